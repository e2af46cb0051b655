"""Stage 2, Agent-RRM: the reasoning reward model (paper section 3.4), by SFT on judgments and then
GRPO on judgments.

    torchrun --nproc_per_node=8 train_rrm.py --stage=sft --lr=1e-5 …   # sft.py's loop on judgments
    torchrun --nproc_per_node=8 train_rrm.py  # GRPO, from that checkpoint

The paper does not publish the reward of the RRM's GRPO. Ours is 0 for a broken format or a judgment
beyond the length bound. A valid one earns more, whatever it says: VALID + (1 - VALID) * the
weighted mean of the parts that its row allows,

    closeness  1 - |s - s*|, s* the annotated score
    agreement  1 - (s - correct)^2, correct = 0 or 1
    critique   an analysis and a critique that are neither too short nor repeat themselves; half of
               it for naming what the annotated critique names (reagent/critiques.py)

times 1 - leak_penalty where the critique states the gold answer. Where s* lies on the side that
correctness says, it is the best score. On the other side that is .45 for a wrong answer and .55 for
a right one (closeness_weight / (2 agreement_weight)), where the reward is flat: no optimum sits on
a cliff. Advantages are those of GRPO, divided by the std of their own group, which moves scores
towards 0 and 1. By that of the step, meant to keep them calibrated, a judge that was not finished
got worse (docs/ablation.md).
"""

import sys

from reagent.config import show_help

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    show_help(__file__)  # before torch is imported

import asyncio
import time
from dataclasses import dataclass
from functools import partial

import torch

from reagent import reward_model
from reagent.chat import Chat
from reagent.config import check_values, parse_config
from reagent.critiques import MOST_WORDS, leaks, name_agreement, names, prose
from reagent.engines import EngineConfig, close, make_engine, rest, run_together
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
    learning_rate,
    load_chat,
    make_optimizer,
    make_policy,
    normalised,
    take_step,
)
from reagent.rows import JsonlRows, batch_indices, seed_of
from reagent.run import Run, say
from results.judging import judgment_report
from results.page import make_page


@dataclass
class Config:
    # data
    stage: str = "grpo"  # sft: on the rows' own judgments | grpo
    model: str = "out/rrm_sft/step-001750"  # a Hugging Face folder or name
    # RRM rows {"question", "trajectory", "think", "critique", "score", "correct"?}
    data: str = "data/reagent/rrm_rl.jsonl"
    eval_data: str = ""  # RRM rows for the report during and after training
    prompt_file: str = ""  # another system prompt; an empty file: no system turn
    request_file: str = ""  # another form of the request, with {question} and {trajectory} in it
    max_tokens_per_row: int = 32_768  # sft: longer rows (prompts: max_context) are left out
    # reward of a judgment
    closeness_weight: float = 0.45
    agreement_weight: float = 0.5
    critique_weight: float = 0.25
    leak_penalty: float = 0.5  # share of the reward that a leak costs
    max_judgment_tokens: int = 1400  # length bound: a judgment cut by it has a broken format
    verdict_weight: float = 1.0  # sft: of the tokens from `verdict_at` on, a place in its text
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
    policy: PolicyConfig = PolicyConfig()
    # run
    seed: int = 0
    out_dir: str = "out/rrm"
    log_interval: int = 1  # steps
    eval_interval: int = 100
    save_interval: int = 100
    keep_last: int = 2
    timeout_s: float = 3600.0
    wandb: bool = False
    check: bool = False  # stop after all checks, before anything heavy; writes nothing


COLUMNS = ("advantage", "weight", "sampler_logps")
VALID = 0.1  # what the worst valid judgment earns: a broken format earns 0

SHOWN = ("loss", "reward", "valid", "grad_norm", "dlogp/mean")
SHOWN += ("eval/valid", "eval/mae", "eval/auc/grounded")

# ---------------------------------------------------------------- the reward of a judgment


