"""Stage 1, cold start: supervised fine-tuning on tool-use trajectories (paper: data in section 3.3,
recipe in section 4).

    python sft.py config/sft_toy_tiny.py           # a laptop
    torchrun --nproc_per_node=8 sft.py  # the paper's recipe: Qwen3-8B, 55.6K trajectories
    python sft.py config/sft_toy_tiny.py --show=3  # rows as the model sees them, trained ones green
"""

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from reagent import run
from reagent.chat import Chat, check_messages
from reagent.config import parse_config, run_facts
from reagent.policy import (
    Row,
    backward,
    balance,
    clip_gradients,
    collate,
    load_policy,
    load_tokenizer,
    memory_of,
    shard,
)
from reagent.rows import JsonlRows, batch_indices
from results.runs import write_run_page


@dataclass
class Config:
    # data
    model: str = "Qwen/Qwen3-8B"  # a Hugging Face folder or name
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
    # memory
    tokens_per_microbatch: int = 32_768  # tokens one rank packs into one forward
    checkpoint_activations: bool = True
    cpu_offload: bool = False
    shard_ranks: int = 0  # HSDP: ranks that share one copy of the parameters; 0: all
    # run
    seed: int = 0
    out_dir: str = "out/sft"
    resume: bool = True  # go on from the newest checkpoint in out_dir
    log_interval: int = 1  # steps
    save_interval: int = 500  # steps; the last step is always saved
    keep_last: int = 2  # checkpoints; 0: all
    timeout_s: float = 1800.0  # seconds that ranks wait for each other
    wandb: bool = False
    show: int = 0  # print that many rows with trained tokens in colour, then stop


MAY_CHANGE = {
    "out_dir",
    "resume",
    "log_interval",
    "save_interval",
    "keep_last",
    "timeout_s",
    "wandb",
    "show",
}
MAY_CHANGE |= {"tokens_per_microbatch", "checkpoint_activations", "cpu_offload", "shard_ranks"}


def sft_messages(row: dict) -> list[dict]:
    """messages as they are; sharegpt `conversations` and alpaca rows turned into messages."""
    if "messages" in row:
        return row["messages"]
    if "conversations" in row:
        roles = {
            "human": "user",
            "gpt": "assistant",
            "observation": "tool",
            "function_call": "assistant",
        }
        turns = [
            (turn.get("from", turn.get("role")), turn.get("value", turn.get("content")))
            for turn in row["conversations"]
        ]
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        return system + [{"role": roles.get(role, role), "content": text} for role, text in turns]
    if "instruction" in row and "output" in row:
        question = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        return system + [
            {"role": "user", "content": question},
            {"role": "assistant", "content": row["output"]},
        ]
    raise ValueError(
        f"neither messages, conversations nor instruction/output; found the keys {sorted(row)}"
    )


def check_row(row: dict) -> str | None:
    try:
        messages = sft_messages(row)
    except (ValueError, AttributeError, TypeError) as error:
        return str(error)
    return check_messages(messages)


def render(chat: Chat, row: dict) -> Row:
    ids, mask = chat.row(sft_messages(row), row.get("tools"))
    return Row(ids, mask)


