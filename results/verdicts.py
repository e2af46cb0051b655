"""Judges of answers: an LLM that compares an answer with the reference."""

import asyncio
import hashlib
import json
import re
import sqlite3
import sys
from functools import partial
from pathlib import Path

from reagent.folder import writing
from reagent.served import endpoint_of, named_model, served_name, without_control
from toolkit.http import Endpoint, Refused, Unavailable, complete, insist
from toolkit.text import after_thoughts, capped, clean, spoken

JUDGE_PROMPT = Path(__file__).with_name("judge_prompt.txt").read_text(encoding="utf-8").rstrip("\n")

PROMPT_VERSION = hashlib.sha256(JUDGE_PROMPT.encode()).hexdigest()[:8]
REQUEST_S, REPLY_TOKENS = 300.0, 4096  # for one reply
REPLIES = 4  # asked for in all, where one has no verdict or does not come to its end
ANSWER_CHARS = 8000  # a longer answer is cut in its middle
# every form of a verdict has one of these words; inside what is quoted they are broken
_KEY = re.compile(r"v(?=erdict)|c(?=orrect)|j(?=udge?ment)", re.I)
_SIDES = r"[^\w.,;!?]{0,12}"  # marks between a key and its value: colons, quotes, stars, brackets
_HEDGE = r"(not|in part|part(?:ial)?ly|mostly|almost|nearly|half|neither|either|un\w+)?"
_VALUE = r"(?:in)?correct|right|wrong|yes|no|true|false"
_OTHER = rf"(\W{{0,4}}(?:(?:[/|]|or\b)\W{{0,3}}(?:{_VALUE})|(?:in )?part|\?))?"
_VERDICT = re.compile(
    rf"(?<![a-z])(?:(?:verdict|judge?ment){_SIDES}(?:is\b)?{_SIDES}"
    r"|(?<!not )(?:is_)?correct[\s\"'*`]{0,4}[:：=][\s\"'*`]{0,4})"
    rf"{_HEDGE}[^\w.,;!?]{{0,3}}({_VALUE})(?![a-z]){_OTHER}",
    re.I,
)


def broken(text: str) -> str:
    """The text with a zero-width space in words of verdicts and control strings: safe to quote."""
    return without_control(_KEY.sub(lambda key: key[0] + "\u200b", text))


def judge_request(question: str, golds: list[str], answer: str) -> str:
    """The judge's prompt. The mark is a hash of all it encloses, so no text can hold it."""
    question, answer, *golds = map(broken, (question, capped(answer, ANSWER_CHARS), *golds))
    reference = "\n".join(f"- {gold}" for gold in golds) if len(golds) > 1 else golds[0]
    whole = json.dumps([question, golds, answer])
    mark = f"=====[{hashlib.sha256(whole.encode()).hexdigest()[:16]}]====="
    return JUDGE_PROMPT.format(mark=mark, question=question, reference=reference, answer=answer)


def parse_verdict(text: str) -> bool | None:
    """What a reply says after its thoughts: "VERDICT: CORRECT" or "correct: yes", in whatever
    marks, JSON too, with a note behind it. None where nothing is said, or hedged, or both ways."""
    said = set()
    for hedge, value, other in _VERDICT.findall(after_thoughts(text)):
        right = value.lower() in ("correct", "right", "yes", "true")
        said.add(None if hedge or other else right)
    return said.pop() if len(said) == 1 else None


def open_verdicts(cache: str) -> sqlite3.Connection:
    """The cache of verdicts; "": one in memory. SystemExit where the file is damaged or none."""
    columns = "key TEXT PRIMARY KEY, correct INTEGER, model TEXT, reply TEXT"
    try:
        if cache:
            Path(cache).parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(cache or ":memory:", timeout=60, isolation_level=None)
        db.execute(f"CREATE TABLE IF NOT EXISTS verdicts ({columns})")
        db.execute("SELECT key, correct, model, reply FROM verdicts LIMIT 1")
        problem = db.execute("PRAGMA quick_check").fetchone()[0]
    except (OSError, sqlite3.Error) as error:
        problem = str(error)
    if problem != "ok":
        raise SystemExit(f"the cache {cache} is damaged or none ({problem}): name another")
    return db


