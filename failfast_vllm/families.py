"""The kinds of block-diffusion checkpoints that can draft. No vLLM, no torch.

A family is described here and nowhere else; the code asks the description, never the name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

QWEN_VOCAB_SIZES = (151936, 152064)  # one vocabulary: up to 3B and Qwen3, from 7B on
MAX_DIFFUSION_BLOCK_SIZE = 32  # every KV page is a multiple of it, so of every smaller block too
DIFFUSION_BLOCK_SIZES = (4, 8, 16, MAX_DIFFUSION_BLOCK_SIZE)


@dataclass(frozen=True)
class Family:
    """What a `config.json` of this family says, and what it leaves unsaid."""

    name: str
    architecture: str
    model_types: tuple[str, ...]  # the published one first
    block_size_key: str
    default_block_size: int
    logit_shift: int  # the logit at position i predicts token i + logit_shift
    mask_token: str
    published_mask_token_id: int
    qkv_bias: bool  # where the config does not say `attention_bias`
    qk_norm: bool  # RMSNorm on each head of query and key
    states_head_dim: bool  # `head_dim` in the config; else hidden_size / heads
    drafter: str  # hub id of the smallest published checkpoint that fits
    targets: tuple[str, ...]  # model types of the targets that it drafts for

    def block_size(self, config: Mapping[str, Any]) -> Any:
        """The diffusion block size that a `config.json` states."""
        return config.get(self.block_size_key, self.default_block_size)


FAST_DLLM_V2 = Family(  # arXiv 2509.26328; MASK from the authors' code, the config lacks it
    name="Fast-dLLM v2",
    architecture="Fast_dLLM_QwenForCausalLM",
    model_types=("Fast_dLLM_Qwen", "qwen2"),
    block_size_key="bd_size",
    default_block_size=32,
    logit_shift=1,
    mask_token="|<MASK>|",
    published_mask_token_id=151665,
    qkv_bias=True,
    qk_norm=False,
    states_head_dim=False,
    drafter="Efficient-Large-Model/Fast_dLLM_v2_1.5B",
    targets=("qwen2",),
)
SDAR = Family(  # arXiv 2510.06303; the plain checkpoints have blocks of 4, "-b32" of 32
    name="SDAR",
    architecture="SDARForCausalLM",
    model_types=("sdar",),
    block_size_key="block_size",
    default_block_size=4,
    logit_shift=0,
    mask_token="<|MASK|>",
    published_mask_token_id=151669,
    qkv_bias=False,
    qk_norm=True,
    states_head_dim=True,
    drafter="JetLM/SDAR-1.7B-Chat-b32",
    targets=("qwen3", "qwen3_moe"),
)
FAMILIES = (FAST_DLLM_V2, SDAR)


def family_of(architectures: Any) -> Family | None:
    """The family that a config's `architectures` name, or None."""
    if isinstance(architectures, list | tuple):
        for family in FAMILIES:
            if family.architecture in architectures:
                return family
    return None
