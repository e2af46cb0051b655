"""Agent-RRM as a tool of its own: judges trajectories of any agent, one JSON line each.

    python evaluate.py critique --rrm=FOLDER|URL[,URL]|FILE.py FILE|FOLDER|- … [--key=value …]
    python evaluate.py critique --rrm=https://host/v1 --rrm.model=NAME --out=judged.jsonl runs/

A line: {"row": "FILE:LINE", "id"?, "attempt"?, "score", "critique", "think", "rrm", "work"}; `work`
is a digest of what was judged. What is read: data/trajectories.py. With --out the same command goes
on where it stopped. The key of the servers: RRM_API_KEY. Ends with 1 where a row is not judged.
"""

import asyncio
import hashlib
import json
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from data.growing import whole_rows
from data.trajectories import Unread, Work, read_works
from reagent.config import parse_config
from reagent.engines import EngineConfig, run_together
from reagent.folder import write_whole
from reagent.reward_model import RewardModel, RewardModelConfig, open_rrm
from reagent.rows import drop_cut_line
from reagent.served import TextChat
from toolkit.http import Refused, Unavailable
from toolkit.text import clean


@dataclass
class Config:
    rrm: RewardModelConfig = RewardModelConfig()
    question: str = ""  # of rows and texts that name none
    out: str = ""  # a JSONL file that grows, and goes on when called again; "": to the terminal
    pretty: bool = False  # for people
    limit: int = 0  # the first so many; 0: all
    seed: int = 0
    engine: EngineConfig = EngineConfig(sleep=False)  # of a folder


def numbered(works: list[Work]) -> dict[str, Work]:
    """{digest of what is judged: work}; the second of two equal works gets "#2" behind it."""
    found, times = {}, Counter()
    for work in works:
        whole = json.dumps([work.question, work.turns])
        digest = hashlib.sha256(whole.encode()).hexdigest()[:16]
        times[digest] += 1
        found[digest if times[digest] == 1 else f"{digest}#{times[digest]}"] = work
    return found


def read_judged(path: str, rrm: str) -> dict[str, dict]:
    """{digest: line} of an earlier call; judgments of another reward model are refused."""
    if not path:
        return {}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    drop_cut_line(Path(path))
    try:
        judged = {line["work"]: line for line in whole_rows(path)}
        others = {line["rrm"] for line in judged.values()} - {rrm}
    except (KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"--out={path} holds other lines than ours ({error!r})") from error
    if others:
        told = f"--out={path} holds judgments of {', '.join(sorted(others))}, not of {rrm}"
        raise SystemExit(f"{told}: name another file")
    return judged


def line_of(work: Work, digest: str, judgment, rrm: str) -> dict:
    names = {"row": work.row, "id": work.name, "attempt": work.attempt}
    told = {"score": judgment.score, "critique": judgment.critique, "think": judgment.think}
    return {k: v for k, v in names.items() if v} | told | {"rrm": rrm, "work": digest}


def pretty(line: dict, question: str) -> str:
    """One judgment for a terminal."""
    asked = textwrap.shorten(clean(question), 96, placeholder=" …")
    name = " ".join(str(line[key]) for key in ("row", "id") if key in line)
    attempt = f", attempt {line['attempt']}" if "attempt" in line else ""
    bar = "█" * round(10 * line["score"])
    head = f"{line['score']:.2f} {bar:·<10} {name}{attempt}"
    parts = [head, *([f"  {asked}"] if asked else [])]
    parts.append(textwrap.indent(textwrap.fill(clean(line["critique"]), 92), "  > "))
    thoughts = textwrap.shorten(clean(line["think"]), 600, placeholder=" …")
    return "\n".join([*parts, textwrap.indent(textwrap.fill(thoughts, 92), "  | "), ""])


