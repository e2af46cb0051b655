"""Agent-RRM as a tool: trajectories of other frameworks (foreign.jsonl holds dumps that those
frameworks wrote, shortened; from "AutoGen 0.2" on, but for Pydantic AI, rows after the forms that
they publish, as in sessions.jsonl; Haystack, Semantic Kernel, the Agent Framework, Mistral and
Cohere after what their serialisers write), rows that cannot be read, servers that fail, going on,
docs.
"""

import io
import json
import re
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from data import critique
from data.trajectories import Unread, Work, read_works, works_of
from reagent.reward_model import Judgment
from tests.helpers.judge_server import hashed_judgment, judge_server
from tests.helpers.search_server import answer, web_server
from tests.helpers.tiny import ROOT
from tests.helpers.trainers import note_parsed, unread

FOREIGN = [
    json.loads(line) for line in Path(__file__).with_name("foreign.jsonl").read_text().splitlines()
]
CHAT = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Ada."},
]


@pytest.mark.parametrize("case", FOREIGN, ids=lambda case: case["layout"])
@pytest.mark.parametrize("form", ["alone", "in a list", "a line"])
def test_a_trajectory_of_another_framework_is_read(case, form, tmp_path):
    path = tmp_path / ("runs.jsonl" if form == "a line" else "run.json")
    path.write_text(json.dumps([case["row"], case["row"]] if form == "in a list" else case["row"]))
    works = list(read_works([str(path)]))
    assert len(works) == 1 + (form == "in a list") and all(isinstance(w, Work) for w in works)
    work = works[0]
    if case["question"]:
        assert work.question == case["question"]
    else:
        assert work.question.startswith("We're currently solving the following issue")
    if case["roles"]:
        assert [turn["role"] for turn in work.turns] == case["roles"].split()
    assert work.turns[0]["role"] == "assistant" and "tool" in {t["role"] for t in work.turns}
    text = "\n".join(turn["content"] for turn in work.turns)
    assert all(words in text for words in case["words"]), text
    assert all(text.count(words) == 1 for words in case.get("once", [])), text
    assert not any(words in text for words in case.get("absent", [])), text


SESSIONS = [
    json.loads(line) for line in Path(__file__).with_name("sessions.jsonl").read_text().splitlines()
]


@pytest.mark.parametrize("case", SESSIONS, ids=lambda case: case["layout"])
def test_a_file_of_events_is_one_trajectory_and_a_broken_line_of_it_is_named(case, tmp_path):
    (tmp_path / "run.jsonl").write_text("\n".join([*map(json.dumps, case["lines"]), '{"ty']))
    work, broken = read_works([str(tmp_path)])
    assert work.question == "What is in a.txt?"
    assert [turn["role"] for turn in work.turns] == ["assistant", "tool", "assistant"]
    said, told, answer = (turn["content"] for turn in work.turns)
    assert (
        "I read it." in said and "a.txt" in said and (told, answer) == ("hello", "It says hello.")
    )
    assert isinstance(broken, Unread) and broken.row.endswith(f":{len(case['lines']) + 1}")


def test_a_log_of_inspect_is_read_out_of_its_zip(tmp_path):
    (row,) = (case["row"] for case in FOREIGN if case["layout"] == "Inspect")
    with zipfile.ZipFile(tmp_path / "log.eval", "w") as log:
        log.writestr("header.json", "{}")
        for n in (1, 2):
            log.writestr(f"samples/{n}_epoch_1.json", json.dumps({"id": n, "messages": row}))
    (tmp_path / "torn.eval").write_bytes((tmp_path / "log.eval").read_bytes()[:99])
    *works, torn = read_works([str(tmp_path)])
    assert [(work.name, work.question) for work in works] == [
        ("1", "Capital of France?"),
        ("2", "Capital of France?"),
    ]
    assert "not a zip" in torn.problem


