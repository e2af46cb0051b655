"""What a trainer keeps beside its loop, without a loop: skips, sums, what may change."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from reagent import run
from reagent.run import Run, check_resume


def bare(tmp_path, **more):
    """A Run whose processes and folder are none."""
    made = object.__new__(Run)
    vars(made).update(out=tmp_path, skips=0, may_change=set(), **more)
    return made


def test_a_skip_on_the_first_step_ends_a_run_and_so_do_six_in_a_row(tmp_path):
    with pytest.raises(SystemExit, match="step 1: drift .1 in a row.; last good checkpoint: none"):
        bare(tmp_path).count_skip(0, "drift")
    made = bare(tmp_path)
    for step in range(1, 6):
        made.count_skip(step, "drift")
    made.count_skip(6, "")  # a step that is taken begins the count again
    for step in range(7, 12):
        made.count_skip(step, "drift")
    with pytest.raises(SystemExit, match="step 13: drift .6 in a row."):
        made.count_skip(12, "drift")


def test_a_sum_is_that_of_all_ranks(monkeypatch):
    def all_reduce(total, group):
        total += group

    monkeypatch.setattr(run.dist, "all_reduce", all_reduce)
    assert run.sum_over_ranks([1.0, 2.5], 10) == [11.0, 12.5]


@pytest.mark.parametrize(
    "asked, sampler, saved",
    [("auto", "bf16", "bf16"), ("auto", "fp32", "fp32"), ("bf16", "fp32", "bf16")]
    + [("fp32", "bf16", "fp32")],
)
def test_a_checkpoint_has_the_type_of_the_sampler_or_that_which_is_asked_for(
    asked, sampler, saved, tmp_path, monkeypatch
):
    types = []
    monkeypatch.setattr(run, "save_checkpoint", lambda *_, dtype, **__: types.append(dtype))
    made = bare(tmp_path, facts={}, log=[], best={}, rank=1, sampler_dtype=run.DTYPES[sampler])
    made.cfg = SimpleNamespace(policy=SimpleNamespace(save_dtype=asked))
    made.save(3, None, None, None)
    assert types == [run.DTYPES[saved]] and made.saved == 3


@pytest.mark.parametrize(
    "before, now, moved",
    [
        ("http://a/v1", "https://b/v1", True),
        ("http://a/v1", "out/rrm/step-000030", False),
        ("out/rrm/step-000030", "http://a/v1", False),
        ("out/a", "out/b", False),
    ],
)
def test_a_server_may_move_but_not_become_a_folder(before, now, moved):
    told = {"rrm": {"source": before}}, {"rrm": {"source": now}}
    if moved:
        return check_resume(*told, set(), "here")
    with pytest.raises(SystemExit, match="rrm.source"):
        check_resume(*told, set(), "here")


def test_a_run_that_goes_on_knows_its_step_its_log_and_its_best(tmp_path):
    for step, best in ((2, 1), (4, 3)):
        folder = tmp_path / f"step-{step:06d}"
        folder.mkdir()
        run.state_of(folder).mkdir(parents=True)
        facts = {"step": step, "config": {"lr": 1.0}, "log": [{"step": step}]}
        facts |= {"best": {"step": best, "accuracy": 0.5}}
        (folder / "trainer.json").write_text(json.dumps(facts))
    none = {"step": None, "accuracy": -1.0}
    made = bare(tmp_path, best=none, log=[], saved=0)
    made.cfg, made.facts = SimpleNamespace(), {"config": {"lr": 1.0}, "wandb": None}
    assert made.find_newest().name == "step-000004" and made.saved == 4
    assert made.best == {"step": 3, "accuracy": 0.5} and made.log == [{"step": 4}]


@pytest.mark.parametrize(
    "asked, done, saved, saves",
    [(0, 3, 0, []), (1, 3, 0, [3]), (1, 3, 2, [3]), (1, 3, 3, []), (1, 0, 0, []), (2, 1, 0, [1])],
)
def test_a_stop_in_mid_step_ends_all_ranks_and_saves_what_is_done_if_it_is_not_saved(
    asked, done, saved, saves, tmp_path
):
    """As many ranks were asked to stop, this one was not."""
    made, written = bare(tmp_path, saved=saved, stop_asked=[]), []
    made.sum = lambda numbers: [number + asked for number in numbers]
    made.save = lambda step, *_: written.append(step)
    assert made.gives_up(done, None, None, None) == made.stopping() == bool(asked)
    assert written == saves


def test_what_a_write_in_the_background_raised_is_raised_by_the_next_and_the_order_kept(tmp_path):
    made, order = bare(tmp_path, writer=ThreadPoolExecutor(1), writing=None), []

    def write(what, seconds=0.0):
        time.sleep(seconds)
        order.append(what)
        if what == "full":
            raise OSError("no space left")

    made.in_background(write, "slow", 0.05)
    made.in_background(write, "full")
    with pytest.raises(OSError, match="no space left"):
        made.in_background(write, "next")
    made.writing = None
    made.in_background(write, "last", 0.05)
    made.finish_writing()
    assert order == ["slow", "full", "last"] and made.writing is None


class Read(Exception):
    """All of a checkpoint was checked."""


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_check_every_shard_once_whatever_their_number_was(
    shards, ranks, tmp_path, monkeypatch
):
    folder = run.state_of(tmp_path / "step-000001")
    folder.mkdir(parents=True)
    names = [f"__{rank}_0.distcp" for rank in range(shards)]
    for name in names:
        (folder / name).touch()
    seen = []

    def stop(*_):
        raise Read

    monkeypatch.setattr(run, "PlainReader", lambda _: None)
    monkeypatch.setattr(run, "check_digest", lambda path: seen.append(path.name))
    monkeypatch.setattr(run, "trained_state", stop)
    monkeypatch.setattr(run.dist, "get_world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(run.dist, "get_rank", lambda: rank)
        with pytest.raises(Read):
            run.load_checkpoint(tmp_path / "step-000001", None, None, lambda *_: None)
    assert sorted(seen) == sorted([*names, *[".metadata"] * ranks])


def test_a_model_card_tells_the_step_the_commit_what_it_came_from_and_its_last_figures():
    config = {"out_dir": "out/own", "model": "a/base", "data": "some/rows.jsonl", "lr": 0.25}
    log = [{"step": n, "loss": n / 4, "skipped": "", "gone": None} for n in (1, 2, 3)]
    facts = {"config": config, "log": log, "git": "abc123", "command": ["./there/sft.py", "--x"]}
    card = run.model_card(3, facts)
    source = "`sft.py` of Reagent (commit abc123) from `a/base` on\n`some/rows.jsonl`."
    for told in ("# out/own, step 3\n", source, "| step | 3 |\n| loss | 0.75 |\n", '"lr": 0.25'):
        assert told in card, told
    assert "gone" not in card and "skipped" not in card
    assert run.model_card(1, {})  # of a checkpoint that tells nothing of itself
