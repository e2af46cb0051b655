"""The pages: safe, complete, and working in a real browser."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pypdfium2
import pytest

from data.page import write_folder_page
from data.report.curves import numeric_series, panels
from data.report.index import compared, grouped, read_run
from data.report.page import INLINE, embed, heads, jsonable, outcomes, slim, write_report
from data.report.plots import Line, visible
from data.report.run import evaluated_episodes, newest_episodes, set_tiles
from reagent.config import flat
from results.page import make_page
from tests.helpers.tiny import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync
--enable-logging=stderr --virtual-time-budget=5000""".split()
EVIL = "<script>window.hacked=1</script><img src=x onerror=window.hacked=1><!--"
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
def test_visible_text_keeps_lines_and_shows_control_characters():
    assert visible("a\n\tb\r\nc") == "a\n\tb\nc"
    assert visible("\x1b[31m\x00\r\u202e") == "\\x1b[31m\\x00\\r\\u202e"


def test_visible_text_encodes_whatever_came_in():
    assert visible("\ud800x\U0001f600").encode() == "\ufffdx\U0001f600".encode()
    assert visible("\ud83d\ude00") == "\U0001f600"
    assert visible("e" + "\u0301" * 1_000_000) == "e" + "\u0301" * 8


def test_embedded_json_cannot_close_its_block_and_holds_no_nan():
    block = embed("x", jsonable({"a": "</script><!--", "b": float("nan"), "c": (1, float("inf"))}))
    assert block.count("<") == 2 and block.endswith("</script>")
    inside = json.loads(block[block.index(">") + 1 : block.rindex("<")])
    assert inside == {"a": "</script><!--", "b": None, "c": [1, None]}


def test_every_text_of_the_page_is_escaped(tmp_path):
    chain = episode("e", [True, False], question=EVIL, dataset=EVIL, tool_text=EVIL)
    log = [{"step": 1, EVIL: 1.0, EVIL + "/a": 1}, {"step": 2, EVIL: 2.0, EVIL + "/a": 3}]
    markdown = f"# {EVIL}\n|{EVIL}|\n|-|\n|{EVIL}|"
    texts = dict(title=EVIL, config={EVIL: EVIL}, markdown=markdown, which=EVIL)
    _, page = page_of(tmp_path, episodes=[chain], log=log, **texts)
    assert "<img" not in page and "window.hacked=1</script>" not in page
    assert not set(map(chr, range(32))) - set("\n\t") & set(page)
    assert embedded(page, "episodes")[0]["question"].startswith("<script>window.hacked=1</script>")


def test_the_page_loads_nothing_from_outside_and_runs_only_what_has_its_nonce(tmp_path):
    _, page = page_of(
        tmp_path, episodes=[episode("e", [True])], log=[{"step": i, "loss": i} for i in range(3)]
    )
    without_names = page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert (
        "http" not in without_names.replace("http-equiv", "")
        and " src=" not in page
        and "@import" not in page
    )
    nonce = re.search("script-src 'nonce-([0-9a-f]{16})'\"", page)[1]
    assert f"default-src 'none';style-src 'nonce-{nonce}'" in page
    scripts = re.findall("<(?:script|style)[^>]*>", page)
    assert scripts.count(f'<script nonce="{nonce}">') == 1
    assert scripts.count(f'<style nonce="{nonce}">') == 1
    assert all("application/json" in tag or nonce in tag for tag in scripts)


def test_many_episodes_lie_in_files_beside_the_page_and_stale_ones_go(tmp_path):
    chains = [episode(str(i), [True], tool_text="</script>ü" * 1000) for i in range(150)]
    for _ in range(2):
        _, page = page_of(tmp_path, episodes=chains)
    parts = embedded(page, "data")["parts"]
    assert len(parts) == 2 and len(page) < 150_000 and 'id="episodes"' not in page
    there = sorted(f"report_episodes/{path.name}" for path in tmp_path.glob("report_episodes/*"))
    assert [part["file"] for part in parts] == there
    read = []
    for number, part in enumerate(parts):
        call = (tmp_path / part["file"]).read_text(encoding="utf-8")
        assert len(call.encode()) < 1.3 * INLINE and part["first"] == len(read)
        text = re.fullmatch(rf"receive\({number},(.*)\);\n", call)[1]
        read += json.loads(json.loads(text))
    assert read == [slim(chain) for chain in chains]
    page_of(tmp_path, episodes=chains[:2])
    assert not list(tmp_path.glob("report_episodes/*"))