class AnswerJudge:
    """An LLM that compares answers with the reference: True, False, None (unscored); no rule. The
    cache (sqlite, "": none) is keyed by judge, prompt version, question, reference and answer.
    Where a reply has no verdict or does not come to its end, another is asked for, REPLIES in all.
    Once the server is down, the rest is unscored."""

    def __init__(self, endpoint: Endpoint, model: str, cache: str, *, served="", patience_s=600.0):
        self.endpoint, self.model, self.patience_s = endpoint, model, patience_s
        self.served = served or model  # what stands behind that name
        self.name = f"{self.served}/{PROMPT_VERSION}"  # what stands beside every number
        self.down, self.problem = False, ""  # why the last unscored answer is unscored
        self.cache, self.db = cache, open_verdicts(cache)

    async def __call__(self, question: str, golds: list[str], answer: str, secret=False):
        """`secret`: the reply may quote what must not lie on a disk, and is not kept there."""
        whole = json.dumps([self.served, PROMPT_VERSION, question, golds, answer])
        key = hashlib.sha256(whole.encode()).hexdigest()
        if kept := self.db.execute("SELECT correct FROM verdicts WHERE key = ?", (key,)).fetchone():
            return bool(kept[0])
        for retry in range(REPLIES):
            if self.down:
                return None
            reply = await self._reply(judge_request(question, golds, answer), retry)
            correct = None if reply is None else parse_verdict(reply)
            if reply is not None and correct is None:
                shown = "not shown: the question is sealed" if secret else repr(clean(reply)[-200:])
                self.problem = f"no verdict in the judge's reply, {shown}"
            if correct is not None:
                row = (key, int(correct), self.served, "" if secret else reply)
                with writing(f"the cache {self.cache}"):
                    self.db.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?)", row)
                return correct
        return None

    async def _reply(self, text: str, retry: int) -> str | None:
        """One reply that came to its end, or None with `problem` set."""
        body = dict(model=self.model, messages=[{"role": "user", "content": text}])
        body |= dict(temperature=0.5 if retry else 0.0, seed=retry)
        once = partial(complete, body=body, most_tokens=REPLY_TOKENS)
        within = dict(request_s=REQUEST_S, patience_s=self.patience_s)
        try:
            choice = await insist([self.endpoint], once, **within)
        except Unavailable as away:
            self.down, self.problem = True, str(away)
            return None
        except Refused as refused:
            self.down = refused.hopeless
            self.problem = f"{self.endpoint.url} refused a request: {refused}"
            return None
        if choice.get("finish_reason") != "stop":
            self.problem = f"the judge's reply ended by {choice.get('finish_reason')}"
            return None
        return spoken(choice["message"])[0]


def open_judge(cfg, runner: asyncio.Runner) -> AnswerJudge | None:
    """The judge at `cfg.judge`, or None where it cannot be asked; looked up when answers wait."""
    endpoint = endpoint_of(cfg.judge, "JUDGE_API_KEY", 16)
    patience = 2.0 if cfg.judge_model else cfg.patience_s  # for the list alone
    listed = named_model(endpoint, cfg.judge_model, "--judge_model", patience_s=patience)
    try:
        card = runner.run(listed)
    except (Unavailable, Refused, SystemExit) as problem:
        if not cfg.judge_model or isinstance(problem, SystemExit):
            print(f"judge: {problem}", file=sys.stderr)
            return None
        card = {"id": cfg.judge_model}
    cache, served = cfg.judge_cache, served_name(card)
    return AnswerJudge(endpoint, card["id"], cache, served=served, patience_s=cfg.patience_s)
