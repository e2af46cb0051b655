"""Stage 3, the agent: GRPO with rule rewards, Reagent-R or Reagent-U (paper sections 3.5.2
and 3.5.3, equations 6-9).

    torchrun --nproc_per_node=8 grpo_unified.py  # the paper's recipe, Qwen3-8B
    torchrun --nproc_per_node=2 grpo_unified.py config/grpo_unified_toy_tiny.py  # a laptop

For each question, i = 1..G:  o1_i ~ pi(.|q);  (c_i, s1_i) from the reward model;  o2_i ~ pi(.|q,
o1_i, c_i);  s2_i. R = R_rule + lambda * s. Reagent-U normalises over the pool of 2G, Reagent-R over
the G first attempts; `rule` has lambda = 0 and no reward model. Differences from the paper:
sampling with top_p 1 (a truncated sampler is not the policy that is trained), asymmetric clipping
as in the released script, pools without any spread of rewards are dropped.
"""

import asyncio
import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import rollout
from reagent import engines, reward_model, run
from reagent.chat import Chat
from reagent.config import check_choices, parse_config, read_prompt, run_facts
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
from reagent.reward_model import RewardModelConfig
from reagent.rows import JsonlRows, batch_indices, check_rl_row
from reagent.scorers import rule_reward
from results.runs import write_run_page
from tools import Toolbox


@dataclass
class Config:
    # data and reward
    model: str = "out/sft/step-003476"  # a Hugging Face folder or name: the agent after SFT
    data: str = "data/reagent/rl_train.jsonl"  # RL rows
    eval_data: str = ""  # RL rows for the evaluation during training; "": none
    variant: str = "u"  # u | r | rule
    rrm: RewardModelConfig = RewardModelConfig("http://localhost:8001/v1")
    rrm_weight: float = 0.3  # lambda
    prompt_file: str = ""  # another system prompt
    fixed_critique: str = (
        ""  # ablation: every refinement reads this instead of the judge's critique
    )
    tools: str = "search,browse,python"
    corpus: str = ""  # local pages for rows without docs
    files_dir: str = ""  # where the files of rows lie (data/reagent/files after prepare.py --media)
    # sampling
    prompts_per_step: int = 64
    group_size: int = 8  # G: Reagent-U samples G attempts and refines each
    temperature: float = 0.7
    max_turns: int = 13  # of one attempt
    max_new_tokens_per_turn: int = 4096
    max_tokens_per_attempt: int = 11_000  # tool results included
    max_context: int = 32_768  # tokens of a chain
    # loss and optimisation
    pool: str = "joint"  # joint: over 2G | per_stage
    drop: str = "equal"  # pools without gradient: equal | rule_equal | release
    loss_agg: str = "seq_mean"  # seq_mean: the paper's | token_mean
    old_logps: str = "sampler"  # sampler | recomputed
    clip_low: float = 0.2
    clip_high: float = 0.34
    prompts_per_minibatch: int = 16  # one optimizer step each
    steps: int = 300
    lr: float = 5e-7
    lr_end: float = 1.0  # share of lr that a linear decay ends at; 1: constant, the paper's
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_dlogp: float = (
        0.05  # mean |logp(sampler) - logp(trainer)|: an error on step 1, later the step is skipped
    )
    max_skips: int = 5  # steps skipped in a row before the run stops
    # engine and memory
    engine: EngineConfig = EngineConfig()
    tokens_per_microbatch: int = 28_000
    checkpoint_activations: bool = True
    shard_ranks: int = 0  # HSDP; 0: all ranks share one copy
    # run
    seed: int = 0
    out_dir: str = "out/u"
    eval_interval: int = 20  # steps; two decoded episodes are printed as often
    save_interval: int = 20  # steps
    keep_last: int = 2  # checkpoints besides the best
    timeout_s: float = 3600.0  # seconds that ranks wait for each other, rollouts included
    wandb: bool = False


