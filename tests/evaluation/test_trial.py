"""What a trial prints at its end."""

import contextlib
from types import SimpleNamespace

import pytest

from data import trial
from reagent import memory
from rollout import Attempt, Episode


def chain(name: str, *right: bool) -> Episode:
    messages = [{"role": "assistant", "content": f"{name} says {n}"} for n in range(len(right))]
    attempts = [
        Attempt((n, n), (n, n + 1), "a", "answered", 0, correct=good, score=0.5, critique=f"c{n}")
        for n, good in enumerate(right)
    ]
    return Episode(name, f"Q {name}", ["a"], [], [], [], messages, 0, attempts=attempts)


CHAINS = [chain("ok", True, True), chain("fix", False, True), chain("bad", False, False)]


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_it_ends_with_a_chain_that_refinement_fixed_and_names_the_page(
    tmp_path, monkeypatch, capsys, count
):
    others = [chain(f"n{i}", True, True) for i in range(20)]
    figures = {"first": [0.5, 0.4, 0.6]}
    monkeypatch.setattr(
        trial, "trial", lambda *_: (figures, CHAINS + others + [chain("one", True)])
    )
    (tmp_path / "report.html").touch()
    agent, cfg = f"{tmp_path}/step-000040", trial.Config(agents=f"{tmp_path}/step-000040")
    trial.main(trial.replace(cfg, rrm=trial.RewardModelConfig("r.py"), transcripts=count))
    told = capsys.readouterr().out
    assert told.count("FIRST ATTEMPT") == min(count, 23)
    last = told.rpartition("--- ")[2]
    assert last.startswith(f"{agent}, fixed by refinement\nQuestion: Q fix")
    assert last.index("fix says 0") < last.index("CRITIQUE  c0") < last.index("fix says 1")
    assert "refinement fixed 1 of 2 wrong answers" in last
    assert told.endswith(f"{tmp_path}/report.html\n") and "0.500 ±0.100" in told


def test_each_figure_stands_under_its_name_where_an_agent_lacks_one(tmp_path, monkeypatch, capsys):
    one, other = [0.5, 0.4, 0.6], [0.25, 0.05, 0.45]
    of = {"a": {"first": one, "closed": other, "2 hops": one}, "b": {"first": other, "limit": one}}
    monkeypatch.setattr(trial, "trial", lambda folder, _: (of[folder], CHAINS))
    trial.main(trial.Config(agents="a,b", out=str(tmp_path)))
    rows = capsys.readouterr().out.splitlines()[2:5]
    cells = [[row[i : i + 14].strip() for i in range(32, len(row), 14)] for row in rows]
    assert cells[0] == ["first", "closed", "2 hops", "limit"]
    assert cells[1] == ["0.500 ±0.100", "0.250 ±0.200", "0.500 ±0.100", "-"]
    assert cells[2] == ["0.250 ±0.200", "-", "-", "0.500 ±0.100"]


@pytest.mark.parametrize("answer", ["1234", "1,234", "**1234**"])
def test_a_right_answer_is_grounded_in_any_spelling_and_only_where_it_stood(answer):
    episode = chain("a", True)
    episode.gold, episode.attempts[0].answer = ["1234"], answer
    assert not trial.grounded(episode)
    for shown, stood in (("It has 12345 people.", False), ("It has 1234 people.", True)):
        episode.messages = [{"role": "tool", "content": shown}, *episode.messages[:1]]
        episode.attempts[0].messages = (0, 2)
        assert trial.grounded(episode) == stood
        episode.messages = episode.messages[1:]


def test_where_nothing_was_fixed_it_says_so(capsys):
    trial.show_chains([chain("ok", True, True)], "out/a", 3)
    told = capsys.readouterr().out
    assert "left right by refinement" in told and "fixed 0 of 0 wrong answers" in told


def tried(monkeypatch, chains: list[list[Episode]], source: str = "r.py"):
    """A trial whose chains ended like these: attempts with critiques, shuffled, closed book."""
    ends, setup = iter(chains), trial.rollout.Setup(None, None, None, None, None)

    @contextlib.contextmanager
    def at_work(*_):
        yield setup, [{"id": chain.id} for chain in chains[0]], lambda _: next(ends)

    monkeypatch.setattr(memory, "plan_engines", lambda *_: None)
    monkeypatch.setattr(trial, "agent_at_work", at_work)
    monkeypatch.setattr(trial, "open_rrm", lambda *_, **__: SimpleNamespace(engine=None))
    for name in ("run_chains", "refine_with"):
        place = trial if name == "refine_with" else trial.rollout
        monkeypatch.setattr(place, name, lambda *_: None)
    judge = trial.RewardModelConfig(source)
    return trial.trial("agent", trial.Config(rrm=judge, closed_book=len(chains) > 2))


def test_every_limit_that_ends_a_first_attempt_counts_as_one(monkeypatch):
    ends = "answered turn_limit turn_tokens token_limit context_limit time_limit no_answer".split()
    chains = [chain(ended, False) for ended in ends]
    for episode, ended in zip(chains, ends):
        episode.attempts[0].termination = ended
    figures, _ = tried(monkeypatch, [chains], source="")
    assert figures["limit"][0] == round(5 / 7, 4)


def fault(name: str) -> Episode:
    broken = chain(name, True)
    broken.dropped, broken.attempts[0].correct = "fault", None
    return broken


