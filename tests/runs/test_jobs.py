"""Whole runs of the scripts as a user starts them: resume to the bit, real paragraphs, clear errors
before work starts.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import grpo_unified
import sft
from reagent import reward_model
from reagent.config import parse_config
from reagent.policy import load_tokenizer
from tests.helpers.judge_server import judge_server
from tests.helpers.tiny import ROOT, tiny_model, toy, toy_world
from tests.helpers.trainers import trained_tokens
from tests.loss.test_model import torchrun

SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny toy: a model with the toy's tokenizer, demonstrations and questions."""
    return toy_world(tmp_path_factory.mktemp("world"))


def run(script, *args, ok=True):
    done = subprocess.run(
        [sys.executable, script, *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ,
        timeout=240,
    )
    assert (done.returncode == 0) is ok, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def final_state(out, steps):
    """Everything a run leaves that must not depend on an interruption."""
    newest = sorted(out.glob("step-*"))[-1]
    assert newest.name == f"step-{steps:06d}"
    weights = (
        torch.load(newest / "weights.pt")
        if (newest / "weights.pt").exists()
        else (newest / "model.safetensors").read_bytes()
    )
    log = [json.loads(line) for line in open(out / "log.jsonl")]
    timeless = [
        {k: v for k, v in line.items() if not k.startswith(("seconds", "tokens_per_second"))}
        for line in log
    ]
    episodes = [path.read_text() for path in sorted(out.glob("episodes/*.jsonl"))]
    untimed = [[untime(json.loads(line)) for line in text.splitlines()] for text in episodes]
    for path in sorted(out.glob("episodes/*.npz")):
        arrays = np.load(path)
        untimed.append({name: arrays[name].tolist() for name in arrays})
    optimizer = sorted((out / "trainer" / newest.name).glob("*.distcp"))
    return weights, timeless, untimed, [path.read_bytes() for path in optimizer]


def untime(episode):
    for attempt in episode["attempts"]:
        for call in attempt["calls"]:
            call.pop("seconds")
    return episode


def resumed_equals_straight(start, out, tmp_path, steps, at):
    """`start(out_dir)` runs to the end; the second run finds the first one's checkpoint of step
    `at` and goes on.
    """
    start(out)
    again = tmp_path / "again"
    for name in (f"step-{at:06d}", f"trainer/step-{at:06d}"):
        shutil.copytree(out / name, again / name)
    if (out / "episodes").exists():
        shutil.copytree(out / "episodes", again / "episodes")
        for kind in ("*.jsonl", "*.npz"):
            for path in sorted((again / "episodes").glob(kind))[at:]:
                path.unlink()
    start(again)
    straight, resumed = final_state(out, steps), final_state(again, steps)
    for name, a, b in zip(("weights", "log", "episodes", "optimizer"), straight, resumed):
        assert a == b, name


SFT = (
    "--rows_per_step=8",
    "--steps=4",
    "--save_interval=2",
    "--policy.tokens_per_microbatch=2000",
    "--keep_last=0",
    "--lr=1e-3",
    "--policy.checkpoint_activations=false",
    "--timeout_s=100",
)


GRPO = (
    "--engine=hf",
    "--tools=search,browse",
    "--group_size=2",
    "--max_turns=3",
    "--temperature=1.0",
    "--max_dlogp=1e-3",
    "--policy.checkpoint_activations=false",
    "--timeout_s=200",
    "--rrm.seconds=20",
    "--lr=1e-3",
    "--keep_last=0",
    "--eval_interval=100",
)


def test_reagent_u_on_two_ranks_resumed_is_bit_identical(world, tmp_path):
    with judge_server() as (url, _):

        def start(out):
            torchrun(
                "grpo_unified.py",
                *GRPO,
                f"--model={world}/model",
                f"--data={world}/rl.jsonl",
                f"--rrm={url}",
                "--prompts_per_step=4",
                "--prompts_per_minibatch=2",
                "--max_new_tokens_per_turn=16",
                "--max_tokens_per_attempt=300",
                "--max_context=900",
                "--steps=2",
                "--save_interval=1",
                f"--out_dir={out}",
            )

        resumed_equals_straight(start, tmp_path / "out", tmp_path, steps=2, at=1)
    log = [json.loads(line) for line in open(tmp_path / "out" / "log.jsonl")]
    for line in log:
        assert line["updates"] == 2 and line["attempts"] == 16 and line["dlogp/mean"] < 1e-4
        assert line["trained_tokens"] == trained_tokens(tmp_path / "out", line["step"])
    page = (tmp_path / "again" / "report.html").read_text()
    assert f"<title>Reagent-U, {tmp_path}/again</title>" in page


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real rows are not here")
def test_three_steps_of_reagent_u_on_real_hotpotqa_paragraphs(tmp_path):
    """A byte-level model that was shown one search and one browse runs both over the real
    paragraphs.
    """
    run(
        "data/hotpotqa/prepare.py",
        f"--input={SHARED}/hotpotqa/train100_distractor.jsonl",
        f"--out={tmp_path}/all.jsonl",
    )
    rows = [json.loads(line) for line in open(tmp_path / "all.jsonl")]
    rows = sorted(rows, key=lambda row: sum(len(doc["text"]) for doc in row["docs"]))[:2]
    toy.write(tmp_path / "rl.jsonl", rows)
    tiny_model(tmp_path / "model", hidden=128, max_positions=16_384)
    toy.write(tmp_path / "sft.jsonl", (demonstration(row) for row in rows))
    run(
        "sft.py",
        f"--model={tmp_path}/model",
        f"--data={tmp_path}/sft.jsonl",
        "--rows_per_step=2",
        "--steps=120",
        "--lr=3e-3",
        "--warmup_steps=10",
        "--policy.checkpoint_activations=false",
        "--timeout_s=200",
        f"--out_dir={tmp_path}/sft",
    )
    with judge_server() as (url, seen):
        torchrun(
            "grpo_unified.py",
            *GRPO,
            f"--model={tmp_path}/sft/step-000120",
            f"--data={tmp_path}/rl.jsonl",
            f"--rrm={url}",
            "--prompts_per_step=2",
            "--prompts_per_minibatch=2",
            "--max_new_tokens_per_turn=160",
            "--max_tokens_per_attempt=5000",
            "--max_context=15000",
            "--steps=3",
            "--save_interval=100",
            f"--out_dir={tmp_path}/out",
            timeout=500,
        )
    episodes = [
        json.loads(line)
        for path in (tmp_path / "out" / "episodes").glob("*.jsonl")
        for line in open(path)
    ]
    calls = [
        call
        for e in episodes
        for a in e["attempts"]
        for call in a["calls"]
        if call["status"] == "ok"
    ]
    assert (
        len(episodes) == 12
        and len(seen) >= 24
        and {call["name"] for call in calls} == {"search", "browse"}
    )
    real = {doc["text"] for row in rows for doc in row["docs"]}
    results = [m["content"] for e in episodes for m in e["messages"] if m["role"] == "tool"]
    assert any(text in result for result in results for text in real)
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


def demonstration(row):
    import asyncio

    from reagent.calls import HERMES
    from rollout import SYSTEM_PROMPT
    from tools import Toolbox

    toolbox, title = Toolbox(["search", "browse"]), row["docs"][0]["title"]
    messages = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": row["question"]},
    ]
    for name, arguments in (
        ("search", {"queries": [title], "top_k": 1}),
        ("browse", {"url": f"doc:{title}"}),
    ):
        seen = asyncio.run(toolbox.call(name, arguments, docs=row["docs"]))
        messages += [
            {"role": "assistant", "content": HERMES.write(name, arguments)},
            {"role": "tool", "content": seen.text},
        ]
    messages.append({"role": "assistant", "content": f"\\boxed{{{row['answer'][0]}}}"})
    return {"messages": messages, "tools": toolbox.schemas}