async def judge_all(rrm: RewardModel, works: dict[str, Work], cfg: Config, live: int, done) -> None:
    """Judges works, `live` at a time (0: all); `done(digest, judgment or None)` as each ends."""
    todo = iter(works.items())

    async def worker():
        for digest, work in todo:
            done(digest, await rrm(work.question, work.turns, (cfg.seed, "critique", digest)))

    await run_together(worker() for _ in range(min(live or len(works), len(works))))


def main(argv: list[str]) -> None:
    keys = [arg for arg in argv if arg.startswith("--") or arg == "-h"]
    files = [arg for arg in argv if arg not in keys]
    if "-h" in keys or "--help" in keys:
        print(__doc__)
    cfg = parse_config(Config, keys)
    if not cfg.rrm.source or not files:
        raise SystemExit("critique needs --rrm=FOLDER|URL|FILE.py and files, folders or - (stdin)")
    found = list(read_works(files, cfg.question))
    unread = [each for each in found if isinstance(each, Unread)]
    works = [each for each in found if isinstance(each, Work)]
    named = numbered(works[: cfg.limit or len(works)])
    for each in unread:
        print(f"{each.row}: {each.problem}", file=sys.stderr)
    if not named:
        raise SystemExit(f"no trajectory to judge: {len(unread)} rows could not be read")
    rrm = open_rrm(cfg.rrm, TextChat(), engine=cfg.engine)
    rrm.must_answer = True  # a server that is away ends the call, and no row is lost by it
    judged = read_judged(cfg.out, rrm.name)
    missing = {digest: work for digest, work in named.items() if digest not in judged}
    live = len(cfg.rrm.source.split(",")) * cfg.rrm.in_flight if cfg.rrm.served else 0
    try:
        failed = judge_rows(rrm, named, missing, judged, cfg, live)
    except (Unavailable, Refused) as down:
        told = f"{sum(d in judged for d in named)} of {len(named)} are judged"
        again = ": the same command goes on" if cfg.out else ""
        raise SystemExit(f"{down}; {told}{again}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    scores = [judged[digest]["score"] for digest in named if digest in judged]
    mean = f", mean score {sum(scores) / len(scores):.3f}" if scores else ""
    told = f"{len(scores)} judged{mean}, {len(failed)} without a valid judgment"
    for work in failed:
        print(f"{work.row}: no valid judgment", file=sys.stderr)
    print(f"{told}, {len(unread)} rows not read", file=sys.stderr)
    if failed or unread:
        raise SystemExit(1)


def judge_rows(rrm, named: dict, missing: dict, judged: dict, cfg: Config, live: int) -> list[Work]:
    """Judges what is missing, into `judged`, the file and the terminal; -> works without a valid
    judgment. The file ends in the order of the rows."""
    failed = []
    settings = dict(total=len(named), initial=len(named) - len(missing), unit="row")
    pause = 0.5 if sys.stderr.isatty() else 30.0  # seconds
    bar = tqdm(desc="judgments", mininterval=pause, disable=len(missing) < 2, **settings)
    file = open(cfg.out, "a", encoding="utf-8") if cfg.out else None

    def done(digest, judgment):
        bar.update()
        if judgment is None:
            failed.append(named[digest])
            return
        line = judged[digest] = line_of(named[digest], digest, judgment, rrm.name)
        if file:
            file.write(json.dumps(line) + "\n")
            file.flush()
        if cfg.pretty:
            tqdm.write(pretty(line, named[digest].question))
        elif not file:
            tqdm.write(json.dumps(line))
        sys.stdout.flush()

    with asyncio.Runner() as runner, bar:
        runner.run(judge_all(rrm, missing, cfg, live, done))
    if file:
        file.close()
        ordered = [judged.pop(d) for d in named if d in judged]
        lines = (json.dumps(line) + "\n" for line in [*ordered, *judged.values()])
        write_whole(Path(cfg.out), lines)
        judged |= {line["work"]: line for line in ordered}
    return failed


if __name__ == "__main__":
    main(sys.argv[1:])
