"""Data of one's own agents (paper section 3.3): RRM, SFT or RL rows from attempts at RL rows.

    python data/annotate.py --agents=FOLDER,https://host/v1#NAME --teacher=https://host/v1
    python data/annotate.py --make=sft --agents=https://host/v1 --data=data/own/rl_train.jsonl
    python data/annotate.py --make=rl --agents=out/sft/step-003476 --data=data/own/rl_train.jsonl

rrm: a teacher judges the attempts. sft: the right ones of a strong agent with the tools stay, as
the paper's 55.6K were made. rl: questions stay that the agents answer sometimes. Attempts and
judgments stand beside OUT in files that only grow: the same command goes on. A table tells what was
kept and why the rest was not. Keys: MODEL_API_KEY of agents, RRM_API_KEY of the teacher.
data/questions.py makes RL rows of a table of questions and answers.
"""

import asyncio
import dataclasses
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import rollout
from data.at_work import Common, agent_at_work
from data.growing import whole_rows
from data.questions import asked
from reagent import engines, reward_model
from reagent.config import check_values, parse_config
from reagent.critiques import leaks
from reagent.folder import read_json, write_whole
from reagent.reward_model import RewardModelConfig, check_judged_row, row_trajectory
from reagent.rows import JsonlRows, check_rl_row, drop_cut_line, seed_of, sft_messages
from reagent.scorers import rule_reward
from reagent.served import TextChat
from toolkit.http import Refused, Unavailable
from tools import TOOLS, schema_of


@dataclass
class AnnotateConfig(Common):
    make: str = "rrm"  # rrm | sft | rl rows
    agents: str = ""  # folders and URLs (URL#NAME: one of its models), separated by commas
    teacher: RewardModelConfig = RewardModelConfig()  # of rrm rows; key of its servers: RRM_API_KEY
    samples_per_question: int = 4  # of each agent
    share_correct: float = 0.5  # of the rrm rows written; the larger class is thinned; 0: all stay
    rows_per_question: int = 1  # sft rows, at most
    keep_unsolved: bool = False  # rl rows that no attempt solved
    out: str = ""  # "": data/reagent/MAKE_annotated.jsonl


# what may change between two calls for the same file: more of the same, and how it is computed
MAY_CHANGE = set(
    "agents limit samples_per_question share_correct rows_per_question keep_unsolved out files_dir "
    "tokenizer patience_s engine.memory_share engine.sleep engine.max_live_chains "
    "teacher.memory_share teacher.seconds teacher.in_flight".split()
)
AGAIN = ("attempts lost", "without a valid", "with one", "leak")  # what the next call tries again


def check_settings(cfg: AnnotateConfig, path: Path, teacher: str) -> None:
    """Trajectories and judgments of one file come from one teacher and one setting: what changed is
    refused by name. `teacher`: the model behind an address, which may have moved.
    """
    settings = dataclasses.asdict(cfg) | {"teacher.serves": teacher}
    if path.is_file():
        from reagent.run import check_resume  # torch

        check_resume(read_json(path), settings, MAY_CHANGE, path)
    write_whole(path, json.dumps(settings, indent=1))


def read_appended(path: Path) -> list[dict]:
    """The rows of a file that only grows, none without it; a last line that a kill cut goes."""
    drop_cut_line(path)
    return list(whole_rows(path))


def bar_of(what: str, total: int):
    return tqdm(desc=what, total=total, mininterval=0.5 if sys.stderr.isatty() else 30.0)


# --------------------------------------------------------------------------------------------------
# attempts


def sample_trajectories(cfg: AnnotateConfig, path: Path, why: Counter) -> list[dict]:
    """First attempts of every agent at every row, appended to `path` as they end; what stands there
    is not run again. `why` counts the chains that were lost; the next call tries them again.
    """
    done = {row["id"]: row for row in read_appended(path)}
    for source in filter(None, cfg.agents.split(",")):
        with agent_at_work(cfg, source) as (setup, rows, run), open(path, "a") as file:
            jobs = [(row, g) for row in rows for g in range(cfg.samples_per_question)]
            missing = [job for job in jobs if f"{source}/{job[0]['id']}/{job[1]}" not in done]
            bar = bar_of(f"attempts of {source}", len(missing))

            async def one(row, g):
                name = f"{source}/{row['id']}/{g}"
                episode = await rollout.run_chain(row, setup, (cfg.seed, source, g))
                bar.update()
                if episode.dropped:
                    why[f"attempts lost: {episode.dropped}"] += 1
                    return
                attempt = episode.attempts[0]
                done[name] = {
                    "id": name,
                    "agent": source,
                    "row": row["id"],
                    "question": episode.question,
                    "answer": episode.gold,
                    "trajectory": episode.messages[slice(*attempt.messages)],
                    "correct": bool(attempt.correct),
                    "termination": attempt.termination,
                }
                file.write(json.dumps(done[name]) + "\n")
                file.flush()

            run(engines.run_together((one(*job) for job in missing), cfg.engine.max_live_chains))
            bar.close()
    return sorted(done.values(), key=by_id)


