"""What an older torch or vLLM of a borrowed machine needs, and nothing else does: imported first by
the checks. torch 2.11: varlen_attn takes grouped heads as they are and has no `enable_gqa`.
"""

import inspect
import os

import torch.nn.attention.varlen as varlen

os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # its kernels would be compiled first

if "enable_gqa" not in inspect.signature(varlen.varlen_attn).parameters:
    newer = varlen.varlen_attn

    def varlen_attn(*args, enable_gqa=False, **options):
        return newer(*args, **options)

    varlen.varlen_attn = varlen_attn