def test_nested_config_is_shown_by_dotted_keys():
    assert flat({"a": 1, "rrm": {"url": "x", "b": {"c": 2}}}) == {
        "a": 1,
        "rrm.url": "x",
        "rrm.b.c": 2,
    }


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
    assert not {"ids", "mask", "logps"} & set(shown) and (shown["tokens"], shown["sampled"]) == (
        9,
        5,
    )
    text = shown["messages"][3]["content"]
    assert len(text) < 21_000 and text.endswith("END") and "30,003 characters left out" in text


def test_every_episode_has_an_address_of_its_own():
    twins = [slim(episode("e", [True]) | {"step": step}) for step in (1, 1, 2)]
    apart = slim(episode("e", [True], dataset=""))
    links = [head["link"] for head in heads([*twins, apart, apart])]
    assert links == ["1/toy/e/1", "1/toy/e/2", "2/toy/e/1", "e/1", "e/2"]


def test_an_episode_keeps_its_address_when_older_ones_leave_the_page(tmp_path):
    run_folder(tmp_path, steps=3, siblings=4)
    alls, few = (heads(list(map(slim, newest_episodes(tmp_path, most)))) for most in (12, 6))
    assert [head["step"] for head in alls] == [1] * 4 + [2] * 4 + [3] * 4
    assert [head["link"] for head in few] == [head["link"] for head in alls[-6:]]
    assert all("ids" not in chain for chain in newest_episodes(tmp_path))


# ---------------------------------------------------------------- curves and tables
def test_series_skip_what_is_not_a_finite_number_and_count_missing_endings_as_zero():
    log = [
        {"step": 0, "eval/first": 1},
        {"step": 1, "loss": 1, "note": "x", "ended/limit": 2},
        {"step": 2, "loss": float("nan")},
        {"step": 3},
    ]
    assert numeric_series(log) == {
        "eval/first": [(0, 1.0)],
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
    found, constants = panels({key: Line(line) for key, line in numeric_series(log).items()})
    assert [(panel.section, panel.title, list(panel.lines)) for panel in found] == [
        ("Learning", "accuracy", ["first", "refined"]),
        ("Learning", "score of right and wrong answers", ["right", "wrong"]),
        ("Learning", "score/first", ["first"]),
        ("Optimization", "dlogp/max", ["max"]),
        ("Optimization", "dlogp/mean", ["mean"]),
        ("Other", "odd", ["odd"]),
    ]
    assert constants == {"lr": 0.1}


# ---------------------------------------------------------------- folders
def run_folder(run, steps=2, siblings=1, seed=0, **config):
    """A finished run of grpo_unified.py, its accuracy a tenth of the step, plus a hundredth of the
    seed.
    """
    (run / "episodes").mkdir(parents=True)
    log = []
    for step in range(1, steps + 1):
        rows = [json.dumps(episode("s", [False, True])) + "\n" for _ in range(siblings)]
        (run / f"episodes/step-{step:06d}.jsonl").write_text("".join(rows))
        log.append({"step": step, "accuracy/first": step / 10 + seed / 100})
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    config = {"variant": "u", "lr": 1, "seed": seed, "out_dir": str(run)} | config
    (run / "run.json").write_text(
        json.dumps({"config": config, "command": ["x/grpo_unified.py", "--a"]})
    )


def test_a_run_folder_gets_its_page_and_picture_again(tmp_path):
    run_folder(tmp_path)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"st')  # a run that writes at this moment
    before = (tmp_path / "log.jsonl").read_bytes()
    write_folder_page(tmp_path)
    page = (tmp_path / "report.html").read_text()
    data = embedded(page, "data")
    assert [head["link"] for head in data["heads"]] == ["1/toy/s/1", "2/toy/s/1"]
    assert ["lr", "1"] in data["config"] and f"<title>Reagent-U, {tmp_path}</title>" in page
    ElementTree.parse(tmp_path / "curve.svg")
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_a_line_that_is_no_json_is_named(tmp_path):
    run_folder(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"log.jsonl:2: not a JSON line"):
        write_folder_page(tmp_path)


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(SystemExit, match="no log.jsonl, results.jsonl or episodes/ there or below"):
        write_folder_page(tmp_path)


# ---------------------------------------------------------------- at the end of a run
def test_a_rank_of_torchrun_makes_its_page_from_any_working_directory(tmp_path, monkeypatch):
    run_folder(tmp_path / "out/u")
    monkeypatch.chdir(tmp_path)
    ranks = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="10.255.255.1", MASTER_PORT="1")
    for key, value in ranks.items():
        monkeypatch.setenv(key, value)
    make_page(Path("out/u"))
    assert "<title>Reagent-U, out/u</title>" in (tmp_path / "out/u/report.html").read_text()
    ElementTree.parse(tmp_path / "out/u/curve.svg")


