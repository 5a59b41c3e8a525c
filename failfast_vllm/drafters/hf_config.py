"""The drafter families' `config.json` for transformers and vLLM.

The published `auto_map` to remote code is ignored.
"""

from typing import ClassVar

from transformers import Qwen2Config, Qwen3Config, Qwen3MoeConfig


class FastDLLMConfig(Qwen2Config):
    """Qwen2's fields and `bd_size`."""

    model_type = "Fast_dLLM_Qwen"


class SDARConfig(Qwen3Config):
    """Qwen3's fields; `block_size` and `mask_token_id` where a file states them."""

    model_type = "sdar"


class SDARMoeConfig(Qwen3MoeConfig):
    """Qwen3-MoE's fields; `block_size` and `mask_token_id` where a file states them."""

    model_type = "sdar_moe"
    attribute_map: ClassVar[dict[str, str]] = {}  # `num_experts` keeps its name


CONFIGS = {config.model_type: config for config in (FastDLLMConfig, SDARConfig, SDARMoeConfig)}
