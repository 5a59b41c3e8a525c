"""`failfast plan`: the memory of a drafter beside a target, from their configs alone.

Weights and KV are exact sums over the tensors of a checkpoint. No vLLM, no torch, no network.
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
)
from failfast_vllm.drafters.families import (
    BLOCK_SIZE_NAMES,
    DIFFUSION_BLOCK_SIZES,
    FAMILIES,
    Family,
    family_of,
)
from failfast_vllm.errors import echo
from failfast_vllm.tools import published_models as published
from failfast_vllm.tools.offline import positive

COPIES_ALONE = "drafts are copies of each request's own text, which take no memory"
GPU = "H200"
NUM_SEQS = 64  # verified at once, for the memory of their logits: float32, as they are sampled
DRAFT_LEN = FailFastConfig.from_user({}).num_speculative_tokens
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
EXPERT_SIZES = ("moe_intermediate_size", "num_experts", "num_experts_per_tok")
# a family has the tensors of the target that it was trained from
LAYOUTS = {family.base_model.split(".")[0]: family for family in reversed(FAMILIES)}


class Memory(NamedTuple):
    """Of a model."""

    weight_bytes: int
    kv_bytes_per_token: int  # of all layers, at the dtype of the weights
    doubt: str  # why the weights are not exact, or ""


def memory_of(name: str, config: Mapping[str, Any]) -> Memory:
    """What the model that a `config.json` describes takes.

    Raises:
        ValueError: a model type whose tensors are not known here, or a missing field.
    """
    layout, config = _layout_of(name, config)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if dtype not in BYTES:
        raise ValueError(f"{name!r} must have a dtype of {', '.join(BYTES)}; got {echo(dtype)}.")
    width = BYTES[dtype]
    linear_width, doubt, quantised = float(width), "", config.get("quantization_config")
    if isinstance(quantised, Mapping):
        bits = quantised.get("bits", 8 if quantised.get("quant_method") == "fp8" else 0)
        linear_width = bits / 8 if type(bits) is int and 0 < bits <= 32 else 0
        counted = "embeddings, biases and norms only"
        if linear_width:
            counted = f"linear layers at {bits} bits, without scales"
        doubt = f"is quantised: its weights are not exact ({counted})"
    num_layers = config["num_hidden_layers"]
    weight_bytes = sum(
        math.prod(dims) * (linear_width if tensor.endswith("_proj.weight") else width)
        for tensor, dims in expected_shapes(layout, config).items()
    )
    if layout.qk_norm and config.get("attention_bias"):  # Qwen3 then has one on o_proj, too
        weight_bytes += num_layers * config["hidden_size"] * width
    values = 2 * num_layers * config["num_key_value_heads"] * config["head_dim"]
    return Memory(int(weight_bytes), values * width, doubt)


def _layout_of(name: str, config: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family with a model's tensors, and its config with all sizes; raises ValueError."""
    family, model_type = family_of(config.get("architectures")), config.get("model_type")
    layout = family or LAYOUTS.get(str(model_type))
    if layout is None:
        raise ValueError(
            f"the tensors of {name!r} are not known (model type {echo(model_type)}); "
            f"give a config of {', '.join(sorted(LAYOUTS))} or of a drafter."
        )
    # of a target all must be stated, but transformers' Qwen3Config has heads of 128
    filled = family.filled(config) if family else dict(config)
    stated = ("head_dim",) if filled.get("head_dim") is not None else ()
    for key in (*published.SIZES, *EXPERT_SIZES * layout.has_experts, *stated):
        value, most = filled.get(key), MAX_SIZE if key.endswith("_size") else MAX_COUNT
        if type(value) is not int or not 1 <= value <= most:
            must = f"{name!r} must have {key!r} as an integer from 1 to {most}"
            raise ValueError(f"{must}; got {echo(value)}.")
    is_mixed = filled.get("mlp_only_layers") or filled.get("decoder_sparse_step", 1) != 1
    if layout.has_experts and is_mixed:
        raise ValueError(f"{name!r} mixes dense and expert layers; only all-expert ones are known.")
    heads = {"head_dim": 128} if layout.qk_norm else {}
    filled["head_dim"] = layout.head_dim({**heads, **filled})
    return layout, filled


