"""What an older torch or vLLM of a borrowed machine needs, and nothing else does: imported first by
the checks and by the table of a card. torch 2.11: varlen_attn takes grouped heads as they are and
has no `enable_gqa`, and torch.compile no `recompile_limit`. vLLM 0.25: its client has no finalizer
that `close` detaches.
"""

import inspect
import os
import types

import torch
import torch.nn.attention.varlen as varlen

from reagent.engines import VLLMEngine

os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # its kernels would be compiled first
# each check is a process: what one has compiled of flash-attn-4 the others read
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")

if "enable_gqa" not in inspect.signature(varlen.varlen_attn).parameters:
    newer = varlen.varlen_attn

    def varlen_attn(*args, enable_gqa=False, **options):
        return newer(*args, **options)

    varlen.varlen_attn = varlen_attn

if "recompile_limit" not in inspect.signature(torch.compile).parameters:
    plain_compile = torch.compile

    def compile_blocks(*args, recompile_limit=32, **options):
        torch._dynamo.config.recompile_limit = recompile_limit  # there of all threads
        return plain_compile(*args, **options)

    torch.compile = compile_blocks

plain_close = VLLMEngine.close


def close(self) -> None:
    client = self.llm.llm_engine.engine_core
    if not hasattr(client, "_finalizer"):
        client._finalizer = types.SimpleNamespace(detach=bool)
    plain_close(self)


VLLMEngine.close = close
