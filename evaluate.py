"""Evaluation: the 12 benchmarks of the paper, under the 18 names of its release, through the agent
loop of training, with numbers that can be trusted.

    python evaluate.py --model=FOLDER|URL --dataset=hotpotqa,math500 [preset.py] [--key=value ...]
    torchrun --nproc_per_node=8 evaluate.py --model=FOLDER --dataset=gaia_text
    python evaluate.py score FILE|FOLDER ...  # finished answers again: pass@1, pass@k over files
    python evaluate.py compare A.jsonl B.jsonl  # paired: difference, interval, gained and lost
    python evaluate.py page FOLDER  # report.html of a run again, or an index over runs
    python evaluate.py critique --rrm=FOLDER|URL FILE ...  # Agent-RRM on trajectories of any agent
    python evaluate.py ask "question" --model=FOLDER|URL ...  # one question, as it is answered

A run appends every finished chain to OUT/journal-<rank>.jsonl, keyed (dataset, id, rollout), and
can be killed at any instant: the same command goes on with what is missing. At its end
OUT/results.jsonl holds the rows in the order of the data, without timings, and OUT/report.md,
report.html and summary.json the numbers. `-h` prints all keys.
"""

import contextlib
import sys
from importlib import import_module
from pathlib import Path

from reagent.config import show_help

if __name__ == "__main__" and len(sys.argv) > 1:  # before torch is imported
    script = Path(__file__).parent / "data" / f"{sys.argv[1]}.py"
    if {"-h", "--help"} & set(sys.argv):
        show_help(script if script.is_file() else __file__)
    if sys.argv[1] in ("ask", "compare", "critique", "page", "score"):
        with contextlib.suppress(KeyboardInterrupt):
            sys.exit(import_module(f"data.{sys.argv[1]}").main(sys.argv[2:]))
        sys.exit(130)

import asyncio
import dataclasses
import json
import os
import time
from collections import Counter
from dataclasses import dataclass

from tqdm import tqdm

import rollout
from reagent import config, engines, reward_model
from reagent.engines import EngineConfig
from reagent.folder import read_json, write_whole
from reagent.reward_model import RewardModelConfig
from reagent.scorers import SCORER_OF_KIND, score
from results.benchmarks import DATASETS, DataSet, Task, load_tasks
from results.journal import Journal, about, check_served, closed, named, write_results
from results.page import make_page
from results.statistics import summarise
from results.verdicts import open_judge, open_verdicts
from toolkit.http import Refused, Unavailable
from tools import FILE_READERS, Toolbox

AT_WORK = EngineConfig(sleep=False, memory_share=0.85, max_live_chains=64)


@dataclass
class Config:
    # what is evaluated
    model: str = "out/u/step-000300"  # a Hugging Face folder or name, or http://…/v1 of a server
    dataset: tuple[str, ...] = ("gaia_text",)  # names, or files of RL rows
    data_dir: str = "data/benchmarks"  # where NAME.jsonl lie
    files_dir: str = "data/benchmarks/files"  # attachments of GAIA
    limit: int = 0  # the first so many questions of each set; 0: all
    ids: tuple[str, ...] = ()  # only these questions
    rollouts: int = 0  # chains of each question; 0: as config/benchmarks.toml says
    # the agent
    temperature: float = 0.6  # 0: greedy
    top_p: float = 0.95
    prompt_file: str = ""  # another system prompt, for a checkpoint that was trained on it
    chat_template: str = ""  # a Jinja file for a model whose own template has no tools
    tools: str = ""  # names, or none; "": as the table says
    max_turns: int = 0  # with tool calls; 0: as the table says
    max_tokens_per_attempt: int = 32_768  # tool results included; less where no more fits
    max_new_tokens_per_turn: int = 0  # 0: as many as the attempt has left
    max_context: int = 0  # tokens of a chain; 0: the model's positions
    refine: bool = False  # Reagent-C: a second attempt after the critique of the reward model
    rrm: RewardModelConfig = RewardModelConfig()
    # tools
    corpus: str = ""  # local pages: search and browse stay offline
    seconds_per_call: float = 0.0  # 0: as the table says
    block: str = ""  # file of addresses that search and browse leave out
    cache: str = ""  # sqlite file of web answers
    replay: bool = False  # answer web calls from the cache alone
    allow: str = ""  # host:port pairs that browse may open beyond the public web
    unsafe_python: bool = False  # run code without a sandbox where this machine has none
    # judge of answers (webwalker, hle, xbench)
    judge: str = ""  # http://…/v1; "": rows that need it stay unscored until a later run has it
    judge_model: str = ""  # "": the only one that the server lists
    judge_cache: str = "out/judge_cache.sqlite"
    judged: str = "table"  # table: the sets that need it | all: every set given | none
    # engine
    engine: EngineConfig = AT_WORK  # a URL needs none
    endpoint: str = "auto"  # of a served model: auto | completions | chat
    served_model: str = ""  # its name there; "": the only one that the server lists
    tokenizer: str = ""  # of a served model: a folder or name; "": what the server was started with
    # run
    seed: int = 0
    out_dir: str = "out/eval"
    retries: int = 2  # more tries, in this run, at a chain that the infrastructure failed
    patience_s: float = 600.0  # how long to wait for a server that is away
    timeout_s: float = 86_400.0  # how long ranks wait for each other
    check: bool = False  # stop after all checks, before anything heavy; writes nothing