MAY_CHANGE = {
    "out_dir",
    "save_interval",
    "keep_last",
    "timeout_s",
    "engine.memory_share",
    "engine.sleep",
    "engine.max_live_chains",
    "rrm.seconds",
    "rrm.patience",
}
MAY_CHANGE |= {
    "tokens_per_microbatch",
    "checkpoint_activations",
    "shard_ranks",
    "max_skips",
    "files_dir",
    "wandb",
}

# --------------------------------------------------------------------------------------------------
# the 2G pool and the loss


def pooled_advantages(
    rewards: torch.Tensor, eps: float = 1e-6, pool: str = "joint"
) -> torch.Tensor:
    """A = (R - mean(R_pool)) / (std(R_pool) + eps) (paper equation 8), unbiased std over the
    attempts that remain.

    rewards (N, 2, G): question, stage, sibling; NaN where an attempt is missing. Returns (N, 2, G)
    with 0 there, in pools with one attempt or none, and in pools whose max - min is under 1e-6: the
    std of equal fp32 numbers is not 0. pool: "joint" over the 2G attempts of a question,
    "per_stage" over the G of each stage.
    """
    n, stages, group = rewards.shape
    flat = rewards.double().reshape((n, stages * group) if pool == "joint" else (n * stages, group))
    there = ~flat.isnan()
    count = there.sum(1, keepdim=True)
    filled = flat.nan_to_num(0.0)
    mean = filled.sum(1, keepdim=True) / count.clamp(min=1)
    centred = (filled - mean) * there
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    spread = flat.nan_to_num(-math.inf).amax(1, keepdim=True) - flat.nan_to_num(math.inf).amin(
        1, keepdim=True
    )
    advantages = torch.where((count > 1) & (spread >= 1e-6), centred / (std + eps), 0.0)
    return advantages.reshape(rewards.shape).to(rewards.dtype)


def kept_pools(rewards: torch.Tensor, rules: torch.Tensor, drop: str) -> torch.Tensor:
    """(N,) bool: which pools train. equal: any spread of rewards will do; rule_equal: the rule
    rewards must differ; release: neither all rewards <= 0 nor all >= 1 (the released script).
    rewards, rules (N, 2, G), NaN = missing."""

    def spread(x):
        x = x.flatten(1)
        return x.nan_to_num(-math.inf).amax(1) - x.nan_to_num(math.inf).amin(1)

    kept = spread(rewards) >= 1e-6
    if drop == "rule_equal":
        kept &= spread(rules) >= 1e-6
    elif drop == "release":
        flat = rewards.flatten(1)
        kept &= ~((flat.nan_to_num(0.0) <= 0).all(1) | (flat.nan_to_num(1.0) >= 1).all(1))
    return kept


def grpo_loss(logps, old_logps, advantages, weights, clip_low: float, clip_high: float):
    """Clipped surrogate (paper equation 9): -sum_t w_t min(r_t A_t, clip(r_t, 1 - low, 1 + high)
    A_t), r = pi / pi_old.

    All (M,). The weights hold the denominator: 1 / (N |o|) for seq_mean, 1 / (all tokens) for
    token_mean, counted over the minibatch on all ranks. Returns (loss, number of clipped tokens).
    """
    ratio = (logps - old_logps).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -(weights * torch.minimum(plain, clipped)).sum(), (clipped < plain).sum().item()


# --------------------------------------------------------------------------------------------------
# episodes -> rewards -> rows


def set_rewards(episodes: list, rrm_weight: float, scored: bool) -> None:
    """R = R_rule + lambda * s (paper equation 6). Without a valid judgment, or in a dropped chain:
    no reward.
    """
    for episode in episodes:
        for attempt in episode.attempts:
            attempt.reward = None
            if (
                not episode.dropped
                and attempt.rule_reward is not None
                and (attempt.score is not None or not scored)
            ):
                attempt.reward = attempt.rule_reward + (
                    rrm_weight * attempt.score if scored else 0.0
                )


