"""One question, shown as it is answered: attempt, critique, refined attempt (Reagent-C).

    python evaluate.py ask "question" --model=FOLDER|URL [--rrm=FOLDER|URL|FILE.py] [--refine]
    python evaluate.py ask "What does it cost?" --model=https://host/v1 --files=bill.pdf,photo.png

The loop, its limits and its tools are those of evaluate.py. Keys: MODEL_API_KEY, RRM_API_KEY and
those of the tools. A server that takes messages needs no tokenizer. Ends with 1 without answer.
"""

import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import evaluate
import rollout
from reagent import engines, reward_model
from reagent.calls import made_up_result, read_turn
from reagent.config import parse_config, read_prompt
from reagent.engines import EngineConfig
from reagent.reward_model import RewardModelConfig
from reagent.rows import shown_question
from results.benchmarks import DataSet, Task
from toolkit.http import Refused, Unavailable
from toolkit.text import capped, clean
from toolkit.web import Web
from tools import Toolbox

RESULT_CHARS = 1500  # of a result that are shown; the model reads all of it
READERS = {"image2text": "VISION_URL", "audio2text": "SPEECH_URL"}  # tool -> what it needs


@dataclass
class Config:
    model: str = ""  # a Hugging Face folder or name, or http://…/v1 of a server
    rrm: RewardModelConfig = RewardModelConfig()  # whose critique and score are shown
    refine: bool = False  # a second attempt after the critique
    files: tuple[str, ...] = ()  # that come with the question
    tools: str = ""  # names, or none; "": those that work here
    corpus: str = ""  # local pages: search and browse stay offline
    allow: str = ""  # host:port pairs that browse may open beyond the public web
    unsafe_python: bool = False  # run code without a sandbox where this machine has none
    seconds_per_call: float = 60.0
    temperature: float = 0.6  # 0: greedy
    top_p: float = 0.95
    max_turns: int = 30  # with tool calls
    max_tokens_per_attempt: int = 32_768  # tool results included; less where no more fits
    max_new_tokens_per_turn: int = 0  # 0: as many as the attempt has left
    max_context: int = 0  # tokens of a chain; 0: the model's positions
    prompt_file: str = ""  # another system prompt
    chat_template: str = ""  # a Jinja file for a model whose own template has no tools
    endpoint: str = "auto"  # of a served model: auto | completions | chat
    served_model: str = ""  # its name there; "": the only one that the server lists
    tokenizer: str = ""  # of a served model: a folder or name; "": what the server was started with
    engine: EngineConfig = evaluate.AT_WORK  # of a folder
    seed: int = 0
    patience_s: float = 30.0  # how long to wait for a server that is away


# --------------------------------------------------------------------------------------------------
# what is shown


class Screen:
    """Stands between the loop and its engine and reward model, and prints what passes."""

    def __init__(self, engine, chat, schemas: list[dict], rrm=None):
        self.engine, self.chat, self.schemas, self.rrm = engine, chat, schemas, rrm
        self.messages: list[dict] = []  # of the last fragment
        self.colours = sys.stdout.isatty()

    def show(self, text: str, colour: int = 0, indent: str = "") -> None:
        for line in clean(text).splitlines():
            line = indent + line
            print(f"\x1b[{colour}m{line}\x1b[0m" if self.colours and colour else line, flush=True)

    def fragment(self, messages: list[dict]) -> list[int]:
        self.messages = messages
        return type(self.chat).fragment(self.chat, messages)

    def results(self) -> None:
        """What was appended since the last turn: results, and calls for an answer."""
        for message in self.messages:
            if message["role"] == "tool":
                self.show(capped(message["content"], RESULT_CHARS), 36, "  < ")
            elif message["content"] == rollout.FINAL_PROMPT:
                self.show(message["content"], 33, "  ! ")
            else:  # it holds the critique, which was shown
                self.show("\nREFINED ATTEMPT", 35)
        self.messages = []

    async def generate(self, ids, **options):
        self.results()
        began = time.monotonic()
        sample = await self.engine.generate(ids, **options)
        said = [i for i in sample.ids if i not in self.chat.stop_ids]
        text = self.chat.opened + self.chat.decode(said)
        made_up = made_up_result(text, self.chat.calls)
        self.turn(text if made_up is None else text[:made_up], len(sample.ids), began)
        if sample.finish_reason != "stop":
            self.show(f"(the turn ended by {sample.finish_reason})", 33, "  ! ")
        return sample

    def turn(self, text: str, tokens: int, began: float) -> None:
        """Thoughts, words and calls of one turn."""
        self.show(f"turn of {tokens} tokens, {time.monotonic() - began:.1f} s", 90)
        turn = read_turn(text, self.chat.calls, self.schemas)
        for start, end in reversed(turn.spans):
            text = text[:start] + text[end:]
        head, closer, rest = text.rpartition("</think>")
        if closer or text.startswith("<think>"):
            thoughts = head if closer else text
            self.show(thoughts.replace("<think>", "").strip(), 90, "  | ")
        self.show((rest if closer or not text.startswith("<think>") else "").strip(), 0, "  ")
        for call in turn.calls:
            given = json.dumps(call.arguments, ensure_ascii=False)
            self.show(f"{call.name}({given})" if not call.problem else call.problem, 34, "  > ")

    async def judge(self, question: str, turns: list[dict], key: tuple):
        self.results()
        judgment, unread = await self.rrm.judge(question, turns, key)
        if judgment is None:
            self.show(f"no valid judgment ({self.rrm.problem})", 31)
        else:
            self.show(f"\nCRITIQUE, score {judgment.score:.2f}", 35)
            self.show(judgment.critique, 35, "  ")
        return judgment, unread