def test_the_defaults_are_the_papers_recipe_and_what_is_missing_is_named_in_one_line():
    cfg = grpo_unified.Config()
    assert (cfg.lr, cfg.prompts_per_step, cfg.prompts_per_minibatch, cfg.group_size) == (
        5e-7,
        64,
        16,
        8,
    )
    assert (cfg.temperature, cfg.rrm_weight, cfg.max_turns, cfg.steps) == (0.7, 0.3, 13, 300)
    doing, text = run("grpo_unified.py", ok=False).splitlines()
    assert doing == "reading data/reagent/rl_train.jsonl"
    assert text == "no file data/reagent/rl_train.jsonl: run python data/reagent/prepare.py"


@pytest.mark.parametrize(
    "args, told",
    [
        (["--variant=x"], "variant = 'x': one of u, r, rule"),
        (["--lr=fast"], "command line: lr = 'fast' is not of type float"),
        (["--learning_rate=1"], "command line: unknown key 'learning_rate'"),
        (["--rrm=nowhere"], "no reward model in nowhere"),
        (
            ["--rrm=nowhere", "--engine.tensor_parallel=2"],
            "engine.tensor_parallel = 2: serve the reward model nowhere",
        ),
        (["--rrm=http://127.0.0.1:9/v1"], "no reward model answers at http://127.0.0.1:9/v1"),
        (["--model=nowhere/at/all"], "no model in nowhere/at/all"),
    ],
)
def test_a_bad_setting_is_named_before_work_starts(world, args, told):
    base = [
        f"--model={world}/model",
        f"--data={world}/rl.jsonl",
        "--engine=hf",
        "--tools=search",
        "--out_dir=/dev/null/x",
    ]
    with pytest.raises(SystemExit, match=None) as stopped:
        grpo_unified.check_config(parse_config(grpo_unified.Config, base + args))
        run_main(base + args)
    assert told in str(stopped.value)


