"""Evaluation: the 18 benchmarks of the paper through the agent loop of training, with numbers that can be trusted.

    python evaluate.py --model=FOLDER|URL --dataset=hotpotqa,math500 --rollouts=3 [preset.py] [--key=value ...]
    torchrun --nproc_per_node=8 evaluate.py --model=FOLDER --dataset=gaia_text
    python evaluate.py score rows.jsonl          # {"scorer", "pred", "gold"} rows -> one JSON line each
    python evaluate.py compare A.jsonl B.jsonl   # paired: difference, 95 % interval, questions gained and lost

A run appends every finished chain to OUT/journal-<rank>.jsonl, keyed (dataset, id, rollout), and can be killed at any
instant: the same command goes on with what is missing. At its end OUT/results.jsonl holds the rows in the order of the
data, without timings, and OUT/report.md, report.html and summary.json the numbers. `-h` prints all keys.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import rollout
from results import (
    SEALED,
    Journal,
    about,
    compare,
    markdown,
    page_episodes,
    question_means,
    sealed,
    summarise,
    unsealed,
    write_results,
)
from rows import Chat, JsonlRows, check_choices, check_rl_row, parse_config, run_facts
from scorers import score, unknown

SCORER_OF_KIND = {"qa": "hotpotqa", "math": "math", "gaia": "gaia", "choice": "choice"}
F1_FLOOR = 0.3  # a token F1 below it earns nothing (the released reward)

# ---------------------------------------------------------------------------------------------------------------------
# the rule reward


def rule_reward(row: dict, answer: str | None, form: str = "em_f1") -> tuple[float, bool]:
    """R_rule of an RL row and whether the answer is right by the benchmark's own metric (paper section 3.3).

    em_f1: 1 for an exact match, else the token F1 if it is at least 0.3 (qa only); em: the metric alone.
    """
    if answer is None or not answer.strip():
        return 0.0, False
    result = score(SCORER_OF_KIND[row["kind"]], answer, row["answer"])
    reward = float(result["correct"])
    if form == "em_f1" and not result["correct"] and result.get("f1", 0.0) >= F1_FLOOR:
        reward = result["f1"]
    return reward, result["correct"]


# ---------------------------------------------------------------------------------------------------------------------
# the data sets and the knobs


@dataclass(frozen=True)
class DataSet:
    """How a benchmark is run. scorer "judge": an LLM compares the answer with the reference; "": by the row's kind."""

    tools: str
    scorer: str
    rollouts: int = 1
    max_turns: int = 30  # turns with tool calls (paper, section 4.1)
    seconds_per_call: float = 30.0


_SEARCH, _MATH, _ALL = "search,browse", "python", "search,browse,python,file_reader,image2text,audio2text"
DATASETS = {
    "gaia": DataSet(_ALL, "gaia", rollouts=3, seconds_per_call=60.0),
    "gaia_text": DataSet("search,browse,python", "gaia", rollouts=3),
    "math500": DataSet(_MATH, "math"),
    "aime24": DataSet(_MATH, "math", rollouts=8),  # 30 questions: one rollout is all noise
    "aime25": DataSet(_MATH, "math", rollouts=8),
    "gsm8k": DataSet(_MATH, "math"),
    "2wiki": DataSet(_SEARCH, "2wiki"),
    "2wiki200": DataSet(_SEARCH, "2wiki"),
    "hotpotqa": DataSet(_SEARCH, "hotpotqa"),
    "hotpotqa200": DataSet(_SEARCH, "hotpotqa"),
    "hotpotqa1000": DataSet(_SEARCH, "hotpotqa"),
    "musique": DataSet(_SEARCH, "musique"),
    "musique200": DataSet(_SEARCH, "musique"),
    "bamboogle": DataSet(_SEARCH, "bamboogle"),
    "webwalker": DataSet(_SEARCH, "judge"),
    "webwalker200": DataSet(_SEARCH, "judge"),
    "hle": DataSet(_SEARCH, "judge"),
    "xbench": DataSet(_SEARCH, "judge"),
}
OWN_ROWS = DataSet("search,browse,python", "")  # --dataset=rows.jsonl


