"""Resume is exact: a run that goes on from a checkpoint leaves what the run that was never stopped
leaves.
"""

import dataclasses
import importlib.util
import json
import random
import sys

import pytest

import grpo_unified
import sft
import train_rrm
from reagent import run
from tests.helpers.judge_server import judge_server
from tests.helpers.tiny import ROOT, toy, toy_world
from tests.loss.test_model import launcher
from tests.runs.test_jobs import GRPO, SFT, resumed_equals_straight
from tests.runs.test_survival import SMALL, finish

RRM = (
    "--judgments_per_step=4",
    "--steps=4",
    "--save_interval=2",
    "--keep_last=0",
    "--lr=1e-3",
    "--engine=hf",
    "--policy.checkpoint_activations=false",
    "--max_context=1024",
    "--timeout_s=100",
)
STAGES = {
    "sft": ("--stage=sft", "--max_judgment_tokens=48"),
    "grpo": ("--stage=grpo", "--group_size=2", "--max_judgment_tokens=16", "--max_dlogp=1e-3"),
}

# an untrained model writes no valid judgment, and without one there is no update: here every text
# counts as one
EVERY_TEXT_JUDGES = """
import sys
sys.path[:0] = [{root!r}]
import train_rrm
from reagent import run
from reagent.reward_model import Judgment
from reagent.config import parse_config
def read(chat, sample):
    return Judgment("read", "look again", sum(sample.ids) % 101 / 100)
train_rrm.read_judgment = read
train_rrm.main(parse_config(train_rrm.Config, sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder, rng = toy_world(tmp_path_factory.mktemp("world"), heads=1, kv_heads=1), random.Random(0)
    toy.write(folder / "rrm.jsonl", (toy.rrm_row(rng, i) for i in range(32)))
    return folder


def grpo(world, out, url, *more):
    return [
        "grpo_unified.py",
        *GRPO,
        *SMALL,
        f"--model={world}/model",
        f"--data={world}/rl.jsonl",
        f"--rrm={url}",
        "--save_interval=1",
        f"--out_dir={out}",
        *more,
    ]


@pytest.mark.slow
def test_sft_on_two_ranks(world, tmp_path):
    def start(out):
        finish(
            [
                *launcher(2),
                "sft.py",
                *SFT,
                f"--model={world}/model",
                f"--data={world}/sft.jsonl",
                f"--out_dir={out}",
            ]
        )

    resumed_equals_straight(start, tmp_path / "out", tmp_path, steps=4, at=2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_the_reward_model_on_two_ranks(world, tmp_path, stage):
    script = tmp_path / "train.py"
    script.write_text(EVERY_TEXT_JUDGES.format(root=str(ROOT)))

    def start(out):
        finish(
            [
                *launcher(2),
                str(script),
                *RRM,
                *STAGES[stage],
                f"--model={world}/model",
                f"--data={world}/rrm.jsonl",
                f"--out_dir={out}",
            ]
        )

    resumed_equals_straight(start, tmp_path / "out", tmp_path, steps=4, at=2)
    log = [json.loads(line) for line in open(tmp_path / "out" / "log.jsonl")]
    assert all(line["grad_norm"] > 0 and not line["skipped"] for line in log)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed")
def test_with_vllm_data_order_seeds_and_step_numbers_are_the_same(world, tmp_path):
    seen = {}
    with judge_server() as (url, _):
        for name, stops in (("straight", ["--steps=3"]), ("resumed", ["--steps=1", "--steps=3"])):
            for steps in stops:
                run = [sys.executable, *grpo(world, tmp_path / name, url, "--engine=vllm", steps)]
                assert "Traceback" not in finish(run)  # nor at the end, where vLLM has its own
            log = [json.loads(line)["step"] for line in open(tmp_path / name / "log.jsonl")]
            paths = sorted((tmp_path / name / "episodes").glob("*.jsonl"))
            episodes = [json.loads(line) for path in paths for line in open(path)]
            chosen = [
                (e["id"], e["policy_version"], [a["seed"] for a in e["attempts"]]) for e in episodes
            ]
            seen[name] = log, [path.name for path in paths], chosen
    assert (
        seen["straight"] == seen["resumed"]
        and seen["straight"][0] == [1, 2, 3]
        and len(seen["straight"][2]) == 12
    )


BOOKKEEPING = {"out_dir", "save_interval", "keep_last", "timeout_s", "wandb", "check"}
BOOKKEEPING |= {"policy.save_dtype", "policy.tokens_per_microbatch", "policy.attention"}
BOOKKEEPING |= {"policy.checkpoint_activations", "policy.shard_ranks", "policy.cpu_offload"}
ENGINE = {"engine.memory_share", "engine.sleep"}
FREE = {
    sft: BOOKKEEPING | {"log_interval", "show"},
    train_rrm: BOOKKEEPING | ENGINE | {"log_interval"},
    grpo_unified: BOOKKEEPING
    | ENGINE
    | {"engine.max_live_chains", "rrm.seconds", "rrm.in_flight", "rrm.memory_share", "files_dir"}
    | {"unsafe_python", "max_seconds_per_chain", "rrm.sleep"},
}


@pytest.mark.parametrize("script", FREE)
def test_a_changed_field_is_refused_by_name_unless_it_leaves_the_math_alone(script):
    config, taken = run.flat(dataclasses.asdict(script.Config())), set()
    may_change = run.MAY_CHANGE | getattr(script, "MAY_CHANGE", set())
    for name in config:
        try:
            run.check_resume(config, config | {name: "another"}, may_change, "step-000001")
            taken.add(name)
        except SystemExit as stopped:
            assert f"{name}: {config[name]!r} -> 'another'" in str(stopped)
    assert taken == FREE[script]


def test_a_run_of_older_keys_is_refused_by_the_name_that_a_key_has_now():
    now = run.flat(dataclasses.asdict(sft.Config()))
    older = {key.removeprefix("policy."): value for key, value in now.items()}
    with pytest.raises(SystemExit, match=r"policy.lora_rank: None -> 0\)"):
        run.check_resume(older, now, run.MAY_CHANGE, "step-000001")
