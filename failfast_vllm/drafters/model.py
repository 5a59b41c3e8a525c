"""The drafter families as vLLM models: vLLM's base models with block attention."""

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention

from failfast_vllm.drafters.attention import BlockDiffusionBackend
from failfast_vllm.drafters.checkpoint import check_tensors, expected_shapes
from failfast_vllm.drafters.families import FAMILIES, Family


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


def _model_class(family: Family) -> type[Any]:
    """The family's architecture: the base's weights, checked while they are loaded."""
    module, name = family.base_model.split(".")
    base: Any = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)

    class BlockDiffusionModel(base):  # type: ignore[misc]
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            _attend_in_blocks(self.model, vllm_config)

        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            shapes = expected_shapes(family, self.config.to_dict())
            checked = check_tensors(self.config.name_or_path, weights, shapes)
            loaded: set[str] = super().load_weights(checked)
            return loaded

    BlockDiffusionModel.__name__ = BlockDiffusionModel.__qualname__ = family.architecture
    BlockDiffusionModel.__doc__ = f"{family.name} on {name}'s weights."
    return BlockDiffusionModel


MODELS = {family.architecture: _model_class(family) for family in FAMILIES}
globals().update(MODELS)  # vLLM looks an architecture up by its name
