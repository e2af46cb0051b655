"""Stage 2, Agent-RRM: the reasoning reward model (paper section 3.4), by SFT on judgments and then
GRPO on judgments.

    torchrun --nproc_per_node=8 train_rrm.py --stage=sft --lr=1e-5 …   # sft.py's loop on judgments
    torchrun --nproc_per_node=8 train_rrm.py  # GRPO, from that checkpoint

What the paper leaves open and what we chose: the reward of the RRM's GRPO is not published. Ours is
0 for a broken format or an analysis beyond the length bound, else closeness_weight * (1 - |s - s*|)
+ agreement_weight * [(s > 0.5) = correct], over the parts a row has, minus leak_penalty for a
critique that states the gold answer. The penalty looks at the critique only (the analysis quotes
the agent's answer), at whole tokens, and only where neither question nor trajectory contains the
answer; yes/no, choices and numbers below 1000 are exempt: a critique may well say "no" or "2".
"""

import asyncio
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from reagent import engines, reward_model, run
from reagent.chat import Chat
from reagent.config import parse_config, read_prompt, run_facts
from reagent.engines import EngineConfig
from reagent.policy import (
    Row,
    backward,
    balance,
    clip_gradients,
    collate,
    full_weights,
    load_policy,
    load_tokenizer,
    memory_of,
    shard,
)
from reagent.reward_model import (
    check_judged_row,
    check_rrm_row,
    golds_of,
    leaks,
    row_trajectory,
    target_text,
)
from reagent.rows import JsonlRows, batch_indices, seed_of
from results.judging import judgment_report, report_table
from results.runs import write_run_page


@dataclass
class Config:
    # data
    stage: str = "grpo"  # sft: on the rows' own judgments | grpo
    model: str = "out/rrm_sft/step-001750"  # a Hugging Face folder or name
    # RRM rows {"question", "trajectory", "think", "critique", "score", "correct"?}
    data: str = "data/reagent/rrm_rl.jsonl"
    eval_data: str = ""  # RRM rows for the report during and after training
    rrm_prompt_file: str = ""  # another prompt for the reward model
    max_tokens_per_row: int = (
        32_768  # sft: longer rows are skipped and counted, as are prompts beyond max_context
    )
    # reward of a judgment
    closeness_weight: float = 0.7  # of 1 - |s - s*|
    agreement_weight: float = 0.3  # of (s > 0.5) == correct
    leak_penalty: float = 0.5
    max_judgment_tokens: int = 1400  # length bound: a judgment cut by it has a broken format
    verdict_weight: float = (
        1.0  # sft: weight of the tokens that carry found value, verdict and score
    )
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
    engine: EngineConfig = EngineConfig()
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


MAY_CHANGE = {
    "out_dir",
    "log_interval",
    "save_interval",
    "keep_last",
    "timeout_s",
    "engine.memory_share",
    "engine.sleep",
}

MAY_CHANGE |= {"tokens_per_microbatch", "checkpoint_activations", "shard_ranks", "wandb"}


# --------------------------------------------------------------------------------------------------
# the reward of a judgment


def judgment_reward(judgment, row: dict, closeness=0.7, agreement=0.3, leak_penalty=0.5) -> float:
    """Reward of one judgment (None = broken format), over the targets the row has; see the top of
    the file.
    """
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


# --------------------------------------------------------------------------------------------------
# GRPO on judgments: one stage, groups of G (grpo_unified.py has the pool of two stages)


def group_advantages(rewards: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """(N, G) -> (N, G): (R - mean) / (unbiased std + eps) of each group; 0 in groups whose max -
    min is under 1e-6.
    """
    rewards = rewards.double()
    spread = rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True)
    centred = rewards - rewards.mean(1, keepdim=True)
    return torch.where(spread >= 1e-6, centred / (rewards.std(1, keepdim=True) + eps), 0.0)


def clipped_loss(
    logps, old_logps, advantages, weights, clip_low: float, clip_high: float
) -> torch.Tensor:
    """-sum_t w_t min(r_t A_t, clip(r_t) A_t), r = pi / mu; all (M,), the weights hold the
    denominator.
    """
    ratio = (logps - old_logps).exp()
    return -(
        weights
        * torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    ).sum()


# --------------------------------------------------------------------------------------------------


def judge_ids(chat: Chat, row: dict, cfg) -> list[int] | None:
    """Prompt ids of a row, its tool results shortened where it does not fit; None where that is not
    enough.
    """
    prompt = read_prompt(cfg.rrm_prompt_file, reward_model.RRM_PROMPT)
    room = (
        cfg.max_context
        - cfg.max_judgment_tokens
        - len(reward_model.judge_prompt(chat, row["question"], "", prompt))
    )
    text = row["trajectory"]
    if not isinstance(text, str):
        text = reward_model.fit_trajectory(text, room, lambda t: len(chat.outside(t)))
    if text is None or len(chat.outside(text)) > room:
        return None
    return reward_model.judge_prompt(chat, row["question"], text, prompt)