# these change no answers, so a resumed run may change them; rows are keyed by set, id and rollout
MAY_CHANGE = set(
    "dataset data_dir files_dir limit ids rollouts judge judge_model judge_cache judged endpoint "
    "engine.memory_share engine.max_live_chains engine.tensor_parallel rrm.seconds rrm.in_flight "
    "rrm.memory_share out_dir retries patience_s timeout_s cache unsafe_python check".split()
)


RULES = """endpoint=auto|completions|chat judged=table|all|none top_p>0 top_p<=1 timeout_s>0
max_tokens_per_attempt>0 engine.tensor_parallel>0 engine.memory_share<=1 rrm.memory_share<=1"""


def check_config(cfg: Config) -> None:
    engines.engine_class(cfg.engine.kind)
    config.prompt_facts(cfg)  # a missing file is told before any work
    config.check_values(cfg, RULES)
    if cfg.refine and not cfg.rrm.source:
        raise SystemExit("--refine needs the reward model whose critique is read: --rrm=FOLDER|URL")
    cfg.rrm.check(cfg.timeout_s)
    if cfg.rrm.source and not cfg.refine:
        raise SystemExit("--rrm is read by --refine alone")
    if not cfg.dataset:
        raise SystemExit(f"--dataset: one or more of {', '.join(DATASETS)}, or files of RL rows")


# --------------------------------------------------- from a finished chain to a line of the journal


def record_of(episode, task: Task, row: dict, n: int) -> dict:
    """A finished chain as one line; every attempt is scored here unless a judge must. Texts of an
    encrypted row are encrypted again: they lie on no disk in the open."""
    told = episode.to_json()
    attempts = [one | scored(task.spec, row, one["answer"]) for one in told["attempts"]]
    last = attempts[-1] if attempts else {"answer": None, "correct": False}
    status = episode.dropped or ("no_answer" if last["answer"] is None else "answered")
    line = named((task.name, row["id"], n)) | {"row": row["digest"], "status": status}
    line |= {"correct": last["correct"], "attempts": attempts, "meta": row["meta"]}
    line |= {key: told[key] for key in ("question", "gold", "messages", "tokens", "sampled")}
    return closed(line, row["canary"]) if "canary" in row else line


def scored(spec: DataSet, row: dict, answer: str | None) -> dict:
    """{"correct", "rule_reward", "em"?, "f1"?} of an answer; None where a judge must say."""
    if answer is None or not answer.strip():
        return {"correct": False, "rule_reward": 0.0}
    if spec.scorer == "judge":
        return {"correct": None, "rule_reward": None}
    result = score(spec.scorer or SCORER_OF_KIND[row["kind"]], answer, row["answer"])
    return result | {"rule_reward": float(result["correct"])}


