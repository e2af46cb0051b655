"""report.py: the page is safe, complete and works in a real browser."""

import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest

from results.page import (
    curve_svg,
    embed,
    jsonable,
    numeric_series,
    outcomes,
    panels,
    plain,
    slim,
    summary,
    table_html,
    ticks,
    write_report,
    write_run_page,
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync
--enable-logging=stderr --virtual-time-budget=5000""".split()
EVIL = "<script>window.hacked=1</script><!--<img src=x onerror=window.hacked=1>"
EVIL += "\x1b[31m\x00\ud800\u202e" + "e" + "\u0301" * 999


def attempt(messages, answer, correct, **fields):
    base = dict(
        span=[0, 5],
        messages=messages,
        answer=answer,
        correct=correct,
        termination="answered",
        seed=1,
    )
    base |= dict(
        rule_reward=float(bool(correct)),
        score=0.5,
        think="it looked",
        critique="look again",
        reward=1.0,
    )
    return base | fields


def episode(
    name, verdicts, *, dropped="", dataset="toy", question="Who?", tool_text="Rome has code 42."
):
    """A chain with one attempt per verdict; every attempt calls search once."""
    messages = [{"role": "system", "content": "Use tools."}, {"role": "user", "content": question}]
    attempts = []
    for stage, verdict in enumerate(verdicts):
        if stage:
            messages.append({"role": "user", "content": "A reviewer wrote: look again"})
        begin = len(messages)
        call = json.dumps({"name": "search", "arguments": {"queries": ["Rome"]}})
        call = f"<think>\nhm\n</think>\n<tool_call>\n{call}\n</tool_call>"
        messages += [
            {"role": "assistant", "content": call},
            {"role": "tool", "content": tool_text},
            {"role": "assistant", "content": f"So \\boxed{{{name}-{stage}}}"},
        ]
        calls = [
            dict(name="search", arguments={"queries": ["Rome"]}, status="ok", seconds=0.2, turn=1)
        ]
        attempts.append(attempt([begin, len(messages)], f"{name}-{stage}", verdict, calls=calls))
    return dict(
        id=name,
        question=question,
        gold=["42"],
        ids=[1] * 9,
        mask=[0] * 4 + [1] * 5,
        logps=[0.0] * 5,
        messages=messages,
        policy_version=3,
        attempts=attempts,
        dropped=dropped,
        meta={"dataset": dataset},
    )


def embedded(page, name):
    return json.loads(
        re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.S)[1]
    )


def page_of(tmp_path, **options):
    path = tmp_path / "report.html"
    write_report(path, title=options.pop("title", "a run"), **options)
    return path, path.read_text(encoding="utf-8")


# ---------------------------------------------------------------- text
def test_plain_text_keeps_lines_and_shows_control_characters():
    assert plain("a\n\tb\r\nc") == "a\n\tb\nc"
    assert plain("\x1b[31m\x00\r\u202e") == "\\x1b[31m\\x00\\x0d\\u202e"


def test_plain_text_encodes_whatever_came_in():
    assert plain("\ud800x\U0001f600").encode() == "\ufffdx\U0001f600".encode()
    assert plain("e" + "\u0301" * 1_000_000) == "e" + "\u0301" * 4


def test_embedded_json_cannot_close_its_block_and_holds_no_nan():
    block = embed("x", jsonable({"a": "</script><!--", "b": float("nan"), "c": (1, float("inf"))}))
    assert block.count("<") == 2 and block.endswith("</script>")
    inside = json.loads(block[block.index(">") + 1 : block.rindex("<")])
    assert inside == {"a": "</script><!--", "b": None, "c": [1, None]}


def test_every_text_of_the_page_is_escaped(tmp_path):
    chain = episode("e", [True, False], question=EVIL, dataset=EVIL, tool_text=EVIL)
    table = f"# {EVIL}\n|{EVIL}|\n|-|\n|{EVIL}|"
    log = [{"step": 1, EVIL: 1.0, EVIL + "/a": 1}, {"step": 2, EVIL: 2.0, EVIL + "/a": 3}]
    _, page = page_of(
        tmp_path, title=EVIL, episodes=[chain], config={EVIL: EVIL}, table_markdown=table, log=log
    )
    assert "<img" not in page and "window.hacked=1</script>" not in page
    assert not set(map(chr, range(32))) - set("\n\t") & set(page)
    assert embedded(page, "episodes")[0]["question"].startswith("<script>window.hacked=1</script>")


def test_the_page_loads_nothing_from_outside(tmp_path):
    _, page = page_of(
        tmp_path, episodes=[episode("e", [True])], log=[{"step": i, "loss": i} for i in range(3)]
    )
    without_names = page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert (
        "http" not in without_names.replace("http-equiv", "")
        and " src=" not in page
        and "@import" not in page
    )


# ---------------------------------------------------------------- episodes
@pytest.mark.parametrize(
    "verdicts, dropped, expected",
    [
        ([True], "", ["right"]),
        ([False], "", ["wrong"]),
        ([False, True], "", ["right", "fixed"]),
        ([True, False], "", ["wrong", "broken"]),
        ([True, True], "", ["right"]),
        ([None], "", ["unscored"]),
        ([], "", ["unscored"]),
        ([None, True], "", ["right"]),
        ([True], "fault", ["dropped"]),
    ],
)
def test_outcomes(verdicts, dropped, expected):
    assert outcomes(episode("e", verdicts, dropped=dropped)) == expected


def test_token_ids_stay_out_of_the_page_and_long_messages_are_cut_in_their_middle(tmp_path):
    chain = episode("e", [True], tool_text="a" * 50_000 + "END")
    _, page = page_of(tmp_path, episodes=[chain])
    shown = embedded(page, "episodes")[0]
    assert not {"ids", "mask", "logps"} & set(shown) and (shown["tokens"], shown["trained"]) == (
        9,
        5,
    )
    text = shown["messages"][3]["content"]
    assert len(text) < 21_000 and text.endswith("END") and "30,003 characters left out" in text


def test_summary_counts_both_stages_without_dropped_chains():
    shown = [
        slim(episode(str(i), verdicts, dropped=dropped))
        for i, (verdicts, dropped) in enumerate(
            [([False, True], ""), ([True, True], ""), ([True, False], ""), ([True, True], "fault")]
        )
    ]
    assert dict(summary(shown)) == {
        "episodes": "4",
        "first attempts right": "66.7 %",
        "refined attempts right": "66.7 %",
        "fixed by refinement": "1",
        "broken by it": "1",
        "dropped": "1",
    }


# ---------------------------------------------------------------- curves and tables
def test_series_skip_what_is_not_a_finite_number_and_count_missing_endings_as_zero():
    log = [
        {"step": 1, "loss": 1, "note": "x", "ended/limit": 2},
        {"step": 2, "loss": float("nan")},
        {"step": 3},
    ]
    assert numeric_series(log) == {
        "loss": [(1, 1.0)],
        "ended/limit": [(1, 2.0), (2, 0.0), (3, 0.0)],
    }


def test_panels_group_by_family_and_split_by_scale():
    log = [
        {
            "step": i,
            "accuracy/first": i / 10,
            "accuracy/refined": i / 9,
            "score/right": 0.8 + i,
            "lr": 0.1,
            "score/wrong": 0.3 + i,
            "score/first": i,
            "dlogp/mean": 1e-6 * i,
            "dlogp/max": 1e-3 * i,
            "odd": i,
        }
        for i in (1, 2)
    ]
    found, constants = panels(numeric_series(log))
    assert [(section, title, list(lines)) for section, title, lines in found] == [
        ("Learning", "accuracy", ["first", "refined"]),
        ("Learning", "score of right and wrong answers", ["right", "wrong"]),
        ("Learning", "score/first", ["first"]),
        ("Optimization", "dlogp/max", ["max"]),
        ("Optimization", "dlogp/mean", ["mean"]),
        ("Other", "odd", ["odd"]),
    ]
    assert constants == {"lr": 0.1}


STRAIGHT = [
    [(1, 0.0)],
    [(1, 0.0), (2, 0.0)],
    [(i, i * 1e9) for i in range(999)],
    [(0, -1e-9), (1, -2e-9)],
]


@pytest.mark.parametrize("points", STRAIGHT)
def test_a_curve_is_well_formed_and_stays_inside_its_panel(points):
    root = ElementTree.fromstring(curve_svg({"<a>&": points, "b": points}, title="<t>&"))
    marks = [
        node
        for node in root.iter()
        if node.tag.endswith(("polyline", "circle")) and "cx" not in node.attrib
    ]
    pairs = [
        tuple(map(float, pair.split(",")))
        for node in marks
        for pair in node.attrib["points"].split()
    ]
    assert all(40 <= x <= 288 and 44 <= y <= 160 for x, y in pairs)


@pytest.mark.parametrize(
    "low, high", [(0, 1), (0.1, 0.93), (-3e-7, 5e-7), (12, 12), (0, 0), (1e6, 9.3e6)]
)
def test_ticks_cover_the_values_with_few_round_marks(low, high):
    marks = ticks(low, high)
    assert marks[0] <= low + 1e-12 and marks[-1] >= high - 1e-12 and 2 <= len(marks) <= 6


def test_a_markdown_table_becomes_html():
    page = table_html(
        "## Results\n\n| set | acc |\n|---|--:|\n| **a** \\| b | 0.5 ± 0.1 |\n\n`x` < y\n"
    )
    assert page == (
        '<h3>Results</h3><div class="scroll"><table><thead><tr><th>set</th>'
        '<th class="right">acc</th></tr></thead>'
        '<tbody><tr><td><b>a</b> | b</td><td class="right">0.5 ± 0.1</td></tr></tbody>'
        "</table></div>"
        "<p><code>x</code> &lt; y</p>"
    )


def test_a_run_folder_gets_its_page_and_picture_again(tmp_path, capsys):
    (tmp_path / "episodes").mkdir()
    for step in (1, 2):
        rows = [episode(f"s{step}", [True])]
        (tmp_path / f"episodes/step-{step:06d}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in rows)
        )
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1, "eval/first": 0.1}\n{"step": 2, "eval/first": 0.9}\n{"st'
    )
    (tmp_path / "run.json").write_text(json.dumps({"config": {"lr": 1}}))
    write_run_page(str(tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert [e["id"] for e in embedded(page, "episodes")] == ["s1", "s2"] and "<dt>lr</dt>" in page
    ElementTree.parse(tmp_path / "curve.svg")
    assert "cut short" in capsys.readouterr().err


def test_a_folder_that_is_not_a_run_is_named(tmp_path):
    with pytest.raises(SystemExit, match="log.jsonl"):
        write_run_page(str(tmp_path))


# ---------------------------------------------------------------- in a browser
PROBE = """<script>
const click = name => document.querySelector(`[data-outcome=${name}]`).click();
const shown = () => document.querySelectorAll("#list .item").length;
const reader = document.getElementById("reader").textContent;
const found = { all: shown(), reader, hacked: window.hacked || 0 };
for (const name of ["right", "fixed", "broken", "dropped"]) { click(name); found[name] = shown(); }
click("all");
const select = document.getElementById("dataset");
select.value = "b"; select.onchange(); found.b = shown();
select.value = ""; select.onchange();
const search = document.getElementById("search");
search.value = "NEEDLE"; search.dispatchEvent(new Event("input"));
setTimeout(() => { found.needle = shown(); document.title = JSON.stringify(found); }, 400);
document.querySelector("figure svg").dispatchEvent(new MouseEvent("mousemove", { clientX: 9999 }));
found.caption = document.querySelector("figcaption").textContent;
</script></body>"""


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
def test_the_page_opens_filters_and_throws_nothing_in_chromium_with_a_thousand_episodes(tmp_path):
    kinds = [([True, True], ""), ([False, True], ""), ([True, False], ""), ([True], "fault")]
    episodes = [
        episode(
            str(i), kinds[i % 4][0], dropped=kinds[i % 4][1], dataset="ab"[i % 2], question=EVIL
        )
        for i in range(1000)
    ]
    episodes[0]["question"] = "The first question"
    episodes[7]["messages"][3]["content"] = "a needle here"
    log = [{"step": i, "accuracy/first": i / 50} for i in range(1, 50)]
    path, page = page_of(tmp_path, episodes=episodes, log=log)
    path.write_text(page.replace("</body>", PROBE), encoding="utf-8")
    command = [
        CHROMIUM,
        *FLAGS,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        path.as_uri(),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", run.stdout, re.S)[1]))
    reader = found.pop("reader")
    assert found == {
        "all": 1000,
        "hacked": 0,
        "right": 500,
        "fixed": 250,
        "broken": 250,
        "dropped": 250,
        "b": 500,
        "needle": 1,
        "caption": "step 49: first 0.98",
    }
    for text in (
        "The first question",
        "First attempt",
        "Refined attempt",
        "search returned",
        "look again",
        "answered",
    ):
        assert text in reader, text
    assert "CONSOLE" not in run.stderr, [
        line for line in run.stderr.splitlines() if "CONSOLE" in line
    ]
