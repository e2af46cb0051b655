"""The ablation on the toy: what each part of Reagent-U is worth. `make ablation` runs it after
`make demo`.

    python data/toy/ablation.py [--seeds=5] [--sft=FOLDER] [--rrm=FOLDER|FILE.py] [--out=FOLDER]

All runs of a world start from the same agent and have the same judge, by default the rule
annotator: the toy, and its harder form (prepare.py --hard). Every run is a process of its own on
one core, two at a time; what is finished is not run again. Reagent-U samples twice the attempts of
R and rule a step, so those two run twice the steps: "R" is at equal steps, "R, 2x steps" at equal
attempts. Writes table.md and curves.svg into `out`.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from reagent.rows import whole_rows
from results.page import numeric_series
from results.plots import Panel, mean_line, picture_svg, share_axes

STEPS, QUESTIONS, GROUP = 24, 8, 8
ARMS = {
    "rule": ["--variant=rule"],
    "rule, token mean": ["--variant=rule", "--loss_agg=token_mean"],
    "R": ["--variant=r"],
    "U": [],
    "U, per-stage pools": ["--pool=per_stage"],
    "U, token mean": ["--loss_agg=token_mean"],
    "U, fixed critique": ["--fixed_critique=The trail was not followed to its end."],
    "U, lambda 0": ["--rrm_weight=0"],
    "U, drop rule_equal": ["--drop=rule_equal"],
}
TWICE = ("rule", "rule, token mean", "R")  # one attempt a chain: these also run to 2 * STEPS
COLUMNS = (
    "first",
    "grounded",
    "refined",
    "calls",
    "steps to .9",
    "attempts to .9",
    "score of wrong",
    "CPU-s",
)


def per_step(arm: str) -> int:
    """Attempts that one step of an arm samples."""
    return QUESTIONS * GROUP * (2 if arm.startswith("U") else 1)


def cpu_seconds(command: list[str], log: Path) -> float:
    """Runs a command to its end, its output appended to `log`; returns the CPU seconds it took."""
    with open(log, "a") as file:
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed: see {log}")
    return usage.ru_utime + usage.ru_stime


@dataclass(frozen=True)
class World:
    """Where a world's rows lie, the agent that all its runs start from, and the tools they have."""

    data: Path
    sft: str
    tools: str


def make_worlds(out: Path, sft: str) -> dict[str, World]:
    """The toy with the agent of `make demo`; the harder one is made here, with an agent of its
    own.
    """
    hard = out / "world"
    end = hard / "agent/step-000250"
    if not end.is_dir():
        hard.mkdir(parents=True, exist_ok=True)
        cpu_seconds(
            [sys.executable, "data/toy/prepare.py", "--hard", f"--out={hard}"], hard / "run.log"
        )
        cpu_seconds(
            [
                sys.executable,
                "sft.py",
                "config/sft_toy_tiny.py",
                f"--model={hard}/model",
                f"--data={hard}/sft.jsonl",
                f"--out_dir={hard}/agent",
            ],
            hard / "run.log",
        )
    return {
        "toy": World(ROOT / "data/toy", sft, "search"),
        "hard": World(hard, str(end), "search,python"),
    }


def try_out(world: World, judge: str, agents: list[str], out: Path) -> list[dict]:
    """The figures of the agents on the world's held-out questions."""
    command = [
        sys.executable,
        "data/toy/trial.py",
        *agents,
        f"--rrm={judge}",
        f"--data={world.data}/rl_test.jsonl",
    ]
    if not (out / "trial.json").is_file():
        cpu_seconds([*command, f"--tools={world.tools}", f"--out={out}"], out / "run.log")
    figures = json.loads((out / "trial.json").read_text())
    return [figures[agent] for agent in agents]


def run(world: World, judge: str, arm: str, seed: int, out: Path) -> None:
    """One run of an arm and the trial of its checkpoints -> result.json in `out`."""
    if (out / "result.json").is_file():
        return
    resumed = (out / "run.log").exists()
    out.mkdir(parents=True, exist_ok=True)
    steps = STEPS * (2 if arm in TWICE else 1)
    train = [
        sys.executable,
        "grpo_unified.py",
        "config/grpo_unified_toy_tiny.py",
        *ARMS[arm],
        f"--model={world.sft}",
        f"--rrm={judge}",
        f"--data={world.data}/rl_train.jsonl",
        "--eval_data=",
        f"--tools={world.tools}",
        f"--prompts_per_step={QUESTIONS}",
        f"--group_size={GROUP}",
        f"--steps={steps}",
        "--lr_end=1",
        f"--save_interval={STEPS}",
        "--keep_last=0",
        f"--seed={seed}",
        "--rrm.max_failures=1",
        f"--out_dir={out}",
    ]
    seconds = cpu_seconds(train, out / "run.log")
    ends = [f"{out}/step-{step:06d}" for step in range(STEPS, steps + 1, STEPS)]
    # of a run that was stopped and went on, only the last process is known
    result = {
        "cpu_seconds": None if resumed else seconds,
        "trials": try_out(world, judge, ends, out),
    }
    (out / "result.json").write_text(json.dumps(result))