@dataclass
class Config:
    # what is evaluated
    model: str = "out/u/step-000300"  # a Hugging Face folder or name, or http://…/v1 of a served model
    dataset: tuple[str, ...] = ("gaia_text",)  # names, or files of RL rows
    data_dir: str = "data/benchmarks"  # where NAME.jsonl lie
    files_dir: str = "data/benchmarks/files"  # attachments of GAIA
    limit: int = 0  # the first so many questions of each set; 0: all
    ids: tuple[str, ...] = ()  # only these questions
    rollouts: int = 0  # chains of each question; 0: as the table of evaluate.py says
    # the agent
    temperature: float = 0.6  # 0: greedy
    top_p: float = 0.95
    prompt_file: str = ""  # another system prompt, for a checkpoint that was trained on it
    tools: str = ""  # names, or none; "": as the table says
    max_turns: int = 0  # with tool calls; 0: as the table says
    max_tokens_per_attempt: int = 32_768  # tool results included; less where the model's positions do not hold it
    max_new_tokens_per_turn: int = 0  # 0: as many as the attempt has left
    max_context: int = 0  # tokens of a chain; 0: the model's positions
    refine: bool = False  # Reagent-C: a second attempt after the critique of the reward model
    rrm: str = ""  # URL[,URL] of the reward model | its folder (in process) | toy
    rrm_prompt_file: str = ""
    rrm_max_context: int = 32_768  # tokens
    # tools
    corpus: str = ""  # local pages: search and browse stay offline
    seconds_per_call: float = 0.0  # 0: as the table says
    block: str = ""  # file of addresses that search and browse leave out
    cache: str = ""  # sqlite file of web answers
    replay: bool = False  # answer web calls from the cache alone
    allow: str = ""  # host:port pairs that browse may open beyond the public web
    # judge of answers (webwalker, hle, xbench)
    judge: str = ""  # http://…/v1; "": rows that need it stay unscored until a later run has it
    judge_model: str = ""  # "": the first that the server lists
    judge_cache: str = "out/judge_cache.sqlite"
    judged: str = "table"  # table: the sets that need it | all: every set given | none
    # engine
    engine: str = "vllm"  # vllm | hf; a URL needs neither
    endpoint: str = "auto"  # of a served model: auto | completions | chat
    served_model: str = ""  # its name there; "": the first that the server lists
    tokenizer: str = ""  # of a served model: a folder or name; "": what the server was started with
    tensor_parallel: int = 1  # adjacent ranks that share an engine
    gpu_memory_share: float = 0.85  # of the GPU
    max_live_chains: int = 64  # at a time on each engine; requests in flight to a server
    # run
    seed: int = 0
    out_dir: str = "out/eval"
    retries: int = 2  # more tries at a chain that the infrastructure failed, before a later run tries it
    patience_s: float = 600.0  # how long to wait for a server that is away
    timeout_s: float = 86_400.0  # how long ranks wait for each other


# these change neither questions nor answers, so a resumed run may change them; rows are keyed by set, id and rollout
MAY_CHANGE = {"dataset", "data_dir", "files_dir", "limit", "ids", "rollouts", "judge", "judge_model", "judge_cache"}
MAY_CHANGE |= {"judged", "endpoint", "gpu_memory_share", "max_live_chains", "tensor_parallel", "out_dir", "retries"}
MAY_CHANGE |= {"patience_s", "timeout_s", "cache"}


def check_config(cfg: Config) -> None:
    check_choices(cfg, engine="vllm hf", endpoint="auto completions chat", judged="table all none")
    for key in ("limit", "rollouts", "retries", "max_context", "max_turns", "temperature"):
        if getattr(cfg, key) < 0:
            raise SystemExit(f"{key} = {getattr(cfg, key)}: not below 0")
    if cfg.refine and not cfg.rrm:
        raise SystemExit("--refine needs the reward model whose critique is read: --rrm=http://…/v1 or --rrm=FOLDER")
    if cfg.rrm and not cfg.refine:
        raise SystemExit("--rrm is read by --refine alone")
    if not cfg.dataset:
        raise SystemExit(f"--dataset: one or more of {', '.join(DATASETS)}, or files of RL rows")


# ---------------------------------------------------------------------------------------------------------------------
# rows


