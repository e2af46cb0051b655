"""Stage 3, the agent: GRPO with rule rewards, Reagent-R or Reagent-U (paper sections 3.5.2
and 3.5.3, equations 6-9).

    torchrun --nproc_per_node=8 grpo_unified.py  # the paper's recipe, Qwen3-8B
    torchrun --nproc_per_node=2 grpo_unified.py config/grpo_unified_toy_tiny.py  # a laptop

For each question, i = 1..G:  o1_i ~ pi(.|q);  (c_i, s1_i) from the reward model;  o2_i ~ pi(.|q,
o1_i, c_i);  s2_i. R = R_rule + lambda * s. Reagent-U normalises over the pool of 2G, Reagent-R over
the G first attempts; `rule` has lambda = 0 and no reward model. Differences from the paper:
sampling with top_p 1 (a truncated sampler is not the policy that is trained), asymmetric clipping
as in the released script with its dual clip, no KL term by default (kl_coef), pools without any
spread of rewards are dropped.
"""

import sys

from reagent.config import show_help

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    show_help(__file__)  # before torch is imported

import asyncio
import dataclasses
import math
import time
from collections import Counter
from dataclasses import dataclass

import torch

import rollout
from reagent import engines, reward_model
from reagent.chat import Chat
from reagent.config import check_values, parse_config, prompt_facts, read_prompt
from reagent.critiques import leak_shares
from reagent.engines import EngineConfig
from reagent.memory import plan_memory
from reagent.policy import (
    POLICY_RULES,
    PolicyConfig,
    Sequence,
    backward,
    balance,
    collate,
    each_microbatch,
    full_weights,
    load_chat,
    make_optimizer,
    make_policy,
    make_reference,
    normalised,
    spread,
    take_step,
)
from reagent.reward_model import RewardModelConfig
from reagent.rows import JsonlRows, batch_indices, check_rl_row
from reagent.run import Run, engine_group, say
from reagent.scorers import rule_reward
from results.judging import auc, has_fallen
from results.page import make_page
from tools import Toolbox


@dataclass
class Config:
    # data and reward
    model: str = "out/sft/step-003476"  # a Hugging Face folder or name: the agent after SFT
    chat_template: str = ""  # a Jinja file for a model whose own template has no tools
    data: str = "data/reagent/rl_train.jsonl"  # RL rows
    eval_data: str = ""  # RL rows for the evaluation during training; "": none
    variant: str = "u"  # u | r | rule
    rrm: RewardModelConfig = RewardModelConfig("http://localhost:8001/v1")
    rrm_weight: float = 0.3  # lambda
    prompt_file: str = ""  # another system prompt
    fixed_critique: str = ""  # ablation: read instead of every critique of the reward model
    tools: str = "search,browse,python"
    corpus: str = ""  # local pages for rows without docs
    files_dir: str = ""  # where the files of rows lie (data/reagent/files after prepare.py --media)
    unsafe_python: bool = False  # run code without a sandbox where this machine has none
    # sampling
    prompts_per_step: int = 64
    group_size: int = 8  # G: Reagent-U samples G attempts and refines each
    temperature: float = 0.7
    max_turns: int = 13  # of one attempt
    max_new_tokens_per_turn: int = 4096
    max_tokens_per_attempt: int = 11_000  # tool results included
    max_context: int = 32_768  # tokens of a chain
    max_seconds_per_chain: float = 1800.0  # then its attempt ends as it stands; 0: no limit
    # loss and optimisation
    pool: str = "joint"  # joint: over 2G | per_stage
    drop: str = "equal"  # pools without gradient: equal | rule_equal | release
    loss_agg: str = "seq_mean"  # seq_mean: the paper's | token_mean
    old_logps: str = "sampler"  # sampler | recomputed
    kl_coef: float = 0.0  # beta of equation 9; 0 loads no reference model, as the release runs it
    clip_low: float = 0.2
    clip_high: float = 0.34
    prompts_per_minibatch: int = 16  # one optimizer step each
    steps: int = 300
    lr: float = 5e-7
    lr_end: float = 1.0  # share of lr that a linear decay ends at; 1: constant, the paper's
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    # mean |logp(sampler) - logp(trainer)|: above it step 1 is an error, a later one is skipped
    max_dlogp: float = 0.05
    # engine and memory
    engine: EngineConfig = EngineConfig()
    policy: PolicyConfig = PolicyConfig()
    # run
    seed: int = 0
    out_dir: str = "out/u"
    eval_interval: int = 20  # steps; two decoded episodes are printed as often
    save_interval: int = 20  # steps
    keep_last: int = 2  # checkpoints besides the best
    timeout_s: float = 3600.0  # seconds that ranks wait for each other, rollouts included
    wandb: bool = False
    check: bool = False  # stop after all checks, before anything heavy; writes nothing


