"""Tries agents on held-out toy questions: first attempts, refined ones, and what the critique is
worth.

    python data/toy/trial.py out/toy/sft/step-000250 out/toy/u/step-000040 [--rrm=FOLDER|FILE.py]
        [--data=FILE] [--tools=search] [--out=FOLDER]

No reward model is used for the first attempts. `shuffled` refines with the critique of another
question. The figures go into trial.json in `out`, by default the folder that holds the last agent.
"""

import asyncio
import contextlib
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import rollout
from reagent import engines, reward_model
from reagent.policy import load_chat
from reagent.rows import JsonlRows
from reagent.scorers import rule_reward
from tools import Toolbox


def grounded(episode, stage: int) -> bool:
    """Right, and the answer stood in a tool result of the chain before it was given."""
    attempt = episode.attempts[min(stage, len(episode.attempts) - 1)]
    seen = [m["content"] for m in episode.messages[: attempt.messages[1]] if m["role"] == "tool"]
    return bool(attempt.correct) and any(
        text.strip() == attempt.answer or f"has code {attempt.answer}." in text for text in seen
    )


def trial(
    folder: str,
    rrm: str = str(Path(__file__).with_name("prepare.py")),
    seed: int = 0,
    data: str = str(Path(__file__).parent / "rl_test.jsonl"),
    tools: str = "search",
):
    """-> (figures, episodes with the judge's own critiques) of one agent on the rows of `data`."""
    rows = list(JsonlRows(data))
    chat = load_chat(folder)
    engine = engines.HFEngine(folder, chat.stop_ids)
    client = reward_model.open_rrm(
        reward_model.RewardModelConfig(rrm, max_context=1024, max_tokens=256),
        chat,
        engine=engines.EngineConfig("hf"),
    )
    limits = rollout.Limits(8, 12, 400, 1024, final_tokens=12)
    with contextlib.closing(Toolbox(tools.split(","))) as toolbox:
        setup = rollout.Setup(engine, chat, toolbox, limits, rule_reward, client, refine=True)
        episodes = asyncio.run(
            rollout.run_chains([(row, (seed, "trial", 0)) for row in rows], setup)
        )
        critiques = [e.attempts[0].critique or "" for e in episodes]
        moved = critiques[1:] + critiques[:1]
        setup.rrm = None
        shuffled = asyncio.run(
            rollout.refine_with(episodes, rows, moved, setup, (seed, "shuffled"))
        )

    def share(values):
        return round(sum(map(bool, values)) / len(rows), 3)

    figures = {
        "first": share(e.attempts[0].correct for e in episodes),
        "grounded": share(grounded(e, 0) for e in episodes),
        "calls": round(sum(len(e.attempts[0].calls) for e in episodes) / len(rows), 2),
        "refined": share(e.attempts[-1].correct for e in episodes),
        "shuffled": share(e.attempts[-1].correct for e in shuffled),
    }
    return figures, episodes


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


def main(argv: list[str]) -> None:
    options = dict(arg[2:].split("=", 1) for arg in argv if arg.startswith("--"))
    folders = [arg for arg in argv if not arg.startswith("--")]
    if not folders or set(options) - {"rrm", "seed", "data", "tools", "out"}:
        raise SystemExit(__doc__)
    out = Path(options.pop("out", Path(folders[-1]).parent))
    options["seed"] = int(options.get("seed", 0))
    table = {folder: trial(folder, **options) for folder in folders}
    chosen = random.Random(0).sample([e for e in table[folders[0]][1] if len(e.attempts) > 1], 3)
    for n, episode in enumerate(chosen, 1):
        print(f"\n--- transcript {n}: {folders[0]}\n{transcript(episode)}")
    head = list(table[folders[0]][0])
    held_out = f"{len(table[folders[0]][1])} held-out questions"
    print(f"\n{held_out:36}" + "".join(f"{name:>10}" for name in head))
    for folder, (figures, _) in table.items():
        print(f"{folder:36}" + "".join(f"{figures[name]:>10}" for name in head))
    (out / "trial.json").write_text(json.dumps({f: t[0] for f, t in table.items()}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
