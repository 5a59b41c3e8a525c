"""What a drafter must be, checked once, before any weight is read. No vLLM, no torch.

Errors are one line: what is wrong, what was got, what to do.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from failfast_vllm.drafters.checkpoint import check_files, read_json
from failfast_vllm.drafters.errors import echo
from failfast_vllm.drafters.families import (
    BLOCK_SIZE,
    BLOCK_SIZE_NAMES,
    FAMILIES,
    FAMILY_NAMES,
    MODELS_DIR,
    VOCAB_SIZES,
    Family,
    family_of,
    is_block_size,
    published_names,
)
from failfast_vllm.drafters.layout import check_config, is_integer

# vLLM's SpeculativeConfig changes the method of a draft model whose path contains one of these
METHOD_WORDS = ("eagle-", "eagle3", "dflash", "dspark")
HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)


def choose_drafter(target: str, model_type: str, vocab_size: int) -> str | None:
    """The drafter for a target when the user names none; None if none is known."""
    if Path(target).exists() and Path(target).resolve() == (MODELS_DIR / "target").resolve():
        return str(MODELS_DIR / "drafter")
    for family in FAMILIES:
        if model_type in family.targets and vocab_size in VOCAB_SIZES:
            return family.drafter
    return None


def check_local_drafter(
    model: str, load_format: str = "auto", asked_size: int | None = None
) -> dict[str, Any] | None:
    """Refuse a local drafter that cannot be one, before vLLM loads anything; raises ValueError.

    vLLM's `load_format` "dummy" reads no weights, so none are asked for.

    Args:
        asked_size: the user's diffusion block size.

    Returns:
        Its `config.json`, or None where it is not a directory.
    """
    for word in METHOD_WORDS:
        if word in model.lower():
            raise ValueError(
                f"failfast: vLLM takes a drafter with {word!r} in its path for another method; "
                f"got {echo(model)}. Rename the directory."
            )
    if not os.path.isdir(model):  # where Path.is_dir raises on an impossible name, this is False
        if model.startswith(("/", ".", "~")) or not HUB_ID.fullmatch(model):
            raise ValueError(
                f"failfast: the drafter {echo(model)} is not a directory; "
                "give a checkpoint directory or a hub id."
            )
        return None
    path = Path(model)
    config = read_json(path / "config.json", f"give a complete {FAMILY_NAMES} checkpoint.")
    family = check_drafter_config(model, config, asked_size)
    if load_format != "dummy":
        if not any(path.glob("*.safetensors")):
            others = sorted(p.name for p in (*path.glob("*.bin"), *path.glob("*.pt")))
            raise ValueError(
                f"failfast: the drafter {model!r} has no .safetensors file "
                f"(got {', '.join(others) or 'no weights'}); convert it, pickles are never loaded."
            )
        check_files(path, family, config)
    return config


def check_drafter_config(
    model: str, config: Mapping[str, Any], asked_size: int | None = None
) -> Family:
    """The drafter's family; raises ValueError on another architecture, layout or block size."""
    architectures = config.get("architectures")
    family = family_of(architectures)
    if family is None:
        found = map(str, architectures) if isinstance(architectures, list) else ()
        known = " or ".join(family.architecture for family in FAMILIES)
        hint = (
            "Its 'auto_map' is of no use: a drafter's own code is never run."
            if config.get("auto_map")
            else "For an autoregressive drafter use vLLM's own method 'draft_model'."
        )
        raise ValueError(
            f"failfast: the drafter {model!r} must be a {known}; "
            f"got {', '.join(found) or 'no architecture'}. {hint}"
        )
    if config.get("model_type") not in family.model_types:
        raise ValueError(
            f"failfast: the drafter {model!r} must have the 'model_type' "
            f"{family.model_types[0]!r}; got {config.get('model_type')!r}. "
            "Set it in its config.json."
        )
    find_block_size(model, family, config, asked_size)
    check_config(model, family, config)
    return family


class BlockSize(NamedTuple):
    """Of a drafter's diffusion blocks, in tokens."""

    size: int
    doubt: str | None  # one line: what a user should know about where it comes from


