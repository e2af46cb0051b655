"""An agent at work on RL rows, for the scripts that sample, judge or try it."""

import asyncio
import contextlib
import copy
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import rollout
from evaluate import AT_WORK
from reagent import engines
from reagent.engines import EngineConfig
from reagent.rows import JsonlRows, check_rl_row
from reagent.scorers import rule_reward
from tools import Toolbox


@dataclass
class Common:
    """What annotate and report share: how the agent works."""

    data: str = "data/reagent/rl_train.jsonl"  # RL rows that the agent works on
    limit: int = 0  # rows; 0: all
    tools: str = "search,browse,python"
    corpus: str = ""  # local pages for rows without docs
    files_dir: str = ""  # where the files of rows lie
    unsafe_python: bool = False  # run code without a sandbox where this machine has none
    engine: EngineConfig = AT_WORK
    temperature: float = 0.7
    max_turns: int = 13
    max_new_tokens_per_turn: int = 4096
    max_tokens_per_attempt: int = 11_000
    max_context: int = 32_768  # tokens of a chain
    seed: int = 0


@contextlib.contextmanager
def agent_at_work(cfg, folder: str):
    """-> (Setup without a reward model, rows, run): an agent; `run(coroutine)` runs its chains."""
    from reagent.policy import load_chat

    rows = JsonlRows(cfg.data, check_rl_row)
    chat = load_chat(folder)
    places = dict(corpus=cfg.corpus, files_dir=cfg.files_dir)
    toolbox = Toolbox(cfg.tools.split(","), **places, unsafe_python=cfg.unsafe_python)
    toolbox.check_rows(rows, cfg.data)
    engine = engines.make_engine(cfg.engine, folder, chat.stop_ids, max_context=cfg.max_context)
    limits = rollout.Limits(
        cfg.max_turns,
        cfg.max_new_tokens_per_turn,
        cfg.max_tokens_per_attempt,
        cfg.max_context,
        final_tokens=min(512, cfg.max_new_tokens_per_turn),
    )
    setup = rollout.Setup(engine, chat, toolbox, limits, rule_reward, temperature=cfg.temperature)
    with asyncio.Runner() as runner:
        yield (
            setup,
            [rows[i] for i in range(min(cfg.limit or len(rows), len(rows)))],
            runner.run,
        )
    engines.close(engine)
    toolbox.close()


async def refine_with(episodes, rows, critiques, setup: rollout.Setup, key: tuple) -> list:
    """Stage 2 after the first of finished episodes, with critiques of one's choice."""

    async def one(episode, row, critique):
        first = episode.attempts[0]
        fresh = copy.deepcopy(episode)
        fresh.ids, fresh.mask = fresh.ids[: first.span[1]], fresh.mask[: first.span[1]]
        fresh.logps, fresh.messages = (
            fresh.logps[: sum(fresh.mask)],
            fresh.messages[: first.messages[1]],
        )
        fresh.attempts = fresh.attempts[:1]
        await rollout.refine(fresh, row, setup, critique, (*key, fresh.id))
        return fresh

    return await engines.run_together(one(*job) for job in zip(episodes, rows, critiques))
