"""The tensors that a drafter's config.json asks for, and whether it brings them. No vLLM, no torch.

vLLM ignores much of what is refused here: a tensor that is missing or has no place.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from failfast_vllm.drafters.families import Family
from failfast_vllm.errors import echo, refusal

Shape = tuple[int, ...]


def expected_shapes(family: Family, config: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors of a checkpoint by their published names; linear weights are [out, in].

    `config` has passed `checks.check_drafter_config`. A tied checkpoint may carry an
    `lm_head.weight` besides.
    """
    config = family.filled(config)
    hidden, layer = config["hidden_size"], _attention_shapes(family, config)
    if family.has_experts:
        layer["mlp.gate.weight"] = (config["num_experts"], hidden)
        mlps = [f"mlp.experts.{i}" for i in range(config["num_experts"])]
        width = config["moe_intermediate_size"]
    else:
        mlps, width = ["mlp"], config["intermediate_size"]
    for mlp in mlps:
        layer[f"{mlp}.gate_proj.weight"] = layer[f"{mlp}.up_proj.weight"] = (width, hidden)
        layer[f"{mlp}.down_proj.weight"] = (hidden, width)
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    return shapes


def _attention_shapes(family: Family, config: Mapping[str, Any]) -> dict[str, Shape]:
    """Of one layer, with its norms."""
    hidden, head_dim = config["hidden_size"], family.head_dim(config)
    q_size = config["num_attention_heads"] * head_dim
    kv_size = config["num_key_value_heads"] * head_dim
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.o_proj.weight": (hidden, q_size),
    }
    for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
        shapes[f"self_attn.{name}_proj.weight"] = (size, hidden)
        if config.get("attention_bias", family.qkv_bias):
            shapes[f"self_attn.{name}_proj.bias"] = (size,)
        if family.qk_norm and name != "v":
            shapes[f"self_attn.{name}_norm.weight"] = (head_dim,)
    return shapes


def check_tensors(
    source: str, weights: Iterable[tuple[str, Any]], shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, Any]]:
    """Pass on the tensors on their way into the model; raises ValueError at the first bad one."""
    drafter, seen = f"the drafter {source!r}", set()
    for name, tensor in weights:
        if "rotary_" in name:
            continue  # a buffer of old checkpoints, which vLLM drops, too
        # a tied checkpoint, too: vLLM uses its head where it differs from the embedding
        twin = "model.embed_tokens.weight" if name == "lm_head.weight" else name
        if name in seen or twin not in shapes:
            what = "twice" if name in seen else "for which its config.json has no place"
            raise ValueError(
                f"failfast: {drafter} holds {echo(name)}, {what}; "
                "use the files of the same checkpoint."
            )
        seen.add(name)
        if (shape := tuple(tensor.shape)) != shapes[twin]:
            must = f"{drafter} must have {name!r} of shape {list(shapes[twin])}"
            raise refusal(must, echo(list(shape)), "Use the config.json of the same checkpoint.")
        if not tensor.is_floating_point() or tensor.element_size() == 1:
            must = f"{drafter} must have {name!r} in 16 or 32 bits"
            raise refusal(must, str(tensor.dtype), "Use unquantised weights.")
        # NaN spreads to both; isfinite would build tensors of the same size
        if not all(math.isfinite(extreme) for extreme in tensor.aminmax()):
            must = f"{drafter} must have finite weights"
            raise refusal(must, f"NaN or infinity in {name!r}", "Download it again.")
        yield name, tensor
    if missing := shapes.keys() - seen:
        raise ValueError(
            f"failfast: {drafter} lacks {len(missing)} of its {len(shapes)} tensors "
            f"(got no {min(missing)!r}); give a complete checkpoint."
        )
