"""Data of one's own agents: trajectories judged by a teacher, as RRM rows (paper section 3.3).

python data/annotate.py --agents=out/sft/step-003476 --teacher=https://host/v1
"""

import asyncio
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import rollout
from data.at_work import Common, agent_at_work
from reagent import engines, reward_model
from reagent.config import parse_config
from reagent.critiques import leaks
from reagent.folder import read_json, write_whole
from reagent.policy import load_chat
from reagent.reward_model import RewardModelConfig, check_judged_row, row_trajectory
from reagent.rows import drop_cut_line, seed_of, whole_rows
from reagent.run import check_resume


@dataclass
class AnnotateConfig(Common):
    agents: str = ""  # folders of one or several agents, separated by commas
    teacher: RewardModelConfig = RewardModelConfig()  # key of its servers: RRM_API_KEY
    samples_per_question: int = 4  # of each agent
    share_correct: float = 0.5  # of the rows written; the larger class is thinned
    out: str = "data/reagent/rrm_annotated.jsonl"


# what may change between two calls for the same file: more of the same, and how it is computed
MAY_CHANGE = {
    "agents",
    "limit",
    "samples_per_question",
    "share_correct",
    "out",
    "files_dir",
    "engine.memory_share",
    "engine.sleep",
    "engine.max_live_chains",
    "teacher.memory_share",
    "teacher.seconds",
    "teacher.in_flight",
}


def check_settings(cfg: AnnotateConfig, path: Path, teacher: str) -> None:
    """Trajectories and judgments of one file come from one teacher and one setting: what changed is
    refused by name. `teacher`: the model behind an address, which may have moved.
    """
    settings = dataclasses.asdict(cfg) | {"teacher.serves": teacher}
    if path.is_file():
        check_resume(read_json(path), settings, MAY_CHANGE, path)
    write_whole(path, json.dumps(settings, indent=1))


def read_appended(path: Path) -> list[dict]:
    """The rows of a file that only grows, none without it; a last line that a kill cut goes."""
    drop_cut_line(path)
    return list(whole_rows(path))


def sample_trajectories(cfg: AnnotateConfig, path: Path) -> list[dict]:
    """First attempts of every agent at every row, appended to `path` as they end; what stands there
    is not run again.
    """
    done = {row["id"]: row for row in read_appended(path)}
    for folder in cfg.agents.split(","):
        with agent_at_work(cfg, folder) as (setup, rows, run), open(path, "a") as file:
            jobs = [
                (f"{folder}/{row['id']}/{g}", row, g)
                for row in rows
                for g in range(cfg.samples_per_question)
            ]
            missing = [job for job in jobs if job[0] not in done]
            bar = tqdm(
                total=len(missing),
                desc=f"trajectories of {folder}",
                disable=not sys.stderr.isatty(),
            )

            async def one(name, row, g):
                episode = await rollout.run_chain(row, setup, (cfg.seed, folder, g))
                bar.update()
                if episode.dropped:  # a fault of ours: tried again by the next call
                    return
                attempt = episode.attempts[0]
                done[name] = {
                    "id": name,
                    "agent": folder,
                    "question": episode.question,
                    "answer": episode.gold,
                    "trajectory": episode.messages[slice(*attempt.messages)],
                    "correct": bool(attempt.correct),
                }
                file.write(json.dumps(done[name]) + "\n")
                file.flush()

            run(engines.run_together((one(*job) for job in missing), cfg.engine.max_live_chains))
            bar.close()
    return sorted(done.values(), key=lambda row: row["id"])


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


def by_id(row: dict) -> str:
    return row["id"]


def annotate(cfg: AnnotateConfig) -> None:
    """Samples trajectories, balances right and wrong ones, has a teacher write the three blocks,
    keeps the valid ones.

    Goes on where it stopped: trajectories and judgments stand beside `out` in files that only grow.
    A trajectory whose judgment failed (teacher down, 429, 500, prose) or leaks the answer is left
    out, counted, and asked for again by the next call. The paper's teacher is gpt-oss-120b; whether
    it saw the gold answer is not said: ours does not.
    """
    for key, given in (("agents", cfg.agents), ("teacher", cfg.teacher.source)):
        if not given:
            raise SystemExit(f"annotate needs --{key}")
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    chat = load_chat(cfg.agents.split(",")[0])
    share = cfg.engine.memory_share  # agents and teacher have the card one after the other
    asked = dataclasses.replace(cfg.teacher, memory_share=share)
    in_turn = Path(cfg.teacher.source).is_dir()
    teacher = None
    if not in_turn:  # is the teacher up? Asked before any work
        teacher = reward_model.open_rrm(asked, chat, engine=cfg.engine)
    check_settings(cfg, out.with_suffix(".settings.json"), getattr(teacher, "name", ""))
    sampled = sample_trajectories(cfg, out.with_suffix(".trajectories.jsonl"))
    if in_turn:
        teacher = reward_model.open_rrm(asked, chat, engine=cfg.engine)
    chosen = thinned(sampled, cfg.share_correct, cfg.seed)
    if not chosen:
        raise SystemExit(
            f"none of {len(sampled)} trajectories is chosen: at no question was an agent right and "
            "wrong. Raise --samples_per_question or --limit, or keep all with --share_correct=0"
        )
    judged = {row["id"]: row for row in read_appended(out.with_suffix(".judgments.jsonl"))}
    missing = [row for row in chosen if row["id"] not in judged]
    unusable: list[str] = []
    before, leaking = len(judged), 0  # `before` is in the seeds: the next call asks afresh
    bar = tqdm(total=len(missing), desc="judgments", disable=not sys.stderr.isatty())
    with open(out.with_suffix(".judgments.jsonl"), "a") as file, asyncio.Runner() as runner:

        async def one(row):
            nonlocal leaking
            judgment = await teacher(
                row["question"], row["trajectory"], (cfg.seed, row["id"], before)
            )
            bar.update()
            if judgment is None:
                return
            if leaks(judgment.critique, row["answer"], row["question"], row_trajectory(row)):
                leaking += 1
                return
            whole = {**row, **dataclasses.asdict(judgment)}
            if check_judged_row(whole):  # such as one without thoughts: nothing to learn from
                unusable.append(row["id"])
                return
            judged[row["id"]] = whole
            file.write(json.dumps(judged[row["id"]]) + "\n")
            file.flush()

        runner.run(engines.run_together((one(row) for row in missing), cfg.engine.max_live_chains))
    bar.close()
    rows = thinned(
        [judged[row["id"]] for row in chosen if row["id"] in judged], cfg.share_correct, cfg.seed
    )
    part = out.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.rename(out)
    right = sum(row["correct"] for row in sampled)
    print(
        f"{len(sampled)} trajectories ({right} right), {len(chosen)} chosen, {teacher.failed} "
        f"without a valid judgment, {len(unusable)} with one that is no target, {leaking} leak the "
        f"answer, {len(rows)} rows ({sum(row['correct'] for row in rows)} right) -> {out}"
    )
    if teacher.failed or leaking or unusable:
        print("call it again to ask for the missing judgments once more")


if __name__ == "__main__":
    annotate(parse_config(AnnotateConfig, sys.argv[1:]))
