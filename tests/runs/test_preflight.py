"""What is told before anything heavy loads: help, checks, the size of a run."""

import importlib.machinery
import json
import os
import random
import shutil
import subprocess
import sys
import types

import pytest

import grpo_unified
import sft
import train_rrm
from reagent import run
from reagent.config import parse_config
from reagent.folder import claim
from reagent.policy import load_chat, load_tokenizer
from tests.helpers.judge_server import judge_server
from tests.helpers.tiny import ROOT, toy, toy_world
from tests.helpers.trainers import run_here

SCRIPTS = {"sft": sft, "train_rrm": train_rrm, "grpo_unified": grpo_unified}
SMALL = ("--steps=2", "--timeout_s=100", "--policy.checkpoint_activations=false")
AGENT = ("--engine=hf", "--tools=search", "--max_context=900", "--rrm.seconds=20")
DATA = {"sft": "sft", "train_rrm": "rrm", "grpo_unified": "rl"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder, rng = toy_world(tmp_path_factory.mktemp("world")), random.Random(0)
    toy.write(folder / "rrm.jsonl", (toy.rrm_row(rng, i) for i in range(8)))
    return folder


@pytest.fixture
def no_loading(monkeypatch):
    """Whatever loads an engine or a model fails the test."""

    def loads(*_, **__):
        raise AssertionError("something heavy was loaded")

    monkeypatch.setattr("reagent.engines.make_engine", loads)
    for script in SCRIPTS.values():
        monkeypatch.setattr(script, "make_policy", loads)
    monkeypatch.setattr(train_rrm, "make_engine", loads)


def checked(name, world, out, *more):
    """main() with --check."""
    script = SCRIPTS[name]
    files = [f"--model={world}/model", f"--data={world}/{DATA[name]}.jsonl", f"--out_dir={out}"]
    own = {"grpo_unified": [*AGENT, "--rrm=data/toy/prepare.py"], "train_rrm": ["--engine=hf"]}
    given = [*SMALL, *files, *own.get(name, []), "--check", *more]
    try:
        script.main(parse_config(script.Config, given))
    finally:
        if run.dist.is_initialized():
            run.dist.destroy_process_group()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_check_says_how_much_a_run_is_and_writes_nothing(
    name, world, tmp_path, no_loading, capsys
):
    checked(name, world, tmp_path / "out")
    told = capsys.readouterr().out
    sizes = {
        "sft": "64 rows, 2,097,152 tokens at most",
        "train_rrm": "512 judgments, 2,724,352 tokens at most",
        "grpo_unified": "2,048 attempts, 2,048 judgments, 22,528,000 tokens at most, 26,624 turns",
    }
    assert f"left of the run: 2 steps, {sizes[name]}" in told and "memory of a rank" in told
    assert "hours: unknown" in told and told.endswith("it can start\n")
    assert not list(tmp_path.iterdir())


def test_the_bare_command_makes_307_200_attempts_and_as_many_judgments():
    counts = grpo_unified.whole_run(grpo_unified.Config(), 300, 0)
    assert counts["attempts"] == counts["judgments"] == 307_200


@pytest.mark.parametrize("steps", range(1, 8))
@pytest.mark.parametrize(
    ("variant", "stages", "judged"), [("u", 2, 2), ("r", 1, 1), ("rule", 1, 0)]
)
def test_what_a_run_asks_for_is_what_its_loop_does(steps, variant, stages, judged):
    sizes = dict(prompts_per_step=4, group_size=3, max_turns=5, max_tokens_per_attempt=7)
    cfg = grpo_unified.Config(variant=variant, steps=steps, eval_interval=3, **sizes)
    evaluations = 1 + sum((step + 1) % 3 == 0 or step + 1 == steps for step in range(steps))
    chains = steps * 4 * 3 + 10 * evaluations
    counts = dict(attempts=chains * stages, judgments=chains * judged)
    counts["tokens at most"] = chains * stages * 7
    counts["turns that search or use a tool at most"] = chains * stages * 5
    assert grpo_unified.whole_run(cfg, steps, 10) == counts


class Resumed(run.Run):
    """A run with a checkpoint of its third step."""

    def __init__(self, *given):
        super().__init__(*given)
        self.saved = 3


@pytest.mark.parametrize(("stage", "each"), [("sft", 1), ("grpo", 3)])
def test_a_resumed_reward_model_announces_the_steps_that_are_left(
    stage, each, world, tmp_path, no_loading, monkeypatch, capsys
):
    monkeypatch.setattr(train_rrm, "Run", Resumed)
    sizes = ["--steps=10", "--judgments_per_step=5", "--group_size=3", "--max_context=100"]
    sizes += [f"--stage={stage}", "--max_judgment_tokens=20"]
    checked("train_rrm", world, tmp_path / "out", *sizes)
    tokens = 7 * 5 * (100 + 20 * (each - 1))  # a prompt stands there once
    assert f"7 steps, {7 * 5 * each} judgments, {tokens:,} tokens" in capsys.readouterr().out


def test_a_resumed_agent_announces_the_steps_that_are_left(
    world, tmp_path, no_loading, monkeypatch, capsys
):
    monkeypatch.setattr(grpo_unified, "Run", Resumed)
    sizes = ["--steps=10", "--prompts_per_step=4", "--prompts_per_minibatch=2", "--group_size=3"]
    checked("grpo_unified", world, tmp_path / "out", *sizes, "--variant=r")
    assert f"7 steps, {7 * 4 * 3} attempts, {7 * 4 * 3} judgments" in capsys.readouterr().out


class Left(Exception):
    """Leaves a main() at the seam where a test has seen enough."""


PLANNED = [  # the longest row that may stand alone; what runs beside the policy on its card
    ("sft", ["--max_tokens_per_row=777"], dict(longest=777)),
    ("train_rrm", ["--stage=sft"], dict(longest=500, engine=False, group=1)),
    ("train_rrm", ["--stage=sft", "--eval_data={data}"], dict(longest=500, engine=True, group=1)),
    ("train_rrm", [], dict(longest=540, engine=True, group=3)),  # a prompt and its judgments
    ("grpo_unified", ["--variant=u"], dict(longest=500, engine=True, rrm=True)),
    ("grpo_unified", ["--variant=rule"], dict(longest=500, engine=True, rrm=False)),
]


@pytest.mark.parametrize(("name", "more", "wanted"), PLANNED)
def test_the_memory_plan_and_the_engine_are_told_what_the_run_will_need(
    name, more, wanted, world, tmp_path, monkeypatch
):
    planned, made = [], []

    def plan(cfg, run, **told):
        parts = dict(engine=cfg.engine, rrm=getattr(cfg, "rrm", None)) if "engine" in told else {}
        given = {key: told[key] is parts[key] for key in parts if told.get(key)}
        planned.append({key: given.get(key, False) if key in parts else told[key] for key in told})

    def make(config, folder, stop_ids, **told):
        made.append((config.max_live_chains, folder, told))
        raise Left

    def load(cfg, *_):
        made.append(None)
        raise Left

    script, shared = SCRIPTS[name], ["--engine.max_live_chains=3", "--max_context=500"]
    if name == "train_rrm":
        shared += ["--max_judgment_tokens=20", "--group_size=3", "--max_tokens_per_row=444"]
    monkeypatch.setattr(script, "plan_memory", plan)
    monkeypatch.setattr(train_rrm, "make_engine", make)
    monkeypatch.setattr("reagent.engines.make_engine", make)
    monkeypatch.setattr(script, "make_policy", load)
    keys = [*more, *(shared if name != "sft" else []), "--check=false"]
    with pytest.raises(Left):
        checked(name, world, tmp_path / "out", *(k.format(data=world / "rrm.jsonl") for k in keys))
    assert planned == [wanted]
    of = {"max_context": 500} | ({"tp_group": None} if name == "grpo_unified" else {})
    assert made == [(3, f"{world}/model", of) if wanted.get("engine") else None]


def test_rows_are_shown_by_the_template_of_a_file(world, tmp_path, no_loading, capsys):
    own = load_tokenizer(f"{world}/model").chat_template
    (tmp_path / "own.jinja").write_text("Once upon a time:" + own)
    for more, times in (([], 0), ([f"--chat_template={tmp_path}/own.jinja"], 2)):
        checked("sft", world, tmp_path / "out", "--show=2", *more)
        told = capsys.readouterr().out
        assert told.count("Once upon a time:") == times and told.count("--- ") == 2
        chat = load_chat(f"{world}/model", more[0].partition("=")[2] if more else "")
        rows = [sft.render(chat, json.loads(line)) for line in open(world / "sft.jsonl")][:2]
        sizes = [f"--- {len(row.ids)} tokens, {sum(row.mask)} trained\n" for row in rows]
        assert told.index(sizes[0]) < told.rindex(sizes[1])


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_the_place_of_a_verdict_is_asked_for_where_it_is_weighted(
    weight, world, tmp_path, no_loading
):
    rows = [json.loads(line) for line in open(world / "rrm.jsonl")]
    rows = [{key: row[key] for key in row if key != "verdict_at"} for row in rows]
    toy.write(tmp_path / "plain.jsonl", rows)
    more = ["--stage=sft", f"--data={tmp_path}/plain.jsonl", f"--verdict_weight={weight}"]
    if weight == 1.0:
        checked("train_rrm", world, tmp_path / "out", *more)
    else:
        with pytest.raises(SystemExit, match="plain.jsonl:1: 'verdict_at' is None"):
            checked("train_rrm", world, tmp_path / "out", *more)


REFUSED = {
    "no weights": "no weights",
    "no key": "data.jsonl:1: an RL row needs 'answer'",
    "no docs": "nothing to search",
    "no docs at all": "eval.jsonl: nothing to search",
    "no folder": "row 1 has files: give --files_dir",
    "no tool": "no tool named serach",
    "no template": "chat_template = ",
    "no group": "a pool of one attempt has no spread",
    "no judge": "no reward model answers at http://127.0.0.1:9/v1",
    "prose": "a first judgment failed on rank 0: the reward model .* gives no judgment: no judg",
    "broken": "a first judgment failed on rank 0: .*no annotator today",
    "shards": "policy.shard_ranks = 3 does not divide 1 ranks",
    "engines": "engine.tensor_parallel = 2 does not divide 1 ranks",
    "taken": "is being written by process",
    "file": "cannot be written",
    "wandb": "wandb = True, but it is not installed",
}


ROW = {"id": 1, "question": "Where?", "kind": "qa", "answer": "there"}


def test_what_rows_need_may_lie_in_a_corpus_and_a_folder(world, tmp_path, no_loading):
    (tmp_path / "pages.jsonl").write_text('{"id": "1", "title": "a", "text": "b"}')
    (tmp_path / "data.jsonl").write_text(json.dumps(ROW | {"files": ["a.txt"]}))
    places = [f"--corpus={tmp_path}/pages.jsonl", f"--files_dir={tmp_path}"]
    rows = [f"--data={tmp_path}/data.jsonl", f"--eval_data={tmp_path}/data.jsonl"]
    more = [*rows, *places, "--tools=search,file_reader", "--variant=rule"]
    checked("grpo_unified", world, tmp_path / "out", *more)


@pytest.mark.parametrize("fault", REFUSED)
def test_what_a_run_lacks_is_told_before_anything_heavy_loads(
    fault, world, tmp_path, no_loading, monkeypatch
):
    out, more = tmp_path / "out", []
    if fault == "no weights":
        shutil.copytree(world / "model", tmp_path / "model")
        (tmp_path / "model" / "model.safetensors").unlink()
        more = [f"--model={tmp_path}/model"]
    elif fault in ("no key", "no docs", "no folder"):
        row = ROW | ({"files": ["a.txt"]} if fault == "no folder" else {})
        row |= {"docs": [{"title": "a", "text": "b"}]} if fault == "no folder" else {}
        row = {key: row[key] for key in row if fault != "no key" or key != "answer"}
        (tmp_path / "data.jsonl").write_text(json.dumps(row))
        more = [f"--data={tmp_path}/data.jsonl"]
    elif fault == "no docs at all":
        (tmp_path / "eval.jsonl").write_text(json.dumps(ROW))
        more = [f"--eval_data={tmp_path}/eval.jsonl"]
    elif fault in ("prose", "broken"):
        body = "return 'Fine.'" if fault == "prose" else "raise KeyError('no annotator today')"
        (tmp_path / "rrm.py").write_text(f"def annotate(question, messages):\n    {body}\n")
        more = [f"--rrm={tmp_path}/rrm.py"]
    elif fault == "taken":
        held = claim(out)
    elif fault == "file":
        out.write_text("a file")
    elif fault == "wandb":
        monkeypatch.setattr(run, "find_spec", lambda name: None)
    flags = {"no tool": "--tools=serach", "no template": "--chat_template=none.jinja"}
    flags |= {"no group": "--group_size=1"}
    flags |= {"no judge": "--rrm=http://127.0.0.1:9/v1", "shards": "--policy.shard_ranks=3"}
    flags |= {"engines": "--engine.tensor_parallel=2", "wandb": "--wandb"}
    with pytest.raises(SystemExit, match=REFUSED[fault]):
        more += ["--variant=r"] * (fault == "no group")
        checked("grpo_unified", world, out, *more, *[flags[f] for f in flags if f == fault])
    if fault == "taken":
        held.close()


def test_two_judgments_of_a_chain_must_fit_the_time_that_ranks_wait(world, tmp_path, no_loading):
    with pytest.raises(SystemExit, match="two judgments .* timeout_s = 100, so at most 50"):
        checked("grpo_unified", world, tmp_path / "out", "--rrm=http://a/v1", "--rrm.seconds=51")


@pytest.mark.parametrize("reply", ["Fine.", 503, 404, 400])
def test_a_server_that_gives_no_judgment_is_told_before_anything_heavy_loads(
    reply, world, tmp_path, no_loading
):
    with judge_server(lambda text: reply) as (url, _):
        with pytest.raises(SystemExit, match="a first judgment failed on rank 0"):
            checked("grpo_unified", world, tmp_path / "out", f"--rrm={url}", "--rrm.seconds=2")


def test_a_server_is_asked_for_one_judgment(world, tmp_path, no_loading):
    with judge_server() as (url, seen):
        checked("grpo_unified", world, tmp_path / "out", f"--rrm={url}")
    assert len(seen) == 1 and "boxed{unknown}" in seen[0]


def train(world, out, *more):
    files = [f"--model={world}/model", f"--data={world}/sft.jsonl", f"--out_dir={out}"]
    return run_here(sft, [*SMALL, "--lr_end=1", "--rows_per_step=2", *files, *more])


def test_hours_come_from_the_steps_that_the_run_has_measured(world, tmp_path, capsys):
    log = train(world, tmp_path / "out")
    mean = sum(line["seconds/step"] for line in log) / 2
    held = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = ("--steps=7202", "--lr_end=1", "--rows_per_step=2")
    checked("sft", world, tmp_path / "out", *again)
    told = capsys.readouterr().out
    assert "7,200 steps, 14,400 rows" in told
    assert f"{2 * mean:.1f} hours at {mean:.1f} s each" in told
    assert held == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="seed: 0 -> 1"):
        checked("sft", world, tmp_path / "out", *again, "--seed=1")


