"""Agent-RRM from both sides: its prompt, its request, reading a judgment, leaks, the client."""

import asyncio
import inspect
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from reagent.config import load_script, read_prompt
from reagent.engines import EngineConfig, make_engine
from reagent.rows import seed_of
from reagent.served import endpoint_of, named_model, served_name, turn_text, without_control
from toolkit.http import Refused, Unavailable, complete, insist, now
from toolkit.http import ask as request
from toolkit.text import capped, spoken

LEAST_ROOM = 64  # tokens: less holds no question with a trajectory
CHECK_S = 2.0  # seconds that a server may be away when a run starts
CUT = ("length", "content_filter", "abort")  # a reply that did not come to its end

RRM_PROMPT = Path(__file__).with_name("rrm_prompt.txt").read_text("utf-8").rstrip("\n")
RRM_REQUEST = "Question:\n{question}\n\nTrajectory of the agent:\n{trajectory}"


@dataclass(frozen=True)
class RewardModelConfig:
    """A reward model at work; `--rrm=URL` is short for `--rrm.source=URL`."""

    source: str = ""  # URL[,URL] of servers | a folder (in this process) | FILE.py with annotate()
    model: str = ""  # its name on the servers; "": the only one that each lists
    prompt_file: str = ""  # another system prompt; an empty file: no system turn
    request_file: str = ""  # another form of the request, with {question} and {trajectory} in it
    memory_share: float = 0.3  # of the GPU, for a folder and for servers that sleep
    sleep: bool = False  # vLLM servers on these GPUs sleep while the policy trains
    max_context: int = 32_768  # tokens; longer trajectories are shortened inside tool results
    max_tokens: int = 4096  # of a judgment, its thoughts included
    temperature: float = 0.3
    seconds: float = 600.0  # for a judgment of a server, turns and tries included
    in_flight: int = 64  # requests at a time to each server, of one rank; 0: all
    max_failures: float = 0.2  # share of the judgments of a step that may fail before a run stops

    @property
    def served(self) -> bool:
        return self.source.startswith(("http://", "https://"))

    @property
    def in_process(self) -> bool:
        return not self.served and not self.source.endswith(".py")

    def check_folder(self) -> None:
        if self.in_process and not Path(self.source).is_dir():
            cure = "train one with train_rrm.py, or give --rrm=http://…/v1 or a FILE.py (annotate)"
            raise SystemExit(f"no reward model in {self.source}: {cure}")

    def check(self, timeout_s: float) -> None:
        """A chain waits for two judgments while the other ranks wait for it."""
        self.check_folder()
        if self.sleep and not self.served:
            raise SystemExit(f"rrm.sleep is for servers (--rrm=http://…/v1), not for {self.source}")
        if self.served and 2 * self.seconds > timeout_s:
            what = f"rrm.seconds = {self.seconds:g}: two judgments of a chain must fit timeout_s"
            raise SystemExit(f"{what} = {timeout_s:g}, so at most {timeout_s / 2:g}")


@dataclass(frozen=True)
class RRMPrompt:
    """What a reward model reads around an attempt."""

    system: str = RRM_PROMPT  # "": no system turn
    request: str = RRM_REQUEST

    def messages(self, question: str, trajectory: str) -> list[dict]:
        parts = {"{question}": question, "{trajectory}": trajectory}
        user = re.sub(r"\{question\}|\{trajectory\}", lambda mark: parts[mark[0]], self.request)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": user}]


def read_rrm_prompt(prompt_file: str, request_file: str) -> RRMPrompt:
    """The prompt in these files, ours where none is given. A form without its places is refused."""
    request = read_prompt(request_file, RRM_REQUEST)
    if any(request.count(mark) != 1 for mark in ("{question}", "{trajectory}")):
        raise SystemExit(f"{request_file}: {{question}} and {{trajectory}} stand in it once each")
    return RRMPrompt(read_prompt(prompt_file, RRM_PROMPT), request)


OURS = RRMPrompt()

# ---------------------------------------------------------------- reading a judgment


@dataclass(frozen=True)
class Judgment:
    think: str
    critique: str
    score: float


_SCORE = r"0(?:\.\d{1,6})?|1(?:\.0{1,6})?|\.\d{1,6}"
_UNTAGGED = r"((?:(?!</?(?:{0})>).)*+)"  # a text without these tags
_THINK, _CRITIQUE = _UNTAGGED.format("think"), _UNTAGGED.format("think|critique|score")
_JUDGMENT = re.compile(
    rf"\s*<think>{_THINK}</think>\s*<critique>{_CRITIQUE}</critique>"
    rf"\s*<score>\s*({_SCORE})\s*</score>\s*",
    re.S,
)


