"""How good a reward model is: on held-out judgments, beside another one, and by what its critiques
do for an agent.

    python data/compare_rrm.py --rrm=FOLDER --eval_data=FILE [--against=OTHER] [--agent=FOLDER]
"""

import asyncio
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import rollout
from data.at_work import Common, agent_at_work
from reagent import engines, reward_model
from reagent.config import parse_config
from reagent.folder import claim
from reagent.reward_model import RewardModelConfig, check_rrm_row
from reagent.rows import JsonlRows
from results.judging import judgment_report, paired_bootstrap, report_table


@dataclass
class Config(Common):
    rrm: RewardModelConfig = RewardModelConfig()
    against: str = ""  # another source, for a paired comparison
    eval_data: str = "data/reagent/rrm_rl.jsonl"  # RRM rows, such as were held out
    agent: str = ""  # a folder: its answers before and after refinement (critique lift) on `data`
    out_dir: str = "out/rrm_report"


def critique_lift(setup, rrm, rows: list[dict], run, seed: int) -> dict:
    """What refinement fixes and breaks with the reward model's own critique, another question's,
    none.
    """
    setup = dataclasses.replace(setup, rrm=rrm)
    episodes = run(rollout.run_chains([(row, (seed, "lift", 0)) for row in rows], setup))
    pairs = [
        (e, row)
        for e, row in zip(episodes, rows)
        if e.attempts and e.attempts[0].critique and not e.dropped
    ]
    if not pairs:
        raise SystemExit("critique lift: the reward model gave no valid critique")
    own = [e.attempts[0].critique for e, _ in pairs]
    lift = {
        "lift/questions": len(pairs),
        "lift/first": sum(e.attempts[0].correct for e, _ in pairs) / len(pairs),
    }
    for name, critiques in (
        ("own", own),
        ("shuffled", own[1:] + own[:1]),
        ("empty", [""] * len(own)),
    ):
        setup.rrm = None
        refined = run(rollout.refine_with(*zip(*pairs), critiques, setup, (seed, name)))
        moves = [(bool(e.attempts[0].correct), bool(e.attempts[-1].correct)) for e in refined]
        lift |= {
            f"lift/{name}/fixed": moves.count((False, True)),
            f"lift/{name}/broken": moves.count((True, False)),
        }
        lift[f"lift/{name}/refined"] = sum(after for _, after in moves) / len(moves)
    return lift


def main(cfg: Config) -> None:
    """A reward model on held-out judgments, beside another, for an agent: a table and log.jsonl."""
    from reagent.policy import load_chat

    if not cfg.rrm.source:
        raise SystemExit("rrm needs --rrm")
    rows = list(JsonlRows(cfg.eval_data, check_rrm_row))
    found, judged, lock = {}, [], claim(cfg.out_dir)
    for source in filter(None, (cfg.rrm.source, cfg.against)):
        folder = next((name for name in (cfg.agent, source) if name and Path(name).is_dir()), None)
        if folder is None:
            raise SystemExit(
                f"{source} is no folder, so lengths need a tokenizer: give --agent=FOLDER"
            )
        chat = load_chat(folder, tools=False)
        share = cfg.engine.memory_share  # alone on the card
        config = dataclasses.replace(cfg.rrm, source=source, memory_share=share)
        rrm = reward_model.open_rrm(config, chat, engine=cfg.engine)
        asked = (
            rrm(row["question"], row["trajectory"], (cfg.seed, i)) for i, row in enumerate(rows)
        )
        with asyncio.Runner() as runner:
            judged.append(runner.run(engines.run_together(asked, cfg.engine.max_live_chains)))
        engines.close(rrm.engine)
        lengths = [len(chat.text(j.think + j.critique)) for j in judged[-1] if j]
        found[source] = judgment_report(judged[-1], rows, lengths)
        print(f"\n{source} on {len(rows)} trajectories of {cfg.eval_data}")
        print(report_table(found[source]))
    own = found[cfg.rrm.source]
    if cfg.against:
        own |= paired_bootstrap(judged[1], judged[0], rows)
    if cfg.agent:
        from reagent.memory import check_shares

        check_shares(cfg.engine, cfg.rrm)
        with agent_at_work(cfg, cfg.agent) as (setup, questions, run):
            rrm = reward_model.open_rrm(cfg.rrm, setup.chat, engine=cfg.engine)
            own |= critique_lift(setup, rrm, questions, run, cfg.seed)
    for name, value in own.items():
        if name.startswith(("difference", "lift")):
            print(f"{name:24} {value}")
    with open(Path(cfg.out_dir) / "log.jsonl", "a") as file:
        file.writelines(
            json.dumps({"rrm": spec, **numbers}) + "\n" for spec, numbers in found.items()
        )
    lock.close()


if __name__ == "__main__":
    main(parse_config(Config, sys.argv[1:]))
