"""Pages that a browser opens: what a run measured, its curves, its episodes turn by turn.

page.html has the markup, the style and the script. It loads nothing from outside, and no text of a
model or of the web is ever markup: texts travel as JSON, which the script puts on the page as text.
Episodes of more than INLINE characters lie in files beside the page, read when they are opened.
"""

import json
import math
import re
import secrets
import time
from collections import Counter
from itertools import accumulate
from pathlib import Path

from data.report.curves import numeric_series, panels
from data.report.plots import CSS, Line, Panel, escape, panel_svg, thin, visible
from reagent.config import flat
from reagent.folder import write_whole
from toolkit.text import capped

MESSAGE = 20_000  # characters of one text; longer ones are cut in the middle
INLINE = 1_000_000  # characters of episodes in the page itself, and at most in a file beside it
UNSHOWN = ("ids", "mask", "logps", "sealed", "canary")  # keys of an episode

# --------------------------------------------------------------------------------------------------
# texts from outside, made harmless


def jsonable(value):
    """A value as strict JSON: texts visible and cut, NaN and infinity None, the rest as text."""
    if isinstance(value, dict):
        return {visible(str(key)): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    return capped(visible(str(value)), MESSAGE)


def as_json(value) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def embed(name: str, value) -> str:
    """A JSON block of the page; `<` as an escape, so that nothing inside can close the block."""
    text = as_json(value).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


# --------------------------------------------------------------------------------------------------
# episodes


def outcomes(episode: dict) -> list[str]:
    """How an episode is filtered: dropped, or by its last attempt, and whether that changed it."""
    if episode.get("dropped"):
        return ["dropped"]
    verdicts = [attempt.get("correct") for attempt in episode.get("attempts") or []]
    if not verdicts or verdicts[-1] is None:
        return ["unscored"]
    names = ["right" if verdicts[-1] else "wrong"]
    if len(verdicts) == 2 and verdicts[0] is not None and bool(verdicts[0]) != bool(verdicts[1]):
        names.append("fixed" if verdicts[1] else "broken")
    return names


def counted(episode: dict) -> dict:
    """An Episode without token ids, mask, log-probs and encrypted texts; the counts stay."""
    if "ids" in episode:
        episode = episode | {"tokens": len(episode["ids"]), "sampled": sum(episode["mask"])}
    return {key: value for key, value in episode.items() if key not in UNSHOWN}


def slim(episode: dict) -> dict:
    """An Episode as JSON data for the page."""
    return jsonable(counted(episode)) | {"outcomes": outcomes(episode)}


def heads(episodes: list[dict]) -> list[dict]:
    """What the list shows of slim episodes; each `link` says step or data set, id and sibling."""
    found, seen = [], Counter()
    for episode in episodes:
        dataset = (episode.get("meta") or {}).get("dataset")
        parts = [str(part) for part in (episode.get("step"), dataset, episode.get("id")) if part]
        seen[*parts] += 1
        sibling = episode.get("sibling") or seen[*parts]
        head = {"step": episode.get("step"), "dataset": dataset, "outcomes": episode["outcomes"]}
        head |= {"sibling": sibling, "link": "/".join([*parts, str(sibling)])}
        head["question"] = (episode.get("question") or "")[:300]
        for key in ("correct", "reward", "score"):
            head[key] = [attempt.get(key) for attempt in episode.get("attempts") or []]
        found.append(head)
    return found


# --------------------------------------------------------------------------------------------------
# the page


def write_report(path, *, title: str, episodes=(), log=(), config=None, **data) -> list[Panel]:
    """Writes the page of a run and returns its panels. episodes: Episode.to_json() dicts, in the
    order to show; log: the dicts of log.jsonl; config: any dict; data: see write_page."""
    series = numeric_series(log)
    drawn, data["constants"] = panels({key: Line(points) for key, points in series.items()})
    data["config"] = [[key, str(value)] for key, value in flat(config or {}).items()]
    write_page(path, title, data, drawn, [slim(episode) for episode in episodes])
    return drawn


def write_page(path, title: str, data: dict, drawn: list[Panel], episodes=()) -> None:
    """Writes `path`, beside and renamed. data: what page.html reads, all of it optional: tiles
    [(label, figure, note)], markdown, tables [{title, head, rows}], config [(key, value)], which
    (what to call episodes that are not all), constants {key: value}, unfolded (sections)."""
    path, nonce = Path(path), secrets.token_hex(8)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(path.stem + "_episodes")
    parts, inline = write_parts(folder, nonce, [as_json(episode) for episode in episodes])
    data = jsonable({"made": time.strftime("Written %Y-%m-%d %H:%M")} | data)
    data |= {"heads": heads(episodes), "parts": parts, "panels": []}
    for panel in drawn:
        lines = {label or panel.title: thin(line.points) for label, line in panel.lines.items()}
        data["panels"].append(jsonable({"section": panel.section, "lines": lines}))
    figures = (f"<figure>{panel_svg(panel)}<figcaption></figcaption></figure>" for panel in drawn)
    slots = {
        "title": escape(title),
        "nonce": nonce,
        "plots_css": CSS.read_text(),
        "figures": "".join(figures),
        "data": embed("data", data) + (embed("episodes", list(episodes)) if inline else ""),
    }
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    write_whole(path, re.sub(r"\{\{(\w+)\}\}", lambda slot: slots[slot[1]], template))
    for old in folder.glob("*.js"):  # only now: until here the page before this one needed them
        if not old.name.startswith(nonce):
            old.unlink()


def write_parts(folder: Path, nonce: str, texts: list[str]) -> tuple[list[dict], bool]:
    """([{file, first}] of the episodes, are they inline?); the nonce ties files to their page."""
    groups, ends = {}, accumulate(map(len, texts))
    for text, end in zip(texts, ends):
        groups.setdefault((end - 1) // INLINE, []).append(text)
    if len(groups) <= 1:
        return [{"file": "", "first": 0}], True
    folder.mkdir(exist_ok=True)
    parts, first = [], 0
    for i, group in enumerate(groups.values()):
        path = folder / f"{nonce}-{i:03}.js"
        call = f"receive({i},{as_json('[' + ','.join(group) + ']')});\n"
        path.write_text(call, encoding="utf-8")
        parts.append({"file": f"{folder.name}/{path.name}", "first": first})
        first += len(group)
    return parts, False
