"""Rows of one's own: tables of questions, SFT rows of right attempts, RL rows that teach; agents
behind URLs.
"""

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from data import annotate, questions
from reagent.config import parse_config
from reagent.reward_model import check_rrm_row
from reagent.rows import check_rl_row, sft_messages
from tests.helpers.chat_server import chat_server
from tests.helpers.judge_server import judge_server
from tests.helpers.trainers import note_parsed, unread

CALL = '<tool_call>\n{"name": "search", "arguments": {"queries": ["Kiel"]}}\n</tool_call>'


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --------------------------------------------------------------------------------------------------
# a table of questions


def made(tmp_path, name: str, text: str, *keys: str) -> list[dict]:
    (tmp_path / name).write_text(text, encoding="utf-8")
    questions.main([str(tmp_path / name), f"--out={tmp_path}/rl.jsonl", *keys])
    rows = lines(tmp_path / "rl.jsonl")
    assert not any(map(check_rl_row, rows))
    return rows


@pytest.mark.parametrize(
    "question, answer, kind, kept",
    [
        ("Who wrote it?", "Ada Lovelace", "qa", "Ada Lovelace"),
        ("How much?", "They pay 3 + 4 = <<3+4=7>>7.\n#### 7", "math", "7"),
        ("Solve.", "So it is $\\boxed{\\frac{1}{2}}$.", "math", "\\frac{1}{2}"),
        ("Which?\nA) red\nB) blue", "B", "choice", "B"),
        ("Which band made it?", "U", "qa", "U"),
        ("How many?", 12, "math", "12"),
    ],
)
def test_the_answer_decides_the_rule(tmp_path, question, answer, kind, kept):
    text = json.dumps({"problem": question, "solution": answer}) + "\n"
    (row,) = made(tmp_path, "q.jsonl", text)
    assert (row["kind"], row["answer"]) == (kind, kept)


LETTERS = ["Mercury", "Venus", "Earth", "Mars"]


@pytest.mark.parametrize(
    "record, answer",
    [
        ({"choices": LETTERS, "answer": 3}, "D"),  # MMLU
        ({"choices": ["4", "3", "2", "1"], "answer": 1}, "B"),  # the place, not the text
        ({"choices": ["4", "3", "2", "1"], "answer": "1"}, "D"),
        ({"options": LETTERS, "answer": "C", "answer_index": 2}, "C"),  # MMLU-Pro
        ({"choices": {"text": LETTERS, "label": list("1234")}, "answerKey": "2"}, "B"),  # ARC
        ({"options": dict(zip("ABCD", LETTERS)), "answer": "Earth", "answer_idx": "C"}, "C"),
        ({"choices": str(LETTERS), "answer": "Mars"}, "D"),  # a table's cell
    ],
)
def test_options_in_a_column_make_a_choice(tmp_path, record, answer):
    (row,) = made(tmp_path, "q.jsonl", json.dumps({"question": "Which planet?"} | record) + "\n")
    assert (row["kind"], row["answer"]) == ("choice", answer)
    lines = row["question"].split("\n")
    assert lines[0] == "Which planet?" and [line[:2] for line in lines[1:]] == "A) B) C) D)".split()


def test_an_answer_that_is_no_option_is_left_out(tmp_path, capsys):
    bad = {"question": "Which?", "choices": LETTERS, "answer": 4}
    good = {"question": "Which one?", "choices": LETTERS, "answer": 0}
    made(tmp_path, "q.jsonl", json.dumps(bad) + "\n" + json.dumps(good) + "\n")
    assert "q.jsonl:1: its answer is none of the options" in capsys.readouterr().err


@pytest.mark.parametrize(
    "answer, kept",
    [
        ({"text": ["Ada", "Ada", "A. Lovelace"], "answer_start": [1, 9]}, ["Ada", "A. Lovelace"]),
        ({"value": "Ada", "aliases": ["Lovelace"], "normalized_value": "ada"}, ["Ada", "Lovelace"]),
        ('["Ada", "Lovelace"]', ["Ada", "Lovelace"]),
        ("['Ada', 'Lovelace']", ["Ada", "Lovelace"]),
        (1234567.0, "1234567"),
        (3.14159265, "3.14159265"),
        (True, ["yes", "true"]),
    ],
)
def test_answers_are_read_as_publishers_write_them(tmp_path, answer, kept):
    record = {"question": "Who?", "answer": answer, "context": "Ada wrote it.", "title": "Notes"}
    (row,) = made(tmp_path, "q.jsonl", json.dumps(record) + "\n")
    assert row["answer"] == kept
    assert row["docs"] == [{"title": "Notes", "text": "Ada wrote it."}]