def steps_to(log: list[dict], level: float = 0.9) -> int | None:
    """The first step whose accuracy of first attempts on fresh questions, over three steps, is at
    least `level`.
    """
    accuracy = [line["accuracy/first"] for line in log]
    return next(
        (i + 1 for i in range(2, len(log)) if sum(accuracy[i - 2 : i + 1]) / 3 >= level), None
    )


def figures_of(folders: list[Path], arm: str, twice: bool) -> dict[str, list]:
    """{column: one value a seed} of an arm, after STEPS or 2 * STEPS steps."""
    values: dict[str, list] = {name: [] for name in COLUMNS}
    for folder in folders:
        result, log = (
            json.loads((folder / "result.json").read_text()),
            list(whole_rows(folder / "log.jsonl")),
        )
        log = log if twice else log[:STEPS]
        tried, reached = result["trials"][twice], steps_to(log)
        wrong = [line["score/wrong"] for line in log[-5:] if "score/wrong" in line]
        for name in ("first", "grounded", "refined", "calls"):
            values[name].append(tried[name])
        values["steps to .9"].append(reached)
        values["attempts to .9"].append(reached and reached * per_step(arm))
        values["score of wrong"].append(statistics.mean(wrong) if wrong else None)
        seconds = result["cpu_seconds"]
        values["CPU-s"].append(seconds and seconds * (1 if twice or arm not in TWICE else 0.5))
    return values


def cell(values: list) -> str:
    """Mean ± standard deviation; where some seeds have no value, how many have one."""
    there = [v for v in values if v is not None]
    if not there:
        return "-"
    digits = 3 if max(there) < 10 else 0
    spread = f" ± {statistics.stdev(there):.{digits}f}" if len(there) > 1 else ""
    return f"{statistics.mean(there):.{digits}f}{spread}" + (
        f" ({len(there)} of {len(values)})" if len(there) < len(values) else ""
    )


def accuracy_panel(folders: list[Path], arm: str, name: str) -> Panel:
    """Accuracy by attempts sampled, both stages: mean over seeds, between the worst and the
    best.
    """
    runs = [numeric_series(whole_rows(folder / "log.jsonl")) for folder in folders]
    stages = {
        stage: [run[f"accuracy/{stage}"] for run in runs]
        for stage in ("first", "refined")
        if all(f"accuracy/{stage}" in run for run in runs)
    }
    lines = {stage: mean_line(points, per=per_step(arm)) for stage, points in stages.items()}
    return Panel(f"{arm}, {name}", lines, x_label="attempts")


def write_results(out: Path, before: dict[str, dict], seeds: int) -> str:
    """Tables and curves of what is finished; `before`: the figures of each world's agent after
    SFT.
    """
    text, drawn = [], []
    for name, start in before.items():
        text += [
            f"\n{name}, {seeds} seeds\n",
            "| variant | " + " | ".join(COLUMNS) + " |",
            "|---" * (len(COLUMNS) + 1) + "|",
        ]
        text.append(
            f"| SFT (refined: Reagent-C) | {start['first']} | {start['grounded']} | "
            f"{start['refined']} | {start['calls']}" + " | -" * 4 + " |"
        )
        for arm in ARMS:
            folders = [
                path
                for path in (
                    out / name / arm.replace(" ", "_") / str(seed) for seed in range(seeds)
                )
                if (path / "result.json").is_file()
            ]
            if not folders:
                continue
            for twice in (False, True)[: 1 + (arm in TWICE)]:
                values = figures_of(folders, arm, twice)
                label = arm + ", 2x steps" * twice
                text.append(
                    f"| {label} | " + " | ".join(cell(values[column]) for column in COLUMNS) + " |"
                )
            drawn.append(accuracy_panel(folders, arm, name))
    (out / "table.md").write_text("\n".join(text).strip() + "\n")
    if drawn:
        share_axes(drawn)
        (out / "curves.svg").write_text(picture_svg(drawn), encoding="utf-8")
    return "\n".join(text)


def main(argv: list[str]) -> None:
    options = {
        "seeds": "5",
        "out": "out/toy/ablation",
        "sft": "out/toy/sft/step-000250",
        "rrm": "data/toy/prepare.py",
    }
    given = dict(arg.removeprefix("--").partition("=")[::2] for arg in argv)
    if set(given) - set(options):
        raise SystemExit(__doc__)
    options |= given
    out, seeds = Path(options["out"]), int(options["seeds"])
    if not Path(options["sft"]).is_dir():
        raise SystemExit(f"no {options['sft']}: run make demo first, or give --sft=FOLDER")
    judge, before = options["rrm"], {}
    worlds = make_worlds(out, options["sft"])
    for name, world in worlds.items():
        (out / name / "sft").mkdir(parents=True, exist_ok=True)
        (before[name],) = try_out(world, judge, [world.sft], out / name / "sft")
    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = [
            pool.submit(
                run, world, judge, arm, seed, out / name / arm.replace(" ", "_") / str(seed)
            )
            for seed in range(seeds)
            for name, world in worlds.items()
            for arm in ARMS
        ]
        for done, job in enumerate(jobs, 1):
            job.result()
            print(f"{done} of {len(jobs)} runs", flush=True)
    print(write_results(out, before, seeds))


if __name__ == "__main__":
    main(sys.argv[1:])
