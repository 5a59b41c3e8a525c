"""The drafter families as vLLM models: vLLM's Qwen2, Qwen3 and Qwen3-MoE with block attention.

Only the attention layer differs; everything else is vLLM's. Loaded natively: a checkpoint's remote
code is never run.
"""

from collections.abc import Iterable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from failfast_vllm.drafters.attention import BlockDiffusionBackend
from failfast_vllm.drafters.checkpoint import check_tensors, expected_shapes
from failfast_vllm.drafters.families import FAST_DLLM_V2, SDAR, SDAR_MOE, Family


def _attend_in_blocks(decoder: Any, vllm_config: VllmConfig) -> None:
    """Replace each layer's causal attention."""
    layers_by_name = vllm_config.compilation_config.static_forward_context
    for layer in decoder.layers:
        causal = layer.self_attn.attn
        del layers_by_name[causal.layer_name]  # vLLM refuses two layers of one name
        layer.self_attn.attn = Attention(
            causal.num_heads,
            causal.head_size,
            layer.self_attn.scaling,
            num_kv_heads=causal.num_kv_heads,
            cache_config=None,  # KV in the drafter's own type, whatever the target's is
            quant_config=vllm_config.quant_config,
            prefix=causal.layer_name,
            attn_backend=BlockDiffusionBackend,
        )


def _checked(
    family: Family, config: Any, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterable[tuple[str, torch.Tensor]]:
    shapes = expected_shapes(family, config.to_dict())
    return check_tensors(config.name_or_path, weights, shapes)


class Fast_dLLM_QwenForCausalLM(Qwen2ForCausalLM):  # noqa: N801 - the published name
    """Fast-dLLM v2 (arXiv 2509.26328): Qwen2's weights."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        _attend_in_blocks(self.model, vllm_config)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: set[str] = super().load_weights(_checked(FAST_DLLM_V2, self.config, weights))
        return loaded


class SDARForCausalLM(Qwen3ForCausalLM):
    """SDAR (arXiv 2510.06303): Qwen3's weights."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        _attend_in_blocks(self.model, vllm_config)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: set[str] = super().load_weights(_checked(SDAR, self.config, weights))
        return loaded


class SDARMoeForCausalLM(Qwen3MoeForCausalLM):
    """SDAR (arXiv 2510.06303): Qwen3-MoE's weights."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        _attend_in_blocks(self.model, vllm_config)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: set[str] = super().load_weights(_checked(SDAR_MOE, self.config, weights))
        return loaded
