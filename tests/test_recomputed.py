"""Both choices of old log-probs, through the training script: on the first update they give the same step."""

import json

from tests.judge_server import judge_server
from tests.test_jobs import GRPO, world  # noqa: F401 - a fixture
from tests.test_model import torchrun


def test_recomputed_and_sampler_old_logps_agree_while_the_sampler_is_the_policy(world, tmp_path):  # noqa: F811
    logs = []
    with judge_server() as (url, _):
        for name in ("sampler", "recomputed"):
            out = tmp_path / name
            torchrun("grpo_unified.py", *GRPO, f"--model={world}/model", f"--data={world}/rl.jsonl", f"--rrm={url}",
                     "--prompts_per_step=4", "--prompts_per_minibatch=2", "--max_new_tokens_per_turn=16", "--steps=1",
                     "--max_tokens_per_attempt=300", "--max_context=900", f"--old_logps={name}", f"--out_dir={out}", ranks=1)
            logs.append(json.loads(open(out / "log.jsonl").readline()))
    assert logs[0]["updates"] == 2 and abs(logs[0]["loss"] - logs[1]["loss"]) < 1e-5
    assert abs(logs[0]["grad_norm"] / logs[1]["grad_norm"] - 1) < 1e-3
