"""Runs that survive: kills, SIGTERM, a full disk, dead and hung ranks, NaN, stale samplers, more
than one machine.
"""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import grpo_unified
import sft
from reagent import engines, run
from reagent.config import parse_config
from tests.helpers.judge_server import hashed_judgment, judge_server
from tests.helpers.tiny import ROOT, toy_world
from tests.helpers.trainers import run_here
from tests.loss.test_model import launcher
from tests.runs.test_jobs import GRPO, final_state

SFT = (
    "--rows_per_step=4",
    "--save_interval=1",
    "--policy.tokens_per_microbatch=2000",
    "--keep_last=3",
    "--lr=1e-3",
    "--policy.checkpoint_activations=false",
    "--timeout_s=60",
)
SMALL = (
    "--prompts_per_step=2",
    "--prompts_per_minibatch=1",
    "--max_new_tokens_per_turn=16",
    "--max_tokens_per_attempt=300",
    "--max_context=900",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return toy_world(tmp_path_factory.mktemp("world"))


def sft_run(world, out, *more):
    return [
        sys.executable,
        "sft.py",
        *SFT,
        f"--model={world}/model",
        f"--data={world}/sft.jsonl",
        f"--out_dir={out}",
        *more,
    ]


def grpo(world, out, url, *more):
    return [
        f"--model={world}/model",
        f"--data={world}/rl.jsonl",
        f"--rrm={url}",
        f"--out_dir={out}",
        *GRPO,
        *SMALL,
        *more,
    ]


def start(command, **options):
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=pipe,
        stderr=subprocess.STDOUT,
        env=os.environ,
        **options,
    )


def wait_for(path, process, seconds=120):
    """Until `path` (a glob under a folder) is there; the process must be alive meanwhile."""
    deadline = time.monotonic() + seconds
    while not list(path.parent.glob(path.name)):
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < deadline, f"no {path} after {seconds} s"
        time.sleep(0.02)


def finish(command, code=0):
    process = start(command)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == code, text[-3000:]
    return text


def check_newest(out):
    """The newest checkpoint of a killed run is whole: transformers loads it, its step is its
    name's.
    """
    found = run.checkpoints(out)
    if found:
        AutoModelForCausalLM.from_pretrained(found[-1])
        assert json.loads((found[-1] / "trainer.json").read_text())["step"] == int(
            found[-1].name[5:]
        )
        assert (run.state_of(found[-1]) / ".metadata").stat().st_size > 0
    return len(found)


FORKS = multiprocessing.get_context(
    "forkserver"
)  # imports once: a run starts in a second, not in ten
FORKS.set_forkserver_preload(["sft", "grpo_unified"])


def killed_until_done(script, arguments, rng, kills):
    """SIGKILLs the run at random moments after its next checkpoint, `kills` times; then lets it
    end.
    """
    cfg = parse_config(script.Config, arguments)
    for _ in range(kills):
        before = run.checkpoints(cfg.out_dir)
        process = FORKS.Process(target=script.main, args=(cfg,))
        process.start()
        while run.checkpoints(cfg.out_dir)[-1:] == before[-1:] and process.is_alive():
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before its last kill"
        check_newest(Path(cfg.out_dir))
    process = FORKS.Process(target=script.main, args=(cfg,))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_run_killed_at_random_moments_ends_as_an_undisturbed_one(world, tmp_path):
    for name, kills in (("straight", 0), ("killed", 2)):
        killed_until_done(
            sft, sft_run(world, tmp_path / name, "--steps=20")[2:], random.Random(1), kills
        )
    assert final_state(tmp_path / "killed", 20) == final_state(tmp_path / "straight", 20)
    assert not list((tmp_path / "killed").glob("*.tmp"))


