"""Tries agents on held-out questions of any world: first attempts, refined ones, and what the
critique is worth.

    python data/trial.py config/trial_toy.py --agents=out/toy/sft/step-000250,out/toy/u/step-000040
    python data/trial.py config/trial_atlas_135m.py --agents=FOLDER --closed_book
    python data/trial.py config/trial_toy.py --agents=FOLDER --rrm=     (first attempts alone)

A question whose chain ended by a fault (a tool's machine, a prompt that is too long) is left out.
`grounded`: right, and the answer stood in a tool result before it was given; `called`: first
attempts with a call; `shuffled`: refined after the critique of another question; `limit`: first
attempts that ended at a limit; `closed`: without tools. Each with its 95 % interval; the first
column also by hops, where rows say how many.
"""

import json
import random
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import rollout
from data.at_work import Common, agent_at_work, refine_with
from reagent import engines
from reagent.config import parse_config, read_prompt
from reagent.folder import write_whole, writing
from reagent.reward_model import RewardModelConfig, open_rrm
from results.statistics import LIMITS, mean_interval
from tools import Toolbox


@dataclass
class Config(Common):
    agents: str = ""  # folders, separated by commas
    rrm: RewardModelConfig = RewardModelConfig()  # its critiques are read by the refined attempts
    prompt_file: str = ""  # another system prompt
    closed_book: bool = False  # also without tools
    transcripts: int = 3  # printed of the last agent, at the end one that refinement fixed
    out: str = ""  # folder of trial.json; "": the one that holds the last agent


def grounded(episode) -> bool:
    """The first attempt is right and its answer, in its own or a right spelling (1,234 and 1234),
    stood in a tool result before."""
    attempt = episode.attempts[0]
    if not attempt.correct:
        return False
    spellings = "|".join(map(re.escape, [attempt.answer, *episode.gold]))
    results = [m for m in episode.messages[: attempt.messages[1]] if m["role"] == "tool"]
    stood = re.compile(rf"(?<!\w)(?:{spellings})(?!\w)")
    return any(stood.search(message["content"]) for message in results)


def sound(others: list, chains: list) -> tuple[list, list]:
    """Both without those whose chain ended by a fault of ours, which says nothing of the agent."""
    whole = [(other, chain) for other, chain in zip(others, chains) if not chain.dropped]
    if not whole:
        raise SystemExit(f"all {len(chains)} chains ended by faults, such as {chains[0].dropped}")
    return tuple(map(list, zip(*whole)))


def attempts(cfg: Config, jobs: list, setup, run) -> tuple[list, list, list, list]:
    """-> (all chains, then the jobs, episodes and chains with another question's critique of those
    that no fault ended); without a reward model no attempt is refined."""
    if not cfg.rrm.source:
        chains = run(rollout.run_chains(jobs, setup))
        return chains, *sound(jobs, chains), []
    rrm = open_rrm(cfg.rrm, setup.chat, engine=cfg.engine)
    chains = run(rollout.run_chains(jobs, replace(setup, rrm=rrm, refine=True)))
    engines.close(rrm.engine)
    jobs, episodes = sound(jobs, chains)
    own = [episode.attempts[0].critique or "" for episode in episodes]
    rows = [row for row, _ in jobs]
    moved = refine_with(episodes, rows, own[1:] + own[:1], setup, (cfg.seed, "shuffled"))
    return chains, jobs, *sound(episodes, run(moved))


def trial(folder: str, cfg: Config) -> tuple[dict, list]:
    """-> ({column: [mean, low, high]}, episodes with the reward model's own critiques)."""
    from reagent.memory import plan_engines  # torch
    from reagent.policy import load_config

    for each in filter(None, cfg.agents.split(",")):  # a missing one ends it before any work
        load_config(each)
    plan_engines(cfg.engine, folder, cfg.rrm)
    with agent_at_work(cfg, folder) as (setup, rows, run):
        prompt = read_prompt(cfg.prompt_file, rollout.SYSTEM_PROMPT)
        setup = replace(setup, system_prompt=prompt)
        jobs = [(row, (cfg.seed, "trial", 0)) for row in rows]
        chains, jobs, episodes, shuffled = attempts(cfg, jobs, setup, run)
        closed = []
        if cfg.closed_book:
            alone = replace(setup, toolbox=Toolbox([]))
            closed = [c for c in run(rollout.run_chains(jobs, alone)) if not c.dropped]
    left_out = len(chains) - min(map(len, filter(None, (episodes, closed))))
    if left_out:
        print(f"{folder}: {left_out} of {len(chains)} questions left out, ended by faults of ours")
    firsts = [episode.attempts[0] for episode in episodes]
    columns = {
        "first": [attempt.correct for attempt in firsts],
        "grounded": [grounded(episode) for episode in episodes],
        "called": [bool(attempt.calls) for attempt in firsts],
        "calls": [len(attempt.calls) for attempt in firsts],
        "refined": [e.attempts[-1].correct for e in episodes if cfg.rrm.source],
        "shuffled": [episode.attempts[-1].correct for episode in shuffled],
        "limit": [attempt.termination in LIMITS for attempt in firsts],
        "closed": [episode.attempts[0].correct for episode in closed],
    }
    for episode, attempt in zip(episodes, firsts):
        if hops := episode.meta.get("hops"):
            columns.setdefault(f"{hops} hops", []).append(attempt.correct)
    figures = {name: mean_interval(map(float, values)) for name, values in columns.items()}
    return {name: figure for name, figure in figures.items() if figure}, episodes