def by_id(row: dict) -> str:
    return row["id"]


def drawn(seed: int):
    """A key that sorts rows in an order of their own."""
    return lambda row: seed_of(seed, "draw", row["id"])


# --------------------------------------------------------------------------------------------------
# rrm rows: judged by a teacher


def thinned(rows: list[dict], share_correct: float, seed: int) -> list[dict]:
    """The largest part of the rows in which `share_correct` of each agent's trajectories at each
    question are correct, so that neither agent nor question tells the label; 0 keeps all. Who stays
    is drawn by a hash of the id.

    Fractions of a row are carried over to the next question of the agent. A question at which an
    agent was always right, or never, is left out.
    """
    if not 0 < share_correct < 1:
        return sorted(rows, key=by_id)
    cells: dict[tuple, tuple[list, list]] = {}
    for row in sorted(rows, key=lambda row: seed_of(seed, "thin", row["id"])):
        name = (str(row.get("agent")), row.get("question"))
        cells.setdefault(name, ([], []))[bool(row["correct"])].append(row)
    kept, owed = [], {}
    for (agent, _), cell in sorted(cells.items(), key=lambda item: seed_of(seed, *item[0])):
        total = min(len(cell[1]) / share_correct, len(cell[0]) / (1 - share_correct))
        for label, share in enumerate((1 - share_correct, share_correct)):
            due = owed.get((agent, label), 0.0) + total * share
            count = min(len(cell[label]), int(due + 1e-9))
            owed[agent, label] = due - count
            kept += cell[label][:count]
    return sorted(kept, key=by_id)


def rrm_rows(cfg: AnnotateConfig, sampled: list[dict], teacher, path: Path, why: Counter) -> list:
    """Balances right and wrong attempts, has a teacher write the three blocks, keeps valid ones.

    An attempt whose judgment failed (teacher down, 429, 500, prose) or leaks the answer is left
    out, counted, and asked for again by the next call. The paper's teacher is gpt-oss-120b; whether
    it saw the gold answer is not said: ours does not.
    """
    chosen = thinned(sampled, cfg.share_correct, cfg.seed)
    if not chosen:
        raise SystemExit(
            f"none of {len(sampled)} trajectories is chosen: at no question was an agent right and "
            "wrong. Raise --samples_per_question or --limit, or keep all with --share_correct=0"
        )
    why["left out to balance right and wrong"] += len(sampled) - len(chosen)
    judged = {row["id"]: row for row in read_appended(path)}
    missing = [row for row in chosen if row["id"] not in judged]
    before = len(judged)  # in the seeds: the next call asks afresh
    bar = bar_of("judgments", len(missing))
    with open(path, "a") as file, asyncio.Runner() as runner:

        async def one(row):
            key = (cfg.seed, row["id"], before)
            judgment = await teacher(row["question"], row["trajectory"], key)
            bar.update()
            if judgment is None:
                why["without a valid judgment"] += 1
            elif leaks(judgment.critique, row["answer"], row["question"], row_trajectory(row)):
                why["leak the answer"] += 1
            elif check_judged_row(whole := {**row, **dataclasses.asdict(judgment)}):
                why["with one that is no target"] += 1  # without thoughts: nothing to learn from
            else:
                judged[row["id"]] = whole
                file.write(json.dumps(whole) + "\n")
                file.flush()

        runner.run(engines.run_together((one(row) for row in missing), cfg.engine.max_live_chains))
    bar.close()
    valid = [judged[row["id"]] for row in chosen if row["id"] in judged]
    kept = thinned(valid, cfg.share_correct, cfg.seed)
    why["left out to balance right and wrong"] += len(valid) - len(kept)
    return kept


# --------------------------------------------------------------------------------------------------
# sft rows: right attempts


def sft_rows(cfg: AnnotateConfig, sampled: list[dict], why: Counter) -> list[dict]:
    """Right attempts that came to their end, at most `rows_per_question` of each question."""
    names = [name for name in cfg.tools.split(",") if name != "none"]
    schemas, kept, of = [schema_of(TOOLS[name]) for name in names], [], Counter()
    for row in sorted(sampled, key=drawn(cfg.seed)):
        opening = [{"role": "system", "content": rollout.SYSTEM_PROMPT}]
        opening.append({"role": "user", "content": row["question"]})
        whole = {"id": row["id"], "messages": opening + row["trajectory"], "tools": schemas}
        if not row["correct"]:
            why["wrong"] += 1
        elif row["termination"] != "answered":
            why[f"right, but ended by {row['termination']}"] += 1
        elif problem := sft_problem(whole):
            why[problem] += 1
        elif of[row["row"]] >= cfg.rows_per_question:
            why[f"right, beyond {cfg.rows_per_question} of a question"] += 1
        else:
            of[row["row"]] += 1
            kept.append(whole)
    return sorted(kept, key=by_id)


