"""Stage 2, Agent-RRM: the reasoning reward model (paper section 3.2), by SFT on judgments and then GRPO on judgments.

    torchrun --nproc_per_node=8 train_rrm.py --stage=sft --lr=1e-5 …   # sft.py's loop on judgments
    torchrun --nproc_per_node=8 train_rrm.py                                 # GRPO, from that checkpoint
    python train_rrm.py annotate --agents=out/sft/step-003476 --teacher=https://host/v1   # makes RRM rows
    python train_rrm.py report --rrm=out/rrm/step-002800 --eval_data=held_out.jsonl --agent=out/sft/step-003476

What the paper leaves open and what we chose: the reward of the RRM's GRPO is not published. Ours is 0 for a broken
format or an analysis beyond the length bound, else closeness_weight * (1 - |s - s*|) + agreement_weight * [(s > 0.5) =
correct], over the parts a row has, minus leak_penalty for a critique that states the gold answer. The penalty looks at
the critique only (the analysis quotes the agent's answer), at whole tokens, and only where neither question nor
trajectory contains the answer; yes/no, choices and numbers below 1000 are exempt: a critique may well say "no" or "2".
"""

import asyncio
import contextlib
import dataclasses
import json
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
import model as shared
import rollout
from evaluate import rule_reward
from report import write_report
from rows import Chat, JsonlRows, batch_indices, check_rl_row, parse_config, read_appended, run_facts
from tools import Toolbox


@dataclass
class Config:
    # data
    stage: str = "grpo"  # sft: on the rows' own judgments | grpo
    model: str = "out/rrm_sft/step-001750"  # a Hugging Face folder or name
    data: str = "data/reagent/rrm_rl.jsonl"  # RRM rows {"question", "trajectory", "think", "critique", "score", "correct"?}
    eval_data: str = ""  # RRM rows for the report during and after training
    rrm_prompt_file: str = ""  # another prompt for the reward model
    max_tokens_per_row: int = 32_768  # sft: longer rows are skipped and counted, as are prompts beyond max_context
    # reward of a judgment
    closeness_weight: float = 0.7  # of 1 - |s - s*|
    agreement_weight: float = 0.3  # of (s > 0.5) == correct
    leak_penalty: float = 0.5
    max_judgment_tokens: int = 1400  # length bound: a judgment cut by it has a broken format
    verdict_weight: float = 1.0  # sft: weight of the tokens that carry found value, verdict and score
    # sampling
    judgments_per_step: int = 32  # rows a step
    group_size: int = 8  # G judgments of each
    temperature: float = 1.0
    max_context: int = 32_768  # tokens
    # optimisation
    clip_low: float = 0.2
    clip_high: float = 0.34
    steps: int = 2800
    lr: float = 5e-7
    warmup_steps: int = 0
    lr_end: float = 1.0  # share of lr that the cosine ends at
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_dlogp: float = 0.05  # mean |logp(sampler) - logp(trainer)| beyond which a step is skipped
    # engine and memory
    engine: str = "vllm"  # vllm | hf
    gpu_memory_share: float = 0.85
    engine_sleep: bool = True
    tokens_per_microbatch: int = 28_000
    checkpoint_activations: bool = True
    shard_ranks: int = 0  # HSDP; 0: all ranks share one copy
    # run
    seed: int = 0
    out_dir: str = "out/rrm"
    log_interval: int = 1  # steps
    eval_interval: int = 100
    save_interval: int = 100
    keep_last: int = 2
    timeout_s: float = 3600.0
    wandb: bool = False


MAY_CHANGE = {"out_dir", "log_interval", "save_interval", "keep_last", "timeout_s", "gpu_memory_share", "engine_sleep"}
MAY_CHANGE |= {"tokens_per_microbatch", "checkpoint_activations", "shard_ranks", "wandb"}

# ---------------------------------------------------------------------------------------------------------------------
# the reward of a judgment


def leaks(critique: str, golds: list[str], question: str, trajectory: str) -> bool:
    """Whether the critique states a gold answer, as whole tokens, that neither question nor trajectory contains."""
    for gold in golds:
        tokens = re.findall(r"\w+", gold.lower())
        exempt = gold.strip().lower() in ("yes", "no", "true", "false") or re.fullmatch(r"[A-Za-z]|\d{1,3}", gold.strip())
        if tokens and not exempt and _holds(critique, tokens) and not _holds(question + " " + trajectory, tokens):
            return True
    return False


