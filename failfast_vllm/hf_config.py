"""Fast-dLLM v2's `config.json` for transformers and vLLM."""

from transformers import Qwen2Config


class FastDLLMConfig(Qwen2Config):
    """Qwen2's fields and `bd_size`; the published `auto_map` to remote code is ignored."""

    model_type = "Fast_dLLM_Qwen"
