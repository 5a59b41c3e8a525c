"""What a drafter's checkpoint must hold, checked before vLLM builds a model. No vLLM, no torch.

vLLM ignores or misreads much of what is refused here: a bias without a place, a sliding window, a
tensor that two shards hold. Files are judged by their safetensors headers alone (8 bytes of
little-endian length, JSON, then data without holes), in milliseconds; the weights themselves are
judged while vLLM loads them.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from failfast_vllm.drafters.families import Family

Shape = tuple[int, ...]

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
BYTES_PER_ELEMENT = {"F16": 2, "BF16": 2, "F32": 4}
# buffers of old checkpoints; vLLM's AutoWeightsLoader drops the same ones
ROTARY_BUFFERS = (
    "rotary_pos_emb.inv_freq",
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
)
SIZE_LIMITS = {  # far beyond any drafter; a larger value is a slip
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "num_hidden_layers": 512,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "vocab_size": 1 << 20,
    "max_position_embeddings": 1 << 24,
}
MAX_HEAD_DIM = 512
MAX_ROPE_NUMBER = 1e12
ROPE_NUMBERS = {  # what each type of scaling cannot do without
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
# what transformers fills in where it is absent, and would break on null
ROPE_OPTIONAL = ("original_max_position_embeddings", "beta_fast", "beta_slow")
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
EXPERT_LIMITS = {"num_experts": 1 << 12, "moe_intermediate_size": 1 << 18}


class Tensor(NamedTuple):
    """One entry of a safetensors header."""

    dtype: str
    shape: Shape
    begin: int  # bytes from the end of the header
    end: int


def expected_shapes(family: Family, config: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors of a checkpoint by their published names; linear weights are [out, in].

    `config` has passed `check_config`. A tied checkpoint may carry an `lm_head.weight` besides.
    """
    config = family.filled(config)
    hidden = config["hidden_size"]
    heads = config["num_attention_heads"]
    head_dim = config["head_dim"] if family.states_head_dim else hidden // heads
    q_size, kv_size = heads * head_dim, config["num_key_value_heads"] * head_dim
    layer: dict[str, Shape] = {
        "self_attn.q_proj.weight": (q_size, hidden),
        "self_attn.k_proj.weight": (kv_size, hidden),
        "self_attn.v_proj.weight": (kv_size, hidden),
        "self_attn.o_proj.weight": (hidden, q_size),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config.get("attention_bias", family.qkv_bias):
        layer["self_attn.q_proj.bias"] = (q_size,)
        layer["self_attn.k_proj.bias"] = (kv_size,)
        layer["self_attn.v_proj.bias"] = (kv_size,)
    if family.qk_norm:
        layer["self_attn.q_norm.weight"] = (head_dim,)
        layer["self_attn.k_norm.weight"] = (head_dim,)
    dense = _mlp_shapes("mlp", hidden, config["intermediate_size"])
    sparse: dict[str, Shape] = {}
    with_experts = expert_layers(config) if family.has_experts else frozenset()
    if with_experts:
        sparse["mlp.gate.weight"] = (config["num_experts"], hidden)
        for i in range(config["num_experts"]):
            sparse |= _mlp_shapes(f"mlp.experts.{i}", hidden, config["moe_intermediate_size"])
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        for name, shape in (layer | (sparse if i in with_experts else dense)).items():
            shapes[f"model.layers.{i}.{name}"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    return shapes


def _mlp_shapes(name: str, hidden: int, width: int) -> dict[str, Shape]:
    return {
        f"{name}.gate_proj.weight": (width, hidden),
        f"{name}.up_proj.weight": (width, hidden),
        f"{name}.down_proj.weight": (hidden, width),
    }


def expert_layers(config: Mapping[str, Any]) -> frozenset[int]:
    """The layers that have experts in place of a dense MLP, by Qwen3-MoE's rule."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    layers = range(config["num_hidden_layers"])
    return frozenset(i for i in layers if i not in dense and (i + 1) % step == 0)


def check_config(model: str, family: Family, config: Mapping[str, Any]) -> None:
    """Refuse sizes that cannot be and settings that vLLM would not follow; raises ValueError."""
    config = family.filled(config)

    def refuse(key: str, must: str, got: Any, remedy: str) -> None:
        raise ValueError(
            f"failfast: the drafter {model!r} must have {key!r} {must}; got {_short(got)}. {remedy}"
        )

    def integer(key: str, high: int) -> int:
        value: Any = config.get(key)
        if not _is_integer(value) or not 1 <= value <= high:
            refuse(key, f"as an integer from 1 to {high}", value, "Correct its config.json.")
        return int(value)

    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            refuse(key, "absent", config[key], "Use its unquantised weights.")
    projections = {
        "attention_bias": (True,) if family.qkv_bias else (False, True),
        "qk_norm": (family.qk_norm,),
    }
    experts = {"norm_topk_prob": (False, True)} if family.has_experts else NO_EXPERTS
    for key, allowed in (ALLOWED | projections | experts).items():
        value = config.get(key, allowed[0])
        if repr(value) not in map(repr, allowed):  # True is no 1 here
            names = " or ".join(map(json.dumps, allowed))
            refuse(key, f"as {names}", value, "Another layout cannot be loaded.")

    sizes = {key: integer(key, high) for key, high in SIZE_LIMITS.items()}
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    kv_heads = sizes["num_key_value_heads"]
    if heads % kv_heads:
        what = f"as a divisor of 'num_attention_heads' ({heads})"
        refuse("num_key_value_heads", what, kv_heads, "Correct its config.json.")
    if family.states_head_dim:
        head_dim = integer("head_dim", MAX_HEAD_DIM)
        if head_dim % 2:
            refuse("head_dim", "even", head_dim, "Correct its config.json.")
    else:
        head_dim, rest = divmod(hidden, heads)
        if rest or head_dim % 2:
            what = f"that splits 'hidden_size' ({hidden}) into heads of even size"
            refuse("num_attention_heads", what, heads, "Correct its config.json.")
        if config.get("head_dim") not in (None, head_dim):
            what = f"equal to 'hidden_size' / 'num_attention_heads' ({head_dim})"
            refuse("head_dim", what, config["head_dim"], "Correct its config.json.")

    if family.has_experts:
        _check_experts(config, integer, refuse)

    layer_types = config.get("layer_types")
    if layer_types not in (None, ["full_attention"] * sizes["num_hidden_layers"]):
        refuse(
            "layer_types",
            "with 'full_attention' for each layer",
            layer_types,
            "Others cannot be loaded.",
        )
    epsilon = config.get("rms_norm_eps", 1e-6)
    if not _is_positive(epsilon) or epsilon >= 1:
        refuse("rms_norm_eps", "between 0 and 1", epsilon, "Correct its config.json.")
    _check_rope(config, refuse)


def _check_experts(
    config: Mapping[str, Any], integer: Callable[[str, int], int], refuse: Callable[..., None]
) -> None:
    sizes = {key: integer(key, high) for key, high in EXPERT_LIMITS.items()}
    integer("num_experts_per_tok", sizes["num_experts"])
    if "norm_topk_prob" not in config:  # both occur
        refuse("norm_topk_prob", "as false or true", None, "Correct its config.json.")
    if "decoder_sparse_step" in config:
        integer("decoder_sparse_step", SIZE_LIMITS["num_hidden_layers"])
    dense = config.get("mlp_only_layers")
    if dense is not None and not (isinstance(dense, list) and all(map(_is_integer, dense))):
        what = "as a list of layer numbers"
        refuse("mlp_only_layers", what, dense, "Correct its config.json.")
    if not expert_layers(config):
        what = "and 'decoder_sparse_step' that leave a layer with experts"
        refuse("mlp_only_layers", what, dense, "Without experts it is another model.")


def _check_rope(config: Mapping[str, Any], refuse: Callable[..., None]) -> None:
    theta = config.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):  # the older name first
        rope = config.get(key)
        if rope is None:
            continue
        fields = rope if isinstance(rope, dict) else {"rope_type": rope}
        kind = str(fields.get("rope_type", fields.get("type", "default")))
        if kind not in ROPE_NUMBERS or rope is not fields or "mrope_section" in fields:
            types = ", ".join(ROPE_NUMBERS)
            refuse(key, f"with a 'rope_type' among {types}", rope, "Others cannot be loaded.")
        for number in ROPE_NUMBERS[kind]:
            if not _is_positive(fields.get(number)):
                refuse(key, f"with a positive {number!r}", rope, "Correct its config.json.")
        for number in ROPE_OPTIONAL:
            if number in fields and not _is_positive(fields[number]):
                refuse(
                    key, f"with a positive {number!r}, or none", rope, "Correct its config.json."
                )
        if kind == "llama3" and fields["low_freq_factor"] >= fields["high_freq_factor"]:
            what = "with a 'high_freq_factor' above its 'low_freq_factor'"
            refuse(key, what, rope, "Correct its config.json.")
        theta = fields.get("rope_theta", theta)
    if not _is_positive(theta):
        refuse("rope_theta", "as a positive number", theta, "Correct its config.json.")


def check_files(path: Path, family: Family, config: Mapping[str, Any]) -> None:
    """Refuse weight files that vLLM could not load completely; raises ValueError.

    As in vLLM an index chooses the files and those it does not name are ignored; without one
    every `.safetensors` file counts.
    """
    files = {p.name: p for p in path.glob("*.safetensors") if not p.name.startswith(".")}
    index = path / INDEX
    weight_map = read_index(index) if index.is_file() else None
    if weight_map is not None:
        for name, shard in weight_map.items():
            if shard not in files:
                raise ValueError(
                    f"failfast: the drafter's {index} puts {name!r} into {shard!r}, which is "
                    "not there; download the checkpoint again."
                )
        files = {shard: files[shard] for shard in set(weight_map.values())}

    shapes = expected_shapes(family, config)
    holders: dict[str, str] = {}  # tensor -> its file
    for shard, file in sorted(files.items()):
        for name, tensor in read_header(file).items():
            if name in holders:
                raise ValueError(
                    f"failfast: the drafter's {file} holds {name!r}, which {holders[name]!r} also "
                    "holds; remove the file that does not belong to the checkpoint."
                )
            if weight_map is not None and weight_map.get(name) != shard:
                raise ValueError(
                    f"failfast: the drafter's {file} holds {name!r}, which {INDEX} puts into "
                    f"{weight_map.get(name, 'no file')!r}; download the checkpoint again."
                )
            holders[name] = shard
            if _is_wanted(f"the drafter's {file}", name, tensor.shape, shapes):
                _check_bytes(file, name, tensor)
    for name, shard in (weight_map or {}).items():
        if name not in holders:
            raise ValueError(
                f"failfast: the drafter's {path / shard} lacks {name!r}, which {INDEX} puts there; "
                "download the checkpoint again."
            )
    check_complete(str(path), holders, shapes)


def _check_bytes(file: Path, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in BYTES_PER_ELEMENT:
        raise ValueError(
            f"failfast: the drafter's {file} must have {name!r} as "
            f"{', '.join(BYTES_PER_ELEMENT)}; got {_short(tensor.dtype)}. Use unquantised weights."
        )
    num_bytes = BYTES_PER_ELEMENT[tensor.dtype] * math.prod(tensor.shape)
    if num_bytes != tensor.end - tensor.begin:
        got = f"got {tensor.end - tensor.begin}"
        raise _damaged(file, f"{name!r} must have {num_bytes} bytes; {got}")


def check_complete(source: str, names: Iterable[str], shapes: Mapping[str, Shape]) -> None:
    """Refuse a checkpoint without one of its tensors; raises ValueError."""
    missing = shapes.keys() - set(names)
    if missing:
        raise ValueError(
            f"failfast: the drafter {source!r} lacks {len(missing)} of its {len(shapes)} tensors "
            f"(got no {min(missing)!r}); give a complete checkpoint."
        )


def check_tensors(
    source: str, weights: Iterable[tuple[str, Any]], shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, Any]]:
    """Pass on the tensors on their way into the model; raises ValueError at the first bad one.

    This is what a checkpoint from the hub meets, and what the weights of every one meet.
    """
    seen: set[str] = set()
    for name, tensor in weights:
        if name in seen:
            raise ValueError(
                f"failfast: the drafter {source!r} holds {name!r} twice; "
                "remove the file that does not belong to the checkpoint."
            )
        seen.add(name)
        if not _is_wanted(f"the drafter {source!r}", name, tuple(tensor.shape), shapes):
            continue
        # NaN spreads to both; isfinite would build tensors of the same size
        if not all(math.isfinite(extreme) for extreme in tensor.aminmax()):
            raise ValueError(
                f"failfast: the drafter {source!r} must have finite weights; got NaN or infinity "
                f"in {name!r}. Download it again."
            )
        yield name, tensor
    check_complete(source, seen, shapes)


def _is_wanted(where: str, name: str, shape: Shape, shapes: Mapping[str, Shape]) -> bool:
    """Whether a tensor is one to load; raises ValueError if it has no place in the model."""
    if any(buffer in name for buffer in ROTARY_BUFFERS):
        return False
    # of a tied checkpoint too: vLLM uses it where it differs from the embedding
    is_head = name == "lm_head.weight"
    expected = shapes["model.embed_tokens.weight"] if is_head else shapes.get(name)
    if expected is None:
        raise ValueError(
            f"failfast: {where} holds {name!r}, for which its config.json has no place; "
            "use the config.json of the same checkpoint."
        )
    if shape != expected:
        raise ValueError(
            f"failfast: {where} must have {name!r} of shape {list(expected)}; "
            f"got {_short(list(shape))}. Use the config.json of the same checkpoint."
        )
    return True


def read_index(file: Path) -> dict[str, str]:
    """The index's {tensor: shard}; raises ValueError."""
    try:
        index = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"failfast: cannot read the drafter's {file} ({_reason(error)}); download it again."
        ) from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise ValueError(
            f"failfast: the drafter's {file} must have a 'weight_map' from tensors to files; "
            f"got {_short(weight_map)}. Download it again."
        )
    return weight_map


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors that a safetensors file declares, all inside the file; raises ValueError."""
    try:
        header, num_data_bytes = _header_json(file)
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, _reason(error)) from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(file, f"its '__metadata__' must be strings; got {_short(metadata)}")
    tensors = {}
    for name, entry in header.items():
        tensor = _as_tensor(entry)
        if tensor is None:
            raise _damaged(
                file, f"{name!r} must have a dtype, a shape and two offsets; got {_short(entry)}"
            )
        tensors[name] = tensor
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if tensor.begin != end or tensor.end < end:
            got = _short([tensor.begin, tensor.end])
            raise _damaged(file, f"the bytes of {name!r} must begin at {end}; got {got}")
        end = tensor.end
    if end != num_data_bytes:
        raise _damaged(file, f"it must hold {_short(end)} bytes of weights; got {num_data_bytes}")
    return tensors


def _header_json(file: Path) -> tuple[dict[str, Any], int]:
    """The header and how many bytes follow it; raises OSError, ValueError or RecursionError."""
    if not file.is_file():  # a pipe would be read for ever
        raise ValueError("it is not a file")
    num_bytes = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if num_bytes < 8 or length > min(num_bytes - 8, MAX_HEADER_BYTES):
            raise ValueError(f"it has {num_bytes} bytes and claims a header of {length}")
        text = stream.read(length).decode("utf-8")
    header = json.loads(text, object_pairs_hook=_without_repeats)
    if not isinstance(header, dict):
        raise ValueError(f"its header must be an object; got {_short(header)}")
    return header, num_bytes - 8 - length


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"its header has {key!r} twice")
        fields[key] = value
    return fields


def _damaged(file: Path, what: str) -> ValueError:
    return ValueError(
        f"failfast: the drafter's weight file {file} is damaged ({what}); download it again."
    )


def _as_tensor(entry: Any) -> Tensor | None:
    if not isinstance(entry, dict):
        return None
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        return None
    if len(offsets) != 2 or not all(_is_integer(n) and n >= 0 for n in (*shape, *offsets)):
        return None
    return Tensor(dtype, tuple(shape), *offsets)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value <= MAX_ROPE_NUMBER


def _short(value: Any) -> str:
    """Text for one line, whatever a file says."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