def parse_judgment(text: str) -> Judgment | None:
    """Exactly <think>…</think><critique>…</critique><score>s</score>, 0 <= s <= 1; else None.
    Critique and score are read after the analysis, so a score inside it never wins."""
    match = _JUDGMENT.fullmatch(text) if len(text) <= 100_000 else None
    think, critique = (match[1].strip(), match[2].strip()) if match else ("", "")
    return Judgment(think, critique, float(match[3])) if think and critique else None


_NUMBER = re.compile(r"[\s*_`\"']*(0?\.\d{1,20}|0\.?|1(?:\.0{0,20})?)[\s*_`\"']*")


def read_judgment(message: dict) -> Judgment | None:
    """The judgment in the message of a chat reply, read at work by what it holds; None: unreadable.
    After the thoughts, wherever they stand (a field of their own, one or several blocks, without
    their opener), one critique and one score; text around them and code fences do no harm. In
    training the format reward goes by `parse_judgment`."""
    text, thoughts = spoken(message)
    if "</critique>" not in text and "</score>" not in text:  # a server that took all for thoughts
        text, thoughts = thoughts, ""
    text = text.encode("utf-8", "replace").decode().rstrip()
    while text.endswith("</think>"):  # a closer after everything closes nothing
        text = text.removesuffix("</think>").rstrip()
    head, _, rest = text.rpartition("</think>")
    blocks = [_blocks(name, rest.partition("<think>")[0]) for name in ("critique", "score")]
    number = _NUMBER.fullmatch(blocks[1])
    if len(text) > 100_000 or not number or not blocks[0]:
        return None
    said = [piece.strip() for piece in re.split("</?think>", head)]
    think = next(filter(None, reversed(said)), thoughts.strip())
    return Judgment(think, blocks[0], float(number[1]))


def _blocks(name: str, text: str) -> str:
    """What stands between <name> and </name>; "" unless there is exactly one of each."""
    alone = text.count(f"<{name}>") == text.count(f"</{name}>") == 1
    inside, closer, _ = text.partition(f"<{name}>")[2].partition(f"</{name}>")
    return inside.strip() if alone and closer else ""


# ---------------------------------------------------------------- rows of judgments


def golds_of(row: dict) -> list[str]:
    """The answers of a row; [] where it has none: then nothing is known of leaks."""
    answer = [] if row.get("answer") is None else row["answer"]
    return list(map(str, answer if isinstance(answer, list) else [answer]))


def annotation(row: dict) -> tuple[float | None, str | None]:
    """The annotated score and critique of a row, which may stand in one text."""
    if judgment := parse_judgment(row.get("judgment") or ""):
        return judgment.score, judgment.critique
    return row.get("score"), row.get("critique")


def row_trajectory(row: dict) -> str:
    return trajectory_text(row["trajectory"])


_TEXT, _BOOL = (str, "a text"), (bool, "true or false")
_SCORE_FORM, _ANSWER_FORM = "a number from 0 to 1", "a text, a number or a list of these"
_FIELDS = {"score": ((int, float), _SCORE_FORM), "correct": _BOOL, "grounded": _BOOL}
_FIELDS |= {"answer": ((str, int, float, list), _ANSWER_FORM)}
_FIELDS |= {"think": _TEXT, "critique": _TEXT, "judgment": _TEXT}


def check_rrm_row(row: dict) -> str | None:
    """What is wrong with an RRM row (docs/records), or None; so for the checks below."""
    question, trajectory = row.get("question"), row.get("trajectory")
    if not isinstance(question, str) or not isinstance(trajectory, (str, list)) or not trajectory:
        return f"an RRM row needs 'question' and 'trajectory'; found the keys {sorted(row)}"
    try:
        plain_turns(trajectory)
    except ValueError as error:
        return str(error)
    if row.get("score") is None and row.get("correct") is None and "judgment" not in row:
        return "an RRM row needs 'score', 'correct' or both"
    for key, (kinds, form) in _FIELDS.items():
        value = row.get(key)
        fits = value is None or isinstance(value, kinds)
        if key == "answer" and isinstance(value, list):
            fits = all(type(each) in (str, int, float) for each in value)
        if key == "score" and fits and value is not None:
            fits = not isinstance(value, bool) and 0 <= value <= 1
        if not fits:
            return f"{key!r} is {value!r}: {form}"
    return None


def target_text(row: dict) -> str:
    """The three blocks that SFT trains on."""
    if "judgment" in row:
        return row["judgment"]
    think, critique, score = row["think"], row["critique"], row["score"]
    return f"<think>{think}</think><critique>{critique}</critique><score>{score:.2f}</score>"