def _holds(text: str, tokens: list[str]) -> bool:
    words = re.findall(r"\w+", text.lower())
    return any(words[i : i + len(tokens)] == tokens for i in range(len(words) - len(tokens) + 1))


def judgment_reward(judgment, row: dict, closeness=0.7, agreement=0.3, leak_penalty=0.5) -> float:
    """Reward of one judgment (None = broken format), over the targets the row has; see the top of the file."""
    if judgment is None:
        return 0.0
    parts = []
    if row.get("score") is not None:
        parts.append((closeness, 1 - abs(judgment.score - row["score"])))
    if row.get("correct") is not None:
        parts.append((agreement, float((judgment.score > 0.5) == bool(row["correct"]))))
    total = sum(weight for weight, _ in parts)
    reward = sum(weight * value for weight, value in parts) / total if total else 0.0
    text = row_trajectory(row)
    if leaks(judgment.critique, golds_of(row), row["question"], text):
        reward -= leak_penalty
    return reward


def golds_of(row: dict) -> list[str]:
    answer = row.get("answer") or []
    return answer if isinstance(answer, list) else [answer]


def row_trajectory(row: dict) -> str:
    trajectory = row["trajectory"]
    return trajectory if isinstance(trajectory, str) else rollout.trajectory_text(trajectory)


def check_rrm_row(row: dict) -> str | None:
    if not isinstance(row.get("question"), str) or not isinstance(row.get("trajectory"), (str, list)) or not row["trajectory"]:
        return f"an RRM row needs 'question' and 'trajectory'; found the keys {sorted(row)}"
    if row.get("score") is None and row.get("correct") is None and "judgment" not in row:
        return "an RRM row needs 'score', 'correct' or both"
    score = row.get("score")
    if score is not None and not (isinstance(score, (int, float)) and 0 <= score <= 1):
        return f"'score' is {score!r}: a number from 0 to 1"
    return None


def target_text(row: dict) -> str:
    """The three blocks that SFT trains on."""
    if "judgment" in row:
        return row["judgment"]
    return f"<think>{row['think']}</think><critique>{row['critique']}</critique><score>{row['score']:.2f}</score>"


def check_judged_row(row: dict) -> str | None:
    """What SFT needs beyond check_rrm_row: a judgment to learn."""
    missing = [] if "judgment" in row else [key for key in ("think", "critique", "score") if row.get(key) is None]
    if missing:
        return f"SFT needs {', '.join(map(repr, missing))}; found the keys {sorted(row)}"
    return check_rrm_row(row) or (None if rollout.parse_judgment(target_text(row)) else "the judgment is not valid")


# ---------------------------------------------------------------------------------------------------------------------
# GRPO on judgments: one stage, groups of G (grpo_unified.py has the pool of two stages)


def group_advantages(rewards: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """(N, G) -> (N, G): (R - mean) / (unbiased std + eps) of each group; 0 in groups whose max - min is under 1e-6."""
    rewards = rewards.double()
    spread = rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True)
    centred = rewards - rewards.mean(1, keepdim=True)
    return torch.where(spread >= 1e-6, centred / (rewards.std(1, keepdim=True) + eps), 0.0)


def clipped_loss(logps, old_logps, advantages, weights, clip_low: float, clip_high: float) -> torch.Tensor:
    """-sum_t w_t min(r_t A_t, clip(r_t) A_t), r = pi / mu; all (M,), the weights hold the denominator."""
    ratio = (logps - old_logps).exp()
    return -(weights * torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)).sum()


# ---------------------------------------------------------------------------------------------------------------------
# the report on held-out judgments


def rank_correlation(a, b) -> float:
    """Spearman's rho with average ranks."""
    ranks = [_ranks(np.asarray(x, float)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1]) if min(r.std() for r in ranks) > 0 else math.nan


def _ranks(x):
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts - 1) / 2)[inverse]