@pytest.mark.slow
def test_fifty_kills_of_reagent_u_change_nothing(world, tmp_path):
    with judge_server() as (url, _):
        for name, kills in (("straight", 0), ("killed", 50)):
            arguments = grpo(
                world, tmp_path / name, url, "--steps=150", "--save_interval=1", "--keep_last=3"
            )
            began = time.monotonic()
            killed_until_done(grpo_unified, arguments, random.Random(2), kills)
            print(f"{name}: {kills} kills, {time.monotonic() - began:.0f} s")
    assert final_state(tmp_path / "killed", 150) == final_state(tmp_path / "straight", 150)


def stopped_by(number, command, run):
    """(exit code, output) of a run that got the signal after its first step."""
    process = start(command)
    wait_for(run / "log.jsonl", process)
    while not (run / "log.jsonl").read_text():
        assert process.poll() is None, process.stdout.read()[-3000:]
        time.sleep(0.02)
    process.send_signal(number)
    text = process.communicate(timeout=90)[0]
    return process.returncode, text


def goes_on_from(command) -> int:
    """The step that a run says it starts from; the run is killed then."""
    process = start(command)
    found = next(filter(None, (re.search(r"from step (\d+) of", line) for line in process.stdout)))
    process.terminate()
    process.communicate(timeout=90)
    return int(found[1])


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(world, tmp_path):
    first = start(sft_run(world, tmp_path / "run", "--steps=4000"))
    wait_for(tmp_path / "run" / "step-*", first)
    told = finish(sft_run(world, tmp_path / "run", "--steps=4000"), code=1)
    assert f"is being written by process {first.pid}" in told and "Traceback" not in told
    assert first.poll() is None
    first.kill()
    first.communicate()
    assert check_newest(tmp_path / "run")


def test_an_empty_checkpoint_is_passed_over_and_a_damaged_one_told(world, tmp_path):
    command = sft_run(world, tmp_path / "run", "--steps=2")
    finish(command)
    (tmp_path / "run" / "step-999999").mkdir()
    assert "from step 2 of 2" in finish(command)
    (tmp_path / "run" / "step-000002" / "trainer.json").write_text("")
    told = finish(command, code=1)
    assert "step-000002/trainer.json cannot be read (it is empty)" in told
    assert "Traceback" not in told


LONG = ("--steps=4000", "--save_interval=4000")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_ends_the_run_with_0_and_it_goes_on_from_there(world, tmp_path, number):
    command = sft_run(world, tmp_path / "run", *LONG)
    code, text = stopped_by(number, command, tmp_path / "run")
    saved = run.checkpoints(tmp_path / "run")
    assert code == 0 and check_newest(tmp_path / "run") == 1, text[-2000:]
    assert (tmp_path / "run" / "report.html").is_file()
    assert goes_on_from(command) == int(saved[0].name[5:])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_reaches_all_ranks_and_they_save_together(world, tmp_path, number):
    command = [*launcher(2), *sft_run(world, tmp_path / "run", *LONG)[1:]]
    _, text = stopped_by(
        number, command, tmp_path / "run"
    )  # torchrun's own code says that it was stopped
    saved = run.checkpoints(tmp_path / "run")
    assert check_newest(tmp_path / "run") == 1 and not list((tmp_path / "run").glob("*.tmp")), text[
        -2000:
    ]
    assert goes_on_from(command) == int(saved[0].name[5:])


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_during_a_rollout_gives_up_the_step_and_saves_what_was_done(
    world, tmp_path, ranks
):
    began, hold = threading.Event(), threading.Event()

    def slow(text):
        log = tmp_path / "run" / "log.jsonl"
        if log.exists() and log.read_text():  # the second step
            began.set()
            hold.wait(60)
        return hashed_judgment(text)

    python = [sys.executable] if ranks == 1 else launcher(ranks)
    runs = {}
    with judge_server(slow) as (url, _):
        for name, more in (("run", ["--save_interval=100"]), ("straight", [])):
            args = grpo(world, tmp_path / name, url, "--steps=3", "--eval_interval=100", *more)
            runs[name] = [*python, "grpo_unified.py", *args]
        process = start(runs["run"])
        assert began.wait(120), process.communicate(timeout=5)[0]
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        hold.set()
        text = process.communicate(timeout=90)[0]
        assert ranks > 1 or process.returncode == 0, text[-2000:]
        assert [path.name for path in run.checkpoints(tmp_path / "run")] == ["step-000001"]
        assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 1
        finish(runs["run"]), finish(runs["straight"])
    assert final_state(tmp_path / "run", 3) == final_state(tmp_path / "straight", 3)


@pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap makes the small disk")
def test_a_full_disk_is_a_clear_error_and_leaves_the_last_checkpoint_whole(world, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = sft_run(world, disk / "run", "--steps=400", "--keep_last=0")
    listing = f"{' '.join(command)}; echo ended $?; ls {disk}/run; cp -r {disk}/run {tmp_path}/left"
    small = [
        "bwrap",
        "--dev-bind",
        "/",
        "/",
        "--size",
        "3000000",
        "--tmpfs",
        str(disk),
        "sh",
        "-c",
        listing,
    ]
    text = finish(small)
    assert "ended 1" in text and "No space left on device" in text and "saving" in text, text[
        -2000:
    ]
    assert check_newest(tmp_path / "left") >= 1 and not list((tmp_path / "left").glob("*.tmp"))


def two_ranks(world, out, url, *more):
    restarts = [a for a in more if a.startswith("--max-restarts")]
    rest = [a for a in more if a not in restarts]
    return [*launcher(2), *restarts, "grpo_unified.py", *grpo(world, out, url, *rest)]


def workers(launcher):
    """Process ids of the ranks, in the order of their ranks."""
    children = open(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read().split()
    found = {}
    for pid in children:
        environ = open(f"/proc/{pid}/environ").read()
        if "LOCAL_RANK=" in environ:
            found[environ.split("LOCAL_RANK=")[1][0]] = int(pid)
    return [found[rank] for rank in sorted(found)]


def test_a_rank_that_hangs_is_named_with_the_phase(world, tmp_path):
    with judge_server() as (url, _):
        more = ("--steps=500", "--save_interval=1000", "--timeout_s=6", "--rrm.seconds=3")
        process = start(two_ranks(world, tmp_path / "run", url, *more))
        wait_for(tmp_path / "run" / "episodes" / "step-000001.jsonl", process)
        hung, text = workers(process)[1], ""
        os.kill(hung, signal.SIGSTOP)
        limit = threading.Timer(90, process.kill)
        limit.start()
        for line in process.stdout:
            text += line
            if "rank 0 stops" in line:
                os.kill(hung, signal.SIGKILL)  # so does torchrun, after half a minute
        limit.cancel()
        process.wait(30)
    assert process.returncode != 0 and re.search(
        r"rank 0 stops: a rank is missing after .*[Rr]anks? 1\b", text, re.S
    ), text[-3000:]


@pytest.mark.slow
def test_a_dead_rank_brings_the_run_back_from_the_last_checkpoint(world, tmp_path, monkeypatch):
    with judge_server() as (url, _):
        more = ("--max-restarts=1", "--steps=6", "--save_interval=1", "--timeout_s=150")
        monkeypatch.setenv(
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1"
        )  # else the new ranks find the dead one's address
        process = start(two_ranks(world, tmp_path / "run", url, *more))
        wait_for(tmp_path / "run" / "step-000002", process)
        os.kill(workers(process)[1], signal.SIGKILL)
        text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text[-3000:]
    log = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]


def in_this_process(world, out, url, *more):
    """grpo_unified.main of one rank; returns its log."""
    return run_here(grpo_unified, grpo(world, out, url, *more))


def test_a_loss_that_is_not_finite_skips_the_step_and_the_next_one_is_taken(
    world, tmp_path, monkeypatch
):
    calls, plain = [], grpo_unified.grpo_loss

    def broken(*args, **clip):
        calls.append(1)
        loss, *counts = plain(*args, **clip)
        return (loss * float("nan") if len(calls) == 3 else loss), *counts

    monkeypatch.setattr(grpo_unified, "grpo_loss", broken)
    with judge_server() as (url, _):
        log = in_this_process(world, tmp_path, url, "--steps=3", "--save_interval=1")
    assert [bool(line["skipped"]) for line in log] == [False, True, False] and "nan" in log[1][
        "skipped"
    ]
    assert log[2]["dlogp/mean"] < 1e-4  # the weights were synced all the same
    assert "nan" not in str(log[2]["loss"])


def test_a_sampler_that_drifts_off_skips_and_then_stops_naming_the_last_good_checkpoint(
    world, tmp_path, monkeypatch
):

    syncs, load = [], engines.HFEngine.load_weights

    def stale(self, pairs):
        syncs.append(1)
        load(self, ((name, value + (0.3 if len(syncs) > 2 else 0)) for name, value in pairs))

    monkeypatch.setattr(engines.HFEngine, "load_weights", stale)
    monkeypatch.setattr("reagent.run.MOST_SKIPS", 2)
    with judge_server() as (url, _), pytest.raises(SystemExit) as stopped:
        in_this_process(world, tmp_path, url, "--steps=9", "--save_interval=1", "--keep_last=0")
    text = str(stopped.value)
    assert (
        "sampler and trainer differ" in text
        and "(3 in a row)" in text
        and "last good checkpoint" in text
        and "step-000004" in text
    )


def test_a_step_whose_judgments_fail_beyond_the_limit_stops_with_one_line(world, tmp_path):
    def worse(text):  # the first one is asked for before anything loads
        return hashed_judgment(text) if "boxed{unknown}" in text else "no judgment today"

    with judge_server(worse) as (url, _), pytest.raises(SystemExit) as stopped:
        in_this_process(world, tmp_path, url, "--steps=2")
    text = str(stopped.value)
    assert "4 of 4 judgments failed, more than rrm.max_failures = 0.2" in text
    assert "The first problem: no judgment in a reply" in text and "no judgment today" in text


def test_odd_and_unreadable_replies_of_the_reward_model_cost_nothing_and_are_counted(
    world, tmp_path
):
    asked = []

    def moody(text):
        asked.append(text)
        if len(asked) in (4, 5):
            return "What a fine attempt!"
        return b"<html>busy</html>" if len(asked) == 7 else hashed_judgment(text)

    with judge_server(moody) as (url, _):
        in_this_process(world, tmp_path, url, "--steps=1")
    (line,) = (json.loads(line) for line in open(tmp_path / "log.jsonl"))
    assert (line["judge/failed"], line["judge/invalid"]) == (0, 2)
    wrong = line["judge/invalid/wrong"]  # all attempts of this tiny agent are
    assert wrong == pytest.approx(2 / line["judge/asked"]) and "judge/invalid/right" not in line


def test_a_wrong_key_for_the_reward_model_ends_the_run_with_the_servers_words(world, tmp_path):
    with judge_server(lambda text: 401) as (url, seen), pytest.raises(SystemExit) as stopped:
        in_this_process(world, tmp_path, url, "--steps=2")
    assert "gives no judgment: " in str(stopped.value) and len(seen) == 1
    assert "401 " in str(stopped.value) and '"no"' in str(stopped.value)


def test_the_kl_term_is_zero_at_the_start_and_holds_the_policy_back(world, tmp_path):
    logs = {}
    with judge_server() as (url, _):
        for beta in (0.1, 10.0):
            fast = ("--steps=3", "--lr=1e-3", f"--kl_coef={beta}", "--max_dlogp=10")
            one = ("--prompts_per_step=4", "--prompts_per_minibatch=4")  # one update a step
            logs[beta] = in_this_process(world, tmp_path / str(beta), url, *fast, *one)
    assert all(abs(log[0]["kl"]) < 1e-6 for log in logs.values())  # the policy is its reference
    assert 0 < abs(logs[10.0][2]["kl"]) < abs(logs[0.1][2]["kl"])
