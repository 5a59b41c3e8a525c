"""What a drafter must be, checked once, before any weight is read. No vLLM, no torch."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from failfast_vllm.drafters.checkpoint import check_files, read_json
from failfast_vllm.drafters.families import (
    BLOCK_SIZE,
    BLOCK_SIZE_NAMES,
    FAMILIES,
    FAMILY_NAMES,
    MODELS_DIR,
    Family,
    family_of,
    is_block_size,
    published_names,
)
from failfast_vllm.errors import echo, refusal

# vLLM's SpeculativeConfig changes the method of a draft model whose path contains one of these
METHOD_WORDS = ("eagle-", "eagle3", "dflash", "dspark")
HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)

MAX_COUNT, MAX_SIZE = 1 << 10, 1 << 24  # far beyond any drafter; a larger value is a slip
COUNTS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZES = ("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings")
# what a key may say, the default first; anything else is not vLLM's Qwen2 or Qwen3
ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False, True),
    "use_sliding_window": (False, None),
    "is_causal": (True, None),
    "dual_chunk_attention_config": (None,),
    "shared_expert_intermediate_size": (None, 0),
    "n_routed_experts": (None, 0),
}
NO_EXPERTS: dict[str, tuple[Any, ...]] = {"num_experts": (None, 0), "num_local_experts": (None, 0)}
EXPERTS: dict[str, tuple[Any, ...]] = {  # in every layer
    "norm_topk_prob": (False, True),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
}
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
LLAMA3_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor")
# what transformers fills in where it is absent, and would break on null
ROPE_OPTIONAL = ("original_max_position_embeddings", "beta_fast", "beta_slow")

Problem = tuple[str, str, Any, str]  # a key, what it must be, what it is, what to do
CORRECT = "Correct its config.json."


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
    filled = family.filled(config)
    for problems in (_other_layout, wrong_sizes, _wrong_rope):
        for key, what, got, remedy in problems(family, filled):
            raise refusal(f"{must} have {key!r} {what}", echo(got), remedy)
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


def _other_layout(family: Family, config: Mapping[str, Any]) -> Iterator[Problem]:
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            yield key, "absent", config[key], "Use its unquantised weights."
    projections = {
        "attention_bias": (True,) if family.qkv_bias else (False, True),
        "qk_norm": (family.qk_norm,),
    }
    experts = EXPERTS if family.has_experts else NO_EXPERTS
    for key, allowed in (ALLOWED | projections | experts).items():
        value = config.get(key, allowed[0])
        if not any(type(value) is type(each) and value == each for each in allowed):
            what = "as " + " or ".join(map(json.dumps, allowed))
            yield key, what, value, "Another layout cannot be loaded."
    if family.has_experts and "norm_topk_prob" not in config:  # both occur
        yield "norm_topk_prob", "as false or true", None, CORRECT


def wrong_sizes(family: Family, config: Mapping[str, Any]) -> Iterator[Problem]:
    """Later checks rely on earlier ones: only the first problem counts."""
    for key in COUNTS + SIZES:
        yield from _no_integer(config, key, MAX_COUNT if key in COUNTS else MAX_SIZE)
    if family.has_experts:
        yield from _no_integer(config, "num_experts", MAX_COUNT)
        yield from _no_integer(config, "num_experts_per_tok", config["num_experts"])
        yield from _no_integer(config, "moe_intermediate_size", MAX_SIZE)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads, stated = config["num_key_value_heads"], config.get("head_dim")
    if heads % kv_heads:
        what = f"as a divisor of 'num_attention_heads' ({heads})"
        yield "num_key_value_heads", what, kv_heads, CORRECT
    if family.qk_norm:
        yield from _no_integer(config, "head_dim", MAX_COUNT)
        if config["head_dim"] % 2:
            yield "head_dim", "even", stated, CORRECT
    elif hidden % heads or hidden // heads % 2:
        what = f"that splits 'hidden_size' ({hidden}) into heads of even size"
        yield "num_attention_heads", what, heads, CORRECT
    elif stated not in (None, hidden // heads):
        what = f"equal to 'hidden_size' / 'num_attention_heads' ({hidden // heads})"
        yield "head_dim", what, stated, CORRECT
    if config.get("layer_types") not in (None, ["full_attention"] * config["num_hidden_layers"]):
        what = "with 'full_attention' for each layer"
        yield "layer_types", what, config["layer_types"], "Others cannot be loaded."
    epsilon = config.get("rms_norm_eps", 1e-6)
    if not _is_positive(epsilon) or epsilon >= 1:
        yield "rms_norm_eps", "between 0 and 1", epsilon, CORRECT


def _wrong_rope(family: Family, config: Mapping[str, Any]) -> Iterator[Problem]:
    theta = config.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):  # the older name first
        rope = config.get(key)
        if rope is None:
            continue
        scaling: dict[str, Any] = rope if isinstance(rope, dict) else {"type": None}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ROPE_TYPES or "mrope_section" in scaling:
            what = f"with a 'rope_type' among {', '.join(ROPE_TYPES)}"
            yield key, what, rope, "Others cannot be loaded."
        needed = {"default": (), "llama3": LLAMA3_NUMBERS}.get(kind, ("factor",))
        for number in (*needed, *(name for name in ROPE_OPTIONAL if name in scaling)):
            if not _is_positive(scaling.get(number)):
                what = f"with a positive {number!r}" + ("" if number in needed else ", or none")
                yield key, what, rope, CORRECT
        if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            yield key, "with a 'high_freq_factor' above its 'low_freq_factor'", rope, CORRECT
        theta = scaling.get("rope_theta", theta)
    if not _is_positive(theta):
        yield "rope_theta", "as a positive number", theta, CORRECT


def _no_integer(config: Mapping[str, Any], key: str, high: int) -> Iterator[Problem]:
    value = config.get(key)
    if type(value) is not int or not 1 <= value <= high:
        yield key, f"as an integer from 1 to {high}", value, CORRECT


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1e12


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
    reason = f"{missing} of its {len(target)} tokens are unknown to the drafter"
    if clash is not None:
        reason = f"id {clash} is {by_id[clash]!r} there"
    if clash is not None or missing > len(target) // 100:
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