def learning_rate(step: int, cfg) -> float:
    """Linear warm-up, then a cosine down to lr_end * lr."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(cfg.steps - cfg.warmup_steps, 1)
    return cfg.lr * (cfg.lr_end + (1 - cfg.lr_end) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def main(cfg: Config) -> None:
    # ---------------------------------------------------------------- data
    tokenizer = load_tokenizer(cfg.model)
    chat = Chat(tokenizer)
    rows = JsonlRows(
        cfg.data, check_row, hint="run python data/reagent/prepare.py (or data/toy/prepare.py)"
    )
    for i in range(min(cfg.show, len(rows))):
        row = render(chat, rows[i])
        print(
            chat.paint(row.ids, row.mask), f"\n--- {len(row.ids)} tokens, {sum(row.mask)} trained\n"
        )
    if cfg.show:
        return

    # ---------------------------------------------------------------- processes, model, optimizer
    rank, world, device = run.init_distributed(cfg.timeout_s)
    gloo = dist.new_group(backend="gloo")

    def meet(phase, error=None):
        run.meet(phase, gloo, cfg.timeout_s, error)

    torch.manual_seed(cfg.seed)
    policy = shard(
        load_policy(cfg.model, cfg.checkpoint_activations), device, cfg.shard_ranks, cfg.cpu_offload
    )
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay
    )

    # ---------------------------------------------------------------- run folder, resume
    out = Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    facts, start, log = run_facts(cfg), 0, []
    found = run.checkpoints(out) if cfg.resume else []
    if found:
        saved = json.loads((found[-1] / "trainer.json").read_text())
        run.check_resume(saved["config"], facts["config"], MAY_CHANGE, found[-1])
        run.load_checkpoint(found[-1], policy, optimizer)
        start, log = saved["step"], saved["log"]
    if rank == 0:
        (out / "run.json").write_text(json.dumps(facts, indent=1))
        (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        print(
            f"{len(rows)} rows, {cfg.rows_per_step} a step on {world} ranks, from step {start} of "
            f"{cfg.steps}, "
            f"about {memory_of(policy, cfg):.1f} GB a rank -> {out}"
        )
    tracker = run.start_wandb(cfg, rank)
    stop = run.asked_to_stop()

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
        batch_rows = [
            render(chat, rows[i])
            for i in batch_indices(step, cfg.rows_per_step, len(rows), cfg.seed)
        ]
        fitting = [row for row in batch_rows if len(row.ids) <= cfg.max_tokens_per_row]
        trained = sum(
            sum(row.mask) for row in fitting
        )  # the denominator, over all ranks: every rank sees the batch
        total_loss, norm, skipped = 0.0, 0.0, False
        with run.phase(f"the update of step {step + 1}", meet):
            if trained:
                for microbatch in balance(fitting, world, cfg.tokens_per_microbatch)[rank]:
                    logps, _ = policy(collate(microbatch, (), device))
                    loss = -logps.sum() / trained
                    backward(loss)
                    total_loss += loss.item()
                norm = clip_gradients(policy, cfg.max_grad_norm)
                total_loss = run.sum_over_ranks([total_loss], gloo)[0]
                skipped = not math.isfinite(norm + total_loss)
                if not skipped:
                    optimizer.step()
                optimizer.zero_grad()

        # ------------------------------------------------------------ log, save
        seconds = time.perf_counter() - began
        line = dict(
            step=step + 1,
            loss=total_loss,
            grad_norm=norm,
            lr=lr,
            tokens=sum(len(r.ids) for r in fitting),
        )
        line |= {
            "too_long": len(batch_rows) - len(fitting),
            "skipped": skipped,
            "seconds/step": round(seconds, 3),
        }
        line["tokens_per_second"] = round(line["tokens"] / seconds)
        log.append(line)
        if rank == 0 and (step + 1) % cfg.log_interval == 0:
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            text = (
                f"step {step + 1:5d}  loss {total_loss:.4f}  norm {norm:.2f}  lr {lr:.1e}  "
                f"{line['tokens_per_second']} tok/s"
            )
            text += "  SKIPPED: the loss or the gradient is not finite" if skipped else ""
            tqdm.write(text) if bar.disable is False else print(text, flush=True)
            if tracker:
                tracker.log(line)
        stopping = run.sum_over_ranks([len(stop)], gloo)[0] > 0
        if (step + 1) % cfg.save_interval == 0 or step + 1 == cfg.steps or stopping:
            run.save_checkpoint(
                out, step + 1, policy, optimizer, tokenizer, {**facts, "log": log}, meet
            )
            if rank == 0:
                run.prune(out, cfg.keep_last, None)
        if stopping:
            break
    if rank == 0:
        write_run_page(out)
    meet("the end")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_config(Config, sys.argv[1:]))
