"""The tensors that a drafter's config.json asks for, and whether its files hold them. No vLLM.

vLLM ignores much of what is refused here: a tensor without a place, one that two shards hold. Files
are judged by their safetensors headers alone, in milliseconds; the weights while vLLM loads them.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from failfast_vllm.drafters.families import Family
from failfast_vllm.errors import echo, reason, refusal

Shape = tuple[int, ...]

INDEX = "model.safetensors.index.json"
DTYPES = ("F16", "BF16", "F32")
# buffers of old checkpoints; vLLM's AutoWeightsLoader drops the same ones
ROTARY_BUFFERS = (
    "rotary_pos_emb.inv_freq",
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
)


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


def check_files(path: Path, family: Family, config: Mapping[str, Any]) -> None:
    """Refuse weight files that vLLM could not load completely; raises ValueError.

    As in vLLM an index chooses the files, and all that they hold is loaded, whatever it says of
    single tensors; without one every `.safetensors` file counts.
    """
    files = {p.name: p for p in path.glob("*.safetensors") if not p.name.startswith(".")}
    if (path / INDEX).is_file():
        files = _choose(path / INDEX, files)
    held = (entry for _, file in sorted(files.items()) for entry in _read_header(file))
    for file, name, dtype in _wanted(str(path), held, expected_shapes(family, config)):
        if dtype not in DTYPES:
            must = f"the drafter's {file} must have {name!r} as {', '.join(DTYPES)}"
            raise refusal(must, echo(dtype), "Use unquantised weights.")


def _choose(index: Path, files: Mapping[str, Path]) -> dict[str, Path]:
    """The files that an index names; raises ValueError."""
    weight_map = read_json(index, "download it again.").get("weight_map")
    shards = weight_map.values() if isinstance(weight_map, dict) else ()
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in shards):
        must = f"the drafter's {index} must have a 'weight_map' from tensors to files"
        raise refusal(must, echo(weight_map), "Download it again.")
    for name, shard in weight_map.items():
        if shard not in files:
            raise ValueError(
                f"failfast: the drafter's {index} puts {echo(name)} into {echo(shard)}, which is "
                "not there; download the checkpoint again."
            )
    return {shard: files[shard] for shard in shards}


def check_tensors(
    source: str, weights: Iterable[tuple[str, Any]], shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, Any]]:
    """Pass on the tensors on their way into the model; raises ValueError at the first bad one.

    This is what a checkpoint from the hub meets, and what the weights of every one meet.
    """
    held = ((None, name, tuple(tensor.shape), tensor) for name, tensor in weights)
    for _, name, tensor in _wanted(source, held, shapes):
        # NaN spreads to both; isfinite would build tensors of the same size
        if not all(math.isfinite(extreme) for extreme in tensor.aminmax()):
            must = f"the drafter {source!r} must have finite weights"
            raise refusal(must, f"NaN or infinity in {name!r}", "Download it again.")
        yield name, tensor


def _wanted(
    source: str, held: Iterable[tuple[Path | None, str, Shape, Any]], shapes: Mapping[str, Shape]
) -> Iterator[tuple[Path | None, str, Any]]:
    """(file, name, value) of the tensors to load; raises ValueError at the first bad one."""
    files: dict[str, Path | None] = {}
    for file, name, shape, value in held:
        where = f"the drafter's {file}" if file else f"the drafter {source!r}"
        if name in files:
            other = files[name]
            also = f", which {other.name!r} also holds" if other else " twice"
            raise ValueError(
                f"failfast: {where} holds {echo(name)}{also}; "
                "remove the file that does not belong to the checkpoint."
            )
        files[name] = file
        if any(buffer in name for buffer in ROTARY_BUFFERS):
            continue
        # a tied checkpoint, too: vLLM uses its head where it differs from the embedding
        twin = "model.embed_tokens.weight" if name == "lm_head.weight" else name
        if twin not in shapes:
            raise ValueError(
                f"failfast: {where} holds {echo(name)}, for which its config.json has no place; "
                "use the config.json of the same checkpoint."
            )
        if shape != shapes[twin]:
            must = f"{where} must have {name!r} of shape {list(shapes[twin])}"
            raise refusal(must, echo(list(shape)), "Use the config.json of the same checkpoint.")
        yield file, name, value
    if missing := shapes.keys() - files.keys():
        raise ValueError(
            f"failfast: the drafter {source!r} lacks {len(missing)} of its {len(shapes)} tensors "
            f"(got no {min(missing)!r}); give a complete checkpoint."
        )


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """What a file says, or nothing where it is no object; raises ValueError with the remedy."""
    try:
        if file.exists() and not file.is_file():
            raise ValueError("it is not a file")  # a pipe would be read for ever
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"failfast: cannot read {file} ({reason(error)}); {remedy}") from None
    return found if isinstance(found, dict) else {}


def _read_header(file: Path) -> Iterator[tuple[Path, str, Shape, str]]:
    """(file, name, shape, dtype) of the tensors that it declares; raises ValueError."""
    try:
        if not file.is_file():  # a pipe would be read for ever
            raise OSError("it is not a file")
        with safe_open(file, framework="np") as header:
            for name in header.keys():  # noqa: SIM118 - it is no mapping
                entry = header.get_slice(name)
                yield file, name, tuple(entry.get_shape()), entry.get_dtype()
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"failfast: the drafter's weight file {file} is damaged ({reason(error)}); "
            "download it again."
        ) from None
