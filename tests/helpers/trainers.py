"""The main() of a trainer in this process, with recorders at its seams."""

import json
import signal
import sys
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from reagent.config import flat, parse_config
from reagent.engines import HFEngine
from reagent.run import Run


def note_reads(cfg, reads: set[str], prefix: str = "") -> None:
    """From here on `reads` gets the name of each key that is read, by other code than that which
    reads all keys: checks, and what a run keeps of its settings.
    """
    plain, names = type(cfg), {field.name for field in fields(cfg)}
    for name in names:
        if is_dataclass(part := getattr(cfg, name)):
            object.__setattr__(cfg, name, replace(part))  # a default is shared by all runs
            note_reads(getattr(cfg, name), reads, f"{prefix}{name}.")

    def look(self, key):
        reader = sys._getframe(1).f_code.co_filename
        if key in names and not reader.endswith(("/dataclasses.py", "/reagent/config.py")):
            reads.add(prefix + key)
        return object.__getattribute__(self, key)

    noting = type(plain.__name__, (plain,), {"__getattribute__": look})
    object.__setattr__(cfg, "__class__", noting)


def note_parsed(patch, module, reads: set[str]) -> None:
    """From here on `reads` gets the keys that are read of what `module` parses."""

    def parsed(cls, argv):
        cfg = parse_config(cls, argv)
        note_reads(cfg, reads)
        return cfg

    patch.setattr(module, "parse_config", parsed)


def unread(cls, reads: set[str]) -> set[str]:
    """The keys of a config that no run has read."""
    return set(flat(asdict(cls()))) - reads


def run_here(script, arguments: list[str], reads: set[str] | None = None) -> list[dict]:
    """script.main of one rank; returns its log. reads: see note_reads."""
    cfg = parse_config(script.Config, arguments)
    if reads is not None:
        note_reads(cfg, reads)
    try:
        script.main(cfg)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return [json.loads(line) for line in open(Path(cfg.out_dir) / "log.jsonl")]


class Seen:
    """What a run did, in order: ("step", lr, gradient norm, settings), ("sync",), ("ask", seed,
    prompt, temperature, tokens at most), ("close",), ("meet", phase), ("save", step) and ("write",
    step, quiet), and what a test notes of its own.
    """

    def __init__(self, patch):
        self.events, self.patch = [], patch
        self.reads: set[str] = set()  # the keys of its config that it has read
        self.note(torch.optim.AdamW, "step", lambda optimizer: ("step", *step_facts(optimizer)))
        self.note(HFEngine, "load_weights", lambda *_: ("sync",))
        self.note(HFEngine, "generate", told_request)
        self.note(HFEngine, "close", lambda _: ("close",))
        self.note(Run, "meet", lambda _, phase, error=None: ("meet", phase))
        self.note(Run, "save", lambda _, step, *more: ("save", step))
        self.note(Run, "write", told_line)

    def note(self, owner, name: str, told, after: bool = False):
        """`told` sees the arguments of owner.name, or (result, *arguments) with `after`."""
        plain = getattr(owner, name)

        def noted(*args, **kwargs):
            if not after:
                self.events.append(told(*args, **kwargs))
            result = plain(*args, **kwargs)
            if after:
                self.events.append(told(result, *args, **kwargs))
            return result

        self.patch.setattr(owner, name, noted)

    def of(self, kind: str) -> list[tuple]:
        return [event[1:] for event in self.events if event[0] == kind]


def told_line(_, line, shown=(), quiet=False):
    return "write", line["step"], quiet


def told_request(_, ids, *, seed, temperature, max_new_tokens, **more):
    return "ask", seed, tuple(ids), temperature, max_new_tokens


def step_facts(optimizer) -> tuple[float, float, tuple]:
    """(learning rate, norm of the gradient that is about to be used, weight decay and betas)."""
    (group,) = optimizer.param_groups
    gradients = [p.grad for p in group["params"]]
    whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
    norm = torch.stack([g.norm() for g in whole]).norm().item()
    return group["lr"], norm, (group["weight_decay"], *group["betas"])


def trained_tokens(out: Path, step: int) -> int:
    """How many tokens a step of Reagent-U has to train, by its episodes: those of attempts whose
    reward is not the mean of their pool.
    """
    path = out / "episodes" / f"step-{step:06d}"
    episodes = [json.loads(line) for line in open(path.with_suffix(".jsonl"))]
    arrays, pools = np.load(path.with_suffix(".npz")), {}
    for episode, start in zip(episodes, arrays["starts"]):
        for attempt in episode["attempts"]:
            a, b = attempt["span"]
            told = attempt["reward"], int(arrays["mask"][start + a : start + b].sum())
            pools.setdefault(episode["id"], []).append(told)
    total = 0
    for pool in pools.values():
        mean = sum(reward for reward, _ in pool) / len(pool)
        total += sum(tokens for reward, tokens in pool if abs(reward - mean) > 1e-9)
    return total