def shown(figure: list | None) -> str:
    """[mean, low, high] in a cell of the table."""
    if figure is None:
        return "-"
    mean, low, high = figure
    return f"{mean:.3f} ±{(high - low) / 2:.3f}"


def transcript(episode) -> str:
    """One chain for a terminal: attempt, critique, refined attempt."""
    lines = [f"Question: {episode.question}   (answer: {', '.join(episode.gold)})"]
    for stage, attempt in enumerate(episode.attempts):
        lines.append(("FIRST ATTEMPT", "REFINED ATTEMPT")[stage])
        for message in episode.messages[slice(*attempt.messages)]:
            lines += [f"  {message['role']:9} {line}" for line in message["content"].splitlines()]
        lines.append(f"  -> {'right' if attempt.correct else 'wrong'}, score {attempt.score}")
        if stage == 0 and attempt.critique:
            lines.append(f"CRITIQUE  {attempt.critique}")
    return "\n".join(lines)


def change(episode) -> str:
    """What refinement did to a chain."""
    first, last = (bool(episode.attempts[i].correct) for i in (0, -1))
    return ("left wrong", "fixed", "broken", "left right")[2 * first + last]


def fixed_last(episodes: list, count: int) -> list:
    """`count` chains, drawn, with a refined attempt if any has one; the fixed ones come last."""
    whole = [episode for episode in episodes if len(episode.attempts) > 1] or list(episodes)
    random.Random(0).shuffle(whole)
    return sorted(whole, key=lambda episode: change(episode) == "fixed")[
        max(len(whole) - count, 0) :
    ]


def show_chains(episodes: list, folder: str, count: int) -> None:
    """Some chains of an agent, at the end one that refinement fixed; where the page is."""
    for episode in fixed_last(episodes, count):
        what = f", {change(episode)} by refinement" if len(episode.attempts) > 1 else ""
        print(f"\n--- {folder}{what}\n{transcript(episode)}")
    changes = [change(episode) for episode in episodes if len(episode.attempts) > 1]
    wrong = changes.count("fixed") + changes.count("left wrong")
    if changes:
        print(f"\nrefinement fixed {changes.count('fixed')} of {wrong} wrong answers of {folder}")
    page = Path(folder).parent / "report.html"
    if page.is_file():
        print(f"its curves and episodes: {page}")


def main(cfg: Config) -> None:
    folders = [folder for folder in cfg.agents.split(",") if folder]
    if not folders:
        raise SystemExit("trial needs --agents=FOLDER[,FOLDER]")
    out = Path(cfg.out or Path(folders[-1]).parent)
    with writing(out):  # before any work
        out.mkdir(parents=True, exist_ok=True)
    table = {folder: trial(folder, cfg) for folder in folders}
    episodes = table[folders[-1]][1]
    print(f"\n{len(episodes)} held-out questions; ± half of the 95 % interval")
    names = list(dict.fromkeys(name for of, _ in table.values() for name in of))
    print(f"{'':32}" + "".join(f"{name:>14}" for name in names))
    for folder, (of, _) in table.items():  # faults may have left one agent without a column
        print(f"{folder:32}" + "".join(f"{shown(of.get(name)):>14}" for name in names))
    kept = {folder: of for folder, (of, _) in table.items()}
    write_whole(out / "trial.json", json.dumps(kept, indent=1))
    show_chains(episodes, folders[-1], cfg.transcripts)


if __name__ == "__main__":
    main(parse_config(Config, sys.argv[1:]))