def test_rows_of_a_parquet_file_are_read_without_the_nulls_of_other_turns(tmp_path):
    call = {"id": "1", "type": "function", "function": {"name": "search", "arguments": "{}"}}
    turns = [CHAT[0], {"role": "assistant", "tool_calls": [call]}]
    turns += [{"role": "tool", "content": "told", "tool_call_id": "1"}, CHAT[1]]
    keys = ("role", "content", "tool_calls", "tool_call_id")
    messages = [{key: turn.get(key) for key in keys} for turn in turns]
    table = pyarrow.Table.from_pylist([{"messages": messages, "history": None}] * 2)
    parquet.write_table(table, tmp_path / "runs.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    *works, torn = read_works([str(tmp_path)])
    assert [work.row for work in works] == [f"{tmp_path}/runs.parquet:{n}" for n in (1, 2)]
    assert [turn["role"] for turn in works[1].turns] == ["assistant", "tool", "assistant"]
    assert '{"name": "search"' in works[0].turns[0]["content"] and works[0].question == "Who?"
    assert isinstance(torn, Unread) and "not a parquet file" in torn.problem


def test_rows_under_data_are_rows_though_they_have_a_type(tmp_path):
    row = {"type": "comparison", "prompt": "Who?", "response": "Ada."}
    (tmp_path / "rows.json").write_text(json.dumps({"data": [row, row]}))
    works = list(read_works([str(tmp_path / "rows.json")]))
    assert [(work.question, work.turns) for work in works] == [("Who?", "Ada.")] * 2


@pytest.mark.parametrize("alike", [False, True])
def test_a_thread_and_the_steps_of_a_run_are_listed_newest_first(alike, tmp_path):
    call = {"name": "search", "arguments": '{"q": "x"}', "output": "there are two"}
    calls = [{"id": "c1", "type": "function", "function": call}]
    details = {"type": "tool_calls", "tool_calls": calls}
    step = {"object": "thread.run.step", "type": "tool_calls", "step_details": details}
    said = [
        {"object": "thread.message", "role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", {"value": "How many?"}), ("assistant", {"value": "Two."}))
    ]
    times = [1, 1, 2] if alike else [1, 2, 3]  # in whole seconds
    turns = [turn | {"created_at": t} for turn, t in zip([said[0], step, said[1]], times)]
    page = {"object": "list", "data": turns[::-1], "first_id": "m2", "has_more": False}
    for name, row in (("page.json", page), ("turns.json", turns), ("other.json", turns[::-1])):
        (tmp_path / name).write_text(json.dumps(row))
        (work,) = read_works([str(tmp_path / name)])
        assert work.question == "How many?"
        assert [turn["role"] for turn in work.turns] == ["assistant", "tool", "assistant"]
        assert work.turns[1]["content"] == "there are two"


TYPED = "search_result title words", "web_search_result url page", "resource resource"


@pytest.mark.parametrize("told", TYPED)
def test_parts_of_a_result_that_are_no_text_are_shown_whole(told):
    kind, *keys = told.split()
    part = {"type": kind, "encrypted_content": "Eqgf"} | {key: f"the {key}" for key in keys}
    document = {"type": "document", "source": {"type": "text", "data": "in the document"}}
    scan = {"type": "document", "source": {"type": "base64", "data": "JVBE"}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [part, document, scan]}
    turns = [*CHAT, {"role": "user", "content": [result]}]
    (work,) = works_of({"messages": turns}, "f:1")
    text = work.turns[-1]["content"]
    assert all(f"the {key}" in text for key in keys) and "in the document" in text
    assert "Eqgf" not in text and "JVBE" not in text and text.endswith("(document)")


@pytest.mark.parametrize("kind", [None, 3])
def test_rows_that_a_tool_returned_may_call_anything_their_type(kind):
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": kind}]}
    (work,) = works_of({"messages": [*CHAT, {"role": "user", "content": [result]}]}, "f:1")
    assert work.turns[-1]["content"] == json.dumps({"type": kind})


def test_a_document_of_llamaindex_is_named():
    document = {"block_type": "document", "data": "JVBE", "url": "https://a/b.pdf"}
    asked = {"role": "user", "blocks": [{"block_type": "text", "text": "Who?"}, document]}
    (work,) = works_of({"messages": [asked, CHAT[1]]}, "f:1")
    assert work.question.startswith("Who?") and work.turns[0]["content"] == "Ada."