def page_script(tmp_path, monkeypatch, text):
    """Puts a script of our own in the place of data/page.py."""
    (tmp_path / "script.py").write_text(text)
    monkeypatch.setattr("results.page.SCRIPT", tmp_path / "script.py")


def test_the_process_of_a_page_is_no_rank_has_no_card_and_hears_no_signal_of_the_run(
    tmp_path, monkeypatch
):
    told = "json.dump([dict(os.environ), os.getsid(0)], open(sys.argv[1] + '/told', 'w'))"
    page_script(tmp_path, monkeypatch, f"import json, os, sys\n{told}")
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "KEPT"):
        monkeypatch.setenv(key, "1")
    make_page(tmp_path)
    found, session = json.loads((tmp_path / "told").read_text())
    assert found["KEPT"] == "1" and found["CUDA_VISIBLE_DEVICES"] == ""
    assert not [key for key in found if re.search("RANK|WORLD|MASTER|TORCHELASTIC", key)]
    assert session != os.getsid(0)


@pytest.mark.parametrize(
    "script, why",
    {
        "import sys; print('kept', file=sys.stderr); sys.exit('log.jsonl:2: bad')": "log.jsonl:2",
        "import os; os.abort()": "exit -6",
        "import time; time.sleep(60)": "timed out after 0.5 seconds",
    }.items(),
)
def test_a_page_that_fails_is_one_line_and_ends_no_run(tmp_path, monkeypatch, capfd, script, why):
    page_script(tmp_path, monkeypatch, script)
    monkeypatch.setattr("results.page.SECONDS", 0.5 if "sleep" in script else 60)
    make_page(tmp_path)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"no page of {tmp_path}: ") and why in line
    assert line.endswith(f"python evaluate.py page {tmp_path} makes it again")


def test_no_page_waits_for_torch():
    check = "import sys, data.page, data.report.index; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


SUMMARY = dict(dataset="hotpotqa", subset="all", judge="rule", questions=500, k=1)


def test_an_evaluation_has_a_tile_for_each_data_set():
    plain = SUMMARY | {"all": [0.534, 0.481, 0.587]}
    refined = SUMMARY | {"dataset": "aime24", "k": 8, "all": [0.5, 0.4, 0.6], "questions": 30}
    refined["refine"] = {"o1": [0.25, 0.2, 0.3]}
    assert set_tiles([plain, refined]) == [
        ("hotpotqa", "53.4 %", "48.1 to 58.7, 500 questions"),
        ("aime24", "25.0 → 50.0 %", "40.0 to 60.0, 30 questions × 8"),
    ]


def test_the_page_of_an_evaluation_shows_as_many_episodes_of_each_set_and_no_sealed_text(tmp_path):
    lines = []
    for i in range(4):
        line = dict(dataset="ab"[i % 2], id="q", rollout=i // 2, status="answered", correct=True)
        lines.append(line | {"question": f"Q{i}", "attempts": [attempt([0, 0], "x", True)]})
    secret = dict(dataset="c", id="q", rollout=0, status="answered", correct=False)
    lines.append(secret | {"sealed": "U0VDUkVU", "canary": "CANARY", "tokens": 7})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "results.jsonl").write_text(text)
    summaries = [SUMMARY | {"dataset": name, "all": [0.5, 0.4, 0.6]} for name in "abc"]
    (tmp_path / "summary.json").write_text(json.dumps(summaries))
    (tmp_path / "report.md").write_text("# Evaluation\n")
    write_folder_page(tmp_path)
    page = (tmp_path / "report.html").read_text()
    data = embedded(page, "data")
    assert [head["link"] for head in data["heads"]] == ["a/q/1", "b/q/1", "a/q/2", "b/q/2", "c/q/1"]
    assert [tile[0] for tile in data["tiles"]] == ["a", "b", "c", "episodes"]
    assert "U0VDUkVU" not in page and "CANARY" not in page and "kept encrypted" in page
    assert (
        data["heads"][4]["outcomes"] == ["wrong"] and embedded(page, "episodes")[4]["tokens"] == 7
    )