def judgment_reward(judgment, row: dict, cfg: Config) -> float:
    """Reward in [0, 1] of a judgment (None: broken), over the parts its row allows (see top)."""
    if judgment is None:
        return 0.0
    score, critique = reward_model.annotation(row)
    transcript = reward_model.row_trajectory(row)
    trail = names(row["question"] + "\n" + transcript)
    written = prose(judgment.think) * prose(judgment.critique, MOST_WORDS)
    worth = written * (1 + name_agreement(judgment.critique, critique, trail)) / 2
    parts = [(cfg.critique_weight, worth)]
    if score is not None:
        parts.append((cfg.closeness_weight, 1 - abs(judgment.score - score)))
    if row.get("correct") is not None:
        parts.append((cfg.agreement_weight, 1 - (judgment.score - row["correct"]) ** 2))
    total = sum(weight for weight, _ in parts) or 1.0
    value = sum(weight * part for weight, part in parts) / total
    if leaks(judgment.critique, reward_model.golds_of(row), row["question"], transcript):
        value *= 1 - cfg.leak_penalty
    return VALID + (1 - VALID) * value


# ---------------------------------------------------------------- GRPO on judgments: groups of G


def clipped_loss(logps, columns: dict, clip_low: float, clip_high: float) -> torch.Tensor:
    """-sum_t w_t min(r_t A_t, clip(r_t) A_t), r = pi / the sampler's, w normalised; all (M,)."""
    ratio = (logps - columns["sampler_logps"]).exp()
    plain = ratio * columns["advantage"]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * columns["advantage"]
    return -(columns["weight"] * torch.minimum(plain, clipped)).sum()


def judge_ids(chat: Chat, row: dict, cfg) -> list[int] | None:
    """Prompt ids of a row, its tool results shortened to fit; None where that is not enough."""
    prompt = reward_model.read_rrm_prompt(cfg.prompt_file, cfg.request_file)

    def ids(transcript: str) -> list[int]:
        return reward_model.prompt_ids(chat, row["question"], transcript, prompt)

    room = cfg.max_context - cfg.max_judgment_tokens - len(ids(""))
    text = reward_model.fit_trajectory(row["trajectory"], room, lambda t: len(chat.outside(t)))
    return None if text is None else ids(text)


def sft_row(chat: Chat, row: dict, cfg) -> Sequence | None:
    """The token row of a judgment; None where it is too long."""
    prompt, written = judge_ids(chat, row, cfg), reward_model.target_text(row)
    text = chat.sampled(written)
    target = [*chat.text(text), chat.closer_id]
    if prompt is None or len(prompt) + len(target) > cfg.max_tokens_per_row:
        return None
    plain = len(target)
    if cfg.verdict_weight != 1.0:  # its place is one of the whole text; the template may open that
        cut = row["verdict_at"] - len(written) + len(text)
        plain = len(chat.text(text[: max(cut, 0)]))
    weights = [1.0] * plain + [cfg.verdict_weight] * (len(target) - plain)
    return Sequence(prompt + target, [0] * len(prompt) + [1] * len(target), {"weight": weights})


def read_judgment(chat: Chat, sample):
    """The judgment of a sample by the strict format; None where it is broken or was cut."""
    text = chat.opened + chat.decode([i for i in sample.ids if i != chat.closer_id])
    return reward_model.parse_judgment(text) if sample.finish_reason == "stop" else None


# ---------------------------------------------------------------- the batches of the two stages


def sft_batch(chat: Chat, rows: list[dict], cfg: Config) -> tuple[list[Sequence], float, dict]:
    """-> (sequences, sum of the weights of their trained tokens, metrics)."""
    fitting = [sequence for row in rows if (sequence := sft_row(chat, row, cfg))]
    total = sum(sum(sequence.columns["weight"]) for sequence in fitting)
    return fitting, total, {"too_long": len(rows) - len(fitting)}