def reward_tensor(episodes: list, group: int, read) -> torch.Tensor:
    """(N, 2, G) of read(attempt), NaN where an attempt has no reward; episodes come question by
    question.
    """
    table = torch.full((len(episodes) // group, 2, group), math.nan, dtype=torch.float64)
    for i, episode in enumerate(episodes):
        for stage, attempt in enumerate(episode.attempts):
            if attempt.reward is not None:
                table[i // group, stage, i % group] = read(attempt)
    return table


def training_rows(episodes: list, advantages: torch.Tensor, group: int, loss_agg: str) -> list[Row]:
    """The rows of a minibatch: one a chain, both attempts in it with their own advantage, weights
    as in grpo_loss.
    """
    chosen = []  # (episode, [(span, advantage, trained tokens)])
    for i, episode in enumerate(episodes):
        spans = []
        for stage, attempt in enumerate(episode.attempts):
            a = advantages[i // group, stage, i % group].item()
            trained = sum(episode.mask[slice(*attempt.span)])
            if attempt.reward is not None and trained:
                spans.append((attempt.span, a, trained))
        chosen.append((episode, spans))
    attempts = sum(len(spans) for _, spans in chosen)
    tokens = sum(n for _, spans in chosen for _, _, n in spans)
    rows = []
    for episode, spans in chosen:
        spans = [
            span for span in spans if span[1] != 0.0
        ]  # no gradient: counted above, not computed
        if not spans:
            continue
        mask, columns = [0] * len(episode.ids), {"advantage": [], "weight": [], "logp_mu": []}
        for (a, b), advantage, n in spans:
            mask[a:b] = episode.mask[a:b]
            columns["advantage"] += [advantage] * n
            columns["weight"] += [1 / (attempts * n) if loss_agg == "seq_mean" else 1 / tokens] * n
            before = sum(episode.mask[:a])
            columns["logp_mu"] += episode.logps[before : before + n]
        end = max(b for (_, b), _, _ in spans)
        rows.append(Row(episode.ids[:end], mask[:end], columns))
    return rows


def step_metrics(episodes: list, rewards, rules, advantages, kept) -> dict:
    """The numbers of a step's episodes; the README explains each."""
    line: dict = {}
    for stage, name in enumerate(("first", "refined")):
        attempts = [
            e.attempts[stage] for e in episodes if len(e.attempts) > stage and not e.dropped
        ]
        if attempts:
            line |= {
                f"reward/{name}": _mean(a.reward for a in attempts),
                f"rule_reward/{name}": _mean(a.rule_reward for a in attempts),
                f"score/{name}": _mean(a.score for a in attempts),
                f"accuracy/{name}": _mean(float(a.correct) for a in attempts),
                f"tool_calls/{name}": _mean(len(a.calls) for a in attempts),
                f"tokens/{name}": _mean(a.span[1] - a.span[0] for a in attempts),
            }
    attempts = [a for e in episodes for a in e.attempts]
    line |= {f"ended/{why}": n for why, n in Counter(a.termination for a in attempts).items()}
    line["score/right"] = _mean(a.score for a in attempts if a.correct)
    line["score/wrong"] = _mean(a.score for a in attempts if a.correct is False)
    line["attempts"] = int((~rewards.isnan()).sum())
    line["left_out/chains"] = sum(bool(e.dropped) for e in episodes)
    line["left_out/attempts"] = sum(a.reward is None for a in attempts)
    line["pools/dropped"] = 1 - kept.double().mean().item()
    wrong = (rules.nan_to_num(0.0) <= 0).flatten(1).all(1)
    size = advantages.abs().flatten(1).sum(1)
    flat_rule = pooled_advantages(rules).abs().flatten(1).sum(1) == 0
    total = max(size.sum().item(), 1e-12)
    line["pools/all_wrong"] = wrong.double().mean().item()
    line["advantage/all_wrong"] = size[wrong].sum().item() / total
    line["advantage/score_alone"] = size[flat_rule].sum().item() / total
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in line.items() if v is not None}


def _mean(values) -> float | None:
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


# --------------------------------------------------------------------------------------------------


def learning_rate(step: int, cfg) -> float:
    """Linear from lr to lr_end * lr."""
    return cfg.lr * (1 - (1 - cfg.lr_end) * step / max(cfg.steps - 1, 1))


def check_config(cfg: Config) -> None:
    engines.engine_class(cfg.engine.kind)
    check_choices(
        cfg,
        variant="u r rule",
        pool="joint per_stage",
        drop="equal rule_equal release",
    )
    check_choices(cfg, loss_agg="seq_mean token_mean", old_logps="sampler recomputed")
    if cfg.prompts_per_step % cfg.prompts_per_minibatch:
        raise SystemExit(
            f"prompts_per_minibatch = {cfg.prompts_per_minibatch} does not divide "
            f"{cfg.prompts_per_step}"
        )
    judged_here = cfg.variant != "rule" and not cfg.rrm.source.startswith("http")
    if cfg.engine.tensor_parallel > 1 and judged_here:
        raise SystemExit(
            f"engine.tensor_parallel = {cfg.engine.tensor_parallel}: serve the reward model "
            f"{cfg.rrm.source} (--rrm=http://…/v1), an engine of its own beside a tensor-parallel "
            "one is not supported"
        )


def update(
    policy, optimizer, minibatches: list, cfg: Config, device, gloo
) -> tuple[Counter, list[float], str, float]:
    """One optimizer step for each minibatch, a list of this rank's micro-batches.

    Returns (sums over ranks, gradient norms, why it was skipped or "", largest |dlogp| of this
    rank).
    """
    columns = ("advantage", "weight", "logp_mu")
    old = {}  # (minibatch, microbatch) -> (M,) log-probs before the first update
    if cfg.old_logps == "recomputed":
        with torch.no_grad():
            for where, mb in [
                ((i, k), mb) for i, part in enumerate(minibatches) for k, mb in enumerate(part)
            ]:
                old[where] = policy(collate(mb, columns, device), cfg.temperature)[0]
    totals, norms, worst = Counter(), [], 0.0
    for i, part in enumerate(minibatches):
        if not part:
            continue
        sums = Counter()
        for k, mb in enumerate(part):
            batch = collate(mb, columns, device)
            logps, entropy = policy(batch, cfg.temperature)
            weights, mu = batch.columns["weight"], batch.columns["logp_mu"]
            behind = mu
            if old:
                behind = old[i, k]
                weights = weights * (behind - mu).exp().clamp(max=2.0)
            loss, clipped = grpo_loss(
                logps, behind, batch.columns["advantage"], weights, cfg.clip_low, cfg.clip_high
            )
            backward(loss + 0.0 * logps.sum())
            gap = (logps.detach() - mu).abs()
            sums.update(
                loss=loss.item(), clipped=clipped, tokens=len(logps), entropy=entropy.sum().item()
            )
            if not totals and len(
                gap
            ):  # before the first update sampler and trainer are the same policy
                sums.update(gap=gap.sum().item(), compared=len(gap))
                worst = max(worst, gap.max().item())
        names = ("loss", "clipped", "tokens", "entropy", "gap", "compared")
        sums = Counter(dict(zip(names, run.sum_over_ranks([sums[n] for n in names], gloo))))
        norm = clip_gradients(policy, cfg.max_grad_norm)
        dlogp, skipped = sums["gap"] / max(sums["compared"], 1), ""
        if not math.isfinite(norm + sums["loss"]):
            skipped = f"loss {sums['loss']}, gradient norm {norm}"
        elif not totals and dlogp > cfg.max_dlogp:
            skipped = (
                f"sampler and trainer differ: mean |dlogp| {dlogp:.4f} > max_dlogp = "
                f"{cfg.max_dlogp}"
            )
        if not skipped:
            optimizer.step()
            norms.append(norm)
        optimizer.zero_grad()
        totals.update(sums)
        if skipped:
            return totals, norms, skipped, worst
    return totals, norms, "", worst


def main(cfg: Config) -> None:
    # ---------------------------------------------------------------- data, processes
    check_config(cfg)
    rows = JsonlRows(
        cfg.data, check_rl_row, hint="run python data/reagent/prepare.py (or data/toy/prepare.py)"
    )
    eval_rows = JsonlRows(cfg.eval_data, check_rl_row) if cfg.eval_data else []
    tokenizer = load_tokenizer(cfg.model)
    chat, toolbox = (
        Chat(tokenizer),
        Toolbox(cfg.tools.split(","), corpus=cfg.corpus, files_dir=cfg.files_dir),
    )
    toolbox.check_rows(rows, cfg.data)
    toolbox.check_rows(eval_rows, cfg.eval_data)
    rank, world, device = run.init_distributed(cfg.timeout_s)
    gloo = dist.new_group(backend="gloo")
    tp = cfg.engine.tensor_parallel
    if world % tp:
        raise SystemExit(f"tensor_parallel = {tp} does not divide {world} ranks")
    patience = timedelta(seconds=cfg.timeout_s)
    tp_groups = (
        [dist.new_group(list(range(a, a + tp)), patience, "gloo") for a in range(0, world, tp)]
        if tp > 1
        else []
    )
    leads, n_engines = rank % tp == 0, world // tp

    def meet(phase, error=None):
        run.meet(phase, gloo, cfg.timeout_s, error)

    # -------------------- engines first (they reseed), then the policy
    out = Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    engine = engines.make_engine(
        cfg.engine,
        cfg.model,
        chat.stop_ids,
        max_context=cfg.max_context,
        tp_group=tp_groups[rank // tp] if tp > 1 else None,
    )
    engines.rest(engine)  # until the first sync: the policy is loaded meanwhile
    judge = None
    if cfg.variant != "rule":
        judge = reward_model.make_judge(cfg.rrm, chat, engine=cfg.engine)
    torch.manual_seed(cfg.seed)
    policy = shard(load_policy(cfg.model, cfg.checkpoint_activations), device, cfg.shard_ranks)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    weights_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    # ---------------------------------------------------------------- resume
    facts, start, log, best = run_facts(cfg), 0, [], {"step": None, "accuracy": -1.0}
    found = run.checkpoints(out)
    if found:
        saved = json.loads((found[-1] / "trainer.json").read_text())
        may_change = MAY_CHANGE | ({"steps"} if cfg.lr_end == 1.0 else set())
        run.check_resume(saved["config"], facts["config"], may_change, found[-1])
        run.load_checkpoint(found[-1], policy, optimizer)
        start, log, best = saved["step"], saved["log"], saved["best"]
    engine.load_weights(full_weights(policy, weights_dtype))  # one that slept has none
    if rank == 0:
        (out / "run.json").write_text(json.dumps(facts, indent=1))
        (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        (out / "episodes").mkdir(exist_ok=True)
        per = cfg.group_size * (2 if cfg.variant == "u" else 1)
        print(
            f"variant {cfg.variant}: {cfg.prompts_per_step} questions x {per} attempts a step, "
            f"{n_engines} engine(s), "
            f"about {memory_of(policy, cfg):.1f} GB a rank to train, -> {out}"
        )
    tracker = run.start_wandb(cfg, rank)
    stop = run.asked_to_stop()
    runner = asyncio.Runner()
    limits = rollout.Limits(
        cfg.max_turns,
        cfg.max_new_tokens_per_turn,
        cfg.max_tokens_per_attempt,
        cfg.max_context,
        final_tokens=min(512, cfg.max_new_tokens_per_turn),
    )
    system_prompt = read_prompt(cfg.prompt_file, rollout.SYSTEM_PROMPT)

    def sample(jobs: list, version: int, what: str) -> list:
        """Runs this engine's share of the jobs [(row, key)]; returns all episodes, in the order of
        the jobs.
        """
        setup = rollout.Setup(
            engine,
            chat,
            toolbox,
            limits,
            rule_reward,
            judge,
            cfg.variant == "u",
            cfg.temperature,
            system_prompt=system_prompt,
            fixed_critique=cfg.fixed_critique,
            policy_version=version,
        )
        mine, error = [], None
        bar = tqdm(
            total=len(jobs), desc=what, leave=False, disable=rank > 0 or not sys.stderr.isatty()
        )
        try:
            if leads:
                share = [
                    job
                    for i, job in enumerate(jobs)
                    if i // cfg.group_size % n_engines == rank // tp
                ]
                done = rollout.run_chains(
                    share, setup, cfg.engine.max_live_chains, lambda _: bar.update(n_engines)
                )
                try:
                    mine = runner.run(done)
                finally:  # also after an error: those that follow would wait for ever
                    if tp > 1:
                        engine.finish()
            else:
                engine.follow()
        except Exception as problem:  # the others wait for this rank: they must hear of it
            error = problem
        bar.close()
        meet(f"the rollout of {what}", error)
        shares = [None] * world
        dist.all_gather_object(shares, mine, group=gloo)
        queues = [iter(share) for share in shares[::tp]]
        return [next(queues[i // cfg.group_size % n_engines]) for i in range(len(jobs))]

    def evaluate_policy(version: int) -> dict:
        jobs = [(eval_rows[i], (cfg.seed, "eval", 0)) for i in range(len(eval_rows))]
        episodes = sample(jobs, version, "evaluation")
        stages = [[e.attempts[s] for e in episodes if len(e.attempts) > s] for s in (0, 1)]
        line = {"eval/first": sum(bool(a.correct) for a in stages[0]) / len(episodes)}
        if stages[1]:  # a chain without a refined attempt keeps its first answer
            line["eval/refined"] = sum(bool(e.attempts[-1].correct) for e in episodes) / len(
                episodes
            )
        return line

    # ---------------------------------------------------------------- loop
    skips = 0
    if eval_rows and start == 0:
        log.append({"step": 0, **evaluate_policy(0)})
        if rank == 0:
            (out / "log.jsonl").write_text(json.dumps(log[0]) + "\n")
    for step in range(start, cfg.steps):
        began = time.perf_counter()
        line: dict = {"step": step + 1, "lr": learning_rate(step, cfg)}
        for group in optimizer.param_groups:
            group["lr"] = line["lr"]

        # -------------------- rollout: G chains for each question
        picked = batch_indices(step, cfg.prompts_per_step, len(rows), cfg.seed)
        jobs = [
            (rows[i], (cfg.seed, step, place, g))
            for place, i in enumerate(picked)
            for g in range(cfg.group_size)
        ]
        asked, failed = (judge.asked, judge.failed) if judge else (0, 0)
        began_rollout = time.perf_counter()
        episodes = sample(jobs, step, f"step {step + 1}")
        if judge:
            asked, failed = run.sum_over_ranks([judge.asked - asked, judge.failed - failed], gloo)
            line |= {"judge/asked": int(asked), "judge/failed": int(failed)}
            if failed > cfg.rrm.max_failures * asked:
                raise SystemExit(
                    f"step {step + 1}: {failed:.0f} of {asked:.0f} judgments failed, more than "
                    f"rrm.max_failures = {cfg.rrm.max_failures}: is the reward model "
                    f"{cfg.rrm.source} up "
                    "and sound?"
                )
        engines.rest(engine)
        began_train = time.perf_counter()

        # ------------------------------------------------------------ rewards, pools, advantages
        set_rewards(episodes, cfg.rrm_weight, judge is not None)
        rewards = reward_tensor(episodes, cfg.group_size, lambda a: a.reward)
        rules = reward_tensor(episodes, cfg.group_size, lambda a: a.rule_reward)
        kept = kept_pools(rewards, rules, cfg.drop)
        advantages = pooled_advantages(rewards, pool=cfg.pool) * kept[:, None, None]
        line |= step_metrics(episodes, rewards, rules, advantages, kept)

        # -------------------- update: minibatches of whole questions
        minibatches = []
        for a in range(0, cfg.prompts_per_step, cfg.prompts_per_minibatch):
            part = [q for q in range(a, a + cfg.prompts_per_minibatch) if kept[q]]
            chosen = [episodes[q * cfg.group_size + g] for q in part for g in range(cfg.group_size)]
            batch = (
                training_rows(chosen, advantages[part], cfg.group_size, cfg.loss_agg)
                if part
                else []
            )
            minibatches.append(
                balance(batch, world, cfg.tokens_per_microbatch)[rank] if batch else []
            )
        with run.phase(f"the update of step {step + 1}", meet):
            totals, norms, skipped, worst = update(
                policy, optimizer, minibatches, cfg, device, gloo
            )
        skips = skips + 1 if skipped else 0
        if skipped and (step == 0 or skips > cfg.max_skips):
            good = run.checkpoints(out)
            raise SystemExit(
                f"step {step + 1}: {skipped} ({skips} in a row); last good checkpoint: "
                f"{good[-1] if good else 'none'}"
            )

        # -------------------- weights to the sampler, also after a skipped step
        began_sync = time.perf_counter()
        with run.phase(f"the weight sync of step {step + 1}", meet):
            engine.load_weights(full_weights(policy, weights_dtype))
        ended = time.perf_counter()

        # ------------------------------------------------------------ log, evaluate, save
        gaps = [None] * world
        dist.all_gather_object(gaps, worst, group=gloo)
        tokens = sum(len(e.ids) for e in episodes)
        line |= {
            "loss": totals["loss"] / max(len(norms), 1),
            "grad_norm": sum(norms) / max(len(norms), 1),
            "updates": len(norms),
            "skipped": skipped,
            "dlogp/mean": totals["gap"] / max(totals["compared"], 1),
            "dlogp/max": max(gaps),
            "clip_share": totals["clipped"] / max(totals["tokens"], 1),
            "entropy": totals["entropy"] / max(totals["tokens"], 1),
            "tokens": tokens,
            "trained_tokens": totals["tokens"],
            "seconds/rollout": round(began_train - began_rollout, 3),
            "seconds/train": round(began_sync - began_train, 3),
            "seconds/sync": round(ended - began_sync, 3),
            "tokens_per_second": round(tokens / (ended - began_rollout)),
        }
        stopping = run.sum_over_ranks([len(stop)], gloo)[0] > 0
        last = step + 1 == cfg.steps
        if eval_rows and ((step + 1) % cfg.eval_interval == 0 or last):
            line |= evaluate_policy(step + 1)
        better = line.get("eval/first", -1.0) > best["accuracy"]
        best = {"step": step + 1, "accuracy": line["eval/first"]} if better else best
        line["seconds/step"] = round(time.perf_counter() - began, 3)
        log.append(line)
        if rank == 0:
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            with open(out / "episodes" / f"step-{step + 1:06d}.jsonl", "w") as file:
                file.writelines(json.dumps(e.to_json()) + "\n" for e in episodes)
            if (step + 1) % cfg.eval_interval == 0:
                print(
                    *(show_episode(chat, episode) for episode in (episodes[0], episodes[-1])),
                    sep="\n",
                )
            if tracker:
                tracker.log(line)
            shown = (
                "reward/first",
                "accuracy/first",
                "accuracy/refined",
                "eval/first",
                "entropy",
                "grad_norm",
                "dlogp/mean",
            )
            print(
                f"step {step + 1:4d} "
                + "  ".join(f"{k} {line[k]:.4g}" for k in shown if k in line)
                + f"  {line['seconds/step']:.1f} s"
                + (f"  SKIPPED: {skipped}" if skipped else ""),
                flush=True,
            )
        if (step + 1) % cfg.save_interval == 0 or last or stopping or better:
            run.save_checkpoint(
                out,
                step + 1,
                policy,
                optimizer,
                tokenizer,
                {**facts, "log": log, "best": best},
                meet,
            )
            if rank == 0:
                run.prune(out, cfg.keep_last, best["step"])
        if stopping:
            break
    if rank == 0:
        write_run_page(out)
    meet("the end")
    toolbox.close()
    dist.destroy_process_group()


def show_episode(chat: Chat, episode) -> str:
    """A chain for the terminal: trained tokens in green, then what each attempt earned."""
    earned = [
        f"[{a.termination}, answer {a.answer}, reward {a.reward}, score {a.score}]"
        for a in episode.attempts
    ]
    return "\n".join([f"--- {episode.id}", chat.paint(episode.ids, episode.mask), *earned])


if __name__ == "__main__":
    main(parse_config(Config, sys.argv[1:]))
