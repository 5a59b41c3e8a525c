"""The drafter families as vLLM models: vLLM's Qwen2 and Qwen3 with block-diffusion attention.

Only the attention layer differs; everything else is vLLM's. Loaded natively: a checkpoint's remote
code is never run.
"""

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from failfast_vllm.attention import BlockDiffusionBackend


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


class Fast_dLLM_QwenForCausalLM(Qwen2ForCausalLM):  # noqa: N801 - the published name
    """Fast-dLLM v2 (arXiv 2509.26328): Qwen2's weights."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        _attend_in_blocks(self.model, vllm_config)


class SDARForCausalLM(Qwen3ForCausalLM):
    """SDAR (arXiv 2510.06303): Qwen3's weights."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        _attend_in_blocks(self.model, vllm_config)
