"""LoRA: a low-rank update beside every linear layer of the blocks; all other weights stay frozen.

A layer computes W x + 2 B A x (alpha is twice the rank): A (rank, in) starts at random, B (out,
rank) at zero, so the policy starts as its base. The sampler and the Hugging Face folder get
W + 2 B A under the base's own names (policy.full_weights).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

SCALE = 2.0  # alpha / rank
ADAPTERS = ("lora_a", "lora_b")


class LoraLinear(nn.Module):
    """An nn.Linear with adapters in fp32; the base keeps its names, its type and its values."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.weight, self.bias, self.adapts = base.weight, base.bias, True
        options = dict(dtype=torch.float32, device=base.weight.device)
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, **options))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, **options))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as nn.Linear starts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.adapts:
            y = y + SCALE * F.linear(F.linear(x, self.lora_a), self.lora_b)
        return y


def add_lora(hf: nn.Module, rank: int) -> None:
    """Freezes a causal LM and puts adapters beside the linear layers of its blocks, in place."""
    hf.requires_grad_(False)
    for parent in list(hf.model.layers.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, LoraLinear(child, rank))
    if not any(weight.requires_grad for weight in hf.parameters()):
        raise SystemExit("policy.lora_rank: its blocks have no linear layers")


def merged(weight, lora_a, lora_b) -> torch.Tensor:
    """W + 2 B A in fp32, of whole tensors."""
    return torch.addmm(weight.float(), lora_b.float(), lora_a.float(), alpha=SCALE)


def base_of(policy):
    """What calls the policy without its adapters, without gradient: the KL term's reference."""

    layers = [module for module in policy.modules() if isinstance(module, LoraLinear)]

    @torch.no_grad()
    def reference(*args):
        for layer in layers:
            layer.adapts = False
        try:
            return policy(*args)
        finally:
            for layer in layers:
                layer.adapts = True

    return reference