def grpo_batch(chat: Chat, rows: list[dict], sample, step: int, cfg: Config):
    """G judgments of each row -> (sequences, 1, metrics); `sample(prompts, seeds, temperature)`.

    N rows that fit, groups of G: rewards and advantages (N, G). A judgment weighs 1 / (judgments in
    groups with a gradient), spread evenly over its tokens. Those of a row are one tree."""
    pairs = [(row, prompt) for row in rows if (prompt := judge_ids(chat, row, cfg))]
    line: dict = {"too_long": len(rows) - len(pairs)}
    if not pairs:
        return [], 1.0, line
    judged = [pair for pair in pairs for _ in range(cfg.group_size)]  # N * G, groups in a row
    seeds = [seed_of(cfg.seed, step, i, "judge") for i in range(len(judged))]
    samples = sample([prompt for _, prompt in judged], seeds, cfg.temperature)
    judgments = [read_judgment(chat, each) for each in samples]
    rewards = [judgment_reward(j, row, cfg) for j, (row, _) in zip(judgments, judged)]
    advantages = normalised(torch.tensor(rewards).view(-1, cfg.group_size))  # (N, G)
    counted = int((advantages != 0).any(1).sum()) * cfg.group_size
    trees = [Sequence([*ids], [0] * len(ids), {c: [] for c in COLUMNS}) for _, ids in pairs]
    for i, (each, advantage) in enumerate(zip(samples, advantages.flatten().tolist())):
        if advantage == 0.0:  # counted above, not computed
            continue
        n, tree = len(each.ids), trees[i // cfg.group_size]
        tree.forks.append(len(tree.ids))
        tree.ids += each.ids
        tree.mask += [1] * n
        for name, column in zip(COLUMNS, ([advantage] * n, [1 / (counted * n)] * n, each.logps)):
            tree.columns[name] += column
    line["reward"] = sum(rewards) / len(rewards)
    line["valid"] = sum(judgment is not None for judgment in judgments) / len(judgments)
    line["pools/dropped"] = 1 - counted / len(samples)
    return [tree for tree in trees if tree.forks], 1.0, line


def update(policy, optimizer, sequences: list, total_weight: float, cfg: Config, run: Run) -> dict:
    """One optimizer step; returns loss, grad_norm, dlogp/mean (grpo) and why it was skipped.

    sft: the weighted mean of -log p over the tokens; grpo: the clipped surrogate of `clipped_loss`.
    """
    if not sequences:
        return {"loss": None, "grad_norm": None, "skipped": ""}
    grpo, loss_sum, gap, compared = cfg.stage == "grpo", 0.0, 0.0, 0
    columns = COLUMNS if grpo else ("weight",)
    mine = balance(sequences, run.world, cfg.policy.tokens_per_microbatch)[run.rank]
    for microbatch in each_microbatch(policy, mine):
        batch = collate(microbatch, columns, run.device)
        logps, _ = policy(batch, cfg.temperature if grpo else 1.0)
        if grpo:
            loss = clipped_loss(logps, batch.columns, cfg.clip_low, cfg.clip_high)
            gap += (logps.detach() - batch.columns["sampler_logps"]).abs().sum().item()
            compared += len(logps)
        else:
            loss = -(logps * batch.columns["weight"]).sum() / total_weight
        backward(loss)
        loss_sum += loss.item()
    loss_sum, gap, compared = run.sum([loss_sum, gap, compared])
    dlogp = gap / max(compared, 1)
    limits = dict(max_norm=cfg.max_grad_norm, dlogp=dlogp, max_dlogp=cfg.max_dlogp)
    norm, skipped = take_step(policy, optimizer, loss_sum, **limits)
    line = {"loss": loss_sum, "grad_norm": norm, "skipped": skipped}
    return line | ({"dlogp/mean": dlogp} if grpo else {})


RULES = f"""stage=sft|grpo judgments_per_step>0 group_size>1 temperature>0 max_judgment_tokens>0
max_context>0 max_tokens_per_row>0 max_grad_norm>0 log_interval>0 eval_interval>0 save_interval>0
timeout_s>0 engine.tensor_parallel>0 engine.memory_share<=1 leak_penalty<=1 {POLICY_RULES}"""


def main(cfg: Config) -> None:
    # ---------------------------------------------------------------- data
    check_values(cfg, RULES)
    reward_model.read_rrm_prompt(cfg.prompt_file, cfg.request_file)  # before any work
    check = reward_model.check_rrm_row
    eval_rows = list(JsonlRows(cfg.eval_data, check)) if cfg.eval_data else []
    if cfg.stage == "sft":
        check = partial(reward_model.check_judged_row, weighted=cfg.verdict_weight != 1.0)
    say(f"reading {cfg.data}")
    rows = JsonlRows(cfg.data, check)
    chat = load_chat(cfg.model, tools=False)

    # ---------------------------------------------------------------- processes, policy, optimizer
    run, engine = Run(cfg, set()), None
    samples = cfg.stage == "grpo" or bool(eval_rows)
    group = cfg.group_size if cfg.stage == "grpo" else 1
    longest = cfg.max_context + (group - 1) * cfg.max_judgment_tokens
    engine_config = cfg.engine if samples else None
    keeps = plan_memory(cfg, run, longest=longest, engine=engine_config, group=group)
    taken = (cfg.steps - run.saved) * cfg.judgments_per_step
    if run.only_checks({"judgments": taken * group, "tokens at most": taken * longest}):
        return
    if samples:
        say(f"starting the engine: {cfg.engine.kind}")  # before the policy: it reseeds
        engine = make_engine(cfg.engine, cfg.model, chat.stop_ids, max_context=cfg.max_context)
    rest(engine)  # until the first sync: the policy is loaded meanwhile
    say(f"loading {cfg.model}")
    torch.manual_seed(cfg.seed)
    policy = make_policy(cfg, run.device, keeps)
    optimizer = make_optimizer(policy, lr=cfg.lr, weight_decay=cfg.weight_decay)
    runner = asyncio.Runner()

    def sync():
        engine.load_weights(full_weights(policy, run.sampler_dtype))

    def sample(prompts: list, seeds: list, temperature: float) -> list:
        """Every rank samples its share; all get all, in order. A rank that is missing is named."""
        options = dict(max_new_tokens=cfg.max_judgment_tokens, temperature=temperature)
        share = range(run.rank, len(prompts), run.world)
        asked = [engine.generate(prompts[i], seed=seeds[i], **options) for i in share]
        with run.together("the sampling of judgments"):
            mine = runner.run(run_together(asked))
        shares = run.gather(mine)
        return [shares[i % run.world][i // run.world] for i in range(len(prompts))]

    def evaluate_policy() -> dict:
        prompts = [judge_ids(chat, row, cfg) for row in eval_rows]
        fitting = {i: prompt for i, prompt in enumerate(prompts) if prompt}
        seeds = [seed_of(cfg.seed, "eval", i) for i in fitting]
        temperature = reward_model.RewardModelConfig.temperature  # as at work
        samples = sample(list(fitting.values()), seeds, temperature)
        judgments = [read_judgment(chat, each) for each in samples]
        lengths = [len(each.ids) for each in samples]
        figures = judgment_report(judgments, [eval_rows[i] for i in fitting], lengths)
        figures["too_long"] = len(prompts) - len(fitting)
        return {f"eval/{key}": value for key, value in figures.items()}

    # ---------------------------------------------------------------- resume
    start = run.resume(policy, optimizer)
    if cfg.stage == "grpo":
        sync()  # also at the start: an engine that slept has no weights
    what = f"{cfg.stage}: {len(rows)} judged trajectories, {cfg.judgments_per_step} a step"
    run.begin(f"{what}, from step {start} of {cfg.steps}")

    # ---------------------------------------------------------------- loop
    for step in run.steps(start):
        began = time.perf_counter()
        lr = learning_rate(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # ------------------------------------------------------------ batch
        chosen = [rows[i] for i in batch_indices(step, cfg.judgments_per_step, len(rows), cfg.seed)]
        if cfg.stage == "sft":
            sequences, total_weight, line = sft_batch(chat, chosen, cfg)
        else:
            sequences, total_weight, line = grpo_batch(chat, chosen, sample, step, cfg)
            rest(engine)
            if run.gives_up(step, policy, optimizer, chat.tokenizer):
                break

        # ------------------------------------------------------------ update
        with run.phase(f"the update of step {step + 1}"):
            line |= update(policy, optimizer, sequences, total_weight, cfg, run)
        run.count_skip(step, line["skipped"])
        stopping, last = run.stopping(), step + 1 == cfg.steps
        evaluates = eval_rows and not stopping and ((step + 1) % cfg.eval_interval == 0 or last)
        if cfg.stage == "grpo" or evaluates:
            sync()

        # ------------------------------------------------------------ log, save
        if evaluates:
            line |= evaluate_policy()
            if cfg.stage == "sft":
                rest(engine)
        line = {"step": step + 1, "lr": lr} | line
        line["tokens"] = sum(len(sequence.ids) for sequence in sequences)
        line["seconds/step"] = round(time.perf_counter() - began, 3)
        run.write(line, SHOWN, quiet=not evaluates and (step + 1) % cfg.log_interval != 0)
        if (step + 1) % cfg.save_interval == 0 or last or stopping:
            run.save(step + 1, policy, optimizer, chat.tokenizer)
        if stopping:
            break

    # ---------------------------------------------------------------- report
    if run.rank == 0:
        make_page(run.out)
    close(engine)
    run.end()


if __name__ == "__main__":
    main(parse_config(Config, sys.argv[1:]))
