"""Our trainer's step beside that of TRL's GRPOTrainer, alternating in one process: `python bench.py --vs=trl`.

Both get the same Qwen3, the same token ids, one batch of all rows and the same AdamW; TRL without activation
checkpointing and in fp32, as ours on a CPU. TRL pads to the longest row and scores every position.
"""

import statistics
import tempfile
import warnings
from importlib import metadata
from pathlib import Path

import torch

import bench

OPTIONS = dict(
    use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], num_generations=8, beta=0.0, epsilon=0.2,
    epsilon_high=0.34, loss_type="grpo", temperature=1.0, learning_rate=1e-6, weight_decay=0.01, max_grad_norm=1.0,
    logging_strategy="no", save_strategy="no", disable_tqdm=True,
)


def make_trainer(folder: str, rows: int, **options):
    """TRL's GRPOTrainer over the same model folder; its data and reward are not used by the loss part."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    arguments = GRPOConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=rows, **(OPTIONS | options))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data = Dataset.from_list([{"prompt": "-"}] * 8)
    trainer = GRPOTrainer(model, lambda completions, **_: [0.0] * len(completions), arguments, data,
                          processing_class=bench.make_tokenizer())
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def padded(rows: list, pad: int) -> dict:
    """Rows -> the tensors of TRL's loss: prompts and completions apart, completions padded on the right."""
    prompts = [row.ids[: row.mask.index(1)] for row in rows]
    completions = [row.ids[len(prompt) :] for row, prompt in zip(rows, prompts)]
    width, left = max(map(len, completions)), max(map(len, prompts))

    def right(columns, value, dtype=torch.long):
        return torch.tensor([list(c) + [value] * (width - len(c)) for c in columns], dtype=dtype)

    return {
        "prompt_ids": torch.tensor([[pad] * (left - len(p)) + p for p in prompts]),
        "prompt_mask": torch.tensor([[0] * (left - len(p)) + [1] * len(p) for p in prompts]),
        "completion_ids": right(completions, pad),
        "completion_mask": right([[1] * len(c) for c in completions], 0),
        "advantages": torch.tensor([row.columns["advantage"][0] for row in rows]),
        "old_per_token_logps": right([row.columns["logp_mu"] for row in rows], 0.0, torch.float32),
    }


class TRLStep:
    """Loss, backward, clipping and optimizer step as in TRL's training loop, on one padded batch."""

    def __init__(self, folder: str, rows: list, make_optimizer=None):
        self.trainer = make_trainer(folder, len(rows))
        self.model = self.trainer.model.train()
        self.inputs = padded(rows, self.model.config.pad_token_id)
        self.optimizer = make_optimizer(list(self.model.parameters())) if make_optimizer else self.trainer.create_optimizer()
        self.trainer._prepare_inputs = lambda inputs: inputs  # the batch is given, nothing is generated

    def step(self) -> None:
        self.trainer.training_step(self.model, self.inputs, None)
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.model.zero_grad()


def update_of(stepper, named) -> dict[str, torch.Tensor]:
    """Change of every parameter by one step."""
    before = {name: p.detach().clone() for name, p in named()}
    stepper.step()
    return {name: whole(p).detach() - whole(before[name]) for name, p in named()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def largest_difference(folder: str, rows: list, tokens_per_microbatch: int) -> tuple[float, float]:
    """(largest difference of the two updates, largest change) under SGD at rate 1: the clipped gradients themselves."""

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=1.0)

    ours = bench.Trainer(folder, rows, tokens_per_microbatch, sgd)
    mine = update_of(ours, lambda: ours.policy.hf.named_parameters())
    theirs = TRLStep(folder, rows, sgd)
    other = update_of(theirs, lambda: theirs.model.named_parameters())
    assert set(mine) == set(other), set(mine) ^ set(other)
    return max((mine[n] - other[n]).abs().max().item() for n in mine), max(d.abs().max().item() for d in mine.values())


def bench_trainer(cfg) -> tuple[list, list[str]]:
    lines, said = [], []
    for kind in cfg.lengths.split(","):
        folder = bench.make_model(Path(cfg.out_dir), cfg.vocab)
        rows = bench.random_rows(bench.random_lengths(kind, cfg.rows), cfg.vocab)
        bench.set_mu(bench.load(folder), rows)
        apart, largest = largest_difference(folder, rows, cfg.tokens_per_microbatch)
        ours, theirs = bench.Trainer(folder, rows, cfg.tokens_per_microbatch), TRLStep(folder, rows)
        seconds = bench.alternate({"ours": ours.step, "trl": theirs.step}, cfg.repeats)
        name = f"{kind}, V = {cfg.vocab:,}"
        lines += [ours.line(f"ours, {name}", seconds["ours"]), ours.line(f"TRL, {name}", seconds["trl"])]
        ratio = statistics.median(a / b for a, b in zip(seconds["ours"], seconds["trl"]))
        share = ours.tokens / (len(rows) * max(len(row.ids) for row in rows))
        said.append(f"{name}: {ratio:.2f} of TRL's CPU-seconds (median of pairs; {share:.2f} of its positions are not padding); "
                    f"largest difference of the updates {apart:.1e} (largest change {largest:.1e})")
    return lines, said


def report(cfg, machine) -> str:
    warnings.filterwarnings("ignore")
    lines, said = bench_trainer(cfg)
    return f"TRL       {metadata.version('trl')}\n\n{bench.table(lines, machine)}\n\n" + "\n".join(said)
