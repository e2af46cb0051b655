"""The ablation on the toy: what each part of Reagent-U is worth. `make ablation` runs it after
`make demo`.

    python data/toy/ablation.py [--seeds=5] [--sft=FOLDER] [--out=FOLDER] [--blocks=toy,hard]

Four blocks: the toy and its harder form (prepare.py --hard), each with the rule annotator's score,
which counts every look-up, and with one that says only right-and-grounded or not (verdict.py, same
critique). Four more, "hard p 0.9" to "hard p 0.5", for R and U: the counting score, upside down
(1 - s) with probability 1 - p (noisy.py). All runs of a world start from the same agent. Every run
is a process of its own on one core, two at a time; what is finished is not run again. Reagent-U
samples twice the attempts of R and rule a step, so those two run twice the steps: "R" is at equal
steps, "R, 2x steps" at equal attempts. Writes table.md, curves.svg, honesty.svg (first attempts by
p) into `out`.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from data.growing import whole_rows
from data.report.curves import mean_line, numeric_series
from data.report.plots import Panel, picture_svg, share_axes
from reagent.folder import write_whole

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
# of the 0/1 score: what it leaves R and what the critique gives U
VERDICT_ARMS = ("rule", "R", "U", "U, per-stage pools", "U, lambda 0", "U, fixed critique")
NOISY_ARMS = ("R", "U")
HONESTY = (0.9, 0.75, 0.6, 0.5)
TRIED = ("first", "first, T .3", "grounded", "refined", "calls")
# Student's t for 95 %, two-sided, by the number of seeds
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
LEVELS = (0.5, 0.7, 0.9)
COLUMNS = (*TRIED, *(f"steps to {x}" for x in LEVELS), "attempts to 0.7", "score of wrong", "CPU-s")


def folder_name(arm: str) -> str:
    """Without commas, which separate folders on a command line."""
    return arm.replace(", ", "_").replace(" ", "_")


def rows_of(arm: str) -> list[tuple[bool, str]]:
    """(after 2 * STEPS?, its name) of each row that the runs of an arm give."""
    return [(False, arm)] + [(True, f"{arm}, 2x steps")] * (arm in TWICE)


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
    """Where a block's rows lie, the agent that all its runs start from, their tools and reward
    model.
    """

    data: Path
    sft: str
    tools: str
    rrm: str = "data/toy/prepare.py"

    arms: tuple[str, ...] = tuple(ARMS)


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
    blocks = {
        "toy": World(ROOT / "data/toy", sft, "search"),
        "hard": World(hard, str(end), "search,python"),
    }
    for name in list(blocks):
        verdict = replace(blocks[name], rrm="data/toy/verdict.py", arms=VERDICT_ARMS)
        blocks[f"{name} 0-1"] = verdict
    for p in HONESTY:
        source = hard / f"honest_{p}.py"
        source.write_text(
            f"import sys\nsys.path[:0] = [{str(ROOT)!r}]\n"
            f"from data.toy.noisy import noisy\nannotate = noisy({p})\n"
        )
        blocks[f"hard p {p}"] = replace(blocks["hard"], rrm=str(source), arms=NOISY_ARMS)
    return blocks


def try_out(world: World, agents: list[str], out: Path) -> list[dict]:
    """The figures of the agents on the world's held-out questions, at temperature 1, and of their
    first attempts at .3."""
    command = [
        sys.executable,
        "data/trial.py",
        "config/trial_toy.py",
        f"--agents={','.join(agents)}",
        f"--data={world.data}/rl_test.jsonl",
        f"--tools={world.tools}",
    ]
    found = []
    for name, temperature, rrm in (("warm", 1.0, world.rrm), ("cool", 0.3, "")):
        folder = out / name
        if not (folder / "trial.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            options = [f"--temperature={temperature}", f"--rrm={rrm}", f"--out={folder}"]
            cpu_seconds([*command, *options], out / "run.log")
        found.append(json.loads((folder / "trial.json").read_text()))
    warm, cool = found
    figures = []
    for agent in agents:
        one = {name: round(figure[0], 3) for name, figure in warm[agent].items()}
        figures.append(one | {"first, T .3": round(cool[agent]["first"][0], 3)})
    return figures


def run(world: World, arm: str, seed: int, out: Path) -> None:
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
        f"--rrm={world.rrm}",
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
        "trials": try_out(world, ends, out),
    }
    write_whole(out / "result.json", json.dumps(result))


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
        tried, reached = result["trials"][twice], {x: steps_to(log, x) for x in LEVELS}
        wrong = [line["score/wrong"] for line in log[-5:] if "score/wrong" in line]
        for name in TRIED:
            values[name].append(tried[name])
        for level, step in reached.items():
            values[f"steps to {level}"].append(step)
        values["attempts to 0.7"].append(reached[0.7] and reached[0.7] * per_step(arm))
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


def paired(u: list[float], r: list[float]) -> str:
    """U minus R of the same seeds: the mean difference and its 95 % interval (paired t)."""
    differences = [a - b for a, b in zip(u, r)]
    mean = statistics.mean(differences)
    half = T95[len(differences)] * statistics.stdev(differences) / len(differences) ** 0.5
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


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


def finished(out: Path, name: str, arm: str, seeds: int) -> list[Path]:
    """The folders of an arm's finished runs."""
    folder = out / name / folder_name(arm)
    runs = [folder / str(seed) for seed in range(seeds)]
    return [path for path in runs if (path / "result.json").is_file()]