class Tracker:
    def __init__(self, **given):
        self.given, self.lines = given, []

    def log(self, line):
        self.lines.append(line["step"])


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(world, tmp_path, monkeypatch):
    made = []
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.init = lambda **given: made.append(Tracker(**given)) or made[-1]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for steps in (1, 2):
        train(world, tmp_path / "out", f"--steps={steps}", "--wandb")
    train(world, tmp_path / "another", "--steps=1", "--wandb")
    names = [tracker.given["id"] for tracker in made]
    assert names[0] == names[1] != names[2] and made[1].given["resume"] == "allow"
    assert [tracker.lines for tracker in made] == [[1], [2], [1]]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["wandb"] == names[0]


@pytest.mark.parametrize(
    "door",
    "sft train_rrm grpo_unified evaluate rollout tools data/annotate data/trial".split(),
)
def test_help_needs_no_torch_and_names_keys_and_commands(door, tmp_path):
    for heavy in ("torch", "transformers"):
        (tmp_path / f"{heavy}.py").write_text("raise ImportError('heavy')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, f"{door}.py", "-h"], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert done.returncode == 0, done.stderr
    names = {"evaluate": ["evaluate.py compare", "rrm:", "memory_share"], "rollout": ["read"]}
    names |= {"tools": ["search", "--corpus="], "sft": ["lr: float = 1e-5", "--show=3"]}
    names |= {"train_rrm": ["stage: str", "max_live_chains"]}
    names |= {"data/annotate": ["make: str", "teacher:"], "data/trial": ["closed_book"]}
    names |= {"grpo_unified": ["rrm_weight: float = 0.3  # lambda", "in_flight: int = 64"]}
    assert all(name in done.stdout for name in names[door]), done.stdout


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--lr", "1e-4"], "command line: write --lr=1e-4"),
        (["--wandb", "true"], "command line: write --wandb=true"),
        (["--seed", "-1"], "command line: write --seed=-1"),
        (["--leraning_rate=1"], "unknown key 'leraning_rate': "),
        (["--stpes=3"], "unknown key 'stpes': did you mean steps?"),
        (["--rrm_seconds=3"], "unknown key 'rrm_seconds': did you mean rrm.seconds?"),
        (["--rrm.secs=3"], "unknown key 'rrm.secs': did you mean rrm.seconds?"),
        (["--engine.kin=hf"], "unknown key 'engine.kin': did you mean engine.kind?"),
        (["--lora_rank=8"], "unknown key 'lora_rank': did you mean policy.lora_rank?"),
    ],
)
def test_a_slip_on_the_command_line_is_told_with_its_cure(given, told):
    with pytest.raises(SystemExit) as stopped:
        parse_config(grpo_unified.Config, given)
    assert told in str(stopped.value)


def test_rows_that_are_missing_are_told_before_a_model_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "load_chat", lambda *given: pytest.fail("a model was asked for"))
    with pytest.raises(SystemExit, match="no file .*none.jsonl"):
        sft.main(sft.Config(data=str(tmp_path / "none.jsonl")))