def sft_row(chat: Chat, row: dict, cfg) -> Row | None:
    """The token row of a judgment; None where it is too long."""
    prompt, text = judge_ids(chat, row, cfg), chat.sampled(target_text(row))
    target = [*chat.text(text), chat.closer_id]
    if prompt is None or len(prompt) + len(target) > cfg.max_tokens_per_row:
        return None
    cut = text.find(" Found ") if cfg.verdict_weight != 1.0 else -1
    plain = len(chat.text(text[:cut])) if cut > 0 else len(target)
    weights = [1.0] * plain + [cfg.verdict_weight] * (len(target) - plain)
    return Row(prompt + target, [0] * len(prompt) + [1] * len(target), {"weight": weights})


def learning_rate(step: int, cfg) -> float:
    """Linear warm-up, then a cosine down to lr_end * lr."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(cfg.steps - cfg.warmup_steps, 1)
    return cfg.lr * (cfg.lr_end + (1 - cfg.lr_end) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


async def sample_judgments(
    engine, prompts: list[list[int]], seeds: list[int], cfg, temperature: float
) -> list:
    options = dict(max_new_tokens=cfg.max_judgment_tokens, temperature=temperature)
    chains = (engine.generate(ids, seed=seed, **options) for ids, seed in zip(prompts, seeds))
    return await engines.run_together(chains)


def read_judgment(chat: Chat, sample):
    text = chat.opened + chat.decode([i for i in sample.ids if i != chat.closer_id])
    return reward_model.parse_judgment(text) if sample.finish_reason == "stop" else None


def main(cfg: Config) -> None:
    # ---------------------------------------------------------------- data, processes
    if cfg.stage not in ("sft", "grpo"):
        raise SystemExit(f"stage = {cfg.stage!r}: sft or grpo")
    check = check_judged_row if cfg.stage == "sft" else check_rrm_row
    rows = JsonlRows(
        cfg.data, check, hint="run python data/reagent/prepare.py (or data/toy/prepare.py)"
    )
    eval_rows = list(JsonlRows(cfg.eval_data, check_rrm_row)) if cfg.eval_data else []
    tokenizer = load_tokenizer(cfg.model)
    chat = Chat(tokenizer)
    rank, world, device = run.init_distributed(cfg.timeout_s)
    gloo = dist.new_group(backend="gloo")

    def meet(phase, error=None):
        run.meet(phase, gloo, cfg.timeout_s, error)

    # -------------------- engine first (it reseeds), then the policy
    engine = None
    if cfg.stage == "grpo" or eval_rows:
        engine = engines.make_engine(
            cfg.engine, cfg.model, chat.stop_ids, max_context=cfg.max_context
        )
    engines.rest(engine)  # until the first sync: the policy is loaded meanwhile
    torch.manual_seed(cfg.seed)
    policy = shard(load_policy(cfg.model, cfg.checkpoint_activations), device, cfg.shard_ranks)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    weights_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    # ---------------------------------------------------------------- run folder, resume
    out = Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    facts, start, log = run_facts(cfg), 0, []
    found = run.checkpoints(out)
    if found:
        saved = json.loads((found[-1] / "trainer.json").read_text())
        run.check_resume(saved["config"], facts["config"], MAY_CHANGE, found[-1])
        run.load_checkpoint(found[-1], policy, optimizer)
        start, log = saved["step"], saved["log"]
    if rank == 0:
        (out / "run.json").write_text(json.dumps(facts, indent=1))
        (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        print(
            f"{cfg.stage}: {len(rows)} judged trajectories, {cfg.judgments_per_step} a step, from "
            f"step {start}, "
            f"about {memory_of(policy, cfg):.1f} GB a rank -> {out}"
        )
    tracker = run.start_wandb(cfg, rank)
    stop = run.asked_to_stop()
    runner = asyncio.Runner()

    def sync():
        if engine:
            engine.load_weights(full_weights(policy, weights_dtype))

    def sample(prompts: list, seeds: list, temperature: float) -> list:
        """Every rank samples its share; all get all, in order."""
        mine = runner.run(
            sample_judgments(engine, prompts[rank::world], seeds[rank::world], cfg, temperature)
        )
        shares = [None] * world
        dist.all_gather_object(shares, mine, group=gloo)
        return [shares[i % world][i // world] for i in range(len(prompts))]

    def evaluate_judge() -> dict:
        prompts = [judge_ids(chat, row, cfg) for row in eval_rows]
        there = [i for i, prompt in enumerate(prompts) if prompt]
        seeds = [seed_of(cfg.seed, "eval", i) for i in there]
        samples = sample([prompts[i] for i in there], seeds, reward_model.JUDGE_TEMPERATURE)
        lengths = [len(s.ids) for s in samples]
        report = judgment_report(
            [read_judgment(chat, s) for s in samples], [eval_rows[i] for i in there], lengths
        )
        return report | {"too_long": len(prompts) - len(there)}

    if cfg.stage == "grpo":
        sync()  # an engine that slept has no weights

    # ---------------------------------------------------------------- loop
    bar = tqdm(
        range(start, cfg.steps),
        initial=start,
        total=cfg.steps,
        disable=rank > 0 or not sys.stderr.isatty(),
    )
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
            asked = [
                (row, prompt) for row, prompt in asked if prompt for _ in range(cfg.group_size)
            ]
            targets, prompts = [row for row, _ in asked], [prompt for _, prompt in asked]
            line["too_long"] = len(picked) - len(asked) // cfg.group_size
            seeds = [seed_of(cfg.seed, step, i, "judge") for i in range(len(prompts))]
            samples = sample(prompts, seeds, cfg.temperature)
            engines.rest(engine)
            judged = [read_judgment(chat, s) for s in samples]
            weights = (cfg.closeness_weight, cfg.agreement_weight, cfg.leak_penalty)
            rewards = torch.tensor(
                [judgment_reward(j, row, *weights) for j, row in zip(judged, targets)]
            )
            advantages = group_advantages(rewards.view(-1, cfg.group_size)).flatten().tolist()
            kept = [i for i in range(len(samples)) if advantages[i] != 0.0]
            counted = sum(
                any(a != 0.0 for a in advantages[g : g + cfg.group_size]) * cfg.group_size
                for g in range(0, len(samples), cfg.group_size)
            )
            fitting = []
            for i in kept:
                n = len(samples[i].ids)
                data = {
                    "advantage": [advantages[i]] * n,
                    "weight": [1 / (counted * n)] * n,
                    "logp_mu": samples[i].logps,
                }
                fitting.append(
                    Row(prompts[i] + samples[i].ids, [0] * len(prompts[i]) + [1] * n, data)
                )
            columns = ("advantage", "weight", "logp_mu")
            if samples:
                line |= {
                    "reward": rewards.mean().item(),
                    "valid": sum(j is not None for j in judged) / len(judged),
                }
                line["pools/dropped"] = 1 - counted / len(samples)

        # ------------------------------------------------------------ update
        total, norm, gap, skipped = 0.0, 0.0, [0.0, 0.0], ""
        with run.phase(f"the update of step {step + 1}", meet):
            for microbatch in (
                balance(fitting, world, cfg.tokens_per_microbatch)[rank] if fitting else []
            ):
                batch = collate(microbatch, columns, device)
                logps, _ = policy(batch, 1.0 if cfg.stage == "sft" else cfg.temperature)
                if cfg.stage == "sft":
                    loss = -(logps * batch.columns["weight"]).sum() / whole
                else:
                    c = batch.columns
                    loss = clipped_loss(
                        logps,
                        c["logp_mu"],
                        c["advantage"],
                        c["weight"],
                        cfg.clip_low,
                        cfg.clip_high,
                    )
                    gap[0] += (logps.detach() - c["logp_mu"]).abs().sum().item()
                    gap[1] += len(logps)
                backward(loss)
                total += loss.item()
            if fitting:
                total, *gap = run.sum_over_ranks([total, *gap], gloo)
                norm = clip_gradients(policy, cfg.max_grad_norm)
                dlogp = gap[0] / max(gap[1], 1)
                if not math.isfinite(norm + total) or dlogp > cfg.max_dlogp:
                    skipped = f"loss {total}, gradient norm {norm}, mean |dlogp| {dlogp}"
                    if step == start:
                        raise SystemExit(
                            f"step {step + 1}: {skipped} (max_dlogp = {cfg.max_dlogp})"
                        )
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
            if cfg.stage == "sft":
                engines.rest(engine)
        line["seconds/step"] = round(time.perf_counter() - began, 3)
        log.append(line)
        if rank == 0:
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            if tracker:
                tracker.log(line)
            if (step + 1) % cfg.log_interval == 0 or "eval/mae" in line:
                shown = (
                    "loss",
                    "reward",
                    "valid",
                    "grad_norm",
                    "dlogp/mean",
                    "eval/valid",
                    "eval/mae",
                    "eval/auc/grounded",
                )
                print(
                    f"step {step + 1:4d} "
                    + "  ".join(f"{k} {line[k]:.4g}" for k in shown if k in line)
                    + f"  {line['seconds/step']:.1f} s"
                    + (f"  SKIPPED: {skipped}" if skipped else ""),
                    flush=True,
                )
        stopping = run.sum_over_ranks([len(stop)], gloo)[0] > 0
        if (step + 1) % cfg.save_interval == 0 or last or stopping:
            run.save_checkpoint(
                out, step + 1, policy, optimizer, tokenizer, {**facts, "log": log}, meet
            )
            if rank == 0:
                run.prune(out, cfg.keep_last, None)
        if stopping:
            break
    if rank == 0:
        final = {k[5:]: v for k, v in log[-1].items() if k.startswith("eval/")} if log else {}
        table = report_table(final) if final else ""
        print(table)
        (out / "report.md").write_text(table)
        write_run_page(out)
    meet("the end")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_config(Config, sys.argv[1:]))