def test_a_large_set_leaves_room_for_the_others_and_a_failed_chain_is_dropped(tmp_path):
    base = dict(rollout=0, status="fault", correct=None, attempts=[])
    rows = [base | {"dataset": name, "id": f"{name}{i}"} for name in "ab" for i in range(3)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown, total = evaluated_episodes(tmp_path, sets=2, most=4)
    assert [row["id"] for row in shown] == ["a0", "a1", "b0", "b1"] and total == 6
    assert outcomes(shown[0]) == ["dropped"] and shown[0]["dropped"] == "fault"


def index_of(folder):
    write_folder_page(folder)
    return embedded((folder / "index.html").read_text(), "data")


def test_the_index_puts_seeds_together_and_links_to_the_pages_of_runs(tmp_path):
    for seed in (0, 2):
        run_folder(tmp_path / f"u/{seed}", seed=seed, model=f"{tmp_path}/sft")
    run_folder(tmp_path / "rule", variant="rule", model=f"{tmp_path}/sft")
    write_folder_page(tmp_path / "u/0")
    (table,) = index_of(tmp_path)["tables"]
    assert table["head"] == ["run", "differs in", "steps", "accuracy/first"]
    seeds = [{"text": "u/0", "href": "u/0/report.html"}, {"text": "u/2", "href": ""}]
    assert table["rows"] == [
        [[{"text": "rule", "href": ""}], "variant rule", "2", "0.200"],
        [seeds, "variant u", "2", "0.210 ± 0.014"],
    ]
    data = embedded((tmp_path / "index.html").read_text(), "data")
    assert [panel["section"] for panel in data["panels"]] == ["accuracy", "accuracy"]
    assert data["panels"][1]["lines"]["first"][1] == pytest.approx([2, 0.21])
    picture = ElementTree.parse(tmp_path / "curves.svg").getroot()
    assert sum(node.get("class", "").startswith("band") for node in picture.iter()) == 1


def test_runs_share_axes_only_where_their_keys_have_one_scale(tmp_path):
    for name, top in (("a", 0.5), ("b", 0.9)):
        run_folder(tmp_path / name, lr=top)
        lines = [{"step": n, "eval/mae": top * n / 2, "eval/tokens": 30} for n in (1, 2)]
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    panels = compared(grouped([read_run(tmp_path, tmp_path / name) for name in "ab"]))
    ranges = {(panel.title, *panel.lines): panel.y_range for panel in panels}
    assert ranges["a", "mae"] == ranges["b", "mae"] != ranges["a", "tokens"]


def test_seeds_whose_models_lie_beside_them_are_seeds_of_each_other(tmp_path):
    for seed in (0, 1):
        run_folder(tmp_path / f"s{seed}/u", seed=seed, model=f"{tmp_path}/s{seed}/sft/step-1")
    (table,) = index_of(tmp_path)["tables"]
    seeds = [{"text": "s0/u", "href": ""}, {"text": "s1/u", "href": ""}]
    assert [row[0] for row in table["rows"]] == [seeds]


def test_runs_of_other_settings_are_no_seeds_and_only_what_is_unusual_is_named(tmp_path):
    run_folder(tmp_path / "a", lr=1)
    run_folder(tmp_path / "b", lr=2)
    (table,) = index_of(tmp_path)["tables"]
    assert [row[1] for row in table["rows"]] == ["lr 1", "lr 2"]
    run_folder(tmp_path / "c", lr=1, rrm={"weight": 0})
    (table,) = index_of(tmp_path)["tables"]
    assert [row[1] for row in table["rows"]] == ["", "lr 2", "rrm.weight 0"]


def test_evaluations_stand_in_the_index_with_their_figures(tmp_path):
    (tmp_path / "e").mkdir()
    (tmp_path / "e/results.jsonl").write_text("")
    (tmp_path / "e/summary.json").write_text(json.dumps([SUMMARY | {"all": [0.5, 0.4, 0.6]}]))
    (table,) = index_of(tmp_path)["tables"]
    link = {"text": "e", "href": "e/report.html"}
    row = [link, "hotpotqa", "all", "rule", "500", "1", "50.0 [40.0, 60.0]"]
    assert table["title"] == "Evaluations" and table["rows"] == [row]


# ---------------------------------------------------------------- in a browser
def in_browser(path, probe="", *flags):
    """What `probe`, the body of an async function, returns on the page; no word on the console."""
    page = path.read_text(encoding="utf-8")
    nonce = re.search(r"'nonce-(\w+)'", page)[1]
    script = f"""<script>window.hacked = 2</script><img src=x onerror="window.hacked = 3">
    <script nonce="{nonce}">(async () => {{ await new Promise(done => setTimeout(done, 300));
    {probe} }})().then(
      found => {{ document.title = JSON.stringify(found); }},
      error => {{ document.title = JSON.stringify(String(error)); }});</script></body>"""
    probed = path.with_name("probed.html")
    probed.write_text(page.replace("</body>", script), encoding="utf-8")
    profile = f"--user-data-dir={path.parent / 'profile'}"
    command = [CHROMIUM, *FLAGS, profile, *flags, "--dump-dom"]
    done = subprocess.run([*command, probed.as_uri()], capture_output=True, text=True, timeout=60)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    blocked = [line for line in said if "Content Security Policy" in line or "x:0" in line]
    assert said == blocked, said  # the two that this function put there
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.S)[1]))


browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium here")

ACTIONS = """
const wait = ms => new Promise(done => setTimeout(done, ms));
const shown = () => document.querySelectorAll("#list .item").length;
const text = id => document.getElementById(id).textContent;
const event = key => new KeyboardEvent("keydown", { key, bubbles: true });
const press = key => document.body.dispatchEvent(event(key));
const choose = async (id, value) => {
  const node = document.getElementById(id);
  node.value = value;
  node.dispatchEvent(new Event(id === "search" ? "input" : "change"));
  await wait(500);
};
const current = () => document.querySelector("[aria-current] .under").textContent;
"""


@browser
def test_the_page_opens_filters_and_throws_nothing_in_chromium_with_a_thousand_episodes(tmp_path):
    kinds = [([True, True], ""), ([True, False], ""), ([False, True], ""), ([True], "fault")]
    episodes = [
        episode(
            str(i),
            kinds[i % 4][0],
            dropped=kinds[i % 4][1],
            dataset="ab"[i % 2],
            question=EVIL,
            tool_text=EVIL + "long" * 300,
        )
        for i in range(1000)
    ]
    episodes[2]["question"] = "The first that was fixed"
    episodes[987]["messages"][3]["content"] = "a needle here"
    log = [{"step": i, "accuracy/first": i / 50, EVIL: i} for i in range(1, 50)]
    markdown = f"## R\n\n| set | `a` |\n|---|--:|\n| **b** \\| c | 0.5 ± 0.1 |\n\n{EVIL}"
    path, page = page_of(tmp_path, episodes=episodes, log=log, markdown=markdown)
    assert len(embedded(page, "data")["parts"]) > 1
    probe = (
        ACTIONS
        + """
const found = { all: shown(), reader: text("reader"), hash: location.hash };
found.tiles = [...document.querySelectorAll(".tile")].map(tile => tile.textContent);
found.table = [...document.querySelectorAll("#results th, #results td")].map(cell =>
  [cell.tagName, cell.className, cell.innerHTML]);
for (const name of ["right", "fixed", "broken", "dropped"]) {
  document.querySelector(`[data-outcome=${name}]`).click();
  found[name] = shown();
}
document.querySelector("[data-outcome=all]").click();
await choose("dataset", "b");
found.b = shown();
await choose("dataset", "");
await choose("search", "needle");
found.needle = [shown(), text("reader").includes("a needle here")];
const move = new PointerEvent("pointermove", { clientX: 9999 });
document.querySelector("figure svg").dispatchEvent(move);
found.caption = document.querySelector("figcaption").textContent;
found.hacked = (window.hacked || 0) + document.querySelectorAll("main img").length;
return found;"""
    )
    found = in_browser(path, probe)
    reader = found.pop("reader")
    assert found == {
        "all": 1000,
        "hash": "",
        "tiles": [
            "1,000episodes",
            "66.7 %first attempts right",
            "66.7 %refined attempts right",
            "250fixed by refinement",
            "250broken by it",
            "250dropped",
        ],
        "table": [
            ["TH", "", "<span>set</span>"],
            ["TH", "right-set", "<span><code>a</code></span>"],
            ["TD", "", "<span><b>b</b> | c</span>"],
            ["TD", "right-set", "<span>0.5 ± 0.1</span>"],
        ],
        "hacked": 0,
        "right": 500,
        "fixed": 250,
        "broken": 250,
        "dropped": 250,
        "b": 500,
        "needle": [1, True],
        "caption": "step 49: first 0.98",
    }
    for part in (
        "The first that was fixed",
        "First attempt",
        "Refined attempt",
        "search returned",
        "look again",
        "answered",
    ):
        assert part in reader, part