# --------------------------- the agent: an engine in this process or a server, its chat, its limits


@dataclass
class Agent:
    engine: object  # None: not started yet
    chat: object
    positions: int  # tokens that a chain may have
    how: str  # how it is asked, for the report
    served: dict[str, str]  # the models behind URLs, by what they are


def served_agent(cfg: Config, runner: asyncio.Runner) -> Agent:
    from reagent.served import ChatEngine, ServedEngine, TextChat, endpoint_of, look_up

    endpoint = endpoint_of(cfg.model, "MODEL_API_KEY", cfg.engine.max_live_chains)
    patience = cfg.patience_s
    found = runner.run(look_up(endpoint, cfg.served_model, cfg.endpoint, patience))
    served = {"model": found.name}
    if found.kind == "chat":
        print(f"{cfg.model} takes messages only: it renders history again, limits are estimates")
        # four characters are a token only roughly: stay clear of the server's own limit
        positions = (found.max_context or 32_768) * 3 // 4
        how = f"{found.model} by chat completions: the server renders history, counts are estimates"
        chat = TextChat()
        return Agent(ChatEngine(endpoint, found, chat, patience), chat, positions, how, served)
    from reagent.policy import load_chat

    folder = cfg.tokenizer or found.root
    try:
        chat = load_chat(folder, cfg.chat_template, tools=cfg.tools != "none")
    except SystemExit as error:
        hint = "--tokenizer=FOLDER names that of the served model, --endpoint=chat does without"
        raise SystemExit(f"{error}: {hint}") from error
    how = f"{found.model} by completions, token ids in"
    how += " and out" if found.kind == "ids" else ", text out: each turn is encoded again"
    positions = found.max_context or cfg.max_context or positions_of(folder)
    return Agent(ServedEngine(endpoint, found, chat, patience), chat, positions, how, served)


def local_agent(cfg: Config) -> Agent:
    from reagent.policy import load_chat

    chat = load_chat(cfg.model, cfg.chat_template, tools=cfg.tools != "none")
    how = f"{cfg.engine.kind} in this process"
    return Agent(None, chat, positions_of(cfg.model), how, {"model": ""})


def start_engine(cfg: Config, agent: Agent, tp_group=None) -> Agent:
    """Loads the model of a `local_agent`."""
    room = dict(max_context=min(cfg.max_context or agent.positions, agent.positions))
    room["tp_group"] = tp_group
    agent.engine = engines.make_engine(cfg.engine, cfg.model, agent.chat.stop_ids, **room)
    return agent


def positions_of(folder: str) -> int:
    """How many positions the model knows."""
    from reagent.policy import load_config

    return load_config(folder).max_position_embeddings


def limits_of(cfg: Config, task: Task, agent: Agent, system: str, schemas) -> rollout.Limits:
    """Limits such that the longest prompt and every attempt fit the model's positions. With
    --refine both attempts get the same share, after room for the critique."""
    ids = (rollout.opening(agent.chat, system, text, schemas)[1] for text in task.longest)
    prompt = max(map(len, ids))
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


def make_toolboxes(cfg: Config, tasks: list[Task]) -> dict[tuple, object]:
    """{(tools, seconds): Toolbox}; SystemExit before the start for what search or rows lack."""
    shared = {key: getattr(cfg, key) for key in ("corpus", "block", "cache", "replay", "allow")}
    if cfg.check and not cfg.replay and not Path(cfg.cache).exists():
        shared["cache"] = ""  # it would be made
    boxes = {}
    for task in tasks:
        names = [name for name in task.spec.tools.split(",") if name != "none"]
        key = (task.spec.tools, task.spec.seconds_per_call)
        if key not in boxes:
            files_dir = cfg.files_dir if FILE_READERS & set(names) else ""
            own = dict(files_dir=files_dir, unsafe_python=cfg.unsafe_python)
            boxes[key] = Toolbox(names, seconds_per_call=key[1], **own, **shared)
        boxes[key].check_rows(task.rows, task.name)
    return boxes


# ---------------------------------------------------------------- running and judging