def test_each_attempt_of_an_episode_is_a_work_of_its_own():
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A1"}]
    messages += [{"role": "user", "content": "review"}, {"role": "assistant", "content": "A2"}]
    episode = {"id": 7, "question": "Q", "messages": messages}
    episode["attempts"] = [{"messages": [1, 2]}, {"messages": [3, 4]}]
    works = list(works_of(episode, "f:1"))
    assert [(w.attempt, w.name, w.turns[0]["content"]) for w in works] == [
        (1, "7", "A1"),
        (2, "7", "A2"),
    ]


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"question": "Q"}, "no trajectory; found the keys"),
        ([{"role": "user", "content": "Q"}], "no turn of the agent"),
        ([{"role": "alien", "content": "Q"}], "turn 0 is not understood .the role 'alien'"),
        ([*CHAT, {"type": "surprise"}], "turn 2 is not understood .the type 'surprise'"),
        ({"messages": ["Q", "A"]}, "turn 0 is not understood .an object"),
        (
            [CHAT[0], {"role": "assistant", "content": [{"fresh": {}}]}],
            "a part with the keys .'fresh'",
        ),
        ([CHAT[0], {"role": "assistant", "content": ""}], "no words and no calls"),
        ({"sealed": "x", "messages": CHAT}, "encrypted"),
        (5, "a row is an object"),
        ({"question": "Q", "messages": [], "attempts": []}, "an episode without an attempt"),
    ],
)
def test_what_cannot_be_read_says_why(row, problem, tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (unread,) = read_works([str(path)])
    assert isinstance(unread, Unread) and re.search(problem, unread.problem)


@pytest.mark.parametrize("key", ["trajectory", "completion", "response"])
def test_a_list_of_rows_with_texts_is_no_list_of_turns(key, tmp_path):
    rows = [{"task": f"Q{i}", key: "I searched."} for i in range(3)]
    (tmp_path / "runs.json").write_text(json.dumps(rows))
    works = list(read_works([str(tmp_path / "runs.json")]))
    assert [(w.question, w.turns) for w in works] == [(f"Q{i}", "I searched.") for i in range(3)]


@pytest.mark.parametrize(
    ("roles", "asked", "begins"),
    [
        ("usua", "0\n\n2", 3),  # what a system turn says is nobody's question
        ("uaua", "0", 1),
        ("suuau", "1\n\n2", 3),
        ("auau", "1", 0),  # the agent greets first
        ("sauu", "2", 1),
    ],
)
def test_the_question_is_all_that_the_user_says_before_the_agent_or_what_it_says_first(
    roles, asked, begins
):
    names = dict(s="system", u="user", a="assistant")
    turns = [{"role": names[role], "content": str(i)} for i, role in enumerate(roles)]
    for own, question in ((None, asked), ("Who?", "Who?")):
        (work,) = works_of({"messages": turns} | ({"question": own} if own else {}), "f")
        assert work.question == question
        assert [turn["content"] for turn in work.turns] == [t["content"] for t in turns[begins:]]


def test_a_question_may_be_a_number():
    (work,) = works_of({"question": 5, "messages": CHAT}, "f")
    assert work.question == "5" and [turn["content"] for turn in work.turns] == ["Ada."]


def test_a_plain_text_and_stdin_are_trajectories(tmp_path, monkeypatch):
    (tmp_path / "run.txt").write_text("I searched.\nThen I guessed.")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(CHAT).encode())))
    text, chat = read_works([str(tmp_path / "run.txt"), "-"], "Who?")
    assert (text.question, text.turns) == ("Who?", "I searched.\nThen I guessed.")
    assert (chat.row, chat.question) == ("stdin", "Who?")


# --------------------------------------------------------------------------------------------------
# the command


def rows(count: int) -> list[dict]:
    return [
        {"id": f"t{i}", "messages": [CHAT[0], {**CHAT[1], "content": f"{i}"}]} for i in range(count)
    ]


