"""An agent at work on RL rows, for the scripts that sample, judge or try it."""

import asyncio
import contextlib
import copy
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import evaluate
import rollout
from reagent import engines
from reagent.engines import EngineConfig
from reagent.rows import JsonlRows, check_rl_row
from reagent.scorers import rule_reward
from tools import Toolbox


@dataclass
class Common:
    """What the scripts share: how the agent works."""

    data: str = "data/reagent/rl_train.jsonl"  # RL rows that the agent works on
    limit: int = 0  # rows; 0: all
    tools: str = "search,browse,python"  # or none
    corpus: str = ""  # local pages for rows without docs
    files_dir: str = ""  # where the files of rows lie
    unsafe_python: bool = False  # run code without a sandbox where this machine has none
    engine: EngineConfig = evaluate.AT_WORK  # of a folder; max_live_chains of a URL too
    tokenizer: str = ""  # of an agent behind a URL; "": what the server was started with
    endpoint: str = "auto"  # of an agent behind a URL: auto | completions | chat
    patience_s: float = 600.0  # how long to wait for its server
    temperature: float = 0.7
    max_turns: int = 13
    max_new_tokens_per_turn: int = 4096
    max_tokens_per_attempt: int = 11_000
    max_context: int = 32_768  # tokens of a chain
    seed: int = 0


def open_agent(cfg: Common, source: str, runner: asyncio.Runner) -> evaluate.Agent:
    """The agent of a folder or of a URL (URL#NAME where the server has several models)."""
    model, _, name = source.partition("#")
    parts = dict(model=model, served_model=name, tools=cfg.tools, engine=cfg.engine)
    parts |= dict(tokenizer=cfg.tokenizer, endpoint=cfg.endpoint, patience_s=cfg.patience_s)
    asked = evaluate.Config(**parts, max_context=cfg.max_context)
    if model.startswith("http"):
        return evaluate.served_agent(asked, runner)
    return evaluate.start_engine(asked, evaluate.local_agent(asked))


@contextlib.contextmanager
def agent_at_work(cfg: Common, source: str):
    """-> (Setup without a reward model, rows, run): an agent; `run(coroutine)` runs its chains."""
    rows = JsonlRows(cfg.data, check_rl_row)
    names = [name for name in cfg.tools.split(",") if name != "none"]
    places = dict(corpus=cfg.corpus, files_dir=cfg.files_dir)
    toolbox = Toolbox(names, **places, unsafe_python=cfg.unsafe_python)
    toolbox.check_rows(rows, cfg.data)
    with asyncio.Runner() as runner:
        agent = open_agent(cfg, source, runner)
        limits = rollout.Limits(
            cfg.max_turns,
            cfg.max_new_tokens_per_turn,
            cfg.max_tokens_per_attempt,
            min(cfg.max_context, agent.positions),
            final_tokens=min(512, cfg.max_new_tokens_per_turn),
        )
        parts = dict(engine=agent.engine, chat=agent.chat, toolbox=toolbox, limits=limits)
        setup = rollout.Setup(**parts, rule_reward=rule_reward, temperature=cfg.temperature)
        some = [rows[i] for i in range(min(cfg.limit or len(rows), len(rows)))]
        yield setup, some, runner.run
    engines.close(agent.engine)
    toolbox.close()


async def refine_with(episodes, rows, critiques, setup: rollout.Setup, key: tuple) -> list:
    """Stage 2 after the first of finished episodes, with critiques of one's choice."""

    async def one(episode, row, critique):
        first, fresh = episode.attempts[0], copy.deepcopy(episode)
        fresh.ids, fresh.mask = fresh.ids[: first.span[1]], fresh.mask[: first.span[1]]
        fresh.logps = fresh.logps[: sum(fresh.mask)]
        fresh.messages = fresh.messages[: first.messages[1]]
        fresh.attempts = fresh.attempts[:1]
        await rollout.refine(fresh, row, setup, critique, (*key, fresh.id))
        return fresh

    return await engines.run_together(one(*job) for job in zip(episodes, rows, critiques))