def check_judged_row(row: dict, weighted: bool = False) -> str | None:
    """What SFT needs beyond check_rrm_row: a judgment to learn; if its verdict is to be weighted,
    also where in its text that begins."""
    wanted = () if "judgment" in row else ("think", "critique", "score")
    if missing := [key for key in wanted if row.get(key) is None]:
        return f"SFT needs {', '.join(map(repr, missing))}; found the keys {sorted(row)}"
    if problem := check_rrm_row(row):
        return problem
    if parse_judgment(target_text(row)) is None:
        return "the judgment is not valid"
    at = row.get("verdict_at")
    if weighted and (not isinstance(at, int) or not 0 <= at < len(target_text(row))):
        return f"'verdict_at' is {at!r}: the place in the judgment's text where its verdict begins"


# ---------------------------------------------------------------- the client


class RewardModel:
    """The client of a reasoning reward model: asks, reads, asks again at a fresh seed, counts.
    `ask(question, trajectory, its transcript, seed, seconds)` -> a choice {"message",
    "finish_reason"} of a chat completion, or Unavailable | Refused. `size` counts what `room`
    limits: question and transcript. `name`: what answers. Where it `must_answer`, Unavailable stops
    the run instead of costing a judgment."""

    tries = 3  # at a judgment, each at a seed of its own
    must_answer = False

    def __init__(self, ask, *, size=len, room=1_000_000, seconds=600.0, name=""):
        if room < LEAST_ROOM:
            what = "the reward model's context is too small for any judgment: its prompt and"
            left = f"leave {max(room, 0)} tokens for a question and its trajectory"
            raise SystemExit(f"{what} rrm.max_tokens {left}")
        self.ask, self.size, self.room = ask, size, room
        self.seconds, self.name = seconds, name
        self.asked = self.failed = self.unread = 0
        self.problem = ""  # the first reply that could not be read, or the first failure
        self.answered = False  # has any request been?
        self.pending = self.refusals = 0  # judgments under way, and those that were refused
        self.settled = asyncio.Event()  # something was answered, or all under way were refused
        self.servers: list = []  # Endpoints
        self.engine = None  # of a reward model in this process; who is done with it may close it

    async def __call__(self, question: str, trajectory, key: tuple) -> Judgment | None:
        """Judges an attempt (paper section 3.4) without the gold; None: no valid judgment."""
        return (await self.judge(question, trajectory, key))[0]

    async def tell_servers(self, what: str) -> None:
        """what: "wake_up" | "sleep?level=1", which keeps the weights in the host's memory. All
        servers at once; SystemExit where one cannot, or where none is there any more."""
        urls = [f"{server.url.removesuffix('/v1')}/{what}" for server in self.servers]
        more, keys = dict(body={}, seconds=300.0), [server.headers for server in self.servers]
        calls = [request("POST", url, headers=key, **more) for url, key in zip(urls, keys)]
        replies, gone = await asyncio.gather(*calls, return_exceptions=True), 0
        for url, reply in zip(urls, replies):
            if isinstance(reply, Unavailable) and not reply.status and not reply.late:
                gone += 1  # and with it what it held of the card
            elif isinstance(reply, Exception):
                need = "VLLM_SERVER_DEV_MODE=1 vllm serve … --enable-sleep-mode"
                raise SystemExit(f"{url}: {reply}; rrm.sleep needs {need}") from reply
        if gone == len(urls):
            raise SystemExit(f"{what}: no server of the reward model is there: {self.name}")

    async def try_out(self, question: str) -> None:
        """SystemExit where no judgment of a short attempt at the question can be read."""
        attempt = [{"role": "assistant", "content": "I cannot find it. \\boxed{unknown}"}]
        try:
            judgment = await self(question, attempt, ("preflight",))
        except (Refused, Unavailable) as problem:
            judgment, self.problem = None, str(problem)
        if judgment is None:
            raise SystemExit(f"the reward model {self.name} gives no judgment: {self.problem}")

    async def judge(self, question: str, trajectory, key: tuple) -> tuple[Judgment | None, int]:
        """(the judgment or None, how many replies could not be read)."""
        self.asked, self.pending = self.asked + 1, self.pending + 1
        try:
            judgment, unread = await self._judge(question, trajectory, key)
        finally:
            self.pending -= 1
            self._settle()
        self.failed, self.unread = self.failed + (judgment is None), self.unread + unread
        return judgment, unread

    async def _judge(self, question, trajectory, key) -> tuple[Judgment | None, int]:
        text = fit_trajectory(trajectory, self.room - self.size(question), self.size)
        if text is None:
            self._note(f"a trajectory does not fit {self.room} tokens")
            return None, 0
        until = time.monotonic() + self.seconds
        for unread in range(self.tries):
            left, seed = until - time.monotonic(), seed_of(*key, "judge", unread)
            try:
                choice = await self.ask(question, trajectory, text, seed, left)
            except (Refused, Unavailable) as problem:
                refused = isinstance(problem, Refused)
                if refused and (problem.hopeless or not await self._was_answered()):
                    raise
                if not refused and self.must_answer:
                    raise
                self._note(f"refused: {problem}" if refused else str(problem))
                return None, unread
            self.answered = True
            self._settle()
            message, ended = choice["message"], choice.get("finish_reason")
            # one that was cut may have gone on with another score
            if ended not in CUT and (judgment := read_judgment(message)):
                return judgment, unread
            said = "".join(spoken(message))[-200:]
            self._note(f"no judgment in a reply ({ended}) that ends {said!r}")
        return None, self.tries

    async def _was_answered(self) -> bool:
        """Known once any request was answered, or once all that are under way were refused."""
        self.refusals += 1
        self._settle()
        await self.settled.wait()
        self.refusals -= 1
        return self.answered

    def _settle(self) -> None:
        if self.answered or self.pending == self.refusals > 0:
            self.settled.set()

    def _note(self, problem: str) -> None:
        if not self.problem:
            print(f"reward model: {problem}", file=sys.stderr)
            self.problem = problem


