"""Stage 2, Agent-RRM: the reasoning reward model (paper section 3.2), by SFT on judgments and then GRPO on judgments.

    torchrun --nproc_per_node=8 train_rrm.py --stage=sft --lr=1e-5 …   # sft.py's loop on judgments
    torchrun --nproc_per_node=8 train_rrm.py                                 # GRPO, from that checkpoint

What the paper leaves open and what we chose: the reward of the RRM's GRPO is not published. Ours is 0 for a broken
format or an analysis beyond the length bound, else closeness_weight * (1 - |s - s*|) + agreement_weight * [(s > 0.5) =
correct], over the parts a row has, minus leak_penalty for a critique that states the gold answer. The penalty looks at
the critique only (the analysis quotes the agent's answer), at whole tokens, and only where neither question nor
trajectory contains the answer; yes/no, choices and numbers below 1000 are exempt: a critique may well say "no" or "2".
"""

import asyncio
import dataclasses
import json
import math
import re
import signal
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
from report import write_report
from rows import Chat, JsonlRows, batch_indices, check_rl_row, parse_config, run_facts


@dataclass
class Config:
    # data
    stage: str = "grpo"  # sft: on the rows' own judgments | grpo
    model: str = "out/rrm_sft/step-001750"  # a Hugging Face folder or name
    data: str = "data/reagent/rrm_rl.jsonl"  # RRM rows {"question", "trajectory", "think", "critique", "score", "correct"?}
    eval_data: str = ""  # RRM rows for the report during and after training
    rrm_prompt_file: str = ""  # another prompt for the reward model
    max_tokens_per_row: int = 32_768  # sft: longer rows are skipped and counted
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


MAY_CHANGE = {"out_dir", "log_interval", "save_interval", "keep_last", "timeout_s", "gpu_memory_share", "engine_sleep"}
MAY_CHANGE |= {"tokens_per_microbatch", "checkpoint_activations", "shard_ranks"}

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
    text = row.get("judgment")
    if text is None:
        score = f"{row['score']:.2f}"
        text = f"<think>{row['think']}</think><critique>{row['critique']}</critique><score>{score}</score>"
    if rollout.parse_judgment(text) is None:
        raise ValueError(f"the judgment of {row.get('id', row['question'][:60])!r} is not valid")
    return text


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


def judge_ids(chat: Chat, row: dict, cfg) -> list[int]:
    """Prompt ids of a row, its tool results shortened where it does not fit."""
    prompt = Path(cfg.rrm_prompt_file).read_text() if cfg.rrm_prompt_file else rollout.RRM_PROMPT
    room = cfg.max_context - cfg.max_judgment_tokens - len(rollout.judge_prompt(chat, row["question"], "", prompt))
    text = row["trajectory"]
    if not isinstance(text, str):
        text = rollout.fit_trajectory(text, room, lambda t: len(chat.outside(t)))
    if text is None or len(chat.outside(text)) > room:
        raise ValueError(f"the trajectory of {row.get('id', row['question'][:60])!r} does not fit max_context")
    return rollout.judge_prompt(chat, row["question"], text, prompt)


def sft_row(chat: Chat, row: dict, cfg) -> shared.Row:
    prompt = judge_ids(chat, row, cfg)
    text = target_text(row)
    target = [*chat.text(text), chat.closer_id]
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
    text = chat.decode([i for i in sample.ids if i != chat.closer_id])
    return rollout.parse_judgment(text) if sample.finish_reason == "stop" else None


def main(cfg: Config) -> None:
    # ---------------------------------------------------------------- data, processes
    if cfg.stage not in ("sft", "grpo"):
        raise SystemExit(f"stage = {cfg.stage!r}: sft or grpo")
    rows = JsonlRows(cfg.data, check_rrm_row, hint="run python data/reagent/prepare.py (or data/toy/prepare.py)")
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
        print(f"{cfg.stage}: {len(rows)} judged trajectories, {cfg.judgments_per_step} a step, from step {start} -> {out}")
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
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
        seeds = [rollout.seed_of(cfg.seed, "eval", i) for i in range(len(prompts))]
        samples = sample(prompts, seeds, 0.0)
        return judgment_report([read_judgment(chat, s) for s in samples], eval_rows, [len(s.ids) for s in samples])

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
            batch_rows = [sft_row(chat, row, cfg) for row in picked]
            fitting = [row for row in batch_rows if len(row.ids) <= cfg.max_tokens_per_row]
            line["too_long"] = len(batch_rows) - len(fitting)
            columns, whole = ("weight",), sum(sum(row.columns["weight"]) for row in fitting)
        else:
            prompts = [judge_ids(chat, row, cfg) for row in picked for _ in range(cfg.group_size)]
            seeds = [rollout.seed_of(cfg.seed, step, i, "judge") for i in range(len(prompts))]
            samples = sample(prompts, seeds, cfg.temperature)
            if hasattr(engine, "sleep"):
                engine.sleep()
            judged = [read_judgment(chat, s) for s in samples]
            targets = [row for row in picked for _ in range(cfg.group_size)]
            weights = (cfg.closeness_weight, cfg.agreement_weight, cfg.leak_penalty)
            rewards = torch.tensor([judgment_reward(j, row, *weights) for j, row in zip(judged, targets)])
            advantages = group_advantages(rewards.view(len(picked), cfg.group_size)).flatten().tolist()
            kept = [i for i in range(len(samples)) if advantages[i] != 0.0]
            counted = sum(any(a != 0.0 for a in advantages[g : g + cfg.group_size]) * cfg.group_size
                          for g in range(0, len(samples), cfg.group_size))
            fitting = []
            for i in kept:
                n = len(samples[i].ids)
                data = {"advantage": [advantages[i]] * n, "weight": [1 / (counted * n)] * n, "logp_mu": samples[i].logps}
                fitting.append(shared.Row(prompts[i] + samples[i].ids, [0] * len(prompts[i]) + [1] * n, data))
            columns = ("advantage", "weight", "logp_mu")
            line |= {"reward": rewards.mean().item(), "valid": sum(j is not None for j in judged) / len(judged)}
            line["pools/dropped"] = 1 - counted / len(samples)

        # ------------------------------------------------------------ update
        total, norm, gap, skipped = 0.0, 0.0, [0.0, 0.0], ""
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


if __name__ == "__main__":
    main(parse_config(Config, sys.argv[1:]))
