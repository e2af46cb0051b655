"""Stage 1, cold start: supervised fine-tuning on tool-use trajectories (paper: data in section 3.3,
recipe in section 4).

    python sft.py config/sft_toy_tiny.py           # a laptop
    torchrun --nproc_per_node=8 sft.py  # the paper's recipe: Qwen3-8B, 55.6K trajectories
    python sft.py config/sft_toy_tiny.py --show=3  # rows as the model sees them, trained ones green
"""

import sys

from reagent.config import show_help

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    show_help(__file__)  # before torch is imported

import time
from dataclasses import dataclass
from functools import partial

import torch

from reagent.chat import Chat, check_messages
from reagent.config import check_values, parse_config
from reagent.memory import plan_memory
from reagent.policy import (
    POLICY_RULES,
    PolicyConfig,
    Sequence,
    backward,
    balance,
    collate,
    each_microbatch,
    learning_rate,
    load_chat,
    make_optimizer,
    make_policy,
    take_step,
)
from reagent.rows import JsonlRows, batch_indices, sft_messages, sft_tools
from reagent.run import Run, say
from results.page import make_page


@dataclass
class Config:
    # data
    model: str = "Qwen/Qwen3-8B"  # a Hugging Face folder or name
    chat_template: str = ""  # a Jinja file for a model whose own template has no tools
    # rows {"messages", "tools"?}; sharegpt and alpaca rows are understood
    data: str = "data/reagent/sft.jsonl"
    max_tokens_per_row: int = 32_768  # longer rows are skipped and counted
    # optimisation
    rows_per_step: int = 32  # global batch, all ranks together
    steps: int = 3476  # 55.6K rows x 2 epochs / 32
    lr: float = 1e-5
    warmup_steps: int = 50  # linear
    lr_end: float = 0.1  # share of lr that the cosine ends at
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    policy: PolicyConfig = PolicyConfig(tokens_per_microbatch=32_768)
    # run
    seed: int = 0
    out_dir: str = "out/sft"
    log_interval: int = 1  # steps
    save_interval: int = 500  # steps; the last step is always saved
    keep_last: int = 2  # checkpoints; 0: all
    timeout_s: float = 1800.0  # seconds that ranks wait for each other
    wandb: bool = False
    check: bool = False  # stop after all checks, before anything heavy; writes nothing
    show: int = 0  # print that many rows with trained tokens in colour, then stop


MAY_CHANGE = {"show"}


def check_row(row: dict, chat: Chat | None = None) -> str | None:
    """What is wrong with a row, or None; with a `chat` also whether it renders turns so ordered."""
    try:
        messages, tools = sft_messages(row), sft_tools(row)
        problem = check_messages(messages)
        if chat and not problem:
            chat.row([dict(role=message["role"], content="") for message in messages], tools)
        return problem
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        return str(error)


def render(chat: Chat, row: dict) -> Sequence:
    ids, mask = chat.row(sft_messages(row), sft_tools(row))
    return Sequence(ids, mask)


def update(policy, optimizer, rows: list[Sequence], cfg: Config, run: Run) -> dict:
    """One optimizer step on the rows of all ranks; returns loss, grad_norm and why it was skipped.

    The loss is the mean over all trained tokens, whatever rank or micro-batch they are in."""
    trained = sum(sum(row.mask) for row in rows)  # every rank sees the whole batch
    if not trained:
        return {"loss": 0.0, "grad_norm": 0.0, "skipped": ""}
    total = 0.0
    mine = balance(rows, run.world, cfg.policy.tokens_per_microbatch)[run.rank]
    for microbatch in each_microbatch(policy, mine):
        logps, _ = policy(collate(microbatch, (), run.device))
        loss = -logps.sum() / trained
        backward(loss)
        total += loss.item()
    total = run.sum([total])[0]
    norm, skipped = take_step(policy, optimizer, total, max_norm=cfg.max_grad_norm)
    return {"loss": total, "grad_norm": norm, "skipped": skipped}


RULES = f"""rows_per_step>0 max_tokens_per_row>0 max_grad_norm>0 beta1<1 beta2<1
log_interval>0 save_interval>0 timeout_s>0 {POLICY_RULES}"""


def main(cfg: Config) -> None:
    # ---------------------------------------------------------------- data
    check_values(cfg, RULES)
    say(f"reading {cfg.data}")
    JsonlRows(cfg.data, check_row)  # what is wrong without a model is told before one is fetched
    chat = load_chat(cfg.model, cfg.chat_template)
    rows = JsonlRows(cfg.data, partial(check_row, chat=chat))
    if cfg.show:
        return show(chat, rows, cfg.show)

    # ---------------------------------------------------------------- processes, policy, optimizer
    run = Run(cfg, MAY_CHANGE)
    keeps = plan_memory(cfg, run, longest=cfg.max_tokens_per_row)
    taken = (cfg.steps - run.saved) * cfg.rows_per_step
    if run.only_checks({"rows": taken, "tokens at most": taken * cfg.max_tokens_per_row}):
        return
    say(f"loading {cfg.model}")
    torch.manual_seed(cfg.seed)
    policy = make_policy(cfg, run.device, keeps)
    betas = (cfg.beta1, cfg.beta2)
    optimizer = make_optimizer(policy, lr=cfg.lr, weight_decay=cfg.weight_decay, betas=betas)

    # ---------------------------------------------------------------- resume
    start = run.resume(policy, optimizer)
    run.begin(
        f"{len(rows)} rows, {cfg.rows_per_step} a step on {run.world} ranks, from step {start} of "
        f"{cfg.steps}"
    )

    # ---------------------------------------------------------------- loop
    for step in run.steps(start):
        began = time.perf_counter()
        lr = learning_rate(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # ------------------------------------------------------------ batch
        picked = batch_indices(step, cfg.rows_per_step, len(rows), cfg.seed)
        rendered = [render(chat, rows[i]) for i in picked]
        fitting = [row for row in rendered if len(row.ids) <= cfg.max_tokens_per_row]

        # ------------------------------------------------------------ update
        with run.phase(f"the update of step {step + 1}"):
            done = update(policy, optimizer, fitting, cfg, run)
        run.count_skip(step, done["skipped"])

        # ------------------------------------------------------------ log, save
        seconds, tokens = time.perf_counter() - began, sum(len(row.ids) for row in fitting)
        line = {"step": step + 1, **done, "lr": lr, "tokens": tokens}
        line |= {"too_long": len(rendered) - len(fitting)}
        line |= {"seconds/step": round(seconds, 3), "tokens_per_second": round(tokens / seconds)}
        shown = ("loss", "grad_norm", "lr", "tokens_per_second")
        run.write(line, shown, quiet=(step + 1) % cfg.log_interval != 0)
        stopping, last = run.stopping(), step + 1 == cfg.steps
        if (step + 1) % cfg.save_interval == 0 or last or stopping:
            run.save(step + 1, policy, optimizer, chat.tokenizer)
        if stopping:
            break

    # ---------------------------------------------------------------- report
    if run.rank == 0:
        make_page(run.out)
    run.end()


def show(chat: Chat, rows: JsonlRows, count: int) -> None:
    """Prints rows as the policy sees them, trained tokens in green."""
    for i in range(min(count, len(rows))):
        row = render(chat, rows[i])
        print(chat.paint(row.ids, row.mask))
        print(f"--- {len(row.ids)} tokens, {sum(row.mask)} trained\n")


if __name__ == "__main__":
    main(parse_config(Config, sys.argv[1:]))