@pytest.mark.parametrize(
    "answer, problem",
    [
        ({"spans": []}, "an answer with the keys spans"),
        ("['Ada' 'Lovelace']", "its list cannot be read"),
        (float("nan"), "no answer"),
        ({"text": [], "answer_start": []}, "no answer"),  # SQuAD 2
    ],
)
def test_an_answer_that_cannot_be_read_is_left_out_and_named(tmp_path, capsys, answer, problem):
    good = {"question": "Whose?", "answer": "Ada's"}
    text = json.dumps({"question": "Who?", "answer": answer}) + "\n" + json.dumps(good)
    assert len(made(tmp_path, "q.jsonl", text)) == 1
    assert f"q.jsonl:1: {problem}" in capsys.readouterr().err


PAGES = [{"title": "Ada", "text": "Ada wrote it. In 1843."}, {"title": "Bo", "text": "Bo did."}]
ASKED = {"question": "Who wrote it?", "answer": "Ada"}


@pytest.mark.parametrize(
    "more",
    [
        {"_id": "7", "context": [["Ada", ["Ada wrote it.", " In 1843."]], ["Bo", ["Bo did."]]]},
        {
            "_id": "7",  # 2Wiki in parquet
            "context": '[["Ada", ["Ada wrote it.", " In 1843."]], ["Bo", ["Bo did."]]]',
        },
        {
            "id": "7",
            "context": {
                "title": ["Ada", "Bo"],
                "sentences": [["Ada wrote it.", " In 1843."], ["Bo did."]],
            },
        },
        {
            "id": "7",
            "answerable": True,
            "paragraphs": [
                {"idx": i, "title": page["title"], "paragraph_text": page["text"]}
                for i, page in enumerate(PAGES)
            ],
        },
    ],
)
def test_the_pages_of_hotpotqa_2wiki_and_musique_come_along(tmp_path, more):
    (row,) = made(tmp_path, "q.jsonl", json.dumps(ASKED | more) + "\n")
    assert row["docs"] == PAGES and row["id"] == "7"


def test_other_names_of_an_answer_in_a_column_of_their_own_are_accepted(tmp_path):
    more = {"answer_aliases": ["Lovelace", "Ada"], "paragraphs": [], "answerable": True}
    (row,) = made(tmp_path, "q.jsonl", json.dumps(ASKED | more) + "\n")
    assert row["answer"] == ["Ada", "Lovelace"] and "docs" not in row


def test_the_articles_of_squad_are_read_question_by_question(tmp_path, capsys):
    answers = [{"answer_start": 0, "text": "Ada"}, {"answer_start": 0, "text": "Ada"}]
    right = {"id": "a", "question": "Who wrote it?", "answers": answers, "is_impossible": False}
    none = {"id": "b", "question": "Who not?", "answers": [], "is_impossible": True}
    none["plausible_answers"] = [{"answer_start": 0, "text": "Ada"}]
    pages = [{"context": "Ada wrote it.", "qas": [right, none]}]
    pages.append({"context": "Bo did.", "qas": [right | {"id": "c", "question": "Who did?"}]})
    whole = {"version": "v2.0", "data": [{"title": "Notes", "paragraphs": pages}]}
    rows = made(tmp_path, "q.json", json.dumps(whole))
    assert [(row["id"], row["answer"], row["docs"][0]["text"]) for row in rows] == [
        ("a", "Ada", "Ada wrote it."),
        ("c", "Ada", "Bo did."),
    ]
    assert "q.json:1: not answerable" in capsys.readouterr().err


def test_triviaqa_and_arc_are_read_as_their_own_files_have_them(tmp_path):
    answer = {"Aliases": ["Lovelace"], "Value": "Ada", "NormalizedValue": "ada", "Type": "X"}
    asked = {"Answer": answer, "Question": "Who?", "QuestionId": "tc_1"}
    (row,) = made(tmp_path, "q.json", json.dumps({"Data": [asked], "Domain": "Web"}))
    assert row["answer"] == ["Ada", "Lovelace"]
    choices = [{"text": text, "label": label} for text, label in zip(LETTERS, "1234")]
    asked = {"id": "M", "question": {"stem": "Which planet?", "choices": choices}}
    (row,) = made(tmp_path, "q.jsonl", json.dumps(asked | {"answerKey": "3"}) + "\n")
    assert row["question"].split("\n")[::3] == ["Which planet?", "C) Earth"]
    assert (row["kind"], row["answer"]) == ("choice", "C")


