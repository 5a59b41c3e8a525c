"""`failfast plan`: the memory of a drafter beside a target, from their configs alone.

Weights and KV are exact sums over the tensors of a checkpoint. No vLLM, no torch.
"""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from failfast_vllm.config import FailFastConfig
from failfast_vllm.drafters.checkpoint import expected_shapes
from failfast_vllm.drafters.checks import (
    MAX_COUNT,
    MAX_SIZE,
    check_drafter_config,
    choose_drafter,
    find_block_size,
    read_json,
)
from failfast_vllm.drafters.families import FAMILIES, family_of
from failfast_vllm.errors import echo, reason

COUNTS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZES = ("hidden_size", "intermediate_size", "vocab_size")
EXPERT_SIZES = ("num_experts", "moe_intermediate_size")
COPIES_ALONE = "drafts are copies of each request's own text, which take no memory"
NUM_SEQS = 64  # verified at once, for the memory of their logits: float32, as they are sampled
DRAFT_LEN = FailFastConfig.from_user({}).num_speculative_tokens
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# a family has the tensors of the target that it was trained from
LAYOUTS = {family.base_model.split(".")[0]: family for family in FAMILIES}


class Memory(NamedTuple):
    """Of a model."""

    weight_bytes: int
    kv_bytes_per_token: int  # of all layers, at the dtype of the weights
    is_exact: bool  # else its weights are quantised


def memory_of(name: str, config: Mapping[str, Any]) -> Memory:
    """What the model that a `config.json` describes takes.

    Raises:
        ValueError: a model type whose tensors are not known here, or a wrong field.
    """
    model_type = config.get("model_type")
    layout = family_of(config.get("architectures")) or LAYOUTS.get(str(model_type))
    if layout is None:
        raise ValueError(
            f"the tensors of {name!r} are not known (model type {echo(model_type)}); "
            f"give a config of {', '.join(sorted(LAYOUTS))} or of a drafter."
        )
    config = layout.filled(config)
    stated = ("head_dim",) if config.get("head_dim") is not None else ()
    for key in (*COUNTS, *SIZES, *EXPERT_SIZES * layout.has_experts, *stated):
        value, most = config.get(key), MAX_SIZE if key.endswith("_size") else MAX_COUNT
        if type(value) is not int or not 1 <= value <= most:
            must = f"{name!r} must have {key!r} as an integer from 1 to {most}"
            raise ValueError(f"{must}; got {echo(value)}.")
    is_mixed = config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1
    if layout.has_experts and is_mixed:
        raise ValueError(f"{name!r} mixes dense and expert layers; only all-expert ones are known.")
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if dtype not in BYTES:
        raise ValueError(f"{name!r} must have a dtype of {', '.join(BYTES)}; got {echo(dtype)}.")
    num_values = sum(map(math.prod, expected_shapes(layout, config).values()))
    num_layers = config["num_hidden_layers"]
    if layout.qk_norm and config.get("attention_bias"):  # Qwen3 then has one on o_proj, too
        num_values += num_layers * config["hidden_size"]
    kv_values = 2 * num_layers * config["num_key_value_heads"] * layout.head_dim(config)
    is_exact = config.get("quantization_config") is None
    return Memory(num_values * BYTES[dtype], kv_values * BYTES[dtype], is_exact)


def make_plan(target: str, drafter: str | None = None) -> dict[str, Any]:
    """What `--json` prints. Raises ValueError, one line, on anything unknown."""
    target, config = load_config(target)
    vocab_size = config.get("vocab_size", 0)
    drafter = drafter or choose_drafter(target, str(config.get("model_type")), vocab_size)
    if drafter is None:
        return {"target": target, "drafter": None}
    memory = {"target": memory_of(target, config)}
    drafter, config = load_config(drafter)
    family = check_drafter_config(drafter, config, None)
    block = find_block_size(drafter, family, config)
    memory["drafter"] = memory_of(drafter, config)
    names = {"target": target, "drafter": drafter}
    notes = ["tokenizers are compared when vLLM starts, not here"]
    for key, part in memory.items():
        if not part.is_exact:
            notes.append(f"{names[key]} is quantised: it takes less than these unquantised weights")
    if block.doubt:
        notes.append(f"{drafter} drafts in blocks of {block.size}: {block.doubt}")
    kv = {key: part.kv_bytes_per_token for key, part in memory.items()}
    return {
        **names,
        "family": family.name,
        "diffusion_block_size": block.size,
        "weight_bytes": {key: part.weight_bytes for key, part in memory.items()},
        "weight_bytes_exact": {key: part.is_exact for key, part in memory.items()},
        "kv_bytes_per_token": kv,
        "drafter_share_of_kv": kv["drafter"] / sum(kv.values()),
        "verification_logits_bytes": NUM_SEQS * (DRAFT_LEN + 1) * vocab_size * 4,
        "notes": notes,
    }


def load_config(name: str) -> tuple[str, Mapping[str, Any]]:
    """Name and config of a checkpoint directory, a config.json or a hub id; raises ValueError."""
    path = Path(name)
    if path.exists():
        path = path / "config.json" if path.is_dir() else path
        return str(path.parent), read_json(path, "give a config.json.")
    from huggingface_hub import hf_hub_download

    try:
        found = hf_hub_download(name, "config.json")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} is no path, and the hub gives no config.json for it ({reason(error)}); "
            "give a checkpoint directory, a config.json or a hub id."
        ) from None
    return name, read_json(Path(found), "download it again.")


def render(plan: Mapping[str, Any]) -> str:
    """The report for a reader."""
    if plan["drafter"] is None:
        return f"target    {plan['target']}\ndrafter   none is known: {COPIES_ALONE}"
    kv, weights = plan["kv_bytes_per_token"], []
    for key, count in plan["weight_bytes"].items():
        size = f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
        doubt = "" if plan["weight_bytes_exact"][key] else " (not exact)"
        weights.append(f"{key} {size}{doubt}")
    lines = (
        f"target    {plan['target']}",
        f"drafter   {plan['drafter']} ({plan['family']}, blocks of {plan['diffusion_block_size']})",
        f"weights   {', '.join(weights)}",
        f"KV        target {kv['target'] / 1024:g} KiB per token, drafter "
        f"{kv['drafter'] / 1024:g} KiB: {plan['drafter_share_of_kv']:.0%} of the pool",
        f"logits    {plan['verification_logits_bytes'] / 1e6:.0f} MB float32 at most: "
        f"{NUM_SEQS} drafts of {DRAFT_LEN} tokens, verified at once",
        "",
        *(f"- {note}" for note in plan["notes"]),
    )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `failfast plan`."""
    text = "checkpoint directory, config.json or hub id"
    parser.add_argument("target", metavar="TARGET", help=text)
    parser.add_argument("--drafter", metavar="PATH_OR_ID", help="default: the family's own")


def run(args: argparse.Namespace) -> int:
    """Print what the pair takes."""
    plan = make_plan(args.target, args.drafter)
    print(json.dumps(plan, indent=2) if args.json else render(plan))
    return 0
