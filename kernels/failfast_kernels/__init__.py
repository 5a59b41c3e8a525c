"""Masked-block attention over a paged KV cache, and the confidence of a draft token.

Every operation has one signature and two homes: `reference` (plain PyTorch, the specification,
runs anywhere) and a Triton launcher. CUDA tensors go to Triton, which is imported at that moment;
others go to the reference, unless FAILFAST_TRITON=1 sends them to Triton's interpreter (which
also needs TRITON_INTERPRET=1). This package imports neither vLLM nor `failfast_vllm`.
"""

import os
from collections.abc import Sequence

import torch

from failfast_kernels import reference
from failfast_kernels.reference import PaddedGroup, TokenConfidence, plan_padding

__all__ = [
    "PaddedGroup",
    "TokenConfidence",
    "block_diffusion_attention",
    "commit_kv",
    "confidence_argmax",
    "plan_padding",
    "uses_triton",
]


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether operations on `tensor` are Triton's; they need no `plan_padding`."""
    return tensor.is_cuda or os.environ.get("FAILFAST_TRITON") == "1"


def block_diffusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    committed_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    diffusion_block_size: int = 32,
    groups: Sequence[PaddedGroup] | None = None,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `reference.block_diffusion_attention`."""
    home = reference.block_diffusion_attention
    if uses_triton(query):
        from failfast_kernels.block_attention import block_diffusion_attention as home
    return home(
        query,
        key,
        value,
        kv_cache,
        block_table,
        committed_lens,
        query_start_loc,
        scale,
        diffusion_block_size,
        groups,
        output,
    )


def commit_kv(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """See `reference.commit_kv`."""
    home = reference.commit_kv
    if uses_triton(key):
        from failfast_kernels.block_attention import commit_kv as home
    home(key, value, kv_cache, slot_mapping)


def confidence_argmax(
    logits: torch.Tensor,
    num_valid_tokens: int,
    forbidden_ids: Sequence[int] = (),
    *,
    details: bool = False,
) -> TokenConfidence:
    """See `reference.confidence_argmax`."""
    home = reference.confidence_argmax
    if uses_triton(logits):
        from failfast_kernels.confidence import confidence_argmax as home
    return home(logits, num_valid_tokens, forbidden_ids, details=details)