def setup_of(cfg: Config, task: Task, agent: Agent, toolbox) -> rollout.Setup:
    system = config.read_prompt(cfg.prompt_file or task.spec.prompt_file, rollout.SYSTEM_PROMPT)
    task.limits = limits = limits_of(cfg, task, agent, system, toolbox.schemas)
    what = f"{task.name}: {len(task.rows)} questions x {task.rollouts}, subset {task.subset}"
    attempts = f"{1 + cfg.refine} attempt(s) of {limits.max_tokens_per_attempt} tokens"
    room = f"{limits.max_turns} turns with calls in {limits.max_context} positions"
    print(f"{what}, tools {task.spec.tools}; {attempts} and {room}", flush=True)

    def unscored(row, answer):  # record_of scores
        return None, None

    parts = dict(engine=agent.engine, chat=agent.chat, toolbox=toolbox, limits=limits)
    parts |= dict(refine=cfg.refine, temperature=cfg.temperature, top_p=cfg.top_p)
    return rollout.Setup(**parts, rule_reward=unscored, system_prompt=system)


async def run_task(cfg: Config, task: Task, setup, journal: Journal, rank=0, world=1):
    """Runs what is missing of this process's share of the questions. A chain that the
    infrastructure failed is tried again, in the end noted as such and left to a later run."""
    place = {row["id"]: i for i, row in enumerate(task.rows)}
    mine = [(key, row) for key, row in task.keys() if place[row["id"]] % world == rank]
    waiting = {key: row for key, row in mine if not journal.done(key, row)}
    bar = progress(task.name, len(mine), len(mine) - len(waiting), rank)
    done = [journal.entries[key] for key, _ in mine if key not in waiting]
    tally = Counter((entry.correct or [False])[-1] for entry in done)
    faults: dict[tuple, str] = {}
    began, before = time.monotonic(), len(journal.entries)

    def on_done(episode):
        key = (task.name, episode.id, episode.meta["rollout"])
        if episode.dropped in ("fault", "aborted"):
            calls = [call for attempt in episode.attempts for call in attempt.calls]
            names = [f"tool {call['name']}" for call in calls if call["status"] == "fault"]
            faults[key] = [*names, episode.dropped][0]
        else:
            line = record_of(episode, task, waiting[key], key[2])
            finished = world * (len(journal.entries) - before + 1)  # the other ranks alike
            journal.append(line | {"pace": (time.monotonic() - began) / finished})
            bar.update()
            tally[line["correct"]] += 1
            share = f"{tally[True] / max(tally[True] + tally[False], 1):.3f}"
            bar.set_postfix(accuracy="to be judged" if tally[None] else share, refresh=False)
        for heavy in (episode.ids, episode.mask, episode.logps, episode.messages):
            heavy.clear()  # thousands of chains would fill the memory

    for retry in range(cfg.retries + 1):
        faults.clear()
        jobs = []
        for (name, _, n), row in waiting.items():
            jobs.append((row | {"meta": {"rollout": n}}, (cfg.seed, "evaluation", name, n)))
        await rollout.run_chains(jobs, setup, cfg.engine.max_live_chains, on_done)
        waiting = {key: waiting[key] for key in faults}
    for key, row in waiting.items():
        journal.append(named(key) | {"row": row["digest"], "fault": faults[key]})
    bar.close()


def progress(what: str, total: int, done: int, rank: int = 0):
    pause = 1.0 if sys.stderr.isatty() else 30.0  # seconds
    return tqdm(desc=what, total=total, initial=done, disable=rank > 0, mininterval=pause)