def runs_by_p(out: Path, arm: str, twice: bool, seeds: int) -> list[list[tuple[float, float]]]:
    """(p, first attempts) on the hard world, of each of the seeds with the most values of p."""
    runs: dict[str, list[tuple[float, float]]] = {}
    for p, name in sorted([(1.0, "hard"), *((p, f"hard p {p}") for p in HONESTY)]):
        for folder in finished(out, name, arm, seeds):
            trial = json.loads((folder / "result.json").read_text())["trials"][twice]
            runs.setdefault(folder.name, []).append((p, trial["first"]))
    most = max(map(len, runs.values()), default=0)
    return [run for run in runs.values() if len(run) == most]


def honesty_panel(out: Path, seeds: int) -> Panel | None:
    """First attempts by p, at equal steps and at equal attempts: mean, worst to best seed."""
    rows = [(arm, *row) for arm in NOISY_ARMS for row in rows_of(arm)]
    found = {label: runs_by_p(out, arm, twice, seeds) for arm, twice, label in rows}
    lines = {label: mean_line(runs) for label, runs in found.items() if runs}
    title = "held-out first attempts by honesty p"
    return Panel(title, lines, x_label="p", y_range=(0, 1)) if lines else None


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
            "| SFT (refined: Reagent-C) | "
            + " | ".join(str(start[column]) for column in TRIED)
            + " | -" * (len(COLUMNS) - len(TRIED))
            + " |"
        )
        first = {}
        for arm in ARMS:
            folders = finished(out, name, arm, seeds)
            if not folders:
                continue
            for twice, label in rows_of(arm):
                values = figures_of(folders, arm, twice)
                first[label] = values["first"]
                text.append(
                    f"| {label} | " + " | ".join(cell(values[column]) for column in COLUMNS) + " |"
                )
            drawn.append(accuracy_panel(folders, arm, name))
        for arm in ("R", "R, 2x steps"):
            if 1 < len(first.get("U", [])) == len(first.get(arm, [])):
                text.append(f"\nU minus {arm}, first: {paired(first['U'], first[arm])}")
    (out / "table.md").write_text("\n".join(text).strip() + "\n")
    if drawn:
        share_axes(drawn)
        (out / "curves.svg").write_text(picture_svg(drawn), encoding="utf-8")
    if panel := honesty_panel(out, seeds):
        (out / "honesty.svg").write_text(picture_svg([panel]), encoding="utf-8")
    return "\n".join(text)


def main(argv: list[str]) -> None:
    options = {
        "seeds": "5",
        "out": "out/toy/ablation",
        "sft": "out/toy/sft/step-000250",
        "blocks": "",
    }
    given = dict(arg.removeprefix("--").partition("=")[::2] for arg in argv)
    if set(given) - set(options):
        raise SystemExit(__doc__)
    options |= given
    out, seeds = Path(options["out"]), int(options["seeds"])
    if not Path(options["sft"]).is_dir():
        raise SystemExit(f"no {options['sft']}: run make demo first, or give --sft=FOLDER")
    worlds, before = make_worlds(out, options["sft"]), {}
    chosen = options["blocks"].split(",") if options["blocks"] else list(worlds)
    if unknown := set(chosen) - set(worlds):
        raise SystemExit(f"--blocks: no {', '.join(unknown)}; there are {', '.join(worlds)}")
    for name in chosen:
        (before[name],) = try_out(worlds[name], [worlds[name].sft], out / name / "sft")
    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = [
            pool.submit(run, worlds[name], arm, seed, out / name / folder_name(arm) / str(seed))
            for seed in range(seeds)
            for name in chosen
            for arm in worlds[name].arms
        ]
        for done, job in enumerate(jobs, 1):
            job.result()
            print(f"{done} of {len(jobs)} runs", flush=True)
    print(write_results(out, before, seeds))


if __name__ == "__main__":
    main(sys.argv[1:])
