"""Masked-block attention as a vLLM attention backend, so that the drafter's KV lives in the pool.

vLLM builds metadata for every backend on each target step; those calls get None (O(1)). The
drafter's own passes bring a `BlockDiffusionMetadata` through the forward context.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import register_backend

from failfast_kernels import (
    PaddedGroup,
    block_diffusion_attention,
    commit_kv,
    plan_padding,
    uses_triton,
)
from failfast_vllm.drafters.families import MAX_DIFFUSION_BLOCK_SIZE
from failfast_vllm.drafting.records import DraftBatch

BACKEND_NAME = "FAILFAST_BLOCK_DIFFUSION"


@dataclass
class BlockDiffusionMetadata:
    """One drafter pass."""

    batch: DraftBatch
    diffusion_block_size: int
    groups: list[PaddedGroup] | None = None  # made by the first layer; not for Triton


@register_backend(BACKEND_NAME)
class BlockDiffusionBackend(AttentionBackend):
    """Bidirectional inside a diffusion block, causal across blocks (see `failfast_kernels`)."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(MAX_DIFFUSION_BLOCK_SIZE)]

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type["BlockDiffusionImpl"]:
        return BlockDiffusionImpl

    @staticmethod
    def get_builder_cls() -> type["BlockDiffusionMetadataBuilder"]:
        return BlockDiffusionMetadataBuilder

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """The target's answers do not depend on drafts; a draft itself may depend on its batch."""
        return True


class BlockDiffusionMetadataBuilder(AttentionMetadataBuilder[BlockDiffusionMetadata]):
    """Answers vLLM's calls for target steps, in which no drafter layer runs."""

    # vLLM takes the least of all groups, and no layer of ours runs in a step of the target
    _cudagraph_support = AttentionCGSupport.ALWAYS

    def __init__(self, *args: Any, **more: Any) -> None:  # abstract in vLLM
        super().__init__(*args, **more)

    def build(self, *args: Any, **more: Any) -> None:
        return None


class BlockDiffusionImpl(AttentionImpl[BlockDiffusionMetadata]):
    """Commits the complete blocks of a pass, then attends."""

    kv_cache_dtype = "auto"

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, *defaults: Any
    ) -> None:
        """`defaults` are vLLM's for no biases, windows, caps or shared layers."""
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: BlockDiffusionMetadata | None,
        output: torch.Tensor,
        *scales: Any,
        **more: Any,
    ) -> torch.Tensor:
        """See `failfast_kernels.block_diffusion_attention`; `output` is written in place."""
        if attn_metadata is None:  # memory profiling and warm-up: shapes only
            return output.zero_()
        meta, batch = attn_metadata, attn_metadata.batch
        if batch.slot_mapping is not None:
            commit_kv(key, value, kv_cache, batch.slot_mapping)
        places = batch.block_table, batch.committed_lens, batch.query_start_loc
        size, group_size = meta.diffusion_block_size, self.num_heads // self.num_kv_heads
        if meta.groups is None and not uses_triton(query):
            meta.groups = plan_padding(*places, kv_cache.shape[2], group_size, query.dtype, size)
        return block_diffusion_attention(
            query, key, value, kv_cache, *places, self.scale, size, meta.groups, output
        )
