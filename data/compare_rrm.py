"""How good a reward model is: on held-out judgments, beside another one, and by what its critiques
do for an agent.

    python data/compare_rrm.py --rrm=FOLDER --eval_data=FILE [--against=OTHER] [--agent=FOLDER]
"""

import asyncio
import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import rollout
from data.at_work import Common, agent_at_work, refine_with
from data.growing import whole_rows
from data.report.markdown import report_table
from reagent import engines, reward_model
from reagent.config import parse_config
from reagent.folder import claim, read_json
from reagent.reward_model import RewardModelConfig, check_rrm_row
from reagent.rows import JsonlRows
from results.judging import auc, judgment_report


@dataclass
class Config(Common):
    rrm: RewardModelConfig = RewardModelConfig()
    against: str = ""  # another source, for a paired comparison
    eval_data: str = "data/reagent/rrm_rl.jsonl"  # RRM rows, such as were held out
    agent: str = ""  # a folder: its answers before and after refinement (critique lift) on `data`
    out_dir: str = "out/rrm_report"


# --------------------------------------------------------------------------------------------------
# what its critiques do for an agent


async def critiques_of(rrm, episodes: list, seed: int) -> list[str | None]:
    """The critique of each first attempt; None where it was dropped or got no valid judgment."""

    async def one(episode):
        if episode.dropped or not episode.attempts:
            return None
        turns = episode.messages[slice(*episode.attempts[0].messages)]
        judgment = await rrm(episode.question, turns, (seed, "lift", episode.id))
        return judgment and judgment.critique

    return await engines.run_together(map(one, episodes))


def critique_lift(setup, jobs: list[tuple], run, seed: int) -> dict:
    """What refinement fixes and breaks with the reward model's own critique, another question's,
    none. `jobs`: (episode with its first attempt, row, own critique). A question at which a
    refinement ended by a fault of ours counts nowhere.
    """
    episodes, rows, own = zip(*jobs)
    kinds = {"own": own, "shuffled": own[1:] + own[:1], "empty": [""] * len(own)}
    refined = {}
    for name, critiques in kinds.items():
        chains = refine_with(episodes, rows, critiques, setup, (seed, name))
        refined[name] = run(chains)
    whole = [i for i in range(len(own)) if not any(of[i].dropped for of in refined.values())]
    if not whole:
        raise SystemExit(f"critique lift: all {len(own)} refinements ended by faults")
    first = [bool(episodes[i].attempts[0].correct) for i in whole]
    lift = {"lift/questions": len(whole), "lift/aborted": len(own) - len(whole)}
    lift["lift/first"] = sum(first) / len(whole)
    for name, of in refined.items():
        last = [bool(of[i].attempts[-1].correct) for i in whole]
        moves = list(zip(first, last))
        lift[f"lift/{name}/fixed"] = moves.count((False, True))
        lift[f"lift/{name}/broken"] = moves.count((True, False))
        lift[f"lift/{name}/refined"] = sum(last) / len(whole)
    return lift


# --------------------------------------------------------------------------------------------------
# beside another one


def paired_bootstrap(judged_a: list, judged_b: list, rows: list[dict], draws: int = 2000) -> dict:
    """b minus a where both judged: [difference, low, high] of MAE and AUC with 95 % intervals.

    Questions are drawn: the trajectories of one stand or fall together.
    """
    result, aucs = {}, [(f"auc/{key}", key, auc) for key in ("correct", "grounded")]
    for name, key, figure in [("mae", "score", mean_error), *aucs]:
        clusters: dict[str, list] = {}
        for a, b, row in zip(judged_a, judged_b, rows):
            if a and b and row.get(key) is not None:
                clusters.setdefault(row["question"], []).append((a.score, b.score, row[key]))
        told = np.array([each for of in clusters.values() for each in of], float)
        if len(told) and not math.isnan(figure(told[:, 0], told[:, 2])):
            result[f"difference/{name}"] = _interval(list(clusters.values()), figure, draws)
    return result


def mean_error(scores, truth) -> float:
    return float(np.abs(scores - truth).mean())


def _interval(clusters: list, figure, draws: int) -> list[float]:
    """[difference, low, high] over clusters of rows (score of a, score of b, truth)."""

    def difference(drawn) -> float:
        a, b, truth = np.concatenate(drawn).T
        return figure(b, truth) - figure(a, truth)

    rng, n = np.random.default_rng(0), len(clusters)
    drawn = [difference([clusters[c] for c in rng.integers(n, size=n)]) for _ in range(draws)]
    low_high = np.nanquantile(drawn, [0.025, 0.975])
    return [round(float(x), 4) for x in (difference(clusters), *low_high)]


# --------------------------------------------------------------------------------------------------
# what was trained on