MAY_CHANGE = set(
    "engine.max_live_chains max_seconds_per_chain rrm.memory_share rrm.sleep rrm.seconds "
    "rrm.in_flight files_dir unsafe_python".split()
)

COLUMNS = ("advantage", "weight", "sampler_logps")  # one number a trained token
SUMS = ("loss", "clipped", "bounded", "kl", "tokens", "entropy", "gap", "compared")
SHOWN = ("reward/first", "accuracy/first", "accuracy/refined", "eval/first")
SHOWN += ("entropy", "grad_norm", "dlogp/mean")
DUAL_CLIP = 3.0  # bound of r A where A < 0, in |A|
LOG_RATIO_CAP = 20.0  # nats of log pi - log pi_old: beyond it exp overflows, its gradient with it
IMPORTANCE_CAP = 2.0  # of pi_old / pi of the sampler, where old log-probs are recomputed

# ---------------------------------------------------------------- rewards


def set_rewards(episodes: list, rrm_weight: float, scored: bool) -> None:
    """R = R_rule + lambda * s (paper equation 6); None in a dropped chain or without a judgment."""
    for episode in episodes:
        for attempt in episode.attempts:
            attempt.reward = None
            if episode.dropped or attempt.rule_reward is None:
                continue
            if not scored:
                attempt.reward = attempt.rule_reward
            elif attempt.score is not None:
                attempt.reward = attempt.rule_reward + rrm_weight * attempt.score