# ---------------------------------------------------------------- trajectories

# the start of a line of a turn that could be taken for the head of another turn, by a reader who
# sees no difference between line ends, cases, spaces and brackets: brackets around a role, or
# around a few words that have the line to themselves
_ENDS = r"\n\r\v\f\x1c-\x1e\x85\u2028\u2029"
_ROLES = "system|developer|user|human|assistant|agent|model|ai|tool|function|observation"
_ROLES += "|environment"
_HEADER = re.compile(
    rf"(\A|[{_ENDS}])([^\w{_ENDS}\[\uff3b\u3010\\]*)(\\*[\[\uff3b\u3010]"
    rf"(?=[\W_]{{0,20}}(?:{_ROLES})"
    rf"|[^][=\d\\{_ENDS}]{{1,40}}[]\uff3d\u3011][^\w{_ENDS}]{{0,20}}(?:\Z|[{_ENDS}])))",
    re.I,
)


def plain_turns(trajectory: str | list[dict]) -> list[dict]:
    """A trajectory as turns of {"role", "content"}: calls stand in the turn that made them, parts
    are joined; one text is a turn without a role. ValueError for what is no conversation."""
    if isinstance(trajectory, str):
        return [{"role": "", "content": trajectory}]
    turns = []
    for i, message in enumerate(trajectory):
        role = message.get("role") if isinstance(message, dict) else None
        role = {"function": "tool", "developer": "system"}.get(role, role)
        if role not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"message {i} of the trajectory has the role {role!r}")
        content = turn_text(message) if role == "assistant" else spoken(message)[0]
        turns.append({"role": role, "content": content})
    return turns


def trajectory_text(trajectory: str | list[dict], cap: int | None = None) -> str:
    """The transcript that a reward model reads: each turn under a line [role]; a line of a turn's
    own that looks like one gets a backslash, so nobody can speak in another's name. Tool results
    of more than `cap` characters are cut in their middle."""
    parts = []
    for turn in plain_turns(trajectory):
        role, text = turn["role"], turn["content"]
        if role == "tool" and cap is not None:
            text = capped(text, cap)
        parts.append(f"[{role}]\n" + _HEADER.sub(r"\1\2\\\3", text) if role else text)
    return "\n".join(parts)