def auc(scores, labels) -> float:
    """Probability that a positive scores above a negative, ties count half."""
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    positives, negatives = labels.sum(), (~labels).sum()
    if not positives or not negatives:
        return math.nan
    return float((_ranks(scores)[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def judgment_report(judgments: list, rows: list[dict], lengths: list[int]) -> dict:
    """Share valid, MAE, Spearman, AUC against correctness (and grounded correctness), leaks, calibration by tenths."""
    pairs = [(j, row) for j, row in zip(judgments, rows) if j is not None]
    scored = [(j.score, row["score"]) for j, row in pairs if row.get("score") is not None]
    leaked = [leaks(j.critique, golds_of(row), row["question"], row_trajectory(row)) for j, row in pairs]
    report = {
        "valid": len(pairs) / max(len(rows), 1),
        "mae": float(np.mean([abs(a - b) for a, b in scored])) if scored else math.nan,
        "spearman": rank_correlation(*zip(*scored)) if scored else math.nan,
        "critique_leaks": float(np.mean(leaked)) if leaked else math.nan,
        "tokens": float(np.mean(lengths)) if lengths else math.nan,
    }
    for name in ("correct", "grounded"):
        labelled = [(j.score, row[name]) for j, row in pairs if row.get(name) is not None]
        if labelled:
            report[f"auc/{name}"] = auc(*zip(*labelled))
    labelled = [(j.score, row["correct"]) for j, row in pairs if row.get("correct") is not None]
    for tenth in range(10):
        inside = [right for score, right in labelled if min(int(score * 10), 9) == tenth]
        if inside:
            report[f"calibration/{tenth / 10:.1f}"] = [round(float(np.mean(inside)), 3), len(inside)]
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in report.items()}


def report_table(report: dict) -> str:
    plain = {k: v for k, v in report.items() if not k.startswith("calibration")}
    lines = ["| " + " | ".join(plain) + " |", "|" + "---|" * len(plain), "| " + " | ".join(map(str, plain.values())) + " |"]
    lines += ["", "| score | share correct | judgments |", "|---|---|---|"]
    lines += [f"| {k[12:]}+ | {v[0]} | {v[1]} |" for k, v in report.items() if k.startswith("calibration")]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# the annotated data, and the report of a judge at work: both run an agent


@dataclass
class Common:
    """What annotate and report share: how the agent works."""

    data: str = "data/reagent/rl_train.jsonl"  # RL rows that the agent works on
    limit: int = 0  # rows; 0: all
    tools: str = "search,browse,python"
    corpus: str = ""  # local pages for rows without docs
    files_dir: str = ""  # where the files of rows lie
    engine: str = "vllm"  # vllm | hf
    temperature: float = 0.7
    max_turns: int = 13
    max_new_tokens_per_turn: int = 4096
    max_tokens_per_attempt: int = 11_000
    max_context: int = 32_768  # tokens of a chain
    rrm_max_context: int = 32_768
    max_live_chains: int = 64
    seed: int = 0


@dataclass
class AnnotateConfig(Common):
    agents: str = ""  # folders of one or several agents, separated by commas
    teacher: str = ""  # URL[,URL] of an OpenAI-compatible endpoint (key: RRM_API_KEY) | a folder | toy
    teacher_model: str = ""  # its name there; "": the first that the endpoint lists
    teacher_prompt_file: str = ""  # another prompt for the teacher
    samples_per_question: int = 4  # of each agent
    share_correct: float = 0.5  # of the rows written; the larger class is thinned
    patience_s: float = 120.0  # seconds a trajectory waits for a teacher that is down
    rest_s: float = 10.0  # seconds an endpoint that failed is left alone
    out: str = "data/reagent/rrm_annotated.jsonl"


@dataclass
class ReportConfig(Common):
    rrm: str = ""  # the judge: folder | URL[,URL] | toy
    against: str = ""  # another judge, for a paired comparison
    eval_data: str = "data/toy/rrm_test.jsonl"  # RRM rows
    rrm_prompt_file: str = ""  # another prompt for both judges
    agent: str = ""  # a folder: its answers before and after refinement (critique lift) on `data`
    out_dir: str = "out/rrm_report"


@contextlib.contextmanager
def agent_at_work(cfg, folder: str):
    """-> (Setup without a judge, rounds, rows, run): an agent's engine and tools; `run(coroutine)` runs chains."""
    rows = JsonlRows(cfg.data, check_rl_row, hint="run python data/reagent/prepare.py (or data/toy/prepare.py)")
    chat, rounds = Chat(shared.load_tokenizer(folder)), rollout.Rounds()
    toolbox = Toolbox(cfg.tools.split(","), corpus=cfg.corpus, files_dir=cfg.files_dir)
    toolbox.check_rows(rows, cfg.data)
    engine = rollout.make_engine(cfg.engine, folder, chat.stop_ids, rounds, max_context=cfg.max_context)
    limits = rollout.Limits(cfg.max_turns, cfg.max_new_tokens_per_turn, cfg.max_tokens_per_attempt, cfg.max_context,
                            final_tokens=min(512, cfg.max_new_tokens_per_turn))
    setup = rollout.Setup(engine, chat, toolbox, limits, rule_reward, temperature=cfg.temperature)
    with asyncio.Runner() as runner:
        yield setup, rounds, [rows[i] for i in range(min(cfg.limit or len(rows), len(rows)))], runner.run
    toolbox.close()


def sample_trajectories(cfg: AnnotateConfig, path: Path) -> list[dict]:
    """First attempts of every agent at every row, appended to `path` as they end; what stands there is not run again."""
    done = {row["id"]: row for row in read_appended(path)}
    for folder in cfg.agents.split(","):
        with agent_at_work(cfg, folder) as (setup, rounds, rows, run), open(path, "a") as file:
            jobs = [(f"{folder}/{row['id']}/{g}", row, g) for row in rows for g in range(cfg.samples_per_question)]
            missing = [job for job in jobs if job[0] not in done]
            bar = tqdm(total=len(missing), desc=f"trajectories of {folder}", disable=not sys.stderr.isatty())

            async def one(name, row, g):
                episode = await rollout.run_chain(row, setup, (cfg.seed, folder, g))
                bar.update()
                if episode.dropped:  # a fault of ours: tried again by the next call
                    return
                attempt = episode.attempts[0]
                done[name] = {"id": name, "question": episode.question, "answer": episode.gold,
                              "trajectory": episode.messages[slice(*attempt.messages)], "correct": bool(attempt.correct)}
                file.write(json.dumps(done[name]) + "\n")
                file.flush()

            run(rollout.run_together((one(*job) for job in missing), rounds, cfg.max_live_chains))
            bar.close()
    return sorted(done.values(), key=lambda row: row["id"])


def thinned(rows: list[dict], share_correct: float, seed: int) -> list[dict]:
    """The largest part of the rows in which `share_correct` are correct; who stays is drawn by a hash of the id."""
    order = sorted(rows, key=lambda row: rollout.seed_of(seed, "thin", row["id"]))
    right, wrong = [r for r in order if r["correct"]], [r for r in order if not r["correct"]]
    if 0 < share_correct < 1:
        total = int(min(len(right) / share_correct, len(wrong) / (1 - share_correct)) + 1e-9)
        right, wrong = right[: round(total * share_correct)], wrong[: round(total * (1 - share_correct))]
    return sorted(right + wrong, key=lambda row: row["id"])


def annotate(cfg: AnnotateConfig) -> None:
    """Samples trajectories, balances right and wrong ones, has a teacher write the three blocks, keeps the valid ones.

    Goes on where it stopped: trajectories and judgments stand beside `out` in files that only grow. A trajectory whose
    judgment failed (teacher down, 429, 500, prose) or leaks the answer is left out, counted, and asked for again by the
    next call. The paper's teacher is gpt-oss-120b; whether it saw the gold answer is not said: ours does not.
    """
    for key in ("agents", "teacher"):
        if not getattr(cfg, key):
            raise SystemExit(f"annotate needs --{key}")
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    prompt = rollout.read_prompt(cfg.teacher_prompt_file, rollout.RRM_PROMPT)
    chat, rounds = Chat(shared.load_tokenizer(cfg.agents.split(",")[0])), rollout.Rounds()
    teacher = rollout.make_judge(cfg.teacher, chat, rounds, engine=cfg.engine, max_context=cfg.rrm_max_context, prompt=prompt,
                                 model=cfg.teacher_model, patience_s=cfg.patience_s, rest_s=cfg.rest_s)  # is it up? Asked before any work
    sampled = sample_trajectories(cfg, out.with_suffix(".trajectories.jsonl"))
    chosen = thinned(sampled, cfg.share_correct, cfg.seed)
    judged = {row["id"]: row for row in read_appended(out.with_suffix(".judgments.jsonl"))}
    missing = [row for row in chosen if row["id"] not in judged]
    before, leaking = len(judged), 0  # the first is in the seeds: the next call asks in-process teachers afresh
    bar = tqdm(total=len(missing), desc="judgments", disable=not sys.stderr.isatty())
    with open(out.with_suffix(".judgments.jsonl"), "a") as file, asyncio.Runner() as runner:

        async def one(row):
            nonlocal leaking
            judgment = await teacher(row["question"], row["trajectory"], (cfg.seed, row["id"], before))
            bar.update()
            if judgment is None:
                return
            if leaks(judgment.critique, row["answer"], row["question"], row_trajectory(row)):
                leaking += 1
                return
            judged[row["id"]] = {**row, **dataclasses.asdict(judgment)}
            file.write(json.dumps(judged[row["id"]]) + "\n")
            file.flush()

        runner.run(rollout.run_together((one(row) for row in missing), rounds, cfg.max_live_chains))
    bar.close()
    rows = thinned([judged[row["id"]] for row in chosen if row["id"] in judged], cfg.share_correct, cfg.seed)
    part = out.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.rename(out)
    right = sum(row["correct"] for row in sampled)
    print(f"{len(sampled)} trajectories ({right} right), {len(chosen)} chosen, {teacher.failed} without a valid judgment, "
          f"{leaking} leak the answer, {len(rows)} rows ({sum(row['correct'] for row in rows)} right) -> {out}")
    if teacher.failed or leaking:
        print("call it again to ask for the missing judgments once more")


def critique_lift(setup, judge, rows: list[dict], rounds, run, seed: int) -> dict:
    """How many answers refinement fixes and breaks with the judge's own critique, another question's, an empty one."""
    setup = dataclasses.replace(setup, judge=judge)
    episodes = run(rollout.run_chains([(row, (seed, "lift", 0)) for row in rows], setup, rounds))
    pairs = [(e, row) for e, row in zip(episodes, rows) if e.attempts and e.attempts[0].critique and not e.dropped]
    if not pairs:
        raise SystemExit("critique lift: the judge gave no valid critique")
    own = [e.attempts[0].critique for e, _ in pairs]
    lift = {"lift/questions": len(pairs), "lift/first": sum(e.attempts[0].correct for e, _ in pairs) / len(pairs)}
    for name, critiques in (("own", own), ("shuffled", own[1:] + own[:1]), ("empty", [""] * len(own))):
        setup.judge = None
        refined = run(rollout.refine_with(*zip(*pairs), critiques, setup, rounds, (seed, name)))
        moves = [(bool(e.attempts[0].correct), bool(e.attempts[-1].correct)) for e in refined]
        lift |= {f"lift/{name}/fixed": moves.count((False, True)), f"lift/{name}/broken": moves.count((True, False))}
        lift[f"lift/{name}/refined"] = sum(after for _, after in moves) / len(moves)
    return lift


def paired_bootstrap(judged_a: list, judged_b: list, rows: list[dict], draws: int = 2000) -> dict:
    """b minus a over trajectories that both judged: MAE and AUC differences with 95 % intervals."""
    both = [i for i in range(len(rows)) if judged_a[i] and judged_b[i]]
    a, b = ([judged[i].score for i in both] for judged in (judged_a, judged_b))
    a, b, truth = np.array(a), np.array(b), np.array([rows[i]["score"] for i in both])
    gaps = np.abs(b - truth) - np.abs(a - truth)
    rng, result = np.random.default_rng(0), {}
    picks = rng.integers(len(both), size=(draws, len(both)))
    result["mae"] = (gaps.mean(), *np.quantile(gaps[picks].mean(1), [0.025, 0.975]))
    for name in ("correct", "grounded"):
        if all(rows[i].get(name) is not None for i in both):
            label = np.array([bool(rows[i][name]) for i in both])
            drawn = [auc(b[p], label[p]) - auc(a[p], label[p]) for p in picks]
            result[f"auc/{name}"] = (auc(b, label) - auc(a, label), *np.nanquantile(drawn, [0.025, 0.975]))
    return {f"difference/{name}": [round(float(x), 4) for x in values] for name, values in result.items()}


def report(cfg: ReportConfig) -> None:
    """A judge on held-out judgments, beside another one, and what its critiques do for an agent; table and log.jsonl."""
    if not cfg.rrm:
        raise SystemExit("report needs --rrm")
    rows = list(JsonlRows(cfg.eval_data, check_rrm_row))
    prompt = rollout.read_prompt(cfg.rrm_prompt_file, rollout.RRM_PROMPT)
    found, judged = {}, []
    for spec in filter(None, (cfg.rrm, cfg.against)):
        folder = next((name for name in (cfg.agent, spec) if name and Path(name).is_dir()), None)
        if folder is None:
            raise SystemExit(f"report: {spec} is no folder, so lengths need a tokenizer: give --agent=FOLDER")
        chat, rounds = Chat(shared.load_tokenizer(folder)), rollout.Rounds()
        judge = rollout.make_judge(spec, chat, rounds, engine=cfg.engine, max_context=cfg.rrm_max_context, prompt=prompt)
        asked = (judge(row["question"], row["trajectory"], (cfg.seed, i)) for i, row in enumerate(rows))
        with asyncio.Runner() as runner:
            judged.append(runner.run(rollout.run_together(asked, rounds, cfg.max_live_chains)))
        lengths = [len(chat.text(j.think + j.critique)) for j in judged[-1] if j]
        found[spec] = judgment_report(judged[-1], rows, lengths)
        print(f"\n{spec} on {len(rows)} trajectories of {cfg.eval_data}\n{report_table(found[spec])}")
    if cfg.against:
        found[cfg.rrm] |= paired_bootstrap(judged[1], judged[0], rows)
    if cfg.agent:
        with agent_at_work(cfg, cfg.agent) as (setup, rounds, questions, run):
            judge = rollout.make_judge(cfg.rrm, setup.chat, rounds, engine=cfg.engine, max_context=cfg.rrm_max_context,
                                       prompt=prompt)
            found[cfg.rrm] |= critique_lift(setup, judge, questions, rounds, run, cfg.seed)
    for name, value in found[cfg.rrm].items():
        if name.startswith(("difference", "lift")):
            print(f"{name:24} {value}")
    out = Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.jsonl", "a") as file:
        file.writelines(json.dumps({"rrm": spec, **numbers}) + "\n" for spec, numbers in found.items())


# ---------------------------------------------------------------------------------------------------------------------


def judge_ids(chat: Chat, row: dict, cfg) -> list[int] | None:
    """Prompt ids of a row, its tool results shortened where it does not fit; None where that is not enough."""
    prompt = rollout.read_prompt(cfg.rrm_prompt_file, rollout.RRM_PROMPT)
    room = cfg.max_context - cfg.max_judgment_tokens - len(rollout.judge_prompt(chat, row["question"], "", prompt))
    text = row["trajectory"]
    if not isinstance(text, str):
        text = rollout.fit_trajectory(text, room, lambda t: len(chat.outside(t)))
    if text is None or len(chat.outside(text)) > room:
        return None
    return rollout.judge_prompt(chat, row["question"], text, prompt)


def sft_row(chat: Chat, row: dict, cfg) -> shared.Row | None:
    """The token row of a judgment; None where it is too long."""
    prompt, text = judge_ids(chat, row, cfg), chat.sampled(target_text(row))
    target = [*chat.text(text), chat.closer_id]
    if prompt is None or len(prompt) + len(target) > cfg.max_tokens_per_row:
        return None
    cut = text.find(" Found ") if cfg.verdict_weight != 1.0 else -1
    plain = len(chat.text(text[:cut])) if cut > 0 else len(target)
    weights = [1.0] * plain + [cfg.verdict_weight] * (len(target) - plain)
    return shared.Row(prompt + target, [0] * len(prompt) + [1] * len(target), {"weight": weights})


def learning_rate(step: int, cfg) -> float:
    """Linear warm-up, then a cosine down to lr_end * lr."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(cfg.steps - cfg.warmup_steps, 1)
    return cfg.lr * (cfg.lr_end + (1 - cfg.lr_end) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


async def sample_judgments(engine, rounds, prompts: list[list[int]], seeds: list[int], cfg, temperature: float) -> list:
    options = dict(max_new_tokens=cfg.max_judgment_tokens, temperature=temperature)
    chains = (engine.generate(ids, seed=seed, **options) for ids, seed in zip(prompts, seeds))
    return await rollout.run_together(chains, rounds)


def read_judgment(chat: Chat, sample):
    text = chat.opened + chat.decode([i for i in sample.ids if i != chat.closer_id])
    return rollout.parse_judgment(text) if sample.finish_reason == "stop" else None


def main(cfg: Config) -> None:
    # ---------------------------------------------------------------- data, processes
    if cfg.stage not in ("sft", "grpo"):
        raise SystemExit(f"stage = {cfg.stage!r}: sft or grpo")
    check = check_judged_row if cfg.stage == "sft" else check_rrm_row
    rows = JsonlRows(cfg.data, check, hint="run python data/reagent/prepare.py (or data/toy/prepare.py)")
    eval_rows = list(JsonlRows(cfg.eval_data, check_rrm_row)) if cfg.eval_data else []
    tokenizer = shared.load_tokenizer(cfg.model)
    chat = Chat(tokenizer)
    rank, world, device = shared.init_distributed(cfg.timeout_s)
    gloo = dist.new_group(backend="gloo")

    def meet(phase, error=None):
        shared.meet(phase, gloo, cfg.timeout_s, error)

    # ---------------------------------------------------------------- engine first (it reseeds), then the policy
    rounds = rollout.Rounds()
    options = dict(max_context=cfg.max_context, gpu_memory_share=cfg.gpu_memory_share, sleep=cfg.engine_sleep)
    sampling = cfg.stage == "grpo" or bool(eval_rows)
    engine = rollout.make_engine(cfg.engine, cfg.model, chat.stop_ids, rounds, **options) if sampling else None
    torch.manual_seed(cfg.seed)
    policy = shared.shard(shared.load_policy(cfg.model, cfg.checkpoint_activations), device, cfg.shard_ranks)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    weights_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    # ---------------------------------------------------------------- run folder, resume
    out = Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    facts, start, log = run_facts(cfg), 0, []
    found = checkpoint.checkpoints(out)
    if found:
        saved = json.loads((found[-1] / "trainer.json").read_text())
        checkpoint.check_resume(saved["config"], facts["config"], MAY_CHANGE, found[-1])
        checkpoint.load_checkpoint(found[-1], policy, optimizer)
        start, log = saved["step"], saved["log"]
    if rank == 0:
        (out / "run.json").write_text(json.dumps(facts, indent=1))
        (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        print(f"{cfg.stage}: {len(rows)} judged trajectories, {cfg.judgments_per_step} a step, from step {start}, "
              f"about {shared.memory_of(policy, cfg):.1f} GB a rank -> {out}")
    tracker = start_wandb(cfg, rank)
    stop = checkpoint.asked_to_stop()
    runner = asyncio.Runner()

    def sync():
        if engine:
            engine.load_weights(shared.full_weights(policy, weights_dtype))

    def sample(prompts: list, seeds: list, temperature: float) -> list:
        """Every rank samples its share; all get all, in order."""
        mine = runner.run(sample_judgments(engine, rounds, prompts[rank::world], seeds[rank::world], cfg, temperature))
        shares = [None] * world
        dist.all_gather_object(shares, mine, group=gloo)
        return [shares[i % world][i // world] for i in range(len(prompts))]

    def evaluate_judge() -> dict:
        prompts = [judge_ids(chat, row, cfg) for row in eval_rows]
        there = [i for i, prompt in enumerate(prompts) if prompt]
        seeds = [rollout.seed_of(cfg.seed, "eval", i) for i in there]
        samples = sample([prompts[i] for i in there], seeds, rollout.JUDGE_TEMPERATURE)
        lengths = [len(s.ids) for s in samples]
        report = judgment_report([read_judgment(chat, s) for s in samples], [eval_rows[i] for i in there], lengths)
        return report | {"too_long": len(prompts) - len(there)}

    if found:
        sync()

    # ---------------------------------------------------------------- loop
    bar = tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, disable=rank > 0 or not sys.stderr.isatty())
    for step in bar:
        began = time.perf_counter()
        lr = learning_rate(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        picked = [rows[i] for i in batch_indices(step, cfg.judgments_per_step, len(rows), cfg.seed)]
        line: dict = {"step": step + 1, "lr": lr}

        # ------------------------------------------------------------ rows to train on
        if cfg.stage == "sft":
            fitting = [row for row in (sft_row(chat, row, cfg) for row in picked) if row]
            line["too_long"] = len(picked) - len(fitting)
            columns, whole = ("weight",), sum(sum(row.columns["weight"]) for row in fitting)
        else:
            asked = [(row, judge_ids(chat, row, cfg)) for row in picked]
            asked = [(row, prompt) for row, prompt in asked if prompt for _ in range(cfg.group_size)]
            targets, prompts = [row for row, _ in asked], [prompt for _, prompt in asked]
            line["too_long"] = len(picked) - len(asked) // cfg.group_size
            seeds = [rollout.seed_of(cfg.seed, step, i, "judge") for i in range(len(prompts))]
            samples = sample(prompts, seeds, cfg.temperature)
            if hasattr(engine, "sleep"):
                engine.sleep()
            judged = [read_judgment(chat, s) for s in samples]
            weights = (cfg.closeness_weight, cfg.agreement_weight, cfg.leak_penalty)
            rewards = torch.tensor([judgment_reward(j, row, *weights) for j, row in zip(judged, targets)])
            advantages = group_advantages(rewards.view(-1, cfg.group_size)).flatten().tolist()
            kept = [i for i in range(len(samples)) if advantages[i] != 0.0]
            counted = sum(any(a != 0.0 for a in advantages[g : g + cfg.group_size]) * cfg.group_size
                          for g in range(0, len(samples), cfg.group_size))
            fitting = []
            for i in kept:
                n = len(samples[i].ids)
                data = {"advantage": [advantages[i]] * n, "weight": [1 / (counted * n)] * n, "logp_mu": samples[i].logps}
                fitting.append(shared.Row(prompts[i] + samples[i].ids, [0] * len(prompts[i]) + [1] * n, data))
            columns = ("advantage", "weight", "logp_mu")
            if samples:
                line |= {"reward": rewards.mean().item(), "valid": sum(j is not None for j in judged) / len(judged)}
                line["pools/dropped"] = 1 - counted / len(samples)

        # ------------------------------------------------------------ update
        total, norm, gap, skipped = 0.0, 0.0, [0.0, 0.0], ""
        with shared.phase(f"the update of step {step + 1}", meet):
            for microbatch in shared.balance(fitting, world, cfg.tokens_per_microbatch)[rank] if fitting else []:
                batch = shared.collate(microbatch, columns, device)
                logps, _ = policy(batch, 1.0 if cfg.stage == "sft" else cfg.temperature)
                if cfg.stage == "sft":
                    loss = -(logps * batch.columns["weight"]).sum() / whole
                else:
                    c = batch.columns
                    loss = clipped_loss(logps, c["logp_mu"], c["advantage"], c["weight"], cfg.clip_low, cfg.clip_high)
                    gap[0] += (logps.detach() - c["logp_mu"]).abs().sum().item()
                    gap[1] += len(logps)
                shared.backward(loss)
                total += loss.item()
            if fitting:
                total, *gap = shared.sum_over_ranks([total, *gap], gloo)
                norm = shared.clip_gradients(policy, cfg.max_grad_norm)
                dlogp = gap[0] / max(gap[1], 1)
                if not math.isfinite(norm + total) or dlogp > cfg.max_dlogp:
                    skipped = f"loss {total}, gradient norm {norm}, mean |dlogp| {dlogp}"
                    if step == start:
                        raise SystemExit(f"step {step + 1}: {skipped} (max_dlogp = {cfg.max_dlogp})")
                else:
                    optimizer.step()
                optimizer.zero_grad()
        if cfg.stage == "grpo":
            line["dlogp/mean"] = gap[0] / max(gap[1], 1)
            sync()

        # ------------------------------------------------------------ log, evaluate, save
        tokens = sum(len(row.ids) for row in fitting)
        line |= {"loss": total, "grad_norm": norm, "skipped": skipped, "tokens": tokens}
        last = step + 1 == cfg.steps
        if eval_rows and ((step + 1) % cfg.eval_interval == 0 or last):
            if cfg.stage == "sft":
                sync()
            line |= {f"eval/{k}": v for k, v in evaluate_judge().items()}
        line["seconds/step"] = round(time.perf_counter() - began, 3)
        log.append(line)
        if rank == 0:
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            if tracker:
                tracker.log(line)
            if (step + 1) % cfg.log_interval == 0 or "eval/mae" in line:
                shown = ("loss", "reward", "valid", "grad_norm", "dlogp/mean", "eval/valid", "eval/mae", "eval/auc/grounded")
                print(f"step {step + 1:4d} " + "  ".join(f"{k} {line[k]:.4g}" for k in shown if k in line)
                      + f"  {line['seconds/step']:.1f} s" + (f"  SKIPPED: {skipped}" if skipped else ""), flush=True)
        stopping = shared.sum_over_ranks([len(stop)], gloo)[0] > 0
        if (step + 1) % cfg.save_interval == 0 or last or stopping:
            checkpoint.save_checkpoint(out, step + 1, policy, optimizer, tokenizer, {**facts, "log": log}, meet)
            if rank == 0:
                checkpoint.prune(out, cfg.keep_last, None)
        if stopping:
            break
    if rank == 0:
        final = {k[5:]: v for k, v in log[-1].items() if k.startswith("eval/")} if log else {}
        table = report_table(final) if final else ""
        print(table)
        write_report(out / "report.html", title=f"RRM {cfg.stage}, {out}", log=log, table_markdown=table,
                     config=dataclasses.asdict(cfg))
    meet("the end")
    dist.destroy_process_group()


def start_wandb(cfg, rank: int):
    if not cfg.wandb or rank:
        return None
    import wandb

    return wandb.init(project="reagent", name=cfg.out_dir, config=dataclasses.asdict(cfg))


if __name__ == "__main__":
    if sys.argv[1:2] == ["annotate"]:
        annotate(parse_config(AnnotateConfig, sys.argv[2:]))
    elif sys.argv[1:2] == ["report"]:
        report(parse_config(ReportConfig, sys.argv[2:]))
    else:
        main(parse_config(Config, sys.argv[1:]))
