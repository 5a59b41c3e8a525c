"""Fast-dLLM v2 (arXiv 2509.26328) as a vLLM model: Qwen2's weights, block-diffusion attention.

Only the attention layer differs from vLLM's Qwen2; everything else is reused. Loaded natively:
the checkpoint's remote code is never run.
"""

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

from failfast_vllm.attention import BlockDiffusionBackend


class FastDLLMForCausalLM(Qwen2ForCausalLM):
    """`Fast_dLLM_QwenForCausalLM`: vLLM's Qwen2 with its attention moved to our backend."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        layers_by_name = vllm_config.compilation_config.static_forward_context
        for layer in self.model.layers:
            causal = layer.self_attn.attn
            del layers_by_name[causal.layer_name]  # vLLM refuses two layers of one name
            layer.self_attn.attn = Attention(
                causal.num_heads,
                causal.head_size,
                layer.self_attn.scaling,
                num_kv_heads=causal.num_kv_heads,
                cache_config=vllm_config.cache_config,
                quant_config=vllm_config.quant_config,
                prefix=causal.layer_name,
                attn_backend=BlockDiffusionBackend,
            )
