"""What a drafter must be, checked once, before any weight is read. No vLLM, no torch."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from failfast_vllm.drafters.families import (
    BLOCK_SIZE,
    BLOCK_SIZE_NAMES,
    FAMILIES,
    FAMILY_NAMES,
    MODELS_DIR,
    Family,
    family_of,
    is_block_size,
    size_in_name,
)
from failfast_vllm.errors import echo, reason, refusal

# vLLM's SpeculativeConfig changes the method of a draft model whose path contains one of these
METHOD_WORDS = ("eagle-", "eagle3", "dflash", "dspark")
HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)

MAX_COUNT, MAX_SIZE = 1 << 10, 1 << 24  # far beyond any model; a larger value is a slip
# what layers of vLLM do not follow without a word, as ours have neither scales nor windows
UNFIT = ("quantization_config", "compression_config", "use_sliding_window")


def choose_drafter(target: str, model_type: str, vocab_size: int) -> str | None:
    """The drafter for a target when the user names none; None if none is known."""
    if Path(target).resolve() == (MODELS_DIR / "target").resolve():
        return str(MODELS_DIR / "drafter")
    for family in FAMILIES:
        if model_type in family.targets and vocab_size in family.vocab_sizes:
            return family.drafter
    return None


def check_local_drafter(
    model: str, load_format: str = "auto", asked_size: int | None = None
) -> dict[str, Any] | None:
    """The `config.json` of a local drafter, or None where it is not a directory; raises ValueError.

    Args:
        load_format: vLLM's; with "dummy" no weights are asked for.
        asked_size: the user's diffusion block size.
    """
    for word in METHOD_WORDS:
        if word in model.lower():
            must = f"vLLM takes a drafter with {word!r} in its path for another method"
            raise refusal(must, echo(model), "Rename the directory.")
    if not os.path.isdir(model):  # where Path.is_dir raises on an impossible name, this is False
        if model.startswith(("/", ".", "~")) or not HUB_ID.fullmatch(model):
            raise ValueError(
                f"failfast: the drafter {echo(model)} is not a directory; "
                "give a checkpoint directory or a hub id."
            )
        return None
    path = Path(model)
    config = read_json(path / "config.json", f"give a complete {FAMILY_NAMES} checkpoint.")
    check_drafter_config(model, config, asked_size)
    if load_format != "dummy" and not any(path.glob("*.safetensors")):
        raise ValueError(
            f"failfast: the drafter {model!r} has no .safetensors file; "
            "convert it, pickles are never loaded."
        )
    return config


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """What a file says, or nothing where it is no object; raises ValueError with the remedy."""
    try:
        if file.exists() and not file.is_file():
            raise ValueError("it is not a file")  # a pipe would be read for ever
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"failfast: cannot read {file} ({reason(error)}); {remedy}") from None
    return found if isinstance(found, dict) else {}


def check_drafter_config(
    model: str, config: Mapping[str, Any], asked_size: int | None = None
) -> Family:
    """The drafter's family; raises ValueError on another kind of checkpoint or block size."""
    architectures = config.get("architectures")
    family, must = family_of(architectures), f"the drafter {model!r} must"
    if family is None:
        named = architectures if isinstance(architectures, list) else ()
        found = echo(", ".join(each for each in named if isinstance(each, str))).strip("'")
        known = " or ".join(family.architecture for family in FAMILIES)
        hint = (
            "Its 'auto_map' is of no use: a drafter's own code is never run."
            if config.get("auto_map")
            else "For an autoregressive drafter use vLLM's own method 'draft_model'."
        )
        raise refusal(f"{must} be a {known}", found or "no architecture", hint)
    if config.get("model_type") not in family.model_types:
        must = f"{must} have the 'model_type' {family.model_types[0]!r}"
        raise refusal(must, echo(config.get("model_type")), "Set it in its config.json.")
    find_block_size(model, family, config, asked_size)
    layers = config.get("num_hidden_layers")  # transformers lists them all
    if type(layers) is not int or not 1 <= layers <= MAX_COUNT:
        limits = f"{must} have 'num_hidden_layers' as an integer from 1 to {MAX_COUNT}"
        raise refusal(limits, echo(layers), "Correct its config.json.")
    for key in UNFIT:
        if config.get(key):
            raise refusal(f"{must} have no {key!r}", echo(config[key]), "Use another checkpoint.")
    return family