def write(path: Path, items: list) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_judged_and_what_is_not_is_named_and_counted(tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    path.write_text(write(path, rows(3)) and path.read_text() + '{"cut\n[1]\n')

    def reply(text):
        return "prose" if text.endswith("\n1") else hashed_judgment(text)

    with judge_server(reply) as (url, _), pytest.raises(SystemExit) as end:
        critique.main([f"--rrm={url}", str(path)])
    told = capsys.readouterr()
    out = [json.loads(line) for line in told.out.splitlines()]
    assert end.value.code == 1 and {line["id"] for line in out} == {"t0", "t2"}
    assert all({"score", "critique", "think", "rrm", "work"} <= set(line) for line in out)
    assert {line["row"] for line in out} == {f"{path}:1", f"{path}:3"}
    assert f"{path}:4: not a JSON line" in told.err and f"{path}:5: " in told.err
    assert f"{path}:2: no valid judgment" in told.err
    assert "2 judged, mean score" in told.err and "2 rows not read" in told.err


def test_it_runs_where_nothing_but_two_packages_is_installed(tmp_path):
    """In a process whose other packages cannot be imported, as on a machine with an API key."""
    path = write(tmp_path / "runs.jsonl", rows(2))
    hidden = "numpy torch transformers mpmath urllib3 trafilatura lxml PIL pyarrow".split()
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden})); import runpy; "
    code += "sys.argv = ['evaluate.py', 'critique', *sys.argv[1:]]; "
    code += f"runpy.run_path('{ROOT}/evaluate.py', run_name='__main__')"
    with judge_server() as (url, _):
        ask = [sys.executable, "-c", code, f"--rrm={url}", path]
        done = subprocess.run(ask, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_a_key_that_is_refused_is_named(tmp_path):
    page = answer({"error": {"message": "Incorrect API key"}}, 401)
    with web_server({"*": page}) as server, pytest.raises(SystemExit, match="RRM_API_KEY"):
        critique.main([f"--rrm={server.url}", write(tmp_path / "runs.jsonl", rows(1))])


def test_a_call_that_was_stopped_goes_on_and_asks_nothing_again(tmp_path):
    path, out = write(tmp_path / "runs.jsonl", rows(12)), tmp_path / "out" / "judged.jsonl"
    with judge_server() as (url, seen):
        critique.main([f"--rrm={url}", path, f"--out={out}", "--limit=5"])
        kept = out.read_bytes()
        out.write_bytes(kept[:-30])  # a kill in the middle of a line
        critique.main([f"--rrm={url}", path, f"--out={out}"])
        assert len(seen) == 5 + 1 + 7
        critique.main([f"--rrm={url}", path, f"--out={out}"])
    assert len(seen) == 13 and [line["id"] for line in lines(out)] == [f"t{i}" for i in range(12)]
    assert out.read_bytes().startswith(kept)


def test_a_file_with_judgments_of_another_model_is_refused(tmp_path):
    path, out = write(tmp_path / "runs.jsonl", rows(2)), tmp_path / "judged.jsonl"
    (tmp_path / "rule.py").write_text(
        "def annotate(question, turns):\n"
        "    return '<think>t</think><critique>c</critique><score>1</score>'\n"
    )
    critique.main([f"--rrm={tmp_path}/rule.py", path, f"--out={out}"])
    with judge_server() as (url, seen), pytest.raises(SystemExit, match="rule.py, not of judge"):
        critique.main([f"--rrm={url}", path, f"--out={out}"])
    assert not seen


def test_an_annotator_that_knows_no_question_of_a_file_is_told_in_a_sentence(tmp_path):
    path, judge = write(tmp_path / "runs.jsonl", rows(2)), tmp_path / "rule.py"
    judge.write_text("def annotate(question, turns):\n    raise ValueError('another world')\n")
    with pytest.raises(SystemExit, match="rule.py: another world; 0 of 2 are judged"):
        critique.main([f"--rrm={judge}", path])


def test_a_server_that_goes_away_ends_the_call_with_what_is_done(tmp_path):
    path, out = write(tmp_path / "runs.jsonl", rows(6)), tmp_path / "judged.jsonl"
    asked = []

    def reply(text):
        asked.append(text)
        return hashed_judgment(text) if len(asked) <= 2 else 401

    with judge_server(reply) as (url, _):
        with pytest.raises(SystemExit, match="401.*2 of 6 are judged: the same command goes on"):
            critique.main([f"--rrm={url}", path, f"--out={out}", "--rrm.in_flight=1"])
    with judge_server() as (url, seen):
        critique.main([f"--rrm={url}", path, f"--out={out}"])
    assert len(seen) == 4 and len(lines(out)) == 6


def test_servers_are_balanced(tmp_path):
    path = write(tmp_path / "runs.jsonl", rows(40))
    with judge_server() as (one, first), judge_server() as (two, second):
        critique.main([f"--rrm={one},{two}", path, f"--out={tmp_path}/out.jsonl"])
    assert len(first) + len(second) == 40 and min(len(first), len(second)) > 8


def test_equal_trajectories_are_two_works_and_pretty_is_for_people(tmp_path, capsys):
    path = write(tmp_path / "runs.jsonl", [CHAT, CHAT])
    with judge_server() as (url, seen):
        critique.main([f"--rrm={url}", path, "--pretty"])
    told = capsys.readouterr().out
    assert len(seen) == 2 and told.count("Look at the tool results again.") == 2
    assert "  Who?" in told and f"{path}:2" in told and "{" not in told


def test_a_server_that_takes_no_seed_and_one_temperature_is_asked_without(tmp_path, capsys):
    """As Mistral's (422 of a key it does not know) and the reasoning models of OpenAI (400)."""

    def page(request):
        if request.command == "GET":
            return answer({"data": [{"id": "m"}]})
        sent = json.loads(request.body)
        words = "Unsupported value: 'temperature' does not support 0.3 with this model."
        if "temperature" in sent:
            return answer({"error": {"message": words}}, 400)
        extra = {"type": "extra_forbidden", "loc": ["body", "seed"]}
        if "seed" in sent:
            return answer({"detail": [extra | {"msg": "Extra inputs are not permitted"}]}, 422)
        judgment = {"role": "assistant", "content": hashed_judgment("x")}
        return answer({"choices": [{"message": judgment, "finish_reason": "stop"}]})

    path = write(tmp_path / "runs.jsonl", rows(3))
    with web_server({"*": page}) as server:
        critique.main([f"--rrm={server.url}", path, f"--out={tmp_path}/o", "--rrm.in_flight=1"])
    assert len(server.seen) == 1 + 2 + 3
    told = capsys.readouterr().err
    assert told.count("takes no temperature") == told.count("takes no seed") == 1


def test_a_line_says_what_was_judged_and_what_the_judgment_holds():
    judgment = Judgment("the analysis", "the critique", 0.25)
    told = dict(score=0.25, critique="the critique", think="the analysis", rrm="m", work="d")
    whole = critique.line_of(Work("f:3", "t7", "Q", "turns", 2), "d", judgment, "m")
    assert whole == dict(row="f:3", id="t7", attempt=2) | told
    assert critique.line_of(Work("f:3", "", "Q", "turns"), "d", judgment, "m") == {
        "row": "f:3",
        **told,
    }


def test_every_key_of_the_command_is_read(tmp_path, monkeypatch):
    reads, path = set(), write(tmp_path / "runs.jsonl", rows(2))
    note_parsed(monkeypatch, critique, reads)
    with judge_server() as (url, _):
        critique.main([f"--rrm={url}", path, f"--out={tmp_path}/out.jsonl"])
    left = unread(critique.Config, reads)
    # of an engine in this process, and of a training run
    trains = {"rrm.memory_share", "rrm.sleep", "rrm.max_failures"}
    assert left == trains | {key for key in left if key.startswith("engine.")}


# --------------------------------------------------------------------------------------------------
# what docs/reward-model.md shows


def snippet(title: str, url: str) -> dict:
    """The names that a snippet of the page defines, once it ran."""
    page = (ROOT / "docs/reward-model.md").read_text().partition(f"## {title}")[2]
    code = page.partition("```python\n")[2].partition("```")[0]
    names: dict = {}
    exec(code.replace("http://judge-host:8001/v1", url), names)
    return names


def test_a_reward_function_as_trl_calls_it():
    """trl.GRPOTrainer (1.16, _calculate_rewards): prompts, completions and ids by keyword, beside
    them columns of the data, its state and two functions that log."""
    asked, given = [], dict(completion_ids=[[1]] * 3, answer=["x"] * 3, trainer_state=object())
    given |= dict(log_extra=lambda *column: None, log_metric=lambda *value: None)

    def reply(text):
        asked.append(text)
        return "prose" if "bad" in text else hashed_judgment(text)

    prompts = [
        [{"role": "system", "content": "S"}, {"role": "user", "content": f"Q{i}"}] for i in range(3)
    ]
    completions = [[{"role": "assistant", "content": word}] for word in ("a", "bad", "c")]
    with judge_server(reply) as (url, _):
        reward = snippet("A reward function in TRL", url)["agent_rrm"]
        for _ in range(2):
            scores = reward(prompts=prompts, completions=completions, **given)
            assert scores[1] is None and 0 <= scores[0] <= 1 and 0 <= scores[2] <= 1
    assert any("Question:\nQ0" in text and text.endswith("[assistant]\na") for text in asked)


def test_a_grader_as_inspect_calls_it(monkeypatch):
    """Stubs of what the snippet imports, with the attributes that Inspect documents."""
    import asyncio

    class Score(types.SimpleNamespace):
        @classmethod
        def unscored(cls, **told):
            return cls(value=float("nan"), **told)

    stub = types.ModuleType("inspect_ai.scorer")
    stub.Score, stub.mean, stub.scorer = Score, (lambda: "mean"), lambda metrics: lambda make: make
    monkeypatch.setitem(sys.modules, "inspect_ai", types.ModuleType("inspect_ai"))
    monkeypatch.setitem(sys.modules, "inspect_ai.scorer", stub)
    (case,) = (case for case in FOREIGN if case["layout"] == "Inspect")
    turns = [types.SimpleNamespace(model_dump=lambda row=row: row) for row in case["row"]]
    state = types.SimpleNamespace(input_text="Capital?", messages=turns, sample_id="s1", epoch=1)
    with judge_server() as (url, seen):
        score = snippet("A grader in another evaluation", url)["agent_rrm"](url)
        graded = asyncio.run(score(state, None))
    assert 0 <= graded.value <= 1 and graded.explanation == "Look at the tool results again."
    assert seen[0].startswith("Question:\nCapital?") and "Paris is" in seen[0]