def test_gaia_keeps_its_rule_and_its_file_and_math_its_rule(tmp_path):
    asked = {"task_id": "t", "Question": "How many?", "Level": 1, "Final answer": "17"}
    (row,) = made(tmp_path, "q.jsonl", json.dumps(asked | {"file_name": "a.xlsx"}) + "\n")
    assert (row["id"], row["kind"], row["files"]) == ("t", "gaia", ["a.xlsx"])
    (row,) = made(tmp_path, "q.jsonl", json.dumps(asked | {"file_name": ""}) + "\n")
    assert row["kind"] == "gaia" and "files" not in row
    asked = {"problem": "Find it.", "solution": "So $\\boxed{p - q}$.", "answer": "p - q"}
    (row,) = made(tmp_path, "q.jsonl", json.dumps(asked) + "\n")
    assert (row["kind"], row["answer"]) == ("math", "p - q")


@pytest.mark.parametrize(
    "more, problem",
    [
        ({"question": "q83kAAAA", "canary": "c"}, "its texts are encrypted"),  # BrowseComp, xbench
        ({"answerable": False}, "not answerable"),  # MuSiQue-Full
        ({"answer": "?"}, "no answer"),  # GAIA's test
        ({"image": "data:image/png;base64,AAA"}, "its question has an image"),  # HLE
        ({"context": [{"page": 1}]}, "its context cannot be read"),
        ({"question": {"text": "Who?"}}, "its question is no text"),
        ({"question": [{"role": "user", "content": "a"}] * 2}, "its question is no text"),
    ],
)
def test_what_is_no_question_with_an_answer_is_left_out(tmp_path, capsys, more, problem):
    text = json.dumps(ASKED | more) + "\n" + json.dumps({"question": "Whose?", "answer": "b"})
    assert len(made(tmp_path, "q.jsonl", text)) == 1
    assert f"q.jsonl:1: {problem}" in capsys.readouterr().err


@pytest.mark.parametrize("truth, kept", [("72", "72"), ({"target": ["Ada", "A."]}, ["Ada", "A."])])
def test_rows_of_verl_have_their_answer_in_the_reward(tmp_path, truth, kept):
    reward = {"style": "rule", "ground_truth": truth}
    row = {"data_source": "s", "prompt": [{"role": "user", "content": "Who?"}], "ability": "a"}
    text = json.dumps(row | {"reward_model": reward, "extra_info": {"index": 0}})
    (row,) = made(tmp_path, "q.jsonl", text + "\n")
    assert (row["question"], row["answer"]) == ("Who?", kept)


def test_the_one_turn_of_a_prompt_is_the_question(tmp_path):
    prompt = [{"role": "system", "content": "Be good."}, {"role": "user", "content": "Who?"}]
    (row,) = made(tmp_path, "q.jsonl", json.dumps({"prompt": prompt, "answer": "Ada"}) + "\n")
    assert row["question"] == "Who?"


def test_a_parquet_file_is_read_and_a_broken_one_named(tmp_path):
    table = {"question": ["Who?", "Where?"], "answer": [["Ada"], ["Paris", "City of Paris"]]}
    parquet.write_table(pyarrow.table(table), tmp_path / "q.parquet")
    questions.main([str(tmp_path / "q.parquet"), f"--out={tmp_path}/rl.jsonl"])
    assert [row["answer"] for row in lines(tmp_path / "rl.jsonl")] == ["Ada", table["answer"][1]]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(SystemExit, match="bad.parquet: not a parquet file"):
        questions.main([str(tmp_path / "bad.parquet")])


@pytest.mark.parametrize("text", ['"text"', "5", "null"])
def test_json_that_is_no_row_is_a_sentence(tmp_path, text):
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(SystemExit, match="no row of 1"):
        questions.main([str(tmp_path / "q.json"), f"--out={tmp_path}/rl.jsonl"])


def test_a_table_is_read_as_a_spreadsheet_writes_it(tmp_path, capsys):
    text = (
        '\ufeffNr;Question;Answer\n1;"Who; then?\nSay it.";Ada\n2;Who else?;Bo\n2;who  ELSE?;Bo\n'
    )
    rows = made(tmp_path, "q.csv", text + "3;broken\n4;;x\n5;Empty?; \n")
    assert [row["question"] for row in rows] == ["Who; then?\nSay it.", "Who else?"]
    told = capsys.readouterr()
    assert "2 of 6 rows" in told.out and "1 left out: asked before" in told.out
    assert "q.csv:5: asked before" in told.err and "q.csv:6: not the 3 fields" in told.err
    assert "q.csv:7: no question" in told.err and "q.csv:8: no answer" in told.err


