"""Sizes of published models, and a cache of the hub that holds their `config.json`."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from failfast_vllm.drafters.families import FAST_DLLM_V2, SDAR, SDAR_MOE

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
COMMON = {"torch_dtype": "bfloat16", "max_position_embeddings": 32768, "rope_theta": 1000000.0}
WIDE_HEADS = {"head_dim": 128, "attention_bias": False}  # of Qwen3 and SDAR


def _config(architecture: str, model_type: str, *sizes: Any, **fields: Any) -> dict[str, Any]:
    named = dict(zip((*SIZES, "tie_word_embeddings"), sizes, strict=True))
    return {"architectures": [architecture], "model_type": model_type, **COMMON, **named, **fields}


_qwen2 = partial(_config, "Qwen2ForCausalLM", "qwen2")
_qwen3 = partial(_config, "Qwen3ForCausalLM", "qwen3", **WIDE_HEADS)
_fast_dllm = partial(_config, FAST_DLLM_V2.architecture, FAST_DLLM_V2.model_types[0], bd_size=32)
_sdar = partial(_config, SDAR.architecture, SDAR.model_types[0], **WIDE_HEADS)
_sdar_moe = partial(_config, SDAR_MOE.architecture, SDAR_MOE.model_types[0], **WIDE_HEADS)
PUBLISHED_TARGETS = {
    "Qwen/Qwen2.5-7B-Instruct": _qwen2(3584, 28, 28, 4, 18944, 152064, False),
    "Qwen/Qwen2.5-14B-Instruct": _qwen2(5120, 48, 40, 8, 13824, 152064, False),
    "Qwen/Qwen2.5-32B-Instruct": _qwen2(5120, 64, 40, 8, 27648, 152064, False),
    "Qwen/Qwen2.5-72B-Instruct": _qwen2(8192, 80, 64, 8, 29568, 152064, False),
    "Qwen/Qwen3-4B": _qwen3(2560, 36, 32, 8, 9728, 151936, True),
    "Qwen/Qwen3-8B": _qwen3(4096, 36, 32, 8, 12288, 151936, False),
    "Qwen/Qwen3-14B": _qwen3(5120, 40, 40, 8, 17408, 151936, False),
    "Qwen/Qwen3-32B": _qwen3(5120, 64, 64, 8, 25600, 151936, False),
}
BLOCKS = ("-b32", "-b16", "-b8", "")  # as the names of SDAR say it
_SDAR = {
    "JetLM/SDAR-1.7B-Chat": _sdar(2048, 28, 16, 8, 6144, 151936, False),
    "JetLM/SDAR-4B-Chat": _sdar(2560, 36, 32, 8, 9728, 151936, False),
    "JetLM/SDAR-8B-Chat": _sdar(4096, 36, 32, 8, 12288, 151936, False),
    "JetLM/SDAR-30B-A3B-Chat": _sdar_moe(  # the sizes of Qwen3-30B-A3B, which it was trained from
        *(2048, 48, 32, 4, 6144, 151936, False),
        moe_intermediate_size=768,
        norm_topk_prob=True,
        num_experts=128,
        num_experts_per_tok=8,
    ),
}
PUBLISHED_DRAFTERS = {
    "Efficient-Large-Model/Fast_dLLM_v2_1.5B": _fast_dllm(1536, 28, 12, 2, 8960, 151936, True),
    "Efficient-Large-Model/Fast_dLLM_v2_7B": _fast_dllm(3584, 28, 28, 4, 18944, 152064, False),
    **{f"{name}{size}": config for name, config in _SDAR.items() for size in BLOCKS},
    "Gen-Verse/TraDo-4B-Instruct": _SDAR["JetLM/SDAR-4B-Chat"],
    "Gen-Verse/TraDo-8B-Instruct": _SDAR["JetLM/SDAR-8B-Chat"],
    "Gen-Verse/TraDo-8B-Thinking": _SDAR["JetLM/SDAR-8B-Chat"],
}


def fill_hub(cache: Path) -> None:
    """Write what downloads of all these `config.json` would have left in a cache of the hub."""
    for name, config in {**PUBLISHED_TARGETS, **PUBLISHED_DRAFTERS}.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / "2c83"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("2c83", encoding="utf-8")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A cache of the hub with the published models; nothing is downloaded."""
    cache = tmp_path_factory.mktemp("hub")
    fill_hub(cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield cache