async def judge_answers(tasks: list[Task], journal: Journal, judge) -> int:
    """Asks for the verdicts that are missing; returns how many answers stay unscored."""
    done = [(task, *each) for task in tasks for each in task.keys() if journal.done(*each)]
    waiting = [
        (task, key, row, i)
        for task, key, row in done
        for i, correct in enumerate(journal.entries[key].correct)
        if correct is None and journal.said(key, i, judge.name)[1] is None
    ]
    bar = progress(f"judge {judge.model}", len(waiting), 0)

    async def one(task, key, row, attempt) -> bool:
        entry = journal.entries[key]
        golds = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        secret = "canary" in row
        correct = await judge(row["question"], golds, entry.answers[attempt], secret=secret)
        if correct is not None:
            line = named(key) | {"attempt": attempt, "about": about(entry, attempt)}
            journal.append(line | {"judge": judge.name, "verdict": correct})
        bar.update()
        return correct is None

    unscored = sum(await asyncio.gather(*(one(*job) for job in waiting)))
    bar.close()
    if unscored:
        what = f"{unscored} of {len(waiting)} answers stay unscored ({judge.problem})"
        print(f"{what}: run the same command again to have them judged", file=sys.stderr)
    return unscored


def write_reports(cfg: Config, tasks, journal: Journal, judge: str) -> None:
    """results.jsonl, summary.json, report.md and report.html."""
    out = Path(cfg.out_dir)
    write_results(out, tasks, journal, judge)
    summaries = [summarise(task, journal, judge, cfg.refine) for task in tasks]
    write_whole(out / "summary.json", json.dumps(summaries, indent=1))
    make_page(out)


def preflight(cfg: Config, tasks, toolboxes, journal, runner, asks: bool) -> tuple:
    """-> (agent, reward model or None, setups), without the engines that this process loads. Says
    what is left of the run; SystemExit for what it lacks. asks: a judge of answers is there."""
    serves, first = cfg.model.startswith("http"), int(os.environ.get("RANK", 0)) == 0
    agent, rrm, left = served_agent(cfg, runner) if serves else local_agent(cfg), None, Counter()
    boxes = [toolboxes[task.spec.tools, task.spec.seconds_per_call] for task in tasks]
    setups = [setup_of(cfg, task, agent, box) for task, box in zip(tasks, boxes)]
    for task in tasks:
        left["chains"] += (chains := sum(not journal.done(*each) for each in task.keys()))
        attempts = chains * (1 + cfg.refine)
        left["attempts"] += attempts
        left["judgments"] += attempts * cfg.refine
        left["verdicts"] += attempts * (asks and task.spec.scorer == "judge")
        left["tokens at most"] += attempts * task.limits.max_tokens_per_attempt
        turns = task.limits.max_turns * (task.spec.tools != "none")
        left["turns that search or use a tool at most"] += attempts * turns
    if not serves or (cfg.refine and cfg.rrm.in_process):
        from reagent.memory import plan_engines

        plan_engines(cfg.engine, cfg.model, cfg.rrm)
    if cfg.refine and not cfg.rrm.in_process:
        rrm = reward_model.open_rrm(cfg.rrm, agent.chat, engine=cfg.engine)
        if first and left["attempts"]:
            runner.run(rrm.try_out(tasks[0].rows[0]["question"]))
    agent.served |= {"rrm": rrm.name if rrm else cfg.rrm.source} if cfg.refine else {}
    check_served(Path(cfg.out_dir) / "run.json", agent.served)
    if first and asks and cfg.check:  # a run looks for it when answers wait
        judge = open_judge(dataclasses.replace(cfg, judge_cache=""), runner)
        if judge is None or runner.run(judge("What is 1 + 1?", ["2"], "2")) is None:
            raise SystemExit(f"no verdict of {cfg.judge}: {judge and judge.problem}")
    if first:
        paces = [entry.pace for entry in journal.entries.values() if entry.pace]
        print(config.left_of_run(left, paces[-1:]))
    return agent, rrm, setups


