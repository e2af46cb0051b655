"""What a trainer keeps beside its loop, without a loop: skips, sums, what may change."""

import json
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
