"""The drafter families' `config.json` for transformers and vLLM.

The published `auto_map` to remote code is ignored.
"""

from transformers import Qwen2Config, Qwen3Config


class FastDLLMConfig(Qwen2Config):
    """Qwen2's fields and `bd_size`."""

    model_type = "Fast_dLLM_Qwen"


class SDARConfig(Qwen3Config):
    """Qwen3's fields, `block_size` and `mask_token_id`."""

    model_type = "sdar"


CONFIGS = {config.model_type: config for config in (FastDLLMConfig, SDARConfig)}