class BlockSize(NamedTuple):
    """Of a drafter's diffusion blocks, in tokens."""

    size: int
    doubt: str | None  # one line: what a user should know about where it comes from


def find_block_size(
    model: str, family: Family, config: Mapping[str, Any], asked_size: int | None = None
) -> BlockSize:
    """What a drafter's config.json states, else the user, else its name, else the family's default.

    Raises ValueError on a size that no kernel has, or one that contradicts the config.json.

    Args:
        config: the `config.json` as published, not as a configuration class has filled it.
        asked_size: `diffusion_block_size` of the speculative config.
    """
    if family.block_size_key in config:
        return _stated_size(model, family, config, asked_size)
    named = size_in_name(model, config) if family.sized_by_name else None
    name, size = named or ("", None)
    if asked_size is not None:
        doubt = f"as {BLOCK_SIZE!r} says, though {name!r} stands for {size}"
        return BlockSize(asked_size, None if size in (None, asked_size) else doubt)
    if size is None:
        doubt = (
            f"the default of {family.name}, as neither its config.json nor its name says it; "
            f"set {BLOCK_SIZE!r} if it was trained with other blocks"
        )
        return BlockSize(family.default_block_size, doubt if family.sized_by_name else None)
    if not is_block_size(size):
        must = f"the drafter {model!r} must have blocks of {BLOCK_SIZE_NAMES} tokens"
        remedy = f"Use another checkpoint, or set {BLOCK_SIZE!r} if the name means something else."
        raise refusal(must, f"{size} (from the name {name!r})", remedy)
    return BlockSize(size, None)


def _stated_size(
    model: str, family: Family, config: Mapping[str, Any], asked_size: int | None
) -> BlockSize:
    key, size = family.block_size_key, config[family.block_size_key]
    if not is_block_size(size):
        must = f"the drafter {model!r} must have a {key!r} of {BLOCK_SIZE_NAMES}"
        raise refusal(must, echo(size), "Use another checkpoint.")
    if asked_size not in (None, size):
        stated = f"the {key!r} in the config.json of the drafter {model!r}, {size}"
        raise refusal(f"{BLOCK_SIZE!r} must be {stated}", str(asked_size), "Leave it out.")
    return BlockSize(size, None)


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
        "moe_intermediate_size": config.get("moe_intermediate_size", 0) % num_ranks,
    }
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
    why = f"{missing} of its {len(target)} tokens are unknown to the drafter"
    if clash is not None:
        why = f"id {clash} is {by_id[clash]!r} there"
    if clash is not None or missing > len(target) // 100:
        raise ValueError(
            f"failfast: the drafter {drafter_name!r} has another tokenizer than the target "
            f"{target_name!r} ({why}); use a drafter of the target's family."
        )


def mask_token_id(
    family: Family, config: Mapping[str, Any], drafter_vocab: Mapping[str, int]
) -> int:
    """MASK of a drafter: from its config, its tokenizer, or the table; raises ValueError."""
    mask = config.get("mask_token_id")
    if mask is not None:
        last = config["vocab_size"] - 1
        if type(mask) is not int or not 0 <= mask <= last:
            must = f"'mask_token_id' must be an integer from 0 to {last}"
            raise ValueError(f"failfast: {must}; got {echo(mask)}.")
        return mask
    if family.mask_token in drafter_vocab:
        return drafter_vocab[family.mask_token]
    if config.get("vocab_size") in family.vocab_sizes:
        return family.published_mask_token_id
    raise ValueError(
        f"failfast: the drafter's MASK token is unknown (no {family.mask_token!r} in its "
        "tokenizer); set 'mask_token_id' in its config.json."
    )
