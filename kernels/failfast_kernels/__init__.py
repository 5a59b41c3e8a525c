"""Masked-block attention over a paged KV cache, and the confidence of a draft token.

Every operation has one signature and up to two homes: `reference` (plain PyTorch, the
specification, runs anywhere) and a Triton launcher for CUDA tensors. This package imports
neither vLLM nor `failfast_vllm`.
"""

from failfast_kernels.reference import (
    PaddedGroup,
    TokenConfidence,
    block_diffusion_attention,
    commit_kv,
    confidence_argmax,
    plan_padding,
)

__all__ = [
    "PaddedGroup",
    "TokenConfidence",
    "block_diffusion_attention",
    "commit_kv",
    "confidence_argmax",
    "plan_padding",
]