def find_block_size(
    model: str, family: Family, config: Mapping[str, Any], asked_size: int | None = None
) -> BlockSize:
    """What a drafter's config.json states, else the user, else its name, else the family's default.

    Args:
        model: hub id or directory.
        config: its `config.json` as published, not as a configuration class has filled it.
        asked_size: `diffusion_block_size` of the speculative config.

    Raises:
        ValueError: a size that no kernel has, or one that contradicts the config.json.
    """
    if family.block_size_key in config:
        return _stated_size(model, family, config, asked_size)
    sizes = [(name, family.size_in_name(name)) for name in published_names(model, config)]
    name, size = next((pair for pair in sizes if pair[1] is not None), ("", None))
    if asked_size is not None:
        doubt = f"as {BLOCK_SIZE!r} says, though {name!r} stands for {size}"
        return BlockSize(asked_size, None if size in (None, asked_size) else doubt)
    if size is None:
        doubt = (
            f"the default of {family.name}, as neither its config.json nor its name says it; "
            f"set {BLOCK_SIZE!r} if it was trained with other blocks"
        )
        return BlockSize(family.default_block_size, doubt)
    if not is_block_size(size):
        raise ValueError(
            f"failfast: the drafter {model!r} must have blocks of {BLOCK_SIZE_NAMES} tokens; "
            f"got {size} (from the name {name!r}). Use another checkpoint, or set {BLOCK_SIZE!r} "
            "if the name means something else."
        )
    return BlockSize(size, None)


def _stated_size(
    model: str, family: Family, config: Mapping[str, Any], asked_size: int | None
) -> BlockSize:
    key = family.block_size_key
    if not is_block_size(config[key]):
        raise ValueError(
            f"failfast: the drafter {model!r} must have a {key!r} of {BLOCK_SIZE_NAMES}; "
            f"got {config[key]!r}. Use another checkpoint."
        )
    if asked_size not in (None, config[key]):
        raise ValueError(
            f"failfast: {BLOCK_SIZE!r} must be the {key!r} in the config.json of the drafter "
            f"{model!r}, {config[key]}; got {asked_size}. Leave it out."
        )
    return BlockSize(config[key], None)


def undivided_size(config: Mapping[str, Any], num_ranks: int) -> str | None:
    """The first size of a drafter that `num_ranks` tensor-parallel ranks cannot share, or None.

    Fewer KV heads than ranks are copied, as vLLM does it; the vocabulary is padded to 64; each
    expert is cut like a dense MLP, and `config` has all its sizes.
    """
    num_kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    remainders = {
        "num_attention_heads": config["num_attention_heads"] % num_ranks,
        "num_key_value_heads": num_kv_heads % num_ranks and num_ranks % num_kv_heads,
        "intermediate_size": config["intermediate_size"] % num_ranks,
        "vocab_size": -(-config["vocab_size"] // 64) * 64 % num_ranks,
    }
    if "moe_intermediate_size" in config:
        remainders["moe_intermediate_size"] = config["moe_intermediate_size"] % num_ranks
    return next((f"'{key}': {config[key]}" for key, rest in remainders.items() if rest), None)


def check_tokenizers(
    target_name: str,
    target: Mapping[str, int],
    drafter_name: str,
    drafter: Mapping[str, int],
    mask_token_id: int,
) -> None:
    """Refuse a drafter whose token ids mean something else; raises ValueError.

    Padding differs and MASK may be the drafter's own: only ids that both use must agree.
    """
    by_id = {i: token for token, i in drafter.items() if i != mask_token_id}
    clash = next((i for token, i in target.items() if i in by_id and by_id[i] != token), None)
    missing = len([i for i in target.values() if i not in by_id and i != mask_token_id])
    if clash is not None or missing > len(target) // 100:
        reason = f"{missing} of its {len(target)} tokens are unknown to the drafter"
        if clash is not None:
            reason = f"id {clash} is {by_id[clash]!r} there"
        raise ValueError(
            f"failfast: the drafter {drafter_name!r} has another tokenizer than the target "
            f"{target_name!r} ({reason}); use a drafter of the target's family."
        )


def mask_token_id(
    family: Family, config: Mapping[str, Any], drafter_vocab: Mapping[str, int]
) -> int:
    """MASK of a drafter: from its config, its tokenizer, or the table; raises ValueError."""
    mask = config.get("mask_token_id")
    if mask is not None:
        last = config["vocab_size"] - 1
        if not is_integer(mask) or not 0 <= mask <= last:
            raise ValueError(
                f"failfast: 'mask_token_id' must be an integer from 0 to {last}; got {mask!r}."
            )
        return int(mask)
    if family.mask_token in drafter_vocab:
        return drafter_vocab[family.mask_token]
    if config.get("vocab_size") in VOCAB_SIZES:
        return family.published_mask_token_id
    raise ValueError(
        f"failfast: the drafter's MASK token is unknown (no {family.mask_token!r} in its "
        "tokenizer); set 'mask_token_id' in its config.json."
    )
