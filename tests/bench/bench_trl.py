"""Ours beside TRL's GRPOTrainer, alternating in one process: `python tests/bench/bench.py --vs=trl
[--what=trainer,step]`.

trainer: the loss part without generation. Both get the same Qwen3, the same token ids, one batch of
all rows and AdamW; TRL without activation checkpointing and in fp32, as ours on a CPU. TRL pads to
the longest row and scores every position.

step: a whole step with tools. Both sample with transformers from the model that knows four tasks by
heart, two calls of 50 ms and an answer in each trajectory, then make one update. Its reward is
drawn at random, so nothing depends on it.
"""

import math
import random
import statistics
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path

import torch

from tests.bench import bench

OPTIONS = dict(
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    report_to=[],
    num_generations=8,
    beta=0.0,
    epsilon=0.2,
    epsilon_high=0.34,
    loss_type="grpo",
    temperature=1.0,
    learning_rate=1e-6,
    weight_decay=0.01,
    max_grad_norm=1.0,
    logging_strategy="no",
    save_strategy="no",
    disable_tqdm=True,
)


def make_trainer(folder: str, rows: int, tools=None, **options):
    """TRL's GRPOTrainer over the same model folder; its reward is drawn at random."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=rows, **(OPTIONS | options)
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data, coin = Dataset.from_list([{"prompt": "-"}] * 8), random.Random(0)
    tokenizer = bench.shared.load_tokenizer(folder) if tools else bench.make_tokenizer()
    if tools:
        from trl import chat_template_utils

        tokenizer.chat_template, tokenizer.response_template = (
            TEMPLATE,
            chat_template_utils.qwen3_template,
        )

    def reward(completions, **_):
        return [coin.random() for _ in completions]

    trainer = GRPOTrainer(model, reward, arguments, data, processing_class=tokenizer, tools=tools)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def padded(rows: list, pad: int = 0) -> dict:
    """Rows -> the tensors of TRL's loss: prompts and completions apart, completions padded on the
    right.
    """
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
        "old_per_token_logps": right(
            [row.columns["sampler_logps"] for row in rows], 0.0, torch.float32
        ),
    }


class TRLStep:
    """Loss, backward, clipping and optimizer step as in TRL's training loop, on one padded
    batch.
    """

    def __init__(self, folder: str, rows: list, make_optimizer=None, clip=1.0):
        self.clip = clip
        self.trainer = make_trainer(folder, len(rows))
        self.model = self.trainer.model.train()
        self.inputs = padded(rows)
        self.optimizer = (
            make_optimizer(list(self.model.parameters()))
            if make_optimizer
            else self.trainer.create_optimizer()
        )
        self.trainer._prepare_inputs = lambda inputs: (
            inputs
        )  # the batch is given, nothing is generated

    def step(self) -> None:
        self.trainer.training_step(self.model, self.inputs, None)
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.model.zero_grad()


def gradient(folder: str, rows: list) -> dict[str, torch.Tensor]:
    """As bench.gradient: the change of every parameter under SGD at rate 1, without clipping."""
    theirs = TRLStep(folder, rows, lambda parameters: torch.optim.SGD(parameters, lr=1.0), math.inf)
    return bench.change_of(theirs.model, theirs.step)


def bench_trainer(cfg) -> tuple[list, list[str]]:
    lines, said = [], []
    for kind in cfg.lengths.split(","):
        folder = bench.make_model(Path(cfg.out_dir), cfg.vocab)
        rows = bench.random_rows(bench.random_lengths(kind, cfg.rows), cfg.vocab)
        bench.set_mu(bench.load(folder), rows)
        same = bench.compare(
            bench.gradient(folder, rows, cfg.tokens_per_microbatch), gradient(folder, rows)
        )
        ours, theirs = bench.Trainer(folder, rows, cfg.tokens_per_microbatch), TRLStep(folder, rows)
        seconds = bench.alternate({"ours": ours.step, "trl": theirs.step}, cfg.repeats)
        name = f"{kind}, V = {cfg.vocab:,}"
        lines += [
            ours.line(f"ours, {name}", seconds["ours"]),
            ours.line(f"TRL, {name}", seconds["trl"]),
        ]
        ratio = statistics.median(a / b for a, b in zip(seconds["ours"], seconds["trl"]))
        share = ours.tokens / (len(rows) * max(len(row.ids) for row in rows))
        said.append(
            f"{name}: {ratio:.2f} of TRL's CPU-seconds (median of pairs; {share:.2f} of its "
            f"positions are not padding); {same}"
        )
    return lines, said


# the toy's template, with tool results as our own loop renders them, so that both programs see the
# same ids
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ "
    "m.content }}\n</tool_response>"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] "
    "%}<tool_call>"
    "{{ c.function | tojson }}</tool_call>{% endfor %}{% endif %}"
    "{% if m.role == 'system' and tools %}{{ '\\ntools:' }}{% for t in tools %} {{ t.function.name "
    "}}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# temperature: both keep to what the model knows by heart, so both make two calls and an answer
COLD = 0.1


def search(queries: list[str], top_k: int = 1) -> str:
    """
    Looks a place up.

    Args:
        queries: Names of places.
        top_k: Results of each.
    """
    time.sleep(0.05)
    return bench.found(queries[0])


class TRLGRPOStep:
    """Generation with tools, reward, advantages, loss and update of TRL on the four tasks."""

    def __init__(self, folder: str, rows: int):
        limits = dict(
            max_completion_length=400,
            max_tool_calling_iterations=4,
            num_generations=rows // len(bench.STARTS),
        )
        self.trainer = make_trainer(
            folder, rows, [search], temperature=COLD, top_p=1.0, top_k=0, **limits
        )
        self.model, self.optimizer = self.trainer.model.train(), self.trainer.create_optimizer()
        prompts = [
            [
                {"role": "system", "content": bench.rollout.SYSTEM_PROMPT},
                {"role": "user", "content": row["question"]},
            ]
            for row in bench.task_rows()
        ]
        self.inputs = [{"prompt": prompts[i * len(prompts) // rows]} for i in range(rows)]
        self.generated: dict = {}

    def __call__(self) -> None:
        self.generated = self.trainer._generate_and_score_completions(self.inputs)
        self.trainer._prepare_inputs = lambda inputs: inputs
        self.trainer.training_step(self.model, self.generated, None)
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.model.zero_grad()


def bench_step(cfg) -> tuple[list, list[str]]:
    agent = bench.Agent(cfg, lambda: 0.05, refine=False, temperature=COLD)
    ours, theirs = bench.GRPOStep(cfg, agent, None), TRLGRPOStep(agent.folder, cfg.rows)
    walls = bench.alternate({"ours": ours, "trl": theirs}, cfg.repeats, bench.wall_seconds)
    calls = sum(len(a.calls) for e in ours.episodes for a in e.attempts)
    metrics = theirs.trainer._metrics["train"]
    sampled, other = (
        sum(sum(e.mask) for e in ours.episodes),
        theirs.generated["tool_mask"].mul(theirs.generated["completion_mask"]),
    )
    ratio = statistics.median(a / b for a, b in zip(walls["ours"], walls["trl"]))
    lines = [bench.Line("ours, whole step with tools, wall", walls["ours"], sampled)]
    lines.append(bench.Line("TRL, whole step with tools, wall", walls["trl"], int(other.sum())))
    parts = ", ".join(
        f"{name} {statistics.median(seconds):.2f} s" for name, seconds in ours.spent.items()
    )
    return lines, [
        f"whole step: {ratio:.2f} of TRL's wall time (median of pairs); ours: {parts}; calls a "
        "trajectory: ours "
        f"{calls / cfg.rows:.2f}, TRL {metrics['tools/call_frequency'][-1]:.2f}"
    ]


def report(cfg, machine) -> str:
    warnings.filterwarnings("ignore")
    lines, said, known = [], [], {"trainer": bench_trainer, "step": bench_step}
    for name in cfg.what.split(","):
        if name not in known:
            raise SystemExit(f"what = {name!r}: against TRL there are {', '.join(known)}")
        more, words = known[name](cfg)
        lines, said = lines + more, said + words
    return f"TRL       {metadata.version('trl')}\n\n{bench.table(lines, machine)}\n\n" + "\n".join(
        said
    )