def test_columns_kinds_and_several_answers_can_be_named(tmp_path):
    text = "ask,reply\nCapital?,Paris|City of Paris\n"
    keys = ["--question=ask", "--answer=reply", "--separator=|", "--kind=gaia"]
    (row,) = made(tmp_path, "q.csv", text, *keys)
    assert row["answer"] == ["Paris", "City of Paris"] and row["kind"] == "gaia"
    with pytest.raises(SystemExit, match="no row of 1"):
        made(tmp_path, "q.csv", text)


def test_held_out_rows_stand_beside_the_others_and_ids_are_unique(tmp_path):
    text = "".join(
        json.dumps({"id": "x", "question": f"Q{i}?", "answer": "a"}) + "\n" for i in range(9)
    )
    rows = made(tmp_path, "q.jsonl", text, "--held_out=3")
    test = lines(tmp_path / "rl_test.jsonl")
    assert (len(rows), len(test)) == (6, 3) and len({r["id"] for r in rows + test}) == 9


def test_held_out_rows_are_drawn_by_their_ids_and_the_seed_whatever_the_order(tmp_path):
    def held(*keys, order=1):
        rows = [dict(id=f"{i:02}", question=f"Q{i}?", answer="a") for i in range(40)][::order]
        made(tmp_path, "q.jsonl", "\n".join(map(json.dumps, rows)), "--held_out=10", *keys)
        return {row["id"] for row in lines(tmp_path / "rl_test.jsonl")}

    drawn, names = held(), [f"{i:02}" for i in range(40)]
    assert len(drawn) == 10 and drawn not in (set(names[:10]), set(names[-10:]))
    assert held(order=-1) == drawn != held("--seed=1")


# --------------------------------------------------------------------------------------------------
# rows of agents behind URLs

ROWS = [
    {"id": f"{i}", "question": f"{word} code has Kiel?", "answer": "42", "kind": "qa"}
    | {"docs": [{"title": "Kiel", "text": "has code 42."}]}
    for i, word in enumerate(("Easy: which", "Even: which", "Never: which", "easy, WHICH"))
]


def agent(text: str, request: dict):
    """Searches, then is right at easy questions, at even ones by its seed, never at the others."""
    whole = json.dumps(request["messages"])
    if "Kiel (doc" not in whole:
        return f"<think>I look.</think>{CALL}"
    right = "asy" in whole or "Even" in whole and request["seed"] % 2
    return "\\boxed{42}" if right else "\\boxed{41}"