def test_a_question_whose_chain_ended_by_a_fault_counts_nowhere_and_is_told(monkeypatch, capsys):
    first = [chain("a", True, True), fault("b"), chain("c", False, True), chain("d", False, False)]
    shuffled = [chain("a", True, True), chain("c", False, True), fault("d")]
    closed = [chain("a", False), fault("c"), fault("d")]
    figures, episodes = tried(monkeypatch, [first, shuffled, closed])
    assert [episode.id for episode in episodes] == ["a", "c"]
    means = {name: figure[0] for name, figure in figures.items()}
    assert (means["first"], means["refined"], means["shuffled"]) == (0.5, 1.0, 1.0)
    assert means["closed"] == 0.0
    assert "agent: 3 of 4 questions left out, ended by faults" in capsys.readouterr().out


def test_every_arm_of_a_trial_is_run_as_it_was_asked_for(monkeypatch, tmp_path):
    (tmp_path / "prompt.txt").write_text("Look it up.")
    seen, chains = {}, [chain("a", True, True), chain("b", False, True), fault("c")]
    rows, judge = [{"id": each.id} for each in chains], SimpleNamespace(engine="its engine")

    @contextlib.contextmanager
    def at_work(cfg, folder):
        setup = trial.rollout.Setup("engine", "chat", "toolbox", "limits", None)
        yield setup, rows, lambda chains: chains

    def run_chains(jobs, setup):
        seen["refined" if setup.refine else "closed"] = [job for job in jobs], setup
        return chains if setup.refine else chains[:2]

    def refine_with(episodes, rows, critiques, setup, key):
        seen["shuffled"] = [e.id for e in episodes], rows, critiques, setup, key
        return episodes

    monkeypatch.setattr(memory, "plan_engines", lambda *given: seen.update(plan=given))
    monkeypatch.setattr(trial, "agent_at_work", at_work)
    monkeypatch.setattr(trial, "open_rrm", lambda *a, **b: seen.update(rrm=(*a, b)) or judge)
    monkeypatch.setattr(trial.rollout, "run_chains", run_chains)
    monkeypatch.setattr(trial, "refine_with", refine_with)
    monkeypatch.setattr(trial.engines, "close", lambda engine: seen.update(closes=engine))
    chains[0].attempts[0].critique, chains[1].attempts[0].critique = "of a", None
    more = dict(prompt_file=f"{tmp_path}/prompt.txt", seed=5, closed_book=True)
    cfg = trial.Config(rrm=trial.RewardModelConfig("r.py"), **more)
    trial.trial("agent", cfg)
    assert seen["plan"] == (cfg.engine, "agent", cfg.rrm) and seen["closes"] == "its engine"
    assert seen["rrm"] == (cfg.rrm, "chat", {"engine": cfg.engine})
    jobs, setup = seen["refined"]
    assert jobs == [(row, (5, "trial", 0)) for row in rows] and setup.rrm is judge
    alone = seen["closed"][1]
    assert seen["closed"][0] == jobs[:2] and not alone.toolbox.names and alone.rrm is None
    ids, of, critiques, shuffled, key = seen["shuffled"]
    assert (ids, of, critiques) == (["a", "b"], rows[:2], ["", "of a"])
    assert shuffled.toolbox == "toolbox" and key == (5, "shuffled")
    assert {each.system_prompt for each in (setup, alone, shuffled)} == {"Look it up."}


def test_it_tells_how_many_first_attempts_call_and_how_often(monkeypatch):
    first = [chain(name, True, True) for name in "abcd"]
    for episode, (before, after) in zip(first, [(0, 2), (3, 0), (1, 0), (0, 0)]):
        for attempt, count in zip(episode.attempts, (before, after)):
            attempt.calls = [{"name": "search"}] * count
    figures, _ = tried(monkeypatch, [first, first])
    assert (figures["called"][0], figures["calls"][0]) == (0.5, 1.0)


def test_without_a_reward_model_first_attempts_alone_are_tried_and_shown(monkeypatch, capsys):
    figures, episodes = tried(monkeypatch, [[chain("a", True), chain("b", False)]], source="")
    assert figures["first"][0] == 0.5 and not {"refined", "shuffled"} & set(figures)
    trial.show_chains(episodes, "out/a", 3)
    told = capsys.readouterr().out
    assert told.count("--- out/a\nQuestion") == 2 and "refine" not in told


def test_a_trial_of_faults_alone_says_so(monkeypatch):
    with pytest.raises(SystemExit, match="all 1 chains ended by faults, such as fault"):
        tried(monkeypatch, [[fault("a")]])


def test_where_its_figures_cannot_be_written_is_told_before_the_agents_are_tried(
    tmp_path, monkeypatch
):
    tries = []
    monkeypatch.setattr(trial, "trial", lambda folder, _: tries.append(folder) or ({}, CHAINS))
    (tmp_path / "file").touch()
    cfg = trial.Config(agents="a", rrm=trial.RewardModelConfig("r.py"))
    with pytest.raises(SystemExit, match=r"file/out cannot be written"):
        trial.main(trial.replace(cfg, out=f"{tmp_path}/file/out"))
    assert not tries
    trial.main(trial.replace(cfg, out=f"{tmp_path}/new/out"))
    assert tries == ["a"] and (tmp_path / "new" / "out" / "trial.json").is_file()


def test_an_agent_that_is_missing_is_told_before_any_other_is_tried(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(trial, "agent_at_work", lambda cfg, folder: tried.append(folder))
    monkeypatch.setattr(memory, "plan_engines", lambda *_: None)
    config = tmp_path / "one"
    config.mkdir()
    (config / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(SystemExit, match="no model in .*/none: run the stage"):
        trial.main(trial.Config(agents=f"{config},{tmp_path}/none", out=str(tmp_path)))
    assert not tried