def sft_problem(row: dict) -> str:
    """Why sft.py would not take a row."""
    try:
        sft_messages(row)
    except ValueError as error:
        return f"not a row for sft.py: {re.sub(r'[0-9]+', 'N', str(error))[:80]}"
    return ""


# --------------------------------------------------------------------------------------------------
# rl rows: questions that teach


def rl_rows(cfg: AnnotateConfig, sampled: list[dict], rows: list[dict], why: Counter) -> list[dict]:
    """Rows that are asked once, whose own answer the rule accepts, and that some attempts solve and
    some do not; `meta.solved` says how many did. (Section 3.3 and appendix A.2 name filters of
    quality and difficulty, without their thresholds: where an agent is always right, or never, a
    group has no spread, and that is ours.)
    """
    attempts: dict[str, list[bool]] = {}
    for row in sampled:
        attempts.setdefault(str(row["row"]), []).append(row["correct"])
    kept, before = [], set()
    for row in rows:
        right = attempts.get(str(row["id"]), [])
        gold = row["answer"] if isinstance(row["answer"], str) else row["answer"][0]
        if (ask := asked(row)) in before:
            why["asked before"] += 1
        elif not rule_reward(row, gold)[1]:
            why["the rule does not accept its own answer"] += 1
        elif not right:
            why["without a finished attempt"] += 1
        elif all(right):
            why["always right"] += 1
        elif not any(right) and not cfg.keep_unsolved:
            why["never right"] += 1
        else:
            meta = (row.get("meta") or {}) | {"solved": [sum(right), len(right)]}
            kept.append(row | {"meta": meta})
        before.add(ask)
    return kept


# --------------------------------------------------------------------------------------------------


def chat_of(cfg: AnnotateConfig):
    """The chat of the first agent in a folder, whose control strings a teacher's request breaks."""
    folder = next((source for source in cfg.agents.split(",") if Path(source).is_dir()), "")
    if not folder:
        return TextChat()
    from reagent.policy import load_chat  # torch

    return load_chat(folder)


def annotate(cfg: AnnotateConfig) -> None:
    """Attempts, then rows of one kind, written whole at the end, and the table."""
    check_values(cfg, "make=rrm|sft|rl")
    for key, given in (("agents", cfg.agents), ("teacher", cfg.teacher.source)):
        if not given and (key == "agents" or cfg.make == "rrm"):
            raise SystemExit(f"annotate needs --{key}")
    out = Path(cfg.out or f"data/reagent/{cfg.make}_annotated.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    share = cfg.engine.memory_share  # agents and teacher have the card one after the other
    asked = dataclasses.replace(cfg.teacher, memory_share=share)
    in_turn, teacher = Path(cfg.teacher.source or "-").is_dir(), None
    if cfg.make == "rrm" and not in_turn:  # is the teacher up? Asked before any work
        teacher = reward_model.open_rrm(asked, chat_of(cfg), engine=cfg.engine)
    check_settings(cfg, out.with_suffix(".settings.json"), getattr(teacher, "name", ""))
    why: Counter = Counter()
    try:
        sampled = sample_trajectories(cfg, out.with_suffix(".trajectories.jsonl"), why)
        if cfg.make == "rrm":
            teacher = teacher or reward_model.open_rrm(asked, chat_of(cfg), engine=cfg.engine)
            kept = rrm_rows(cfg, sampled, teacher, out.with_suffix(".judgments.jsonl"), why)
        elif cfg.make == "sft":
            kept = sft_rows(cfg, sampled, why)
        else:
            rows = JsonlRows(cfg.data, check_rl_row)
            first = [rows[i] for i in range(min(cfg.limit or len(rows), len(rows)))]
            kept = rl_rows(cfg, sampled, first, why)
    except (Unavailable, Refused) as down:
        raise SystemExit(f"{down}: the same command goes on") from None
    write_whole(out, (json.dumps(row) + "\n" for row in kept))
    print_table(cfg, sampled, kept, why, out)


def print_table(cfg, sampled: list[dict], kept: list[dict], why: Counter, out: Path) -> None:
    """What was kept and why the rest was not, on the terminal and in OUT's .table.txt."""
    lines = [(f"attempts of {a}", n) for a, n in Counter(row["agent"] for row in sampled).items()]
    lines += [("of these right", sum(row["correct"] for row in sampled)), *why.most_common()]
    right = sum(row.get("correct", False) for row in kept)
    right = f" ({right} of right attempts)" if cfg.make == "rrm" else ""
    lines.append((f"{cfg.make} rows{right} -> {out}", len(kept)))
    text = "\n".join(
        f"{count:>8,} {what}" for what, count in lines if count or what == lines[-1][0]
    )
    write_whole(out.with_suffix(".table.txt"), text + "\n")
    print(text)
    if any(what.startswith(AGAIN) for what in why):
        print("call it again to ask for what is missing once more")


if __name__ == "__main__":
    annotate(parse_config(AnnotateConfig, sys.argv[1:]))