def training_files(folder: str) -> list[str]:
    """The data of the checkpoint's run and of those it started from, as their configs name it."""
    files = []
    while (path := Path(folder) / "trainer.json").is_file():
        config = read_json(path, "config")["config"]
        files.append(config["data"])
        folder = config["model"]
    return files


def asked(row: dict) -> str:
    """The question of a row of any stage."""
    messages = row.get("messages") or []
    users = (m["content"] for m in messages if m.get("role") == "user")
    return row["question"] if "question" in row else next(users, "")


def held_out(what: str, rows: list[dict], folder: str) -> str:
    """A sentence: which of the rows the model of a folder was trained on."""
    files = [path for path in training_files(folder) if Path(path).is_file()]
    if not files:
        return f"{what}: what {folder} was trained on is not known here"
    trained = [row for path in files for row in whole_rows(path)]
    questions = {asked(row) for row in trained}
    known = sum(asked(row) in questions for row in rows)
    verbatim = {
        json.dumps([asked(row), row["trajectory"]]) for row in trained if "trajectory" in row
    }
    same = sum(json.dumps([asked(row), row.get("trajectory")]) in verbatim for row in rows)
    return (
        f"{what}: of {len(rows)} rows {known} have a question that stands in {', '.join(files)}, "
        f"which {folder} was trained on, and {same} stand there whole"
    )


# --------------------------------------------------------------------------------------------------


def main(cfg: Config) -> None:
    """A judge on held-out judgments, beside another, for an agent: a table and log.jsonl. One
    engine at a time: each has the card alone.
    """
    from reagent.policy import load_chat

    if not cfg.rrm.source:
        raise SystemExit("compare_rrm needs --rrm")
    if cfg.agent and not Path(cfg.agent).is_dir():
        raise SystemExit(f"--agent: no folder {cfg.agent}")
    for source in filter(None, (cfg.rrm.source, cfg.against)):
        if not any(name and Path(name).is_dir() for name in (cfg.agent, source)):
            raise SystemExit(
                f"{source} is no folder, so lengths need a tokenizer: give --agent=FOLDER"
            )
    rows = list(JsonlRows(cfg.eval_data, check_rrm_row))
    lock, told = claim(cfg.out_dir), [held_out(cfg.eval_data, rows, cfg.rrm.source)]
    episodes, critiques = [], []
    if cfg.agent:
        with agent_at_work(cfg, cfg.agent) as (setup, questions, run):
            chains = [(row, (cfg.seed, "lift", 0)) for row in questions]
            episodes = run(rollout.run_chains(chains, setup, cfg.engine.max_live_chains))
            told.append(held_out(cfg.data, questions, cfg.agent))
    found, judged = {}, []
    for source in filter(None, (cfg.rrm.source, cfg.against)):
        folder = next(name for name in (cfg.agent, source) if name and Path(name).is_dir())
        chat = load_chat(folder, tools=False)
        share = cfg.engine.memory_share  # alone on the card
        config = dataclasses.replace(cfg.rrm, source=source, memory_share=share)
        rrm = reward_model.open_rrm(config, chat, engine=cfg.engine)
        each = (rrm(r["question"], r["trajectory"], (cfg.seed, i)) for i, r in enumerate(rows))
        with asyncio.Runner() as runner:
            judged.append(runner.run(engines.run_together(each, cfg.engine.max_live_chains)))
            if not found:
                critiques = runner.run(critiques_of(rrm, episodes, cfg.seed))
        engines.close(rrm.engine)
        lengths = [len(chat.text(j.think + j.critique)) for j in judged[-1] if j]
        found[source] = judgment_report(judged[-1], rows, lengths)
        print(f"\n{source} on {len(rows)} trajectories of {cfg.eval_data}")
        print(report_table(found[source]))
    own = found[cfg.rrm.source]
    if cfg.against:
        own |= paired_bootstrap(judged[1], judged[0], rows)
    if cfg.agent:
        with agent_at_work(cfg, cfg.agent) as (setup, questions, run):
            jobs = [job for job in zip(episodes, questions, critiques) if job[2]]
            if not jobs:
                raise SystemExit("critique lift: the reward model gave no valid critique")
            own |= critique_lift(setup, jobs, run, cfg.seed)
    for name, value in own.items():
        if name.startswith(("difference", "lift")):
            print(f"{name:24} {value}")
    print(*told, sep="\n")
    own["held_out"] = told
    with open(Path(cfg.out_dir) / "log.jsonl", "a") as file:
        file.writelines(
            json.dumps({"rrm": spec, **numbers}) + "\n" for spec, numbers in found.items()
        )
    lock.close()


if __name__ == "__main__":
    main(parse_config(Config, sys.argv[1:]))
