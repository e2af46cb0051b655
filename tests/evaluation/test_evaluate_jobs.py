"""Whole evaluations as a user starts them: served and local models, kills, servers that go away,
judges, refinement.
"""

import contextlib
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

import evaluate
from reagent.config import parse_config
from results.journal import opened, sealed
from results.verdicts import open_verdicts
from tests.helpers.chat_server import chat_server
from tests.helpers.judge_server import hashed_judgment, judge_server
from tests.helpers.tiny import ROOT, tiny_model, toy
from toolkit.web import Cache

SHARED = ROOT.parent / "shared" / "data"
ANSWERS = {"q0": "Paris", "q1": "Lima", "q2": "Rome", "q3": "Oslo"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model and four questions with documents of their own."""
    folder = tmp_path_factory.mktemp("world")
    tiny_model(folder / "model", max_positions=4096)
    docs = [{"title": "Capitals", "text": "Paris, Lima, Rome and Oslo are capitals."}]
    rows = [
        dict(
            id=name,
            question=f"Which city is {name}?",
            answer=city,
            kind="qa",
            docs=docs,
            meta={"level": name[1]},
        )
        for name, city in ANSWERS.items()
    ]
    toy.write(folder / "cities.jsonl", rows)
    return folder


def tokenizer_of(world):
    from reagent.policy import load_tokenizer

    return load_tokenizer(str(world / "model"))


def run(world, out, *args):
    """evaluate.py in this process; the same question file for all."""
    base = [
        f"--dataset={world}/cities.jsonl",
        "--tools=search",
        f"--out_dir={out}",
        "--patience_s=5",
        f"--judge_cache={out}/cache.sqlite",
    ]
    evaluate.main(parse_config(evaluate.Config, [*base, *args]))
    return results(out)


def results(out):
    return [json.loads(line) for line in open(Path(out) / "results.jsonl")]


def knows(text, request):
    """Searches once, then answers; q3 is answered wrong."""
    name = re.findall(
        r"Which city is (q\d)", str(request["messages"]) if "messages" in request else text
    )[-1]
    if "Results for" not in str(request.get("messages", text)):
        return '<tool_call>{"name": "search", "arguments": {"queries": ["capital"]}}</tool_call>'
    return f"<think>I saw it.</think>\\boxed{{{'Bonn' if name == 'q3' else ANSWERS[name]}}}"


def served(world, url):
    return f"--model={url}", f"--tokenizer={world}/model"


def test_a_served_model_is_asked_with_token_ids_that_only_grow(world, tmp_path):
    with chat_server(knows, tokenizer_of(world)) as (url, seen):
        rows = run(world, tmp_path, *served(world, url), "--rollouts=2")
    assert [(r["id"], r["rollout"], r["correct"]) for r in rows] == [
        (q, n, q != "q3") for q in ANSWERS for n in (0, 1)
    ]
    assert len(seen) == 16 and len({request["seed"] for request in seen}) == 16
    assert {(request["temperature"], request["top_p"]) for request in seen} == {(0.6, 0.95)}
    assert all(
        request["top_k"] == -1 and request["ignore_eos"] and request["stop_token_ids"]
        for request in seen
    )
    prompts = sorted((request["prompt"] for request in seen), key=len)
    assert all(any(long[: len(short)] == short for long in prompts[8:]) for short in prompts[:8])
    report = (tmp_path / "report.md").read_text()
    assert (
        "token ids in and out" in report
        and "75.0 [25.0, 100.0]" in report
        and "prompt_file our own" in report
        and "| level | 3 | 1 | 0.0 [0.0, 79.3] |" in report  # one question tells little
    )
    assert re.search(r"- \d{4}-\d\d-\d\d, commit ([0-9a-f]{12}|unknown)\n", report)
    assert re.search(r"rows of \S+, sha256 [0-9a-f]{12}; tools search", report)
    assert re.search(r"- search: (no provider|local pages|\w+)", report)
    assert "| scored rows |" in report and "| 8 | 75.0 [25.0, 100.0] |" in report
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_a_finished_run_asks_nothing_and_more_rollouts_only_what_is_missing(world, tmp_path):
    with chat_server(knows, tokenizer_of(world)) as (url, seen):
        run(world, tmp_path, *served(world, url), "--limit=2")
        assert len(seen) == 4
        run(world, tmp_path, *served(world, url), "--limit=2")
        assert len(seen) == 4
        rows = run(world, tmp_path, *served(world, url), "--limit=3", "--rollouts=2")
    assert len(seen) == 12 and len(rows) == 6
    with pytest.raises(
        SystemExit, match="other settings .temperature: 0.6 -> 1.0.: give another --out_dir"
    ):
        run(world, tmp_path, *served(world, url), "--temperature=1.0")


def test_a_server_that_goes_away_stops_the_run_and_marks_no_row(world, tmp_path, capfd):
    asked = []

    def dies(text, request):
        asked.append(request)
        return 503 if len(asked) > 3 else knows(text, request)

    tokenizer = tokenizer_of(world)
    with chat_server(dies, tokenizer) as (url, _):
        with pytest.raises(
            SystemExit,
            match=r"no answer from http\S+ for 1 s .*; 1 of 4 chains are finished: run the same",
        ):
            run(
                world,
                tmp_path / "a",
                *served(world, url),
                "--engine.max_live_chains=1",
                "--patience_s=1",
            )
    assert (
        not (tmp_path / "a" / "results.jsonl").exists()
        and "waiting for http" in capfd.readouterr().err
    )
    lines = [json.loads(line) for line in open(tmp_path / "a" / "journal-0.jsonl")]
    assert [(line["id"], line["status"]) for line in lines] == [("q0", "answered")]
    with chat_server(knows, tokenizer) as (url, seen):  # at another port
        run(world, tmp_path / "a", *served(world, url), "--engine.max_live_chains=1")
        assert len(seen) == 6
        run(world, tmp_path / "b", *served(world, url))
    assert (tmp_path / "a" / "results.jsonl").read_bytes() == (
        tmp_path / "b" / "results.jsonl"
    ).read_bytes()


def test_a_server_that_serves_another_model_does_not_go_on_with_the_first_ones_answers(
    world, tmp_path
):
    tokenizer = tokenizer_of(world)
    with chat_server(knows, tokenizer) as (url, _):
        run(world, tmp_path, *served(world, url), "--limit=1")
    with chat_server(knows, tokenizer, model="another") as (url, seen):
        with pytest.raises(SystemExit, match="other models .model: tiny -> another.: give another"):
            run(world, tmp_path, *served(world, url))
        assert seen == []
    with chat_server(knows, tokenizer) as (url, _):  # at another port
        assert len(run(world, tmp_path, *served(world, url))) == 4


def test_a_server_that_comes_back_in_time_is_waited_for(world, tmp_path):
    asked = []

    def stumbles(text, request):
        asked.append(request)
        bad = {2: 503, 4: None, 6: 429, 8: b"<html>busy</html>"}
        return bad[len(asked)] if len(asked) in bad else knows(text, request)

    with chat_server(stumbles, tokenizer_of(world)) as (url, seen):
        rows = run(
            world, tmp_path, *served(world, url), "--engine.max_live_chains=1", "--patience_s=30"
        )
    assert [r["correct"] for r in rows] == [True, True, True, False] and len(seen) == 12


def test_a_server_that_is_not_there_yet_is_waited_for(world, tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stop = threading.Event()

    def late():
        time.sleep(0.5)
        with chat_server(knows, tokenizer_of(world), port=port):
            stop.wait(30)

    thread = threading.Thread(target=late)
    thread.start()
    try:
        rows = run(
            world, tmp_path, *served(world, f"http://127.0.0.1:{port}/v1"), "--patience_s=30"
        )
    finally:
        stop.set()
        thread.join()
    assert len(rows) == 4
    with pytest.raises(
        SystemExit, match="no answer from http.* for 0 s .*; 0 of 4 chains are finished"
    ):
        run(
            world,
            tmp_path / "none",
            *served(world, f"http://127.0.0.1:{port}/v1"),
            "--patience_s=0.3",
        )


def test_refused_requests_are_no_answers_and_a_later_run_makes_them(world, tmp_path, capfd):
    refuses = [True]

    def reply(text, request):
        return 400 if refuses[0] and "q1" in text else knows(text, request)

    with chat_server(reply, tokenizer_of(world)) as (url, _):
        rows = run(world, tmp_path / "a", *served(world, url))
        assert [
            (r["id"], r["status"], r["correct"]) for r in rows if r["status"] != "answered"
        ] == [("q1", "fault", None)]
        text = capfd.readouterr()
        assert (
            "refused a request" in text.err
            and "1 chains failed for want of infrastructure" in text.err
        )
        assert json.load(open(tmp_path / "a" / "summary.json"))[0]["counts"]["fault"] == 1
        refuses[0] = False
        run(world, tmp_path / "a", *served(world, url))
        run(world, tmp_path / "b", *served(world, url))
    assert (tmp_path / "a" / "results.jsonl").read_bytes() == (
        tmp_path / "b" / "results.jsonl"
    ).read_bytes()


def test_a_tool_fault_is_no_answer(world, tmp_path, monkeypatch):
    toy.write(
        tmp_path / "rows.jsonl",
        [dict(id="q0", question="Which city is q0?", answer="Paris", kind="qa")],
    )
    monkeypatch.setenv("SEARXNG_URL", "http://127.0.0.1:9")
    with chat_server(knows, tokenizer_of(world)) as (url, seen):
        args = (
            *served(world, url),
            f"--dataset={tmp_path}/rows.jsonl",
            "--retries=1",
            "--seconds_per_call=1",
        )
        rows = run(world, tmp_path / "a", *args)
        assert len(seen) == 2  # tried again once
        assert [(r["status"], r["fault"], r["correct"]) for r in rows] == [
            ("fault", "tool search", None)
        ]
        monkeypatch.delenv("SEARXNG_URL")
        with pytest.raises(
            SystemExit, match="rows: nothing to search: give --corpus=FILE or a search provider"
        ):
            run(world, tmp_path / "a", *args)


def test_a_chat_only_server_works_and_the_report_says_so(world, tmp_path):
    with chat_server(knows, completions=False) as (url, seen):
        rows = run(world, tmp_path, f"--model={url}")
    assert [r["correct"] for r in rows] == [True, True, True, False]
    assert "the server renders history" in (tmp_path / "report.md").read_text()
    last = max(seen, key=lambda request: len(request["messages"]))["messages"]
    assert [m["role"] for m in last] == [
        "system",
        "user",
        "assistant",
        "user",
    ] and '"name": "search"' in last[0]["content"]
    assert last[3]["content"].startswith("<tool_response>\nResults for")


def test_a_server_without_token_ids_in_its_replies_is_marked_too(world, tmp_path):
    with chat_server(knows, tokenizer_of(world), gives_ids=False) as (url, _):
        rows = run(world, tmp_path, *served(world, url))
    assert [r["correct"] for r in rows] == [True, True, True, False]
    assert "each turn is encoded again" in (tmp_path / "report.md").read_text()


def test_refinement_counts_what_it_fixes_and_breaks(world, tmp_path):
    def second_thoughts(text, request):
        name, again = re.findall(r"Which city is (q\d)", text)[-1], "A reviewer" in text
        right = {"q0": (True, True), "q1": (False, True), "q2": (True, False), "q3": (False, True)}[
            name
        ][again]
        return f"\\boxed{{{ANSWERS[name] if right else 'Bonn'}}}"

    with (
        chat_server(second_thoughts, tokenizer_of(world)) as (url, _),
        judge_server() as (rrm, judged),
    ):
        rows = run(world, tmp_path, *served(world, url), "--refine", f"--rrm={rrm}")
    figures = json.load(open(tmp_path / "summary.json"))[0]
    assert (
        figures["refine"]["o1"][0] == 0.5
        and figures["refine"]["o2"][0] == figures["all"][0] == 0.75
    )
    assert [figures["refine"][key] for key in ("fixed", "broken", "refined", "not_refined")] == [
        2,
        1,
        4,
        0,
    ]
    assert [r["correct"] for r in rows] == [True, True, False, True] and all(
        len(r["attempts"]) == 2 for r in rows
    )
    report = (tmp_path / "report.md").read_text()
    assert len(judged) == 1 + 8 and "| 2 | 1 | 4 | 0 |" in report
    assert f"refined after critiques of {rrm}: pass@1 is of refined answers" in report
    assert "rrm.request_file our own" in report


def after_the_preflight(reply):
    """A reward model that judges the preflight's attempt, then says `reply` for ever."""
    return lambda text: hashed_judgment(text) if "I cannot find it." in text else reply


def test_invalid_critiques_leave_the_first_answer_and_a_dead_reward_model_stops_the_run(
    world, tmp_path
):
    with chat_server(knows, tokenizer_of(world)) as (url, _):
        with judge_server(after_the_preflight("no blocks")) as (rrm, _):
            run(world, tmp_path / "a", *served(world, url), "--refine", f"--rrm={rrm}")
        figures = json.load(open(tmp_path / "a" / "summary.json"))[0]["refine"]
        assert figures["not_refined"] == 4 and figures["o1"] == figures["o2"]
        with pytest.raises(SystemExit, match="no reward model answers at http://127.0.0.1:9"):
            run(
                world,
                tmp_path / "b",
                *served(world, url),
                "--refine",
                "--rrm=http://127.0.0.1:9/v1",
            )
    with pytest.raises(SystemExit, match="--refine needs the reward model"):
        run(world, tmp_path / "b", "--model=x", "--refine")


def says(*verdicts):
    """A judge that gives these verdicts in turn, the last one for ever."""
    left = list(verdicts)

    def reply(text, request):
        said = left.pop(0) if len(left) > 1 else left[0]
        return (
            said
            if isinstance(said, (int, tuple)) or said is None
            else f"They agree or not.\nVERDICT: {said}"
        )

    return reply


def test_answers_without_a_judge_are_judged_later_and_the_model_is_not_asked_again(
    world, tmp_path, capfd
):
    args = ("--judged=all",)
    with chat_server(knows, tokenizer_of(world)) as (url, seen):
        rows = run(world, tmp_path, *served(world, url), *args)
        assert [r["correct"] for r in rows] == [
            None
        ] * 4  # three of them equal the reference: no rule decides
        figures = json.load(open(tmp_path / "summary.json"))[0]
        assert (
            figures["scored"] is None
            and figures["all"][0] == 0
            and figures["counts"]["unscored"] == 4
        )
        asked = len(seen)
        with chat_server(says("CORRECT", "INCORRECT", "PERHAPS")) as (judge, judged):
            rows = run(world, tmp_path, *served(world, url), *args, f"--judge={judge}")
        assert (
            len(seen) == asked
            and [r["correct"] for r in rows].count(None) == 2
            and len(judged) == 2 + 2 * 4
        )
        told = "2 of 4 answers stay unscored (no verdict in the judge's reply, 'They agree or not."
        assert told in capfd.readouterr().err
        with chat_server(says("CORRECT")) as (judge, judged):
            rows = run(world, tmp_path, *served(world, url), *args, f"--judge={judge}")
        assert len(judged) == 2 and [r["correct"] for r in rows].count(True) == 3
        with chat_server(says("CORRECT"), model="another") as (
            judge,
            judged,
        ):  # its verdicts are its own
            run(world, tmp_path, *served(world, url), *args, f"--judge={judge}")
            assert len(judged) == 4
    figures = json.load(open(tmp_path / "summary.json"))[0]
    assert figures["judge"].startswith("another/") and figures["scored"][0] == 1.0
    assert "- judge of answers: another/" in (tmp_path / "report.md").read_text()


def test_087_a_judge_that_is_down_leaves_answers_unscored(world, tmp_path, capfd):
    with chat_server(knows, tokenizer_of(world)) as (url, _), chat_server(says(500)) as (judge, _):
        rows = run(
            world,
            tmp_path,
            *served(world, url),
            "--judged=all",
            f"--judge={judge}",
            "--patience_s=0.3",
        )
    assert [r["correct"] for r in rows] == [
        None
    ] * 4 and "4 of 4 answers stay unscored (no answer from" in capfd.readouterr().err


def test_encrypted_rows_lie_on_no_disk_in_the_open(world, tmp_path):
    secret = {
        "question": "Which city is q0, the Verrocchio of towns?",
        "answer": "Paris on the Zyzzyva",
    }
    canary = "xb-9f2c"
    row = {key: sealed(text, canary) for key, text in secret.items()}
    toy.write(
        tmp_path / "xbench.jsonl",
        [dict(id="1", **row, kind="qa", meta={"encrypted": True, "canary": canary})],
    )
    toy.write(tmp_path / "pages.jsonl", [dict(id="1", title="Capitals", text="Paris.")])

    def replies(text, request):
        return "\\boxed{Paris on the Zyzzyva}"

    with (
        chat_server(replies, tokenizer_of(world)) as (url, seen),
        chat_server(says("CORRECT")) as (judge, judged),
    ):
        args = (
            *served(world, url),
            f"--judge={judge}",
            f"--dataset={tmp_path}/xbench.jsonl",
            f"--corpus={tmp_path}/pages.jsonl",
        )
        rows = run(world, tmp_path / "out", *args)
    assert "Verrocchio" in judged[0]["messages"][0]["content"] and rows[0]["correct"] is True
    assert opened(rows[0])["attempts"][0]["answer"] == "Paris on the Zyzzyva"
    for path in (tmp_path / "out").rglob("*"):
        data = path.read_bytes()
        assert not any(word in data for word in (b"Verrocchio", b"Zyzzyva")), path


HF = (
    "--engine=hf",
    "--max_tokens_per_attempt=120",
    "--rollouts=3",
    "--temperature=1.0",
    "--top_p=1.0",
)


def test_a_local_run_cut_anywhere_and_resumed_leaves_the_same_bytes(world, tmp_path):
    run(world, tmp_path / "straight", f"--model={world}/model", *HF)
    journal = (tmp_path / "straight" / "journal-0.jsonl").read_bytes()
    for share in (0.0, 0.31, 0.77):
        again = tmp_path / str(share)
        again.mkdir()
        (again / "journal-0.jsonl").write_bytes(journal[: int(share * len(journal))])
        run(world, again, f"--model={world}/model", *HF, "--engine.max_live_chains=5")
        assert (again / "results.jsonl").read_bytes() == (
            tmp_path / "straight" / "results.jsonl"
        ).read_bytes(), share


def test_089_two_runs_cannot_write_one_folder(world, tmp_path):
    holder = evaluate.Journal(str(tmp_path))
    with pytest.raises(
        SystemExit, match=f"is being written by process {os.getpid()} on .*, since 20"
    ):
        run(world, tmp_path, f"--model={world}/model", *HF)
    holder.close()
    assert len(run(world, tmp_path, f"--model={world}/model", *HF, "--limit=1")) == 3


def command(world, out, *args):
    return [
        f"--dataset={world}/cities.jsonl",
        "--tools=search",
        f"--out_dir={out}",
        f"--model={world}/model",
        *HF,
        *args,
    ]


@pytest.mark.slow
def test_two_ranks_share_the_questions_and_leave_the_same_file(world, tmp_path):
    from tests.loss.test_model import torchrun

    run(world, tmp_path / "one", f"--model={world}/model", *HF)
    torchrun("evaluate.py", *command(world, tmp_path / "two"))
    assert all(
        (tmp_path / "two" / f"journal-{rank}.jsonl").stat().st_size > 1000 for rank in (0, 1)
    )
    assert (tmp_path / "one" / "results.jsonl").read_bytes() == (
        tmp_path / "two" / "results.jsonl"
    ).read_bytes()


@pytest.mark.slow
def test_088_twenty_kills_leave_the_file_of_an_undisturbed_run(world, tmp_path):
    """SIGKILL at random moments of start, sampling and writing."""
    rng, args = (
        random.Random(0),
        ("--rollouts=12", "--engine.max_live_chains=4", "--max_tokens_per_attempt=400"),
    )

    def start(out):
        return subprocess.Popen(
            [sys.executable, "evaluate.py", *command(world, out, *args)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    whole = start(tmp_path / "a")
    began = time.monotonic()
    assert whole.wait(300) == 0, whole.stderr.read()[-2000:]
    took, sizes, kills = time.monotonic() - began, [], 0
    while kills < 20:
        process = start(tmp_path / "b")
        time.sleep(rng.uniform(0.3, 0.9) * took if kills % 4 else rng.uniform(0.0, 0.3) * took)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        journal = tmp_path / "b" / "journal-0.jsonl"
        sizes.append(journal.stat().st_size if journal.exists() else 0)
        if process.returncode == 0:  # it came to its end: begin a new one, the kills so far count
            assert (tmp_path / "b" / "results.jsonl").read_bytes() == (
                tmp_path / "a" / "results.jsonl"
            ).read_bytes()
            for path in (tmp_path / "b").iterdir():
                path.unlink()
    last = start(tmp_path / "b")
    assert last.wait(300) == 0, last.stderr.read()[-2000:]
    assert (tmp_path / "b" / "results.jsonl").read_bytes() == (
        tmp_path / "a" / "results.jsonl"
    ).read_bytes()
    keys = [(r["dataset"], r["id"], r["rollout"]) for r in results(tmp_path / "b")]
    assert len(keys) == len(set(keys)) == 48 and len(set(sizes)) > 3


@pytest.mark.slow
def test_transformers_vllm_and_vllm_over_two_ranks_leave_the_same_file(tmp_path, world):
    """Greedy, fp32, on a CPU."""
    from tests.loss.test_model import torchrun

    pytest.importorskip("vllm")
    tiny_model(tmp_path / "model", hidden=128, max_positions=4096)
    options = (
        f"--model={tmp_path}/model",
        "--temperature=0",
        "--max_tokens_per_attempt=200",
        "--tools=search",
    )
    common = (f"--dataset={world}/cities.jsonl", *options)
    commands = {
        "hf": ["--engine=hf"],
        "vllm": ["--engine=vllm"],
        "two": ["--engine=vllm", "--engine.tensor_parallel=2"],
    }
    for name, args in commands.items():
        args = ("evaluate.py", *common, *args, f"--out_dir={tmp_path}/{name}")
        if name == "two":
            torchrun(*args, timeout=400)
        else:
            done = subprocess.run(
                [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=400
            )
            assert done.returncode == 0, done.stderr[-2000:]
    assert len({(tmp_path / name / "results.jsonl").read_bytes() for name in commands}) == 1


@pytest.mark.slow
def test_a_real_vllm_server_gives_what_the_local_engine_gives(world, tmp_path):
    """Greedy, fp32, turn for turn; and sampling can be repeated by its seeds."""
    import socket

    pytest.importorskip("vllm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tiny_model(
        tmp_path / "model", hidden=128, max_positions=4096
    )  # vLLM's CPU attention wants heads of 32
    options = [
        "--dtype=float32",
        "--max-model-len=4096",
        "--enforce-eager",
        "--seed=0",
        f"--port={port}",
        "--host=127.0.0.1",
    ]
    log = open(tmp_path / "server.log", "w")
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            f"--model={tmp_path}/model",
            *options,
        ],
        cwd=tmp_path,
        stdout=log,
        stderr=log,
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        start_new_session=True,
    )
    url, most = f"--model=http://127.0.0.1:{port}/v1", "--max_tokens_per_attempt=300"
    try:
        greedy = run(
            world, tmp_path / "served", url, "--temperature=0", most, "--patience_s=240"
        )  # the run waits for it
        sampled = [
            run(world, tmp_path / name, url, "--temperature=1.0", "--rollouts=2", most)
            for name in "ab"
        ]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert "token ids in and out" in (tmp_path / "served" / "report.md").read_text()
    local = run(
        world,
        tmp_path / "local",
        f"--model={tmp_path}/model",
        "--engine=hf",
        "--temperature=0",
        most,
    )
    assert [r["messages"] for r in greedy] == [r["messages"] for r in local] and [
        r["tokens"] for r in greedy
    ] == [r["tokens"] for r in local]
    assert sampled[0] == sampled[1] and len({str(r["messages"]) for r in sampled[0]}) == 8


@pytest.mark.skipif(not (SHARED / "hotpotqa").is_dir(), reason="the real rows are not here")
def test_real_rows_of_four_sets_pass_through_the_whole_path_offline(world, tmp_path):
    prepare = __import__("tests.helpers.tiny", fromlist=["load"]).load("data/benchmarks/prepare.py")
    files = {
        "hotpotqa200": "hotpotqa/arpo200",
        "gsm8k": "gsm8k/test",
        "math500": "math500/test",
        "bamboogle": "bamboogle/test",
    }
    for name, file in files.items():
        prepare.prepare(name, [SHARED / f"{file}.jsonl"], tmp_path / "data", {})
    lines = open(SHARED / "corpus" / "corpus.jsonl").readlines()[:1000]
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    names = ",".join(files)
    evaluate.main(
        parse_config(
            evaluate.Config,
            [
                f"--model={world}/model",
                "--engine=hf",
                f"--dataset={names}",
                f"--data_dir={tmp_path}/data",
                "--limit=3",
                "--rollouts=2",
                f"--corpus={tmp_path}/corpus.jsonl",
                "--max_tokens_per_attempt=100",
                f"--out_dir={tmp_path}/out",
            ],
        )
    )
    rows = results(tmp_path / "out")
    assert [r["dataset"] for r in rows] == [name for name in files for _ in range(6)]
    assert all(
        r["status"] in ("answered", "no_answer") and r["correct"] in (True, False) for r in rows
    )
    figures = json.load(open(tmp_path / "out" / "summary.json"))
    assert [s["questions"] for s in figures] == [3] * 4 and all(
        s["counts"]["fault"] == 0 for s in figures
    )


def ended(world, out, *args, signal_at=None):
    """(exit code, what a run says to the person) of evaluate.py as a process."""
    command = [sys.executable, "evaluate.py", f"--dataset={world}/cities.jsonl", "--tools=search"]
    command += [f"--out_dir={out}", "--patience_s=5", f"--judge_cache={out}/cache.sqlite", *args]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    # a background job of a shell ignores Ctrl-C, and so would what it starts
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, cwd=ROOT, preexec_fn=heard, **pipes)
    while signal_at and not signal_at() and process.poll() is None:
        time.sleep(0.05)
    if signal_at:
        process.send_signal(signal.SIGINT)
    return process.wait(120), process.stderr.read()


def test_a_ctrl_c_is_answered_in_a_sentence_and_the_run_goes_on_later(world, tmp_path):
    def slow(text, request):
        time.sleep(0.5)
        return knows(text, request)

    with chat_server(slow, tokenizer_of(world)) as (url, seen):
        code, told = ended(world, tmp_path, *served(world, url), signal_at=lambda: len(seen) > 2)
        assert code == 130 and "stopped: the same command goes on" in told
        assert "Traceback" not in told
    with chat_server(knows, tokenizer_of(world)) as (url, seen):
        assert len(run(world, tmp_path, *served(world, url))) == 4


@pytest.mark.parametrize(
    "name, body, told",
    [
        ("run.json", b"", "run.json cannot be read .it is empty."),
        ("run.json", b'{"config": {', "run.json cannot be read .JSONDecodeError"),
        ("cache.sqlite", b"not a database", "cache.sqlite is damaged or none"),
        ("web.sqlite", b"not a database", "web.sqlite is damaged or none"),
    ],
)
def test_a_damaged_file_of_a_run_is_told_before_work_starts(world, tmp_path, name, body, told):
    (tmp_path / name).write_bytes(body)
    with chat_server(knows, tokenizer_of(world)) as (url, seen):
        args = ("--judged=all", f"--judge={url}", f"--cache={tmp_path}/web.sqlite")
        with pytest.raises(SystemExit, match=told):
            run(world, tmp_path, *served(world, url), *args)
    assert not seen


@pytest.mark.parametrize("cache", ["verdicts", "web"])
def test_a_cache_with_a_damaged_page_is_told(tmp_path, cache):
    path = tmp_path / "cache.sqlite"
    make = {"verdicts": open_verdicts, "web": lambda path: Cache(path, {}, False)}[cache]
    make(str(path))
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        table = "verdicts (key, reply)" if cache == "verdicts" else "calls (tool, value)"
        for i in range(200):
            db.execute(f"INSERT INTO {table} VALUES (?, ?)", (str(i), "x" * 500))
    make(str(path))
    body = bytearray(path.read_bytes())
    body[len(body) // 2 : len(body) // 2 + 5000] = bytes(5000)
    path.write_bytes(body)
    with pytest.raises(SystemExit, match="cache.sqlite is damaged or none"):
        make(str(path))


def test_a_reward_model_that_goes_away_stops_the_run_and_costs_no_critique(world, tmp_path):
    """A chain that kept its first answer for want of a judge would count as refined for ever."""
    with (
        chat_server(knows, tokenizer_of(world)) as (url, _),
        judge_server(after_the_preflight(503)) as (rrm, _),
    ):
        asked = ("--refine", f"--rrm={rrm}", "--rrm.seconds=0.5")
        with pytest.raises(SystemExit, match="0 of 4 chains are finished: run the same command"):
            run(world, tmp_path, *served(world, url), *asked)