def reward_tensor(episodes: list, group: int, read) -> torch.Tensor:
    """(N, 2, G) of read(attempt), NaN where an attempt has no reward; episodes by question."""
    table = torch.full((len(episodes) // group, 2, group), math.nan, dtype=torch.float64)
    for i, episode in enumerate(episodes):
        for stage, attempt in enumerate(episode.attempts):
            if attempt.reward is not None:
                table[i // group, stage, i % group] = read(attempt)
    return table


# ---------------------------------------------------------------- the 2G pool


def pooled_advantages(rewards, eps: float = 1e-6, pool: str = "joint") -> torch.Tensor:
    """A = (R - mean(R_pool)) / (std(R_pool) + eps) (paper equation 8), as `normalised` has it.

    rewards (N, 2, G): question, stage, sibling; NaN where an attempt is missing. Returns (N, 2, G).
    pool: "joint" over the 2G attempts of a question, "per_stage" over the G of each stage."""
    pools = rewards.flatten(1) if pool == "joint" else rewards.flatten(0, 1)
    return normalised(pools, eps).reshape(rewards.shape).to(rewards.dtype)


def kept_pools(rewards: torch.Tensor, rules: torch.Tensor, drop: str) -> torch.Tensor:
    """(N,) bool: which pools train. equal: any spread of rewards will do; rule_equal: the rule
    rewards must differ; release: neither all rewards <= 0 nor all >= 1 (the released script).
    rewards, rules (N, 2, G), NaN = missing."""
    kept = spread(rewards) >= 1e-6
    if drop == "rule_equal":
        kept &= spread(rules) >= 1e-6
    elif drop == "release":
        flat = rewards.flatten(1)
        kept &= ~((flat.nan_to_num(0.0) <= 0).all(1) | (flat.nan_to_num(1.0) >= 1).all(1))
    return kept


# ---------------------------------------------------------------- the loss


def token_weight(length: int, attempts: int, tokens: int, loss_agg: str) -> float:
    """The weight of a token in an attempt of `length` trained tokens: the loss is normalised here
    and nowhere else, by what the minibatch holds over all ranks.

    seq_mean: the mean over the `attempts` of each one's mean over its tokens (paper equation 9);
    token_mean: the mean over all `tokens`."""
    return 1 / (attempts * length) if loss_agg == "seq_mean" else 1 / tokens


def grpo_loss(logps, old_logps, advantages, weights, clip_low: float, clip_high: float):
    """Clipped surrogate (paper equation 9): -sum_t w_t min(r_t A_t, clip(r_t, 1 - low, 1 + high)
    A_t), r = pi / pi_old. All (M,); the weights are those of `token_weight`.

    Where A < 0 that has no lower bound: one token far above the sampler would take the whole
    gradient. Dual clip (veRL's, and so the release's) stops it at DUAL_CLIP * A.
    Returns (loss, number of clipped tokens, number of tokens that the dual clip bounds)."""
    ratio = (logps - old_logps).clamp(max=LOG_RATIO_CAP).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    surrogate, floor = torch.minimum(plain, clipped), DUAL_CLIP * advantages
    bounded = (advantages < 0) & (surrogate < floor)
    loss = -(weights * torch.where(bounded, floor, surrogate)).sum()
    return loss, (clipped < plain).sum().item(), bounded.sum().item()


def kl_loss(logps, reference_logps, weights) -> torch.Tensor:
    """sum_t w_t (log pi - log pi_ref)^2 / 2, the k2 estimator: on the policy's own samples its
    gradient is that of KL(pi || pi_ref) (equation 9; k3 as a loss has another). All (M,)."""
    return (weights * (logps - reference_logps).square()).sum() / 2


def training_sequences(
    episodes: list, advantages: torch.Tensor, group: int, loss_agg: str
) -> list[Sequence]:
    """The sequences of a minibatch: one a chain, both attempts in it with their own advantage.

    advantages (N, 2, G). Attempts with advantage 0 are counted in the denominator, not computed."""
    spans = []  # of each episode: [(span, advantage, trained tokens)]
    for i, episode in enumerate(episodes):
        spans.append([])
        for stage, attempt in enumerate(episode.attempts):
            length = sum(episode.mask[slice(*attempt.span)])
            if attempt.reward is not None and length:
                advantage = advantages[i // group, stage, i % group].item()
                spans[i].append((attempt.span, advantage, length))
    attempts = sum(map(len, spans))
    tokens = sum(length for each in spans for _, _, length in each)
    sequences = []
    for episode, each in zip(episodes, spans):
        mask, columns = [0] * len(episode.ids), {name: [] for name in COLUMNS}
        end = 0
        for (a, b), advantage, length in each:
            if advantage == 0.0:
                continue
            weight, before = token_weight(length, attempts, tokens, loss_agg), sum(episode.mask[:a])
            mask[a:b], end = episode.mask[a:b], b
            columns["advantage"] += [advantage] * length
            columns["weight"] += [weight] * length
            columns["sampler_logps"] += episode.logps[before : before + length]
        if end:
            sequences.append(Sequence(episode.ids[:end], mask[:end], columns))
    return sequences


# ---------------------------------------------------------------- the update


def update(policy, optimizer, minibatches: list, cfg: Config, run: Run, reference=None) -> dict:
    """One optimizer step for each minibatch, a list of this rank's micro-batches.

    reference: a policy that is not trained, for the KL term. Returns the SUMS over ranks, "norms"
    of the gradients, "worst" |dlogp| of this rank and "skipped": why the rest was left out, or "".
    """
    old = {}  # (minibatch, microbatch) -> (M,) log-probs before the first update
    if cfg.old_logps == "recomputed":
        old = recomputed_logps(policy, minibatches, cfg, run.device)
    totals, norms, worst, skipped = Counter(), [], 0.0, ""
    for i, microbatches in enumerate(minibatches):
        if not microbatches:
            continue
        first = not norms  # before the first update sampler and trainer are the same policy
        sums = Counter()
        for k, microbatch in enumerate(each_microbatch(policy, microbatches)):
            batch = collate(microbatch, COLUMNS, run.device)
            logps, entropy = policy(batch, cfg.temperature)
            sampler_logps, weights = batch.columns["sampler_logps"], batch.columns["weight"]
            old_logps = sampler_logps
            if old:
                old_logps = old[i, k]
                weights = weights * (old_logps - sampler_logps).exp().clamp(max=IMPORTANCE_CAP)
            clip = dict(clip_low=cfg.clip_low, clip_high=cfg.clip_high)
            advantages = batch.columns["advantage"]
            loss, clipped, bounded = grpo_loss(logps, old_logps, advantages, weights, **clip)
            if reference:
                with torch.no_grad():
                    reference_logps = reference(batch, cfg.temperature)[0]
                loss = loss + cfg.kl_coef * kl_loss(logps, reference_logps, weights)
                sums.update(kl=(logps.detach() - reference_logps).sum().item())
            backward(loss)
            sums.update(loss=loss.item(), clipped=clipped, bounded=bounded, tokens=len(logps))
            sums.update(entropy=entropy.sum().item())
            gap = (logps.detach() - sampler_logps).abs()
            if first and len(gap):
                sums.update(gap=gap.sum().item(), compared=len(gap))
                worst = max(worst, gap.max().item())
        sums = Counter(dict(zip(SUMS, run.sum([sums[name] for name in SUMS]))))
        dlogp = sums["gap"] / max(sums["compared"], 1)
        limits = dict(max_norm=cfg.max_grad_norm, dlogp=dlogp, max_dlogp=cfg.max_dlogp)
        norm, skipped = take_step(policy, optimizer, sums["loss"], **limits)
        totals.update(sums)
        if skipped:
            break
        norms.append(norm)
    return {name: totals[name] for name in SUMS} | dict(norms=norms, worst=worst, skipped=skipped)


def recomputed_logps(policy, minibatches: list, cfg: Config, device) -> dict:
    """(minibatch, microbatch) -> (M,) log-probs under the policy as it stands."""
    found = {}
    with torch.no_grad():
        for i, microbatches in enumerate(minibatches):
            for k, microbatch in enumerate(microbatches):
                found[i, k] = policy(collate(microbatch, COLUMNS, device), cfg.temperature)[0]
    return found


def update_metrics(done: dict, worst: float) -> dict:
    """The log's names for what `update` returns; worst: of all ranks. Means over nothing: None."""

    def mean(name: str, number: int) -> float | None:
        return done[name] / number if number else None

    updates, tokens, compared = len(done["norms"]), done["tokens"], done["compared"]
    line = {"updates": updates, "skipped": done["skipped"], "trained_tokens": tokens}
    line |= {"loss": mean("loss", updates), "grad_norm": _mean(done["norms"])}
    line |= {"dlogp/mean": mean("gap", compared), "dlogp/max": worst if compared else None}
    shares = dict(clip_share="clipped", bounded_share="bounded", kl="kl", entropy="entropy")
    return line | {name: mean(sums, tokens) for name, sums in shares.items()}


def step_metrics(episodes: list, rewards, rules, advantages, kept) -> dict:
    """The numbers of a step's episodes; docs/metrics.md explains each."""
    line: dict = {}
    for stage, name in enumerate(("first", "refined")):
        whole = [e for e in episodes if len(e.attempts) > stage and not e.dropped]
        attempts = [e.attempts[stage] for e in whole]
        for key in ("reward", "rule_reward", "score"):
            line[f"{key}/{name}"] = _mean(getattr(a, key) for a in attempts)
        line[f"accuracy/{name}"] = _mean(float(a.correct) for a in attempts)
        line[f"tool_calls/{name}"] = _mean(len(a.calls) for a in attempts)
        line[f"repaired/{name}"] = _mean(sum(c["repaired"] for c in a.calls) for a in attempts)
        line[f"tokens/{name}"] = _mean(a.span[1] - a.span[0] for a in attempts)
    attempts = [a for e in episodes for a in e.attempts]
    line |= {f"ended/{why}": n for why, n in Counter(a.termination for a in attempts).items()}
    firsts = [e.attempts[0] for e in episodes if e.attempts and not e.dropped]
    pairs = [(a.score, a.correct) for a in firsts if a.score is not None]
    found = auc(*zip(*pairs)) if pairs else math.nan
    line["score/auc"] = found if math.isfinite(found) else None  # of one kind only: none
    line |= leak_shares(episodes, rollout.REFINE_PROMPT.replace("{critique}", ""))
    for name, right in (("right", True), ("wrong", False)):
        part = [a for a in attempts if a.correct is right]
        line[f"score/{name}"] = _mean(a.score for a in part)
        line[f"judge/invalid/{name}"] = _mean(a.unread for a in part)
    line["judge/invalid"] = sum(a.unread for a in attempts)
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


def learning_rate(step: int, cfg) -> float:
    """Linear from lr to lr_end * lr."""
    return cfg.lr * (1 - (1 - cfg.lr_end) * step / max(cfg.steps - 1, 1))


RULES = f"""variant=u|r|rule pool=joint|per_stage drop=equal|rule_equal|release
loss_agg=seq_mean|token_mean old_logps=sampler|recomputed prompts_per_step>0 group_size>0
prompts_per_minibatch>0 temperature>0 max_context>0 max_new_tokens_per_turn>0
max_tokens_per_attempt>0 max_grad_norm>0 eval_interval>0 save_interval>0 timeout_s>0
engine.tensor_parallel>0 engine.memory_share<=1 rrm.memory_share<=1 {POLICY_RULES}"""


def check_config(cfg: Config) -> None:
    engines.engine_class(cfg.engine.kind)
    prompt_facts(cfg)  # a missing file is told before any work
    check_values(cfg, RULES)
    if cfg.variant != "u" and cfg.group_size < 2:
        raise SystemExit("group_size = 1: a pool of one attempt has no spread and trains nothing")
    if cfg.prompts_per_step % cfg.prompts_per_minibatch:
        what = f"prompts_per_minibatch = {cfg.prompts_per_minibatch}"
        raise SystemExit(f"{what} does not divide {cfg.prompts_per_step}")
    scored = cfg.variant != "rule"
    if cfg.engine.tensor_parallel > 1 and scored and cfg.rrm.in_process:
        told = f"engine.tensor_parallel = {cfg.engine.tensor_parallel}: serve the reward model"
        why = "an engine of its own beside a tensor-parallel one is not supported"
        raise SystemExit(f"{told} {cfg.rrm.source} (--rrm=http://…/v1), {why}")
    if scored:
        cfg.rrm.check(cfg.timeout_s)


def main(cfg: Config) -> None:
    # ---------------------------------------------------------------- data
    check_config(cfg)
    say(f"reading {cfg.data}")
    rows = JsonlRows(cfg.data, check_rl_row)
    eval_rows = JsonlRows(cfg.eval_data, check_rl_row) if cfg.eval_data else []
    chat = load_chat(cfg.model, cfg.chat_template)
    places = dict(corpus=cfg.corpus, files_dir=cfg.files_dir)
    toolbox = Toolbox(cfg.tools.split(","), **places, unsafe_python=cfg.unsafe_python)
    toolbox.check_rows(rows, cfg.data)
    toolbox.check_rows(eval_rows, cfg.eval_data)

    # ---------------------------------------------------------------- processes, policy, optimizer
    run = Run(cfg, MAY_CHANGE)
    scored = cfg.variant != "rule"
    beside = cfg.rrm if scored else None
    keeps = plan_memory(cfg, run, longest=cfg.max_context, engine=cfg.engine, rrm=beside)
    tp = cfg.engine.tensor_parallel  # adjacent ranks that share an engine; the first leads
    tp_group, place, n_engines = engine_group(tp, cfg.timeout_s), run.rank // tp, run.world // tp
    runner, rrm = asyncio.Runner(), None
    if scored and not cfg.rrm.in_process:
        rrm = reward_model.open_rrm(cfg.rrm, chat, engine=cfg.engine)

    def tell_rrm(what: str) -> None:
        """Wakes the servers of the reward model or puts them to sleep, with rrm.sleep."""
        if scored and cfg.rrm.sleep:
            run.on_first_rank(what, lambda: runner.run(rrm.tell_servers(what)))

    tell_rrm("wake_up")  # a run that died may have left them asleep
    if rrm:
        run.on_first_rank("a first judgment", lambda: runner.run(rrm.try_out(rows[0]["question"])))
    if run.only_checks(whole_run(cfg, cfg.steps - run.saved, len(eval_rows))):
        return toolbox.close()
    tell_rrm("sleep?level=1")
    say(f"starting the engine: {cfg.engine.kind}")
    engine = engines.make_engine(  # before the policy: it reseeds
        cfg.engine, cfg.model, chat.stop_ids, max_context=cfg.max_context, tp_group=tp_group
    )
    engines.rest(engine)  # until the first sync: the policy is loaded meanwhile
    if scored and rrm is None:
        rrm = reward_model.open_rrm(cfg.rrm, chat, engine=cfg.engine)
    say(f"loading {cfg.model}")
    torch.manual_seed(cfg.seed)
    policy = make_policy(cfg, run.device, keeps)
    optimizer = make_optimizer(policy, lr=cfg.lr, weight_decay=cfg.weight_decay)
    # the policy at the start, for forwards only
    reference = make_reference(cfg, policy, run.device) if cfg.kl_coef else None
    turn, attempt = cfg.max_new_tokens_per_turn, cfg.max_tokens_per_attempt
    ends = dict(max_seconds_per_chain=cfg.max_seconds_per_chain or math.inf)
    ends |= dict(final_tokens=min(512, turn))
    limits = rollout.Limits(cfg.max_turns, turn, attempt, cfg.max_context, **ends)
    parts = dict(engine=engine, chat=chat, toolbox=toolbox, limits=limits, rrm=rrm)
    parts |= dict(refine=cfg.variant == "u", temperature=cfg.temperature)
    system = read_prompt(cfg.prompt_file, rollout.SYSTEM_PROMPT)
    parts |= dict(system_prompt=system, fixed_critique=cfg.fixed_critique)
    setup = rollout.Setup(**parts, rule_reward=rule_reward)

    def sync():
        torch.cuda.empty_cache()  # what training kept of the card: servers wake up beside it
        engine.load_weights(full_weights(policy, run.sampler_dtype))

    def sample(jobs: list, version: int, what: str) -> list:
        """Runs this engine's share of the jobs [(row, key)]; returns all episodes, in order."""
        now = dataclasses.replace(setup, policy_version=version)
        share = [job for i, job in enumerate(jobs) if i // cfg.group_size % n_engines == place]
        tell_rrm("wake_up")
        bar = run.bar(what, len(jobs))
        mine = []
        with run.together(f"the rollout of {what}"):
            if run.rank % tp:  # another rank of the tensor-parallel group leads
                engine.follow()
            else:
                most = cfg.engine.max_live_chains
                chains = rollout.run_chains(share, now, most, lambda _: bar.update(n_engines))
                try:
                    mine = runner.run(chains)
                finally:  # also after an error: those that follow would wait for ever
                    if hasattr(engine, "finish"):
                        engine.finish()
        bar.close()
        tell_rrm("sleep?level=1")
        shares = run.gather([episode.packed() for episode in mine])[::tp]
        queues = [iter(share) for share in shares]
        return [next(queues[i // cfg.group_size % n_engines]) for i in range(len(jobs))]

    def evaluate_policy(version: int) -> dict:
        jobs = [(eval_rows[i], (cfg.seed, "eval", 0)) for i in range(len(eval_rows))]
        episodes = sample(jobs, version, "evaluation")
        first = [e.attempts[0].correct for e in episodes if e.attempts]
        line = {"eval/first": sum(map(bool, first)) / len(episodes)}
        if any(len(e.attempts) > 1 for e in episodes):
            # a chain without a refined attempt keeps its first answer
            last = [e.attempts[-1].correct for e in episodes if e.attempts]
            line["eval/refined"] = sum(map(bool, last)) / len(episodes)
        return line

    # ---------------------------------------------------------------- resume
    start = run.resume(policy, optimizer)
    sync()  # also at the start: an engine that slept has no weights
    attempts = cfg.group_size * (2 if cfg.variant == "u" else 1)
    run.begin(
        f"variant {cfg.variant}: {cfg.prompts_per_step} questions x {attempts} attempts a step, "
        f"{n_engines} engine(s)"
    )
    if eval_rows and not start:
        run.write({"step": 0, **evaluate_policy(0)}, quiet=True)

    # ---------------------------------------------------------------- loop
    for step in range(start, cfg.steps):
        began = time.perf_counter()
        line: dict = {"step": step + 1, "lr": learning_rate(step, cfg)}
        for group in optimizer.param_groups:
            group["lr"] = line["lr"]

        # ------------------------------------------------------------ batch: G chains a question
        picked = batch_indices(step, cfg.prompts_per_step, len(rows), cfg.seed)
        jobs = []
        for place_in_step, i in enumerate(picked):
            jobs += [(rows[i], (cfg.seed, step, place_in_step, g)) for g in range(cfg.group_size)]
        asked, failed = (rrm.asked, rrm.failed) if rrm else (0, 0)
        began_rollout = time.perf_counter()
        episodes = sample(jobs, step, f"step {step + 1}")
        if rrm:
            asked, failed = run.sum([rrm.asked - asked, rrm.failed - failed])
            line |= {"judge/asked": int(asked), "judge/failed": int(failed)}
            check_failures(step, asked, failed, cfg.rrm, run.gather(rrm.problem))
        engines.rest(engine)
        if run.gives_up(step, policy, optimizer, chat.tokenizer):
            break
        began_train = time.perf_counter()

        # ------------------------------------------------------------ rewards, pools, advantages
        set_rewards(episodes, cfg.rrm_weight, rrm is not None)
        rewards = reward_tensor(episodes, cfg.group_size, lambda attempt: attempt.reward)
        rules = reward_tensor(episodes, cfg.group_size, lambda attempt: attempt.rule_reward)
        kept = kept_pools(rewards, rules, cfg.drop)
        advantages = pooled_advantages(rewards, pool=cfg.pool) * kept[:, None, None]
        line |= step_metrics(episodes, rewards, rules, advantages, kept)
        aucs = [each["score/auc"] for each in [*run.log, line] if "score/auc" in each]
        if "score/auc" in line and has_fallen(aucs):
            line["alarm"] = "score/auc fell: the reward model no longer tells right from wrong"

        # ------------------------------------------------------------ update, by whole questions
        minibatches = []
        for a in range(0, cfg.prompts_per_step, cfg.prompts_per_minibatch):
            pools = [q for q in range(a, a + cfg.prompts_per_minibatch) if kept[q]]
            chosen = []
            for q in pools:
                chosen += episodes[q * cfg.group_size : (q + 1) * cfg.group_size]
            sequences = training_sequences(chosen, advantages[pools], cfg.group_size, cfg.loss_agg)
            dealt = balance(sequences, run.world, cfg.policy.tokens_per_microbatch)
            minibatches.append(dealt[run.rank])
        with run.phase(f"the update of step {step + 1}"):
            done = update(policy, optimizer, minibatches, cfg, run, reference)
        run.count_skip(step, done["skipped"])

        # ------------------------------------------------------------ weights to the sampler
        began_sync = time.perf_counter()
        with run.phase(f"the weight sync of step {step + 1}"):
            sync()  # also after a skipped step: an engine that slept has thrown its weights away
        ended = time.perf_counter()

        # ------------------------------------------------------------ log, evaluate, save
        tokens = sum(len(episode.ids) for episode in episodes)
        line |= update_metrics(done, max(run.gather(done["worst"]))) | {"tokens": tokens}
        line["seconds/rollout"] = round(began_train - began_rollout, 3)
        line["seconds/train"] = round(began_sync - began_train, 3)
        line["seconds/sync"] = round(ended - began_sync, 3)
        line["tokens_per_second"] = round(tokens / (ended - began_rollout))
        stopping, last = run.stopping(), step + 1 == cfg.steps
        if eval_rows and not stopping and ((step + 1) % cfg.eval_interval == 0 or last):
            line |= evaluate_policy(step + 1)
        better = line.get("eval/first", -1.0) > run.best["accuracy"]
        if better:
            run.best = {"step": step + 1, "accuracy": line["eval/first"]}
        line["seconds/step"] = round(time.perf_counter() - began, 3)
        if run.rank == 0:
            run.in_background(rollout.write_episodes, run.out / "episodes", step + 1, episodes)
            if (step + 1) % cfg.eval_interval == 0:
                print(show_episode(chat, episodes[0]), show_episode(chat, episodes[-1]), sep="\n")
        run.write(line, SHOWN)
        if (step + 1) % cfg.save_interval == 0 or last or stopping or better:
            run.save(step + 1, policy, optimizer, chat.tokenizer)
        if stopping:
            break

    # ---------------------------------------------------------------- report
    tell_rrm("wake_up")
    run.finish_writing()
    if run.rank == 0:
        make_page(run.out)
    toolbox.close()
    for each in (engine, rrm and rrm.engine):
        engines.close(each)
    run.end()


def whole_run(cfg: Config, steps: int, held_out: int) -> dict[str, int]:
    """What so many steps with their evaluations ask for."""
    chains = steps * cfg.prompts_per_step * cfg.group_size
    chains += held_out * (1 + -(-steps // cfg.eval_interval))
    attempts = chains * (2 if cfg.variant == "u" else 1)
    turns = attempts * cfg.max_turns * bool(cfg.tools)
    counts = {"attempts": attempts, "judgments": attempts * (cfg.variant != "rule")}
    tokens = attempts * cfg.max_tokens_per_attempt
    return counts | {"tokens at most": tokens, "turns that search or use a tool at most": turns}


def check_failures(step: int, asked: float, failed: float, rrm, problems: list[str]) -> None:
    """Stops the run where too many judgments of a step failed: a thinned pool is a biased one.
    `problems`: the first of each rank."""
    if failed > rrm.max_failures * asked:
        what = f"step {step + 1}: {failed:.0f} of {asked:.0f} judgments failed, more than"
        why = f"is the reward model {rrm.source} up and sound? The first problem:"
        first = next(filter(None, problems), "unknown")
        raise SystemExit(f"{what} rrm.max_failures = {rrm.max_failures}: {why} {first}")


def show_episode(chat: Chat, episode) -> str:
    """A chain for the terminal: trained tokens in green, then what each attempt earned."""
    lines = [f"--- {episode.id}", chat.paint(episode.ids, episode.mask)]
    for a in episode.attempts:
        earned = f"answer {a.answer}, reward {a.reward}, score {a.score}"
        lines.append(f"[{a.termination}, {earned}]")
    return "\n".join(lines)


if __name__ == "__main__":
    main(parse_config(Config, sys.argv[1:]))