def sorted_run(tmp_path):
    """Five siblings of one question: (verdicts, rewards, scores)."""
    kinds = [
        ([True, True], (1.2, 1.1), (0.7, 0.3)),
        ([False, True], (0.1, 1.3), (0.2, 0.9)),
        ([True, False], (1.2, 0.0), (0.8, 0.1)),
        ([False, False], (0.0, 0.2), (0.0, 0.6)),
        ([None], (None,), (None,)),
    ]
    chains = []
    for verdicts, rewards, scores in kinds:
        chain = episode("e", verdicts) | {"step": 7}
        for attempted, reward, score in zip(chain["attempts"], rewards, scores):
            attempted |= {"reward": reward, "score": score}
        chains.append(chain)
    return page_of(tmp_path, episodes=chains)[0]


@browser
def test_sorting_keys_links_and_colours_in_chromium(tmp_path):
    probe = (
        ACTIONS
        + """
const items = () => [...document.querySelectorAll("#list .item")];
const order = () => items().map(item => item.textContent.match(/no. ([0-9])/)[1]).join("");
const found = { opened: current(), item: document.querySelector("[aria-current]").textContent };
for (const { value } of document.getElementById("sort").options) {
  await choose("sort", value);
  found[value] = order();
}
await choose("sort", "order");
items()[3].click();
await wait(100);
found.hash = decodeURIComponent(location.hash);
const marks = [...document.querySelectorAll("mark")];
found.marks = marks.map(mark => [mark.textContent, mark.className]);
press("k"); press("k"); press("j"); await wait(100);
found.keys = current();
press("k"); press("k"); press("f"); await wait(100);
found.f = current();
location.hash = "#" + encodeURIComponent("7/toy/e/5"); await wait(200);
found.linked = [current(), document.querySelector(".stage .tag").textContent];
press("/");
found.focus = document.activeElement.id;
found.shown = [...document.querySelectorAll("kbd")].map(key => key.textContent).join(" ");
return found;"""
    )
    found = in_browser(sorted_run(tmp_path), probe)
    assert found.pop("opened") == "rightfixedstep 7 · toy · no. 2"
    assert "reward 0.10 → 1.30" in found.pop("item")
    assert found == {
        "order": "12345",
        "fixed": "24135",
        "broken": "31425",
        "reward": "21435",
        "lowreward": "34125",
        "score": "24135",
        "lowscore": "31425",
        "hash": "#7/toy/e/4",
        "marks": [["\\boxed{e-0}", "wrong"], ["\\boxed{e-1}", "wrong"]],
        "keys": "wrongbrokenstep 7 · toy · no. 3",
        "f": "rightfixedstep 7 · toy · no. 2",
        "linked": ["unscoredstep 7 · toy · no. 5", "unscored"],
        "focus": "search",
        "shown": "j k f / o",
    }


@browser
def test_on_a_phone_a_tap_goes_to_the_episode(tmp_path):
    probe = (
        ACTIONS
        + """
const top = () => document.getElementById("reader").getBoundingClientRect().top;
const before = top();
document.querySelectorAll("#list .item")[3].click();
await wait(300);
const after = top();
document.querySelector(".steps button").click();
await wait(300);
const wide = document.documentElement.scrollWidth > innerWidth;
return [before > 300, after < 60, top() > 60, wide];"""
    )
    found = in_browser(sorted_run(tmp_path), probe, "--window-size=400,500")
    assert found == [True, True, True, False]


@browser
def test_printing_prints_the_page_with_all_its_texts(tmp_path):
    chain = episode("e", [False, True], tool_text="fact " * 400 + "THE END OF THE RESULT")
    path, _ = page_of(tmp_path, episodes=[chain, episode("other", [True], question="Not this?")])
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--print-to-pdf={tmp_path / 'page.pdf'}", path.as_uri()]
    subprocess.run(command, capture_output=True, timeout=60, check=True)
    document = pypdfium2.PdfDocument(tmp_path / "page.pdf")
    text = " ".join(" ".join(page.get_textpage().get_text_range() for page in document).split())
    for part in ("a run", "Refined attempt", "THE END OF THE RESULT", "it looked", "Use tools."):
        assert part in text, part
    assert "Not this?" not in text and "Search questions" not in text and "next" not in text