@dataclass
class Task:
    """One data set of a run: its rows (decrypted, ids unique), each with a `digest` of what its file holds."""

    name: str
    spec: DataSet
    rows: list[dict]
    rollouts: int
    canaries: dict[str, str]  # id -> key of an encrypted row
    longest: list[str]  # its longest questions, those left out by --limit too: they say how much room a prompt needs
    limits: rollout.Limits | None = None

    @property
    def subset(self) -> str:
        """Names the questions and references that the numbers are about."""
        return hashlib.sha256("".join(row["digest"] for row in self.rows).encode()).hexdigest()[:8]

    def keys(self):
        """(dataset, id, rollout) and the row, in the order of the final file."""
        for row in self.rows:
            for n in range(self.rollouts):
                yield (self.name, row["id"], n), row


def load_tasks(cfg: Config) -> list[Task]:
    """Reads and checks the rows of every data set before anything starts."""
    tasks = [load_task(name, cfg) for name in cfg.dataset]
    twice = [name for name, n in Counter(task.name for task in tasks).items() if n > 1]
    if twice:
        raise SystemExit(f"--dataset: {twice[0]} is given twice")
    known = {row["id"] for task in tasks for row in task.rows}
    if missing := [i for i in cfg.ids if i not in known]:
        raise SystemExit(f"--ids: no question {', '.join(missing[:5])} in {', '.join(cfg.dataset)}")
    return tasks


def load_task(name: str, cfg: Config) -> Task:
    if name.endswith(".jsonl"):
        path, name, spec, hint = name, Path(name).stem, OWN_ROWS, ""
        if name in DATASETS:
            spec = DATASETS[name]
    elif name in DATASETS:
        path, spec = str(Path(cfg.data_dir) / f"{name}.jsonl"), DATASETS[name]
        hint = f"run python data/benchmarks/prepare.py --dataset={name}"
    else:
        raise SystemExit(f"--dataset: no {name!r}: there are {', '.join(DATASETS)}, and files of RL rows (*.jsonl)")
    changes = dict(tools=cfg.tools, max_turns=cfg.max_turns, seconds_per_call=cfg.seconds_per_call)
    spec = dataclasses.replace(spec, **{key: value for key, value in changes.items() if value})
    if cfg.judged == "all":
        spec = dataclasses.replace(spec, scorer="judge")
    rows, canaries = read_rows(path, hint)
    longest = sorted((rollout.shown_question(row) for row in rows), key=len)[-20:]
    if cfg.ids:
        rows = [row for row in rows if row["id"] in cfg.ids]
    rows = rows[: cfg.limit] if cfg.limit else rows
    check_files(rows, spec, path, cfg.files_dir)
    return Task(name, spec, rows, cfg.rollouts or spec.rollouts, canaries, longest)


def read_rows(path: str, hint: str = "") -> tuple[list[dict], dict[str, str]]:
    """(rows, {id: canary} of the encrypted ones). A question that stands there twice is two rows: the second of two
    equal ids gets "#2" behind it (or the next number that is free)."""

    def check(row):
        problem = check_rl_row(row)
        row.pop("id", None)  # JsonlRows would refuse the second
        return problem

    try:
        file = JsonlRows(path, check, hint)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    rows, canaries, seen = [], {}, set()
    for i in range(len(file)):
        row = file[i]
        name = str(row["id"])
        base, copies = name, 1
        while name in seen:
            copies += 1
            name = f"{base}#{copies}"
        seen.add(name)
        row["id"] = name
        whole = json.dumps([row["question"], row["answer"], row.get("docs"), row.get("files")])
        row["digest"] = hashlib.sha256(whole.encode()).hexdigest()[:12]
        meta = row.get("meta") or {}
        if not isinstance(meta, dict):
            raise SystemExit(f"{path}: row {name}: 'meta' is an object, not {type(meta).__name__}")
        if meta.get("encrypted"):
            try:
                canaries[row["id"]] = meta["canary"]
                row["question"], row["answer"] = (unsealed(row[key], meta["canary"]) for key in ("question", "answer"))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise SystemExit(f"{path}: row {row['id']} cannot be decrypted with its canary ({error})") from error
        row["meta"] = {k: v for k, v in meta.items() if k not in ("encrypted", "canary", "solution", "dataset")}
        rows.append(row)
    return rows, canaries