def run_missing(cfg: Config, tasks, journal, runner, agent, rrm, setups, *, rank, world, group):
    """Runs this process's share of what is missing."""
    tp = cfg.engine.tensor_parallel
    agent = agent if agent.engine else start_engine(cfg, agent, group)
    if cfg.refine:
        rrm = rrm or reward_model.open_rrm(cfg.rrm, agent.chat, engine=cfg.engine)
        rrm.must_answer = True  # else chains would keep their first answer and count as finished
    if rank == 0:
        facts = config.run_facts(cfg) | {"agent": agent.how, "served": agent.served}
        facts["subsets"] = {task.name: task.subset for task in tasks}
        web = setups[0].toolbox.web.settings["search"] or "no provider"
        facts["search"] = f"local pages {cfg.corpus}" if cfg.corpus else web
        write_whole(Path(cfg.out_dir) / "run.json", json.dumps(facts, indent=1))
    if rank % tp:  # a tensor-parallel rank that does not lead
        return agent.engine.follow()
    try:
        for task, setup in zip(tasks, setups):
            setup = dataclasses.replace(setup, engine=agent.engine, rrm=rrm)
            runner.run(run_task(cfg, task, setup, journal, rank // tp, world // tp))
    finally:  # also after an error: those that follow would wait for ever
        if tp > 1:
            agent.engine.finish()


def join_ranks(cfg: Config, rank: int, world: int, stack):
    """(the group of this rank's engine or None, a function in which all ranks meet)."""
    if world == 1:
        return None, lambda phase: None
    import torch.distributed as dist

    from reagent import run

    run.init_distributed(cfg.timeout_s)
    stack.callback(dist.destroy_process_group)
    own = run.engine_group(cfg.engine.tensor_parallel, cfg.timeout_s)
    gloo = dist.new_group(backend="gloo")
    return own, lambda phase: run.meet(phase, gloo, cfg.timeout_s)


def main(cfg: Config) -> None:
    # -------------------- everything that can be wrong, before work starts
    check_config(cfg)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    tasks = load_tasks(cfg)
    keys = [(key, row) for task in tasks for key, row in task.keys()]
    facts = Path(cfg.out_dir) / "run.json"
    judged = [task for task in tasks if task.spec.scorer == "judge"]
    asks = bool(judged and cfg.judge and cfg.judged != "none")
    if judged and not asks:
        names = ", ".join(task.name for task in judged)
        what = f"the answers of {names} stay unscored until a run has --judge=http://…/v1"
        print(f"no judge: {what}", file=sys.stderr)
    if asks:
        kept = cfg.judge_cache if Path(cfg.judge_cache).exists() or not cfg.check else ""
        open_verdicts(kept).close()  # a damaged one is told before any work
    with contextlib.ExitStack() as stack:
        toolboxes = make_toolboxes(cfg, tasks)
        for toolbox in toolboxes.values():
            stack.callback(toolbox.close)
        journal = Journal(cfg.out_dir, rank, reads=cfg.check)
        stack.enter_context(contextlib.closing(journal))
        if facts.is_file():  # a folder holds the answers of one agent: a changed key is refused
            from reagent.run import check_resume

            now = json.loads(json.dumps(dataclasses.asdict(cfg)))
            check_resume(read_json(facts, "config")["config"], now, MAY_CHANGE, cfg.out_dir)
        group, meet = join_ranks(cfg, rank, world, stack)
        runner = stack.enter_context(asyncio.Runner())

        # ------------------------------------------------------------ chains
        try:
            agent, *parts = preflight(cfg, tasks, toolboxes, journal, runner, asks)
            if cfg.check:
                return print("checked: it can start") if rank == 0 else None
            own = dict(rank=rank, world=world, group=group)
            run_missing(cfg, tasks, journal, runner, agent, *parts, **own)
        except (Unavailable, Refused) as down:
            done = sum(journal.done(key, row) for key, row in keys)
            told = f"{done} of {len(keys)} chains are finished: run the same command again"
            raise SystemExit(f"{down}; {told} to go on") from None
        meet("the chains")
        if rank > 0:
            return

        # ------------------------------------------------------------ judge, results, report
        journal.read_other_ranks()
        judge = open_judge(cfg, runner) if asks else None
        if judge:
            runner.run(judge_answers(judged, journal, judge))
        write_reports(cfg, tasks, journal, judge.name if judge else "")
        if left := sum(not journal.done(key, row) for key, row in keys):
            what = f"{left} chains failed for want of infrastructure"
            print(f"{what}: run the same command again", file=sys.stderr)


if __name__ == "__main__":
    try:
        main(config.parse_config(Config, sys.argv[1:]))
    except KeyboardInterrupt:
        print("stopped: the same command goes on with what is missing", file=sys.stderr)
        sys.exit(130)