def fit_trajectory(trajectory: str | list, room: int, size: Callable[[str], int]) -> str | None:
    """Shortens long tool results until size(text) <= room; the end is never cut. None: no fit."""
    results = [turn["content"] for turn in plain_turns(trajectory) if turn["role"] == "tool"]
    text, cap = trajectory_text(trajectory), max(map(len, results), default=0)
    while size(text) > room:
        if (cap := cap // 2) < 32:
            return None
        text = trajectory_text(trajectory, cap)
    return text


# ---------------------------------------------------------------- a script, this process, servers


def scripted_rrm(path: str, seconds: float) -> RewardModel:
    """The reward model is a Python file: annotate(question, turns) -> three blocks | ValueError."""
    annotate = getattr(load_script(path), "annotate", None)
    if not callable(annotate):
        raise SystemExit(f"{path} has no annotate(question, messages)")

    async def ask(question, trajectory, text, seed, seconds):
        try:
            said = annotate(question, plain_turns(trajectory))
            if inspect.isawaitable(said):
                said = await asyncio.wait_for(said, seconds)
        except TimeoutError as error:
            raise Unavailable(f"{path} took too long", late=True) from error
        except ValueError as error:  # a question of another world
            raise Refused(f"{path}: {error}", 422) from error
        if not isinstance(said, str):
            raise Unavailable(f"annotate returned {said!r:.80}, not a text", late=True)
        return {"message": {"content": said}}

    return RewardModel(ask, seconds=seconds, name=path)


def engine_rrm(engine, chat, config: RewardModelConfig, prompt: RRMPrompt = OURS) -> RewardModel:
    """The client of a reward model behind an engine."""
    options = dict(temperature=config.temperature, top_p=1.0, max_new_tokens=config.max_tokens)

    async def ask(question, trajectory, text, seed, seconds):
        ids = prompt_ids(chat, question, text, prompt)
        sample = await engine.generate(ids, seed=seed, **options)
        said = chat.opened + chat.decode([i for i in sample.ids if i != chat.closer_id])
        return {"message": {"content": said}, "finish_reason": sample.finish_reason}

    room = config.max_context - config.max_tokens - len(prompt_ids(chat, "", "", prompt))
    rrm = RewardModel(ask, size=lambda text: len(chat.outside(text)), room=room, name=config.source)
    rrm.engine = engine
    return rrm


def prompt_ids(chat, question: str, transcript: str, prompt: RRMPrompt = OURS) -> list[int]:
    return chat.prompt(prompt.messages(question, transcript), None)


def served_rrm(
    config: RewardModelConfig, prompt: RRMPrompt = OURS, broken: Callable[[str], str] = str
) -> RewardModel:
    """The client of OpenAI-compatible servers (key: RRM_API_KEY), asked here what they serve.
    `broken` breaks the control strings of a text."""
    cards, within = {}, dict(request_s=30.0, patience_s=CHECK_S)
    for url in config.source.split(","):
        endpoint = endpoint_of(url, "RRM_API_KEY", config.in_flight)
        try:
            cards[endpoint] = now(named_model(endpoint, config.model, "--rrm.model", **within))
        except (Unavailable, Refused) as problem:
            hint = "start one with `vllm serve <RRM folder> --port …`"
            hint = "its key stands in RRM_API_KEY" if problem.status in (401, 403) else hint
            raise SystemExit(f"no reward model answers at {url} ({problem}): {hint}") from problem

    async def ask(question, trajectory, text, seed, seconds):
        messages = prompt.messages(question, text)
        messages[-1]["content"] = without_control(broken(messages[-1]["content"]))
        body = dict(messages=messages, temperature=config.temperature, top_p=1.0, seed=seed % 2**31)

        async def once(endpoint, seconds):
            named = body | {"model": cards[endpoint]["id"]}
            return await complete(endpoint, named, config.max_tokens, seconds=seconds)

        wait = dict(seconds=seconds, request_s=seconds, patience_s=seconds)
        return await insist(list(cards), once, **wait)

    def size(text: str) -> int:  # no tokenizer is at hand: three bytes are a token, or nearly so
        return len(text.encode()) // 3

    held = [card.get("max_model_len") for card in cards.values()]
    room = min([config.max_context, *(n for n in held if isinstance(n, int))]) - config.max_tokens
    room -= size(prompt.system + prompt.request)
    name = ", ".join(sorted(set(map(served_name, cards.values()))))
    rrm = RewardModel(ask, size=size, room=room, seconds=config.seconds, name=name)
    rrm.servers = list(cards)
    return rrm


def open_rrm(config: RewardModelConfig, chat, *, engine: EngineConfig) -> RewardModel:
    """The client of the reward model of `config`; `chat` breaks control strings for servers. That
    of a folder has an engine of its own in this process."""
    prompt = read_rrm_prompt(config.prompt_file, config.request_file)
    if config.served:
        return served_rrm(config, prompt, chat.broken)
    if not config.in_process:
        if config.prompt_file or config.request_file:
            print(f"rrm.prompt_file, rrm.request_file: {config.source} reads no prompt", flush=True)
        return scripted_rrm(config.source, config.seconds)
    config.check_folder()
    from reagent.policy import load_chat

    own = load_chat(config.source, tools=False)
    alone = dict(sleep=False, tensor_parallel=1, memory_share=config.memory_share)
    options = dict(max_context=config.max_context)
    made = make_engine(replace(engine, **alone), config.source, own.stop_ids, **options)
    return engine_rrm(made, own, config, prompt)
