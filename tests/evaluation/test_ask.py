"""One question on a server that takes messages only, and on the model of a folder: what is shown,
in which order, and what is refused before anything starts.
"""

import json
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

import data.ask
import evaluate
from reagent.reward_model import RewardModelConfig
from reagent.served import TextChat
from tests.helpers.chat_server import chat_server
from tests.helpers.judge_server import judge_server
from tests.helpers.tiny import ROOT
from tools import Toolbox

CALL = '<tool_call>\n{"name": "search", "arguments": {"queries": ["Kiel"]}}\n</tool_call>'
REPLIES = [
    f"<think>I look.</think>Let me search.\n{CALL}",
    '<tool_call>\n{"name": "search", "arguments": {"queries": 3}}\n</tool_call>',
    "\\boxed{41}",
    "Now I see: \\boxed{42}",
]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "pages.jsonl"
    path.write_text(json.dumps({"id": "1", "title": "Kiel", "text": "has code 42."}) + "\n")
    return path


def ask(*args) -> tuple[int, None]:
    with pytest.raises(SystemExit) as end:
        data.ask.main([*map(str, args)])
    return end.value.code


def in_order(text: str, *parts: str) -> None:
    at = -1
    for part in parts:
        assert part in text[at + 1 :], (part, text)
        at = text.index(part, at + 1)


def test_a_server_of_messages_shows_attempt_critique_and_refined_attempt(corpus, capsys):
    replies = iter(REPLIES)
    score = iter(("0.20", "0.90"))

    def judged(text):
        critique = "Read the page of Kiel again."
        return f"<think>t</think><critique>{critique}</critique><score>{next(score)}</score>"

    with (
        chat_server(lambda *_: next(replies), completions=False) as (url, seen),
        judge_server(judged) as (rrm, _),
    ):
        code = ask(
            "Which code has Kiel?",
            f"--model={url}",
            f"--rrm={rrm}",
            "--refine",
            f"--corpus={corpus}",
            "--tools=search",
        )
    told = capsys.readouterr().out
    in_order(told, "| I look.", "Let me search.", '> search({"queries": ["Kiel"]', "has code 42.")
    in_order(told, "has code 42.", '> search({"queries": 3', "must be a list of texts", "{41}")
    in_order(told, "{41}", "CRITIQUE, score 0.20", "Read the page of Kiel", "REFINED", "{42}")
    assert told.endswith("ANSWER  42   score 0.20 -> 0.90\n") and code == 0
    assert "<tool_call>" not in told and len(seen) == 4
    assert "Read the page of Kiel again." in seen[-1]["messages"][-1]["content"]


def test_files_are_read_and_no_answer_ends_with_1(tmp_path, capsys):
    (tmp_path / "bill.txt").write_text("The sum is 17 francs.")
    read = (
        '<tool_call>\n{"name": "file_reader", "arguments": {"file_path": "bill.txt"}}\n</tool_call>'
    )
    replies = iter([read, "I cannot say."])
    with chat_server(lambda *_: next(replies), completions=False) as (url, seen):
        code = ask("What is the sum?", f"--model={url}", f"--files={tmp_path}/bill.txt")
    told = capsys.readouterr().out
    assert "file_reader" in told.splitlines()[1] and "File: bill.txt" in str(seen[0]["messages"])
    assert "The sum is 17 francs." in told and "ANSWER  none (no_answer)" in told and code == 1