def make_plan(
    target: str, drafter: str | None = None, diffusion_block_size: int | None = None, gpu: str = GPU
) -> dict[str, Any]:
    """What `--json` prints. Raises ValueError, one line, on anything unknown."""
    if gpu not in published.GPUS:
        raise ValueError(f"--gpu must be one of {', '.join(published.GPUS)}; got {gpu!r}.")
    target, config = load_config(target, published.PUBLISHED_TARGETS)
    vocab_size = config.get("vocab_size", 0)
    drafter = drafter or choose_drafter(target, str(config.get("model_type")), vocab_size)
    if drafter is None:
        return {"target": target, "drafter": None}
    memory = {"target": memory_of(target, config)}
    drafter, config = load_config(drafter, published.PUBLISHED_DRAFTERS)
    if diffusion_block_size not in (None, *DIFFUSION_BLOCK_SIZES):
        raise ValueError(
            f"--diffusion-block-size must be one of {BLOCK_SIZE_NAMES}; got {diffusion_block_size}."
        )
    family = check_drafter_config(drafter, config, diffusion_block_size)
    block = find_block_size(drafter, family, config, diffusion_block_size)
    memory["drafter"] = memory_of(drafter, config)
    names = {"target": target, "drafter": drafter}
    notes = ["tokenizers are compared when vLLM starts, not here"]
    notes += [f"{names[key]} {part.doubt}" for key, part in memory.items() if part.doubt]
    if block.doubt:
        notes.append(f"{drafter} drafts in blocks of {block.size}: {block.doubt}")
    kv = {key: part.kv_bytes_per_token for key, part in memory.items()}
    return {
        **names,
        "family": family.name,
        "diffusion_block_size": block.size,
        "gpu": {"name": gpu, "memory": published.GPUS[gpu]},
        "weight_bytes": {key: part.weight_bytes for key, part in memory.items()},
        "weight_bytes_exact": {key: not part.doubt for key, part in memory.items()},
        "weights_fit": sum(part.weight_bytes for part in memory.values()) <= published.GPUS[gpu],
        "kv_bytes_per_token": kv,
        "drafter_share_of_kv": kv["drafter"] / sum(kv.values()),
        "verification_logits_bytes": NUM_SEQS * (DRAFT_LEN + 1) * vocab_size * 4,
        "notes": notes,
    }


def load_config(name: str, known: Mapping[str, Mapping[str, Any]]) -> tuple[str, Mapping[str, Any]]:
    """The directory or hub id, and the config, of a checkpoint, a config.json or a published model.

    Raises:
        ValueError: none of them, or no JSON object.
    """
    path = Path(name)
    if path.exists():
        path = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"cannot read {path} ({error}); give a config.json.") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path} holds no JSON object; give a config.json.")
        return str(path.parent), config
    for hub_id, config in known.items():
        if name.lower() in (hub_id.lower(), hub_id.split("/")[1].lower()):
            return hub_id, config
    raise ValueError(
        f"{name!r} is neither a path nor one of {', '.join(known)}; "
        "give a checkpoint directory or a config.json."
    )


def render(plan: Mapping[str, Any]) -> str:
    """The report for a reader."""
    if plan["drafter"] is None:
        return f"target    {plan['target']}\ndrafter   none is known: {COPIES_ALONE}"
    kv, gpu = plan["kv_bytes_per_token"], plan["gpu"]
    weights = []
    for key, count in plan["weight_bytes"].items():
        size = f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
        doubt = "" if plan["weight_bytes_exact"][key] else " (not exact)"
        weights.append(f"{key} {size}{doubt}")
    fit = "the weights fit" if plan["weights_fit"] else "the weights do not fit"
    lines = (
        f"target    {plan['target']}",
        f"drafter   {plan['drafter']} ({plan['family']}, blocks of {plan['diffusion_block_size']})",
        f"weights   {', '.join(weights)}",
        f"KV        target {kv['target'] / 1024:g} KiB per token, drafter "
        f"{kv['drafter'] / 1024:g} KiB: {plan['drafter_share_of_kv']:.0%} of the pool",
        f"logits    {plan['verification_logits_bytes'] / 1e6:.0f} MB float32 at most: "
        f"{NUM_SEQS} drafts of {DRAFT_LEN} tokens, verified at once",
        f"GPU       {fit}: {gpu['name']} has {gpu['memory'] / 1e9:g} GB",
        "",
        *(f"- {note}" for note in plan["notes"]),
    )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `failfast plan`."""
    add = parser.add_argument
    add("target", metavar="TARGET", help="checkpoint directory, config.json or name")
    add("--drafter", metavar="PATH_OR_ID", help="default: the family's own")
    text = "as in the speculative config"
    add("--diffusion-block-size", type=positive, metavar="N", help=text)
    add("--gpu", default=GPU, metavar="NAME", help=f"default: {GPU}")


def run(args: argparse.Namespace) -> int:
    """Print what the pair takes."""
    plan = make_plan(args.target, args.drafter, args.diffusion_block_size, args.gpu)
    print(json.dumps(plan, indent=2) if args.json else render(plan))
    return 0
