"""The kinds of block-diffusion checkpoints that can draft. No vLLM, no torch.

A family is described here and nowhere else; the code asks the description, never the name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

MODELS_DIR = Path(__file__).parents[1] / "small_pair"  # the shipped target and its drafter
QWEN_VOCAB_SIZES = (151936, 152064)  # of one vocabulary: up to 3B and Qwen3, from 7B on
MAX_DIFFUSION_BLOCK_SIZE = 32  # every KV page is a multiple of it, so of every smaller block too
DIFFUSION_BLOCK_SIZES = (4, 8, 16, MAX_DIFFUSION_BLOCK_SIZE)
BLOCK_SIZE = "diffusion_block_size"  # the user's key
BLOCK_SIZE_NAMES = ", ".join(map(str, DIFFUSION_BLOCK_SIZES))


@dataclass(frozen=True)
class Family:
    """What a `config.json` of this family says, and what it leaves unsaid."""

    name: str
    architecture: str
    model_types: tuple[str, ...]  # the published one first
    base_model: str  # below vllm.model_executor.models: the class with the same weights
    block_size_key: str
    default_block_size: int
    logit_shift: int  # the logit at position i predicts token i + logit_shift
    mask_token: str
    published_mask_token_id: int
    qkv_bias: bool  # where the config does not say `attention_bias`
    qk_norm: bool  # Qwen3: RMSNorm on heads of `head_dim`; else of hidden_size / heads, without
    drafter: str  # hub id of the smallest published checkpoint that fits
    targets: tuple[str, ...]  # model types of the targets that it drafts for
    vocab_sizes: tuple[int, ...]  # of the published checkpoints and their targets, padding included
    defaults: Mapping[str, Any]  # the published configuration class's, for what a file leaves out
    sized_by_name: bool = False  # a silent config.json: the block size is in the name, if at all
    has_experts: bool = False  # layers of Qwen3-MoE

    def filled(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`config` as the published configuration class would read it; block and MASK apart."""
        fields = {**self.defaults, **config}
        if self.defaults and fields["num_key_value_heads"] is None:
            fields["num_key_value_heads"] = fields.get("num_attention_heads")
        return fields

    def head_dim(self, config: Mapping[str, Any]) -> int:
        """Of a `filled` config: what it states, else the hidden size over the heads."""
        return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "rope_theta": 10000.0}
FAST_DLLM_V2 = Family(  # arXiv 2509.26328; MASK from the authors' code, the config lacks it
    name="Fast-dLLM v2",
    architecture="Fast_dLLM_QwenForCausalLM",
    model_types=("Fast_dLLM_Qwen", "qwen2"),
    base_model="qwen2.Qwen2ForCausalLM",
    block_size_key="bd_size",
    default_block_size=32,
    logit_shift=1,
    mask_token="|<MASK>|",
    published_mask_token_id=151665,
    qkv_bias=True,
    qk_norm=False,
    drafter="Efficient-Large-Model/Fast_dLLM_v2_1.5B",
    targets=("qwen2",),
    vocab_sizes=QWEN_VOCAB_SIZES,
    defaults=DEFAULTS,
)
# arXiv 2510.06303; the plain checkpoints have blocks of 4, "-b32" of 32. TraDo is SDAR-4B and -8B
# trained further, in blocks of 4 and with the same MASK.
SDAR = Family(
    name="SDAR",
    architecture="SDARForCausalLM",
    model_types=("sdar",),
    base_model="qwen3.Qwen3ForCausalLM",
    block_size_key="block_size",
    default_block_size=4,
    logit_shift=0,
    mask_token="<|MASK|>",
    published_mask_token_id=151669,
    qkv_bias=False,
    qk_norm=True,
    drafter="JetLM/SDAR-1.7B-Chat-b32",
    targets=("qwen3", "qwen3_moe"),
    vocab_sizes=QWEN_VOCAB_SIZES,
    defaults={"head_dim": 128, **DEFAULTS},
    sized_by_name=True,
)
SDAR_MOE = replace(
    SDAR,
    name="SDAR MoE",
    architecture="SDARMoeForCausalLM",
    model_types=("sdar_moe",),
    base_model="qwen3_moe.Qwen3MoeForCausalLM",
    drafter="JetLM/SDAR-30B-A3B-Chat-b32",
    targets=(),  # chosen for none: it costs what a large target does
    defaults={},  # whose a silent file would be could not be looked up: all must be stated
    has_experts=True,
)
FAMILIES = (FAST_DLLM_V2, SDAR, SDAR_MOE)
FAMILY_NAMES = " or ".join(family.name for family in FAMILIES)


def size_in_name(path: str, config: Mapping[str, Any]) -> tuple[str, int] | None:
    """A published name, and the diffusion block size that it says: JetLM/SDAR-1.7B-Chat-b32.

    `path` is a hub id or a directory, also one inside a hub cache.
    """
    origin = config.get("_name_or_path")  # what it was trained from
    origin = origin if isinstance(origin, str) else ""
    for place in (Path(path), Path(path).resolve(), Path(origin)):  # through "." and links
        # models--JetLM--SDAR-1.7B-Chat-b32/snapshots/<commit>
        cached = [part for part in place.parts if part.startswith("models--")]
        for name in (place.name, *cached):
            if found := re.search(r"-b(\d{1,4})(?=-|$)", name):
                return name, int(found[1])
    return None


def family_of(architectures: Any) -> Family | None:
    """The family that a config's `architectures` name, or None."""
    named = architectures if isinstance(architectures, list | tuple) else ()
    return next((family for family in FAMILIES if family.architecture in named), None)


def is_block_size(value: Any) -> bool:
    """Whether the kernels have diffusion blocks of this size; 4.0 is no size."""
    return isinstance(value, int) and value in DIFFUSION_BLOCK_SIZES  # True is 1