def run_main(args):
    """The part of main that opens what the config names, in this process."""
    from reagent.chat import Chat

    cfg = parse_config(grpo_unified.Config, args)
    chat = Chat(load_tokenizer(cfg.model))
    reward_model.open_rrm(cfg.rrm, chat, engine=cfg.engine)


@pytest.mark.parametrize(
    "line, told",
    [
        ('{"id": "1", "answer": "a", "kind": "qa"}', "rl.jsonl:2: an RL row needs 'question'"),
        (
            '{"id": "1", "question": "q", "answer": "", "kind": "qa"}',
            "rl.jsonl:2: an RL row needs 'answer'",
        ),
        ('{"question": "q", "answer": "a", "kind": "qa"}', "rl.jsonl:2: an RL row needs 'id'"),
        (
            '{"id": "1", "question": "q", "answer": "a", "kind": "poem"}',
            "rl.jsonl:2: 'kind' is 'poem'",
        ),
        (
            '{"id": "0", "question": "q", "answer": "a", "kind": "qa"}',
            "rl.jsonl:2: id '0' stands in line 1 too",
        ),
        ('{"id": "1", "question": "q", "ans', "rl.jsonl:2: not a JSON line"),
    ],
)
def test_a_bad_rl_row_is_named_by_file_and_line(tmp_path, line, told):
    from reagent.rows import JsonlRows, check_rl_row

    path = tmp_path / "rl.jsonl"
    path.write_text('{"id": "0", "question": "q", "answer": "a", "kind": "qa"}\n' + line + "\n")
    with pytest.raises(SystemExit) as stopped:
        JsonlRows(str(path), check_rl_row)
    assert told in str(stopped.value)


def test_an_empty_file_and_a_bad_sft_row_are_clear_errors(tmp_path):
    from reagent.rows import JsonlRows

    path = tmp_path / "sft.jsonl"
    path.write_text("\n")
    with pytest.raises(SystemExit, match="sft.jsonl is empty"):
        JsonlRows(str(path), sft.check_row)
    path.write_text('{"text": "hello"}\n')
    with pytest.raises(SystemExit, match=r"sft.jsonl:1: no messages,.*\['text'\]"):
        JsonlRows(str(path), sft.check_row)


@pytest.mark.slow
def test_reagent_u_lifts_the_toy_from_lazy_to_grounded(tmp_path):
    """One seed of the demo: at most 0.5 after SFT, refined by its own critique 0.15 above, by
    others' 0.05; 0.9 after U.
    """
    from data import trial as trials

    def trial(agent: str) -> dict:
        given = ["config/trial_toy.py", "--rrm=data/toy/prepare.py"]
        figures, _ = trials.trial(agent, parse_config(trials.Config, given))
        return {name: mean for name, (mean, *_) in figures.items()}

    run("data/toy/prepare.py")
    torchrun("sft.py", "config/sft_toy_tiny.py", f"--out_dir={tmp_path}/sft", timeout=1200)
    before = trial(f"{tmp_path}/sft/step-000250")
    assert (
        before["first"] <= 0.5
        and before["refined"] >= before["first"] + 0.15
        and before["shuffled"] <= before["first"] + 0.05
    )
    torchrun(
        "grpo_unified.py",
        "config/grpo_unified_toy_tiny.py",
        f"--model={tmp_path}/sft/step-000250",
        "--rrm=data/toy/prepare.py",
        f"--out_dir={tmp_path}/u",
        timeout=2400,
    )
    after = trial(f"{tmp_path}/u/step-000040")
    assert after["first"] >= 0.9 and after["grounded"] >= 0.9 and after["refined"] >= after["first"]