def check_files(rows: list[dict], spec: DataSet, path: str, files_dir: str) -> None:
    """Every attachment must lie inside files_dir, whatever links lead out of it."""
    if "file_reader" not in spec.tools:
        return
    base, missing = os.path.realpath(files_dir), []
    for row in rows:
        for name in row.get("files", []):
            real = os.path.realpath(os.path.join(base, name))
            if not (os.path.isfile(real) and os.path.commonpath([base, real]) == base):
                missing.append(f"{name} (row {row['id']})")
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise SystemExit(f"{path}: {len(missing)} files are not in {files_dir}: {', '.join(missing[:5])}{more}")


# ---------------------------------------------------------------------------------------------------------------------
# from a finished chain to a line of the journal


def record_of(episode, task: Task, row: dict, n: int) -> dict:
    """A finished chain as one line; every attempt is scored here unless a judge must. Texts of an encrypted row are
    encrypted again: they lie on no disk in the open."""
    attempts = [dataclasses.asdict(attempt) for attempt in episode.attempts]
    for attempt in attempts:
        attempt |= scored(task.spec, row, attempt["answer"])
    answered = bool(attempts) and attempts[-1]["answer"] is not None
    line = {
        "dataset": task.name, "id": row["id"], "rollout": n, "row": row["digest"],
        "status": episode.dropped or ("answered" if answered else "no_answer"),
        "correct": attempts[-1]["correct"] if attempts else False,
        "question": episode.question, "gold": episode.gold, "messages": episode.messages, "attempts": attempts,
        "meta": row["meta"], "tokens": len(episode.ids), "sampled": sum(episode.mask),
    }
    if canary := task.canaries.get(row["id"]):
        line["sealed"] = sealed(json.dumps({key: line.pop(key) for key in SEALED}), canary)
        line["canary"] = canary
    return line


def scored(spec: DataSet, row: dict, answer: str | None) -> dict:
    """{"correct", "rule_reward", "em"?, "f1"?, "scorer_status"} of an answer; correct None where a judge must say."""
    if answer is None or not answer.strip():
        return {"correct": False, "rule_reward": 0.0, "scorer_status": "ok"}
    if spec.scorer == "judge":
        return {"correct": None, "rule_reward": None, "scorer_status": "judge"}
    result = score(spec.scorer or SCORER_OF_KIND[row["kind"]], answer, row["answer"])
    kept = {key: result[key] for key in ("em", "f1") if key in result}
    right = result["correct"]
    return kept | {"correct": right, "rule_reward": float(right), "scorer_status": result["status"]}


# ---------------------------------------------------------------------------------------------------------------------
# the agent: an engine in this process or a server, its chat, its limits


@dataclass
class Agent:
    engine: object
    chat: object
    rounds: rollout.Rounds | None
    positions: int  # tokens that a chain may have
    how: str  # how it is asked, for the report


def served_agent(cfg: Config, runner: asyncio.Runner) -> Agent:
    from served import ChatEngine, Line, ServedEngine, TextChat, look_up

    line = Line(cfg.model, "MODEL_API_KEY", patience_s=cfg.patience_s, most=cfg.max_live_chains)
    found = runner.run(look_up(line, cfg.served_model, cfg.endpoint))
    if found.kind == "chat":
        print(f"{cfg.model} takes messages only: it renders the history again at every turn, limits are estimates")
        # four characters are a token only roughly: stay clear of the server's own limit
        positions = (found.max_context or 32_768) * 3 // 4
        how = f"{found.model} by chat completions: history rendered again by the server, token counts estimated"
        chat = TextChat()
        return Agent(ChatEngine(line, found, chat), chat, None, positions, how)
    from model import load_tokenizer

    folder = cfg.tokenizer or found.root
    try:
        chat = Chat(load_tokenizer(folder))
    except (SystemExit, ValueError) as error:
        hint = "--tokenizer=FOLDER names the tokenizer of the served model, --endpoint=chat does without"
        raise SystemExit(f"{error}: {hint}") from error
    how = f"{found.model} by completions, token ids in and out"
    if found.kind == "text":
        how = f"{found.model} by completions, token ids in, text out: each turn is encoded again"
    positions = found.max_context or cfg.max_context or positions_of(folder)
    return Agent(ServedEngine(line, found, chat), chat, None, positions, how)