def config(tmp_path, url: str, *keys: str):
    (tmp_path / "rl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    args = [f"--agents={url}#tiny", f"--data={tmp_path}/rl.jsonl", "--tools=search"]
    args += ["--samples_per_question=8", f"--out={tmp_path}/out/rows.jsonl", *keys]
    return parse_config(annotate.AnnotateConfig, args)


def test_right_attempts_of_an_agent_behind_a_url_become_sft_rows(tmp_path, capsys):
    with chat_server(agent, completions=False) as (url, seen):
        annotate.annotate(config(tmp_path, url, "--make=sft", "--samples_per_question=2"))
        count = len(seen)
        annotate.annotate(config(tmp_path, url, "--make=sft", "--samples_per_question=2"))
        assert len(seen) == count
    rows = lines(tmp_path / "out/rows.jsonl")
    assert {row["id"].split("/")[-2] for row in rows} >= {"0", "3"}
    assert not any(row["id"].split("/")[-2] == "2" for row in rows)
    assert len(rows) == len({row["messages"][1]["content"] for row in rows})
    for row in rows:
        roles = [message["role"] for message in sft_messages(row)]
        assert roles == ["system", "user", "assistant", "tool", "assistant"]
        assert row["messages"][-1]["content"] == "\\boxed{42}"
        assert [tool["function"]["name"] for tool in row["tools"]] == ["search"]
    told = capsys.readouterr().out
    assert " wrong\n" in told and " right, beyond 1 of a question\n" in told
    assert f"sft rows -> {tmp_path}/out/rows.jsonl" in told
    assert (tmp_path / "out/rows.table.txt").read_text() in told


def test_rl_rows_are_those_that_the_agent_solves_sometimes(tmp_path, capsys):
    with chat_server(agent, completions=False) as (url, _):
        annotate.annotate(config(tmp_path, url, "--make=rl"))
        (row,) = lines(tmp_path / "out/rows.jsonl")
        annotate.annotate(config(tmp_path, url, "--make=rl", "--keep_unsolved"))
    assert row["id"] == "1" and 0 < row["meta"]["solved"][0] < row["meta"]["solved"][1] == 8
    assert row == ROWS[1] | {"meta": row["meta"]} and check_rl_row(row) is None
    assert [r["id"] for r in lines(tmp_path / "out/rows.jsonl")] == ["1", "2"]
    told = capsys.readouterr().out
    assert "1 always right" in told and "1 never right" in told and "1 asked before" in told


def test_questions_asked_twice_and_golds_that_score_nothing_are_no_rl_rows():
    rows = [
        {"id": "a", "question": "Who is it?", "answer": "Ada", "kind": "qa"},
        {"id": "b", "question": "who is it", "answer": "Ada", "kind": "qa"},
        {"id": "c", "question": "Sum?", "answer": "a blue whale", "kind": "math"},
        {"id": "d", "question": "New?", "answer": "x", "kind": "qa"},
    ]
    sampled = [{"row": i, "correct": c} for i in "abc" for c in (True, False)]
    why = annotate.Counter()
    kept = annotate.rl_rows(config_of_nothing(), sampled, rows, why)
    assert [row["id"] for row in kept][:1] == ["a"] and why["asked before"] == 1
    assert why["without a finished attempt"] == 1
    assert len(kept) + sum(why.values()) == 4


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("What is 2+2?", "What is 2-2?", False),
        ("Solve x^2 = 1.5.", "Solve x^2 = 15.", False),
        ("Is it 5! or 5?", "Is it 5 or 5?", False),
        ("Easy: which one", "easy,  WHICH one?", True),
        ("谁写的？", "谁写的？", True),
    ],
)
def test_marks_at_the_end_of_words_make_no_other_question(one, other, same):
    assert (questions.asked({"question": one}) == questions.asked({"question": other})) == same


@pytest.mark.parametrize("key", ["docs", "files"])
def test_one_question_about_two_pages_or_files_is_asked_twice(tmp_path, key):
    values = [["a.png"], ["b.png"], ["a.png"]]
    if key == "docs":
        values = [[{"title": name, "text": "t"}] for (name,) in values]
    records = [{"question": "What is it?", "answer": str(i), key: v} for i, v in enumerate(values)]
    rows = made(tmp_path, "q.jsonl", "".join(json.dumps(each) + "\n" for each in records))
    assert [row[key] for row in rows] == values[:2]
    sampled = [{"row": row["id"], "correct": c} for row in rows for c in (True, False)]
    kept = annotate.rl_rows(config_of_nothing(), sampled, rows, annotate.Counter())
    assert [row["id"] for row in kept] == [row["id"] for row in rows]


def config_of_nothing():
    return annotate.AnnotateConfig(make="rl")


def test_a_teacher_judges_an_agent_behind_a_url(tmp_path):
    with chat_server(agent, completions=False) as (url, _), judge_server() as (teacher, _):
        keys = ["--make=rrm", f"--teacher={teacher}", "--share_correct=0"]
        annotate.annotate(config(tmp_path, url, *keys, "--samples_per_question=1"))
    rows = lines(tmp_path / "out/rows.jsonl")
    assert len(rows) == 4 and not any(map(check_rrm_row, rows))


def test_an_agent_that_goes_away_ends_the_call_and_the_next_goes_on(tmp_path, capsys):
    asked = []

    def dying(text, request):
        asked.append(text)
        return agent(text, request) if len(asked) < 5 else 500

    with chat_server(dying, completions=False) as (url, _):
        keys = ("--make=rl", "--samples_per_question=2", "--patience_s=0.3")
        with pytest.raises(SystemExit, match="no answer from .*: the same command goes on"):
            annotate.annotate(config(tmp_path, url, *keys, "--engine.max_live_chains=1"))
        done = len(lines(tmp_path / "out/rows.trajectories.jsonl"))
        port = int(url.split(":")[2].split("/")[0])
    with chat_server(agent, completions=False, port=port) as (url, _):
        annotate.annotate(config(tmp_path, url, *keys))
    assert done == 2 and len(lines(tmp_path / "out/rows.trajectories.jsonl")) == 8


def test_every_key_of_the_command_is_read(tmp_path, monkeypatch):
    reads = set()
    note_parsed(monkeypatch, questions, reads)
    made(tmp_path, "q.csv", "question,answer\nQ?,a\n")
    assert not unread(questions.Config, reads)