def test_a_tokenizer_that_cannot_be_had_does_not_stop_the_question(tmp_path, capsys):
    """The server takes token ids, but the folder it names is not on this machine."""

    def reply(text, request):
        return "\\boxed{4}"

    class Tokenizer:
        def encode(self, text, add_special_tokens):
            return [7]

        def decode(self, ids):
            return "a"

    with chat_server(reply, Tokenizer(), model="/models/not-here") as (url, seen):
        assert ask("2 + 2?", f"--model={url}", "--tools=none") == 0
    assert "messages" in seen[0] and "is asked with messages" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, problem",
    [
        (["Q"], "ask needs --model"),
        (["Q", "--model=http://127.0.0.1:9/v1", "--refine"], "--refine needs"),
        (["Q", "--model=http://127.0.0.1:9/v1", "--files=nowhere.pdf"], "no file nowhere.pdf"),
        (["Q", "--model=nowhere", "--engine=hf"], "no folder nowhere"),
        (["Q", "--model=http://127.0.0.1:9/v1", "--patience_s=0.1"], "no answer from"),
    ],
)
def test_what_is_missing_is_told_in_one_line(args, problem):
    assert problem in str(ask(*args))


def test_ctrl_c_ends_a_command_without_a_traceback():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"--model=http://127.0.0.1:{silent.getsockname()[1]}/v1"
        command = [sys.executable, "evaluate.py", "ask", "Who?", url]
        restored = "import signal, sys, os; signal.signal(2, signal.default_int_handler); "
        child = subprocess.Popen(
            [sys.executable, "-c", restored + "os.execv(sys.argv[1], sys.argv[1:])", *command],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        silent.settimeout(60)
        silent.accept()[0].recv(1)  # it asks, and would wait
        child.send_signal(signal.SIGINT)
        assert "Traceback" not in child.communicate(timeout=60)[1] and child.returncode == 130


def test_what_a_question_is_asked_with_reaches_its_place(corpus, tmp_path, monkeypatch):
    """Each option has a value of its own, so that none can stand in for another."""
    seen, prompt = {}, tmp_path / "prompt.txt"
    prompt.write_text("Look it up.")
    engine, judge, chat = object(), SimpleNamespace(), TextChat()

    async def run_chains(jobs, setup):
        seen.update(jobs=jobs, setup=setup)
        return ["the chain"]

    def opened(cfg, runner):
        seen["agent"] = cfg
        return evaluate.Agent(engine, chat, 3000, "", {})

    def open_rrm(config, chat, *, engine):
        seen["rrm"] = config, engine
        return judge

    monkeypatch.setattr(data.ask, "open_agent", opened)
    monkeypatch.setattr(data.ask.reward_model, "open_rrm", open_rrm)
    monkeypatch.setattr(data.ask.rollout, "run_chains", run_chains)
    monkeypatch.setattr(data.ask, "Toolbox", lambda *a, **b: seen.update(box=(a, b)) or Toolbox([]))
    own = dict(seconds_per_call=7.0, temperature=0.25, top_p=0.75, max_turns=4, seed=9)
    own |= dict(max_tokens_per_attempt=800, max_new_tokens_per_turn=60, max_context=2000)
    own |= dict(corpus=str(corpus), allow="d", prompt_file=str(prompt), tools="search,none")
    cfg = data.ask.Config(model="http://a/v1", refine=True, unsafe_python=True, **own)
    cfg.rrm = RewardModelConfig("r.py")
    assert data.ask.answer("Which code?", cfg) == "the chain" and seen["agent"] is cfg
    (((row, key),), setup) = seen["jobs"], seen["setup"]
    assert (row["question"], key) == ("Which code?", (9, "ask"))
    assert (setup.temperature, setup.top_p, setup.refine) == (0.25, 0.75, True)
    assert setup.system_prompt == "Look it up." and setup.engine is setup.rrm
    assert (setup.engine.engine, setup.engine.rrm, setup.chat) == (engine, judge, chat)
    limits = evaluate.rollout.Limits(4, 60, 800, 2000, final_tokens=200)
    assert setup.limits == limits
    assert seen["rrm"] == (cfg.rrm, cfg.engine) and judge.must_answer
    options = dict(corpus=str(corpus), allow="d", unsafe_python=True, seconds_per_call=7.0)
    assert seen["box"] == ((["search"],), options | {"files_dir": ""})