# --------------------------------------------------------------------------------------------------


def tools_here(cfg: Config) -> str:
    """The names of the tools that this machine and its environment can run."""
    if cfg.tools:
        return cfg.tools
    names = ["search", "browse"] if cfg.corpus or Web().settings["search"] else []
    with contextlib.suppress(SystemExit):
        Toolbox(["python"], unsafe_python=cfg.unsafe_python).close()
        names.append("python")
    if cfg.files:
        names += ["file_reader", *(name for name, key in READERS.items() if os.environ.get(key))]
    return ",".join(names) or "none"


def with_files(cfg: Config, folder: str) -> list[str]:
    """Copies of the files in a folder of their own; -> their names there."""
    for path in map(Path, cfg.files):
        if not path.is_file():
            raise SystemExit(f"--files: no file {path}")
        if (Path(folder) / path.name).exists():
            raise SystemExit(f"--files: two files are called {path.name}")
        shutil.copy(path, folder)
    return [Path(path).name for path in cfg.files]


def open_agent(cfg: Config, runner: asyncio.Runner) -> evaluate.Agent:
    """The agent of a folder or a URL; messages are sent where its tokenizer cannot be had."""
    if not cfg.model.startswith("http"):
        return evaluate.start_engine(cfg, evaluate.local_agent(cfg))
    try:
        return evaluate.served_agent(cfg, runner)
    except SystemExit as error:
        if cfg.endpoint != "auto" or "--endpoint=chat does without" not in str(error):
            raise
        print(f"no tokenizer here: {cfg.model} is asked with messages", file=sys.stderr)
        return evaluate.served_agent(dataclasses.replace(cfg, endpoint="chat"), runner)


def check(cfg: Config) -> None:
    if not cfg.model:
        raise SystemExit("ask needs --model=FOLDER or --model=http://…/v1")
    if cfg.refine and not cfg.rrm.source:
        raise SystemExit("--refine needs the reward model whose critique is read: --rrm=…")
    if not cfg.model.startswith("http"):
        if cfg.engine.kind == "vllm" and not importlib.util.find_spec("vllm"):
            raise SystemExit("no vllm here: --engine=hf runs the folder by transformers")
        if not Path(cfg.model).exists() and cfg.model.count("/") != 1:
            raise SystemExit(f"--model: no folder {cfg.model}")


def answer(question: str, cfg: Config) -> rollout.Episode:
    """Runs the chain of one question, shown as it happens."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ask-"))
        row = {"id": "0", "question": question, "answer": "?", "kind": "qa"}
        if cfg.files:
            row["files"] = with_files(cfg, folder)
        names = tools_here(cfg)
        spec = DataSet(names, "", max_turns=cfg.max_turns, seconds_per_call=cfg.seconds_per_call)
        task = Task("question", spec, [row], 1, [shown_question(row)])
        shared = dict(corpus=cfg.corpus, allow=cfg.allow, unsafe_python=cfg.unsafe_python)
        own = dict(seconds_per_call=cfg.seconds_per_call, files_dir=folder if cfg.files else "")
        toolbox = Toolbox([n for n in names.split(",") if n != "none"], **shared, **own)
        stack.callback(toolbox.close)
        toolbox.check_rows([row], "the question")
        runner = stack.enter_context(asyncio.Runner())
        agent = open_agent(cfg, runner)
        stack.callback(engines.close, agent.engine)
        rrm = None
        if cfg.rrm.source:
            rrm = reward_model.open_rrm(cfg.rrm, agent.chat, engine=cfg.engine)
            rrm.must_answer = True
        system = read_prompt(cfg.prompt_file, rollout.SYSTEM_PROMPT)
        limits = evaluate.limits_of(cfg, task, agent, system, toolbox.schemas)
        print(f"tools {names}; {limits.max_tokens_per_attempt} tokens an attempt", flush=True)
        screen = Screen(agent.engine, agent.chat, toolbox.schemas, rrm)
        agent.chat.fragment = screen.fragment

        def unscored(row, answer):  # nobody knows what is right
            return None, None

        parts = dict(engine=screen, chat=agent.chat, toolbox=toolbox, limits=limits)
        parts |= dict(rrm=screen if rrm else None, refine=cfg.refine, system_prompt=system)
        sampling = dict(temperature=cfg.temperature, top_p=cfg.top_p)
        setup = rollout.Setup(**parts, **sampling, rule_reward=unscored)
        chains = rollout.run_chains([(row, (cfg.seed, "ask"))], setup)
        return runner.run(chains)[0]


def main(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-"):
        print(__doc__)
        parse_config(Config, argv)
        raise SystemExit(2)
    cfg = parse_config(Config, argv[1:])
    check(cfg)
    try:
        episode = answer(argv[0], cfg)
    except (Unavailable, Refused) as down:
        raise SystemExit(f"{down}") from None
    if episode.dropped or not episode.attempts:
        raise SystemExit(f"no answer: {episode.dropped}")
    last = episode.attempts[-1]
    scores = " -> ".join(f"{a.score:.2f}" for a in episode.attempts if a.score is not None)
    answered = clean(last.answer) if last.answer is not None else f"none ({last.termination})"
    print(f"\nANSWER  {answered}" + (f"   score {scores}" if scores else ""))
    raise SystemExit(int(last.answer is None))


if __name__ == "__main__":
    main(sys.argv[1:])