def local_agent(cfg: Config, tp_group) -> Agent:
    from model import load_tokenizer

    chat, rounds, positions = Chat(load_tokenizer(cfg.model)), rollout.Rounds(), positions_of(cfg.model)
    context = min(cfg.max_context or positions, positions)
    options = dict(max_context=context, gpu_memory_share=cfg.gpu_memory_share)
    options |= dict(tp_group=tp_group, tp_size=cfg.tensor_parallel)
    engine = rollout.make_engine(cfg.engine, cfg.model, chat.stop_ids, rounds, **options)
    return Agent(engine, chat, rounds, positions, f"{cfg.engine} in this process")


def positions_of(folder: str) -> int:
    """How many positions the model knows."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder).get_text_config()
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise SystemExit(f"{folder} does not say how many positions the model has: {why}") from error
    return config.max_position_embeddings


def limits_of(cfg: Config, task: Task, agent: Agent, prompt: int) -> rollout.Limits:
    """Limits such that the prompt (of `prompt` tokens) and every attempt fit the model's positions.

    With --refine both attempts get the same share, after room for the critique.
    """
    context = min(cfg.max_context or agent.positions, agent.positions)
    room = context - min(prompt, context // 2)  # a longer prompt is that question's own trouble
    if cfg.refine:
        room = (room - min(2048, context // 8)) // 2
    attempt = min(cfg.max_tokens_per_attempt, room)
    final = min(512, attempt // 4)
    if final < 16:
        left = f"{attempt} of {context} positions are left for an attempt"
        raise SystemExit(f"{task.name}: {left}, the prompt has {prompt} tokens")
    turn = min(cfg.max_new_tokens_per_turn or attempt, attempt)
    return rollout.Limits(task.spec.max_turns, turn, attempt, context, final_tokens=final)


def prompt_tokens(task: Task, agent: Agent, toolbox, system: str) -> int:
    """The tokens of the longest prompt."""
    user = lambda text: [{"role": "system", "content": system}, {"role": "user", "content": text}]  # noqa: E731
    return max(len(agent.chat.prompt(user(text), toolbox.schemas)) for text in task.longest)


def make_toolboxes(cfg: Config, tasks: list[Task]) -> dict[tuple, object]:
    """(tools, seconds) -> Toolbox, one for all sets that share them; says before the start what search would lack."""
    from tools import Toolbox

    boxes = {}
    for task in tasks:
        names = [name for name in task.spec.tools.split(",") if name != "none"]
        key = (task.spec.tools, task.spec.seconds_per_call)
        if key not in boxes:
            boxes[key] = Toolbox(names, corpus=cfg.corpus, seconds_per_call=task.spec.seconds_per_call, block=cfg.block,
                                 files_dir=cfg.files_dir if "file_reader" in names else "", cache=cfg.cache,
                                 replay=cfg.replay, allow=cfg.allow)
        boxes[key].check_rows(task.rows, task.name)
    return boxes


# ---------------------------------------------------------------------------------------------------------------------
# running and judging


def setup_of(cfg: Config, task: Task, agent: Agent, toolbox, critic) -> rollout.Setup:
    system = rollout.read_prompt(cfg.prompt_file, rollout.SYSTEM_PROMPT)
    task.limits = limits = limits_of(cfg, task, agent, prompt_tokens(task, agent, toolbox, system))
    print(f"{task.name}: {len(task.rows)} questions x {task.rollouts}, subset {task.subset}, tools {task.spec.tools};",
          f"{1 + cfg.refine} attempt(s) of {limits.max_tokens_per_attempt} tokens and {limits.max_turns} turns with",
          f"calls in {limits.max_context} positions", flush=True)
    return rollout.Setup(
        agent.engine, agent.chat, toolbox, limits, lambda row, answer: (None, None),  # record_of scores
        critic, cfg.refine, cfg.temperature, cfg.top_p, system_prompt=system,
    )


async def run_task(cfg: Config, task: Task, setup: rollout.Setup, agent: Agent, journal: Journal, rank=0, world=1):
    """Runs what is missing of this process's share of the questions. A chain that the infrastructure failed is tried
    again, in the end noted as such and left to a later run."""
    place = {row["id"]: i for i, row in enumerate(task.rows)}
    mine = [(key, row) for key, row in task.keys() if place[row["id"]] % world == rank]
    waiting = {(key[1], key[2]): (key, row) for key, row in mine if not journal.done(key, row)}
    bar = progress(task.name, len(mine), len(mine) - len(waiting), rank)
    finals = [journal.entries[key].correct[-1:] for key, row in mine if journal.done(key, row)]
    tally = Counter(right=sum(c == [True] for c in finals), scored=sum(c != [None] for c in finals))
    for retry in range(cfg.retries + 1):
        faults = {}

        def on_done(episode):
            key, row = waiting[episode.id, episode.meta["rollout"]]
            if episode.dropped in ("fault", "aborted"):
                faults[key[1], key[2]] = fault_text(episode)
            else:
                line = record_of(episode, task, row, key[2])
                journal.append(line)
                bar.update()
                tally.update(right=line["correct"] is True, scored=line["correct"] is not None)
                accuracy = f"{tally['right'] / tally['scored']:.3f}" if tally["scored"] else "to be judged"
                bar.set_postfix(accuracy=accuracy, refresh=False)
            for heavy in (episode.ids, episode.mask, episode.logps, episode.messages):
                heavy.clear()  # thousands of chains would fill the memory

        chains = [(row | {"meta": {"rollout": key[2]}}, key) for key, row in waiting.values()]
        jobs = [(row, (cfg.seed, "evaluation", task.name, key[2])) for row, key in chains]
        await rollout.run_chains(jobs, setup, agent.rounds, cfg.max_live_chains, on_done)
        waiting = {name: waiting[name] for name in faults}
        if not waiting:
            break
    for name, (key, row) in waiting.items():
        journal.append(dict(dataset=key[0], id=key[1], rollout=key[2], row=row["digest"], fault=faults[name]))
    bar.close()


def fault_text(episode) -> str:
    """What failed: the tool, or the engine."""
    calls = [call for attempt in episode.attempts for call in attempt.calls if call["status"] == "fault"]
    return f"tool {calls[0]['name']}" if calls else episode.dropped


def progress(what: str, total: int, done: int, rank: int = 0):
    from tqdm import tqdm

    pause = 1.0 if sys.stderr.isatty() else 30.0  # seconds
    return tqdm(desc=what, total=total, initial=done, disable=rank > 0, mininterval=pause)


def make_answer_judge(cfg: Config, runner: asyncio.Runner):
    """The judge of answers, or None; it is looked up only when answers wait for it."""
    from served import AnswerJudge, Line, ServerDown, look_up

    line = Line(cfg.judge, "JUDGE_API_KEY", patience_s=cfg.patience_s, request_s=300.0, most=16)
    model = cfg.judge_model
    if not model:
        try:
            model = runner.run(look_up(line, "", "chat")).model
        except ServerDown as down:
            print(f"judge: {down}", file=sys.stderr)
            return None
    return AnswerJudge(line, model, cfg.judge_cache)


async def judge_answers(tasks: list[Task], journal: Journal, judge) -> int:
    """Asks for the verdicts that are missing; returns how many answers stay unscored."""
    waiting = []
    for task in tasks:
        for key, row in task.keys():
            if journal.done(key, row):
                entry = journal.entries[key]
                open_ = [i for i, correct in enumerate(entry.correct) if correct is None]
                waiting += [(task, key, row, i) for i in open_ if journal.verdict(key, i, judge.name) is None]
    bar = progress(f"judge {judge.model}", len(waiting), 0)

    async def one(task, key, row, attempt) -> bool:
        entry = journal.entries[key]
        golds = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        correct = await judge(row["question"], golds, entry.answers[attempt], secret=row["id"] in task.canaries)
        if correct is not None:
            name = dict(dataset=key[0], id=key[1], rollout=key[2], attempt=attempt, about=about(entry, attempt))
            journal.append({**name, "judge": judge.name, "verdict": correct})
        bar.update()
        return correct is None

    unscored = sum(await asyncio.gather(*(one(*job) for job in waiting)))
    bar.close()
    if unscored:
        print(f"{unscored} of {len(waiting)} answers stay unscored ({judge.problem}):",
              "run the same command again to have them judged", file=sys.stderr)
    return unscored


# ---------------------------------------------------------------------------------------------------------------------
# what a run leaves


def write_reports(cfg: Config, tasks: list[Task], journal: Journal, judge: str, how: str) -> str:
    """results.jsonl, summary.json, report.md and report.html; returns report.md."""
    from report import write_report

    out = Path(cfg.out_dir)
    write_results(out, tasks, journal, judge)
    summaries = [summarise(task, journal, judge, cfg.refine) for task in tasks]
    facts = [f"model {cfg.model} ({how})", f"temperature {cfg.temperature}, top_p {cfg.top_p}, seed {cfg.seed}"]
    facts += [f"{t.name}: tools {t.spec.tools}, {t.limits.max_tokens_per_attempt} tokens an attempt, "
              f"{t.limits.max_context} positions, {t.limits.max_turns} turns with calls" for t in tasks if t.limits]
    facts += [f"system prompt {cfg.prompt_file}"] * bool(cfg.prompt_file)
    facts += [f"local pages {cfg.corpus}"] * bool(cfg.corpus)
    facts += [f"refined after critiques of {cfg.rrm}"] * cfg.refine
    text = markdown(summaries, facts)
    (out / "report.md").write_text(text, encoding="utf-8")
    (out / "summary.json").write_text(json.dumps(summaries, indent=1), encoding="utf-8")
    config = {key: str(value) for key, value in dataclasses.asdict(cfg).items()}
    shown, total = page_episodes(out, tasks)
    which = f"of {total:,} episodes" if total > len(shown) else "episodes"
    write_report(out / "report.html", title=f"Evaluation of {cfg.model}", episodes=shown, which=which, table_markdown=text,
                 config=config)
    return text


# ---------------------------------------------------------------------------------------------------------------------


def check_resume(out: Path, cfg: Config) -> None:
    """A folder holds the answers of one agent: a changed key that changes the answers is refused by name."""
    path, now = out / "run.json", json.loads(json.dumps(dataclasses.asdict(cfg)))
    if path.is_file():
        before = json.loads(path.read_text())["config"]
        served = all(str(c["model"]).startswith("http") for c in (before, now))  # a server may move
        free = MAY_CHANGE | ({"model"} if served else set())
        changed = [key for key in now if key not in free and before.get(key) != now[key]]
        if changed:
            what = ", ".join(f"{key}: {before.get(key)} -> {now[key]}" for key in changed)
            raise SystemExit(f"{out} holds another run ({what}): give another --out_dir")


def stopping(critic: rollout.Judge) -> rollout.Judge:
    """A reward model that is down stops the run: its chains would keep their first answer and count as finished."""
    from served import ServerDown

    ask = critic.ask

    async def asked(*args):
        try:
            return await ask(*args)
        except rollout.JudgeDown as down:
            raise ServerDown(f"the reward model is away: {down}") from down

    critic.ask = asked
    return critic


def run_missing(cfg: Config, tasks, toolboxes, journal: Journal, runner, rank: int, world: int, group) -> str:
    """Builds the agent and runs this process's share of what is missing; returns how the agent is asked."""
    tp = cfg.tensor_parallel
    agent = served_agent(cfg, runner) if cfg.model.startswith("http") else local_agent(cfg, group)
    critic = None
    if cfg.refine:
        prompt = rollout.read_prompt(cfg.rrm_prompt_file, rollout.RRM_PROMPT)
        options = dict(engine=cfg.engine, max_context=cfg.rrm_max_context, prompt=prompt)
        critic = stopping(rollout.make_judge(cfg.rrm, agent.chat, agent.rounds or rollout.Rounds(), **options))
    if rank == 0:
        facts = run_facts(cfg) | {"agent": agent.how, "subsets": {task.name: task.subset for task in tasks}}
        (Path(cfg.out_dir) / "run.json").write_text(json.dumps(facts, indent=1))
    if rank % tp:  # a tensor-parallel rank that does not lead
        agent.engine.follow()
        return agent.how
    try:
        for task in tasks:
            setup = setup_of(cfg, task, agent, toolboxes[task.spec.tools, task.spec.seconds_per_call], critic)
            runner.run(run_task(cfg, task, setup, agent, journal, rank // tp, world // tp))
    finally:  # also after an error: those that follow would wait for ever
        if tp > 1:
            agent.engine.finish()
    return agent.how


def join_ranks(cfg: Config, rank: int, world: int, stack):
    """(the group of this rank's engine or None, a function in which all ranks meet); left when `stack` closes."""
    if world == 1:
        return None, lambda phase: None
    import torch.distributed as dist

    import model as shared

    shared.init_distributed(cfg.timeout_s)
    stack.callback(dist.destroy_process_group)
    gloo, tp = dist.new_group(backend="gloo"), cfg.tensor_parallel
    groups = [dist.new_group(list(range(a, a + tp)), backend="gloo") for a in range(0, world, tp)] if tp > 1 else []
    return groups[rank // tp] if groups else None, lambda phase: shared.meet(phase, gloo, cfg.timeout_s)


def main(cfg: Config) -> None:
    # ---------------------------------------------------------------- everything that can be wrong, before work starts
    from served import ServerDown

    check_config(cfg)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    tasks = load_tasks(cfg)
    judged = [task for task in tasks if task.spec.scorer == "judge"]
    asks = bool(judged and cfg.judge and cfg.judged != "none")
    if judged and not asks:
        names = ", ".join(task.name for task in judged)
        print(f"no judge: the answers of {names} stay unscored until a run has --judge=http://…/v1", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        toolboxes = make_toolboxes(cfg, tasks)
        for toolbox in toolboxes.values():
            stack.callback(toolbox.close)
        journal = stack.enter_context(contextlib.closing(Journal(cfg.out_dir, rank)))
        check_resume(Path(cfg.out_dir), cfg)
        group, meet = join_ranks(cfg, rank, world, stack)
        runner = stack.enter_context(asyncio.Runner())

        # ------------------------------------------------------------ chains
        try:
            how = run_missing(cfg, tasks, toolboxes, journal, runner, rank, world, group)
        except ServerDown as down:
            keys = [(key, row) for task in tasks for key, row in task.keys()]
            done = sum(journal.done(key, row) for key, row in keys)
            text = f"{down}; {done} of {len(keys)} chains are finished: run the same command again to go on"
            raise SystemExit(text) from None
        meet("the chains")
        if rank > 0:
            return

        # ------------------------------------------------------------ judge, results, report
        journal.read_other_ranks()
        judge = make_answer_judge(cfg, runner) if asks else None
        if judge:
            runner.run(judge_answers(judged, journal, judge))
        print(write_reports(cfg, tasks, journal, judge.name if judge else "", how))
        left = sum(not journal.done(key, row) for task in tasks for key, row in task.keys())
        if left:
            print(f"{left} chains failed for want of infrastructure: run the same command again", file=sys.stderr)


def score_file(path: str) -> None:
    """One JSON line for each row of {"scorer", "pred", "gold"}."""

    def check(row):
        if not {"scorer", "pred", "gold"} <= set(row) or row["gold"] == []:
            return "needs scorer, pred and at least one gold"
        return unknown(row["scorer"])

    for row in JsonlRows(path, check, "score takes a file of rows with scorer, pred and gold"):
        print(json.dumps(score(row["scorer"], row["pred"], row["gold"])))


def command(argv: list[str]) -> None:
    """score FILE | compare A B | the keys of a run."""
    if argv[:1] not in (["score"], ["compare"]):
        return main(parse_config(Config, argv))
    if len(argv) != (2 if argv[0] == "score" else 3):
        raise SystemExit(__doc__)
    try:
        if argv[0] == "score":
            score_file(argv[1])
        else:
            print(json.dumps(compare(question_means(argv[1]), question_means(argv[2])), indent=1))
    except ValueError as error:  # names file and line
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    command(sys.argv[1:])
