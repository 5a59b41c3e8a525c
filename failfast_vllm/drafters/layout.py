"""What a drafter's config.json must say, and the tensors that it asks for. No vLLM, no torch.

vLLM ignores or misreads much of what is refused here: a sliding window, an unknown rope.
"""

import json
from collections.abc import Mapping
from typing import Any, NoReturn, TypeGuard

from failfast_vllm.drafters.errors import echo
from failfast_vllm.drafters.families import Family

Shape = tuple[int, ...]

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


def expected_shapes(family: Family, config: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors of a checkpoint by their published names; linear weights are [out, in].

    `config` has passed `check_config`. A tied checkpoint may carry an `lm_head.weight` besides.
    """
    config = family.filled(config)
    hidden = config["hidden_size"]
    attention = _attention_shapes(family, config)
    dense = _mlp_shapes("mlp", hidden, config["intermediate_size"])
    with_experts = expert_layers(config) if family.has_experts else frozenset()
    sparse: dict[str, Shape] = {}
    if with_experts:
        sparse["mlp.gate.weight"] = (config["num_experts"], hidden)
        for i in range(config["num_experts"]):
            sparse |= _mlp_shapes(f"mlp.experts.{i}", hidden, config["moe_intermediate_size"])
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        for name, shape in (attention | (sparse if i in with_experts else dense)).items():
            shapes[f"model.layers.{i}.{name}"] = shape
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


class _ConfigError(ValueError):
    """What a config.json must have, what it has, what to do."""


def check_config(model: str, family: Family, config: Mapping[str, Any]) -> None:
    """Refuse sizes that cannot be and settings that vLLM would not follow; raises ValueError."""
    config = family.filled(config)
    try:
        _check_settings(config, family)
        for key, high in SIZE_LIMITS.items():
            _check_integer(config, key, high)
        _check_heads(config, family)
        if family.has_experts:
            _check_experts(config)
        _check_layers(config)
        _check_rope(config)
    except _ConfigError as error:
        raise ValueError(f"failfast: the drafter {model!r} must have {error}") from None


def _refuse(key: str, must: str, got: Any, remedy: str = "Correct its config.json.") -> NoReturn:
    raise _ConfigError(f"{key!r} {must}; got {echo(got)}. {remedy}")


def _check_integer(config: Mapping[str, Any], key: str, high: int) -> None:
    value = config.get(key)
    if not is_integer(value) or not 1 <= value <= high:
        _refuse(key, f"as an integer from 1 to {high}", value)


def _check_settings(config: Mapping[str, Any], family: Family) -> None:
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            _refuse(key, "absent", config[key], "Use its unquantised weights.")
    projections = {
        "attention_bias": (True,) if family.qkv_bias else (False, True),
        "qk_norm": (family.qk_norm,),
    }
    experts = {"norm_topk_prob": (False, True)} if family.has_experts else NO_EXPERTS
    for key, allowed in (ALLOWED | projections | experts).items():
        value = config.get(key, allowed[0])
        if repr(value) not in map(repr, allowed):  # True is no 1 here
            names = " or ".join(map(json.dumps, allowed))
            _refuse(key, f"as {names}", value, "Another layout cannot be loaded.")


def _check_heads(config: Mapping[str, Any], family: Family) -> None:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads, stated = config["num_key_value_heads"], config.get("head_dim")
    if heads % kv_heads:
        _refuse("num_key_value_heads", f"as a divisor of 'num_attention_heads' ({heads})", kv_heads)
    if family.qk_norm:
        _check_integer(config, "head_dim", MAX_HEAD_DIM)
        if config["head_dim"] % 2:
            _refuse("head_dim", "even", stated)
        return
    head_dim, rest = divmod(hidden, heads)
    if rest or head_dim % 2:
        must = f"that splits 'hidden_size' ({hidden}) into heads of even size"
        _refuse("num_attention_heads", must, heads)
    if stated not in (None, head_dim):
        must = f"equal to 'hidden_size' / 'num_attention_heads' ({head_dim})"
        _refuse("head_dim", must, stated)


def _check_experts(config: Mapping[str, Any]) -> None:
    for key, high in EXPERT_LIMITS.items():
        _check_integer(config, key, high)
    _check_integer(config, "num_experts_per_tok", config["num_experts"])
    if "norm_topk_prob" not in config:  # both occur
        _refuse("norm_topk_prob", "as false or true", None)
    if "decoder_sparse_step" in config:
        _check_integer(config, "decoder_sparse_step", SIZE_LIMITS["num_hidden_layers"])
    dense = config.get("mlp_only_layers")
    if dense is not None and not (isinstance(dense, list) and all(map(is_integer, dense))):
        _refuse("mlp_only_layers", "as a list of layer numbers", dense)
    if not expert_layers(config):
        must = "and 'decoder_sparse_step' that leave a layer with experts"
        _refuse("mlp_only_layers", must, dense, "Without experts it is another model.")


def _check_layers(config: Mapping[str, Any]) -> None:
    types = config.get("layer_types")
    if types not in (None, ["full_attention"] * config["num_hidden_layers"]):
        must = "with 'full_attention' for each layer"
        _refuse("layer_types", must, types, "Others cannot be loaded.")
    epsilon = config.get("rms_norm_eps", 1e-6)
    if not _is_positive(epsilon) or epsilon >= 1:
        _refuse("rms_norm_eps", "between 0 and 1", epsilon)


def _check_rope(config: Mapping[str, Any]) -> None:
    theta = config.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):  # the older name first
        rope = config.get(key)
        if rope is not None:
            _check_scaling(key, rope)
            theta = rope.get("rope_theta", theta)
    if not _is_positive(theta):
        _refuse("rope_theta", "as a positive number", theta)


def _check_scaling(key: str, rope: Any) -> None:
    scaling: dict[str, Any] = rope if isinstance(rope, dict) else {"rope_type": None}
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    if kind not in ROPE_NUMBERS or "mrope_section" in scaling:
        must = f"with a 'rope_type' among {', '.join(ROPE_NUMBERS)}"
        _refuse(key, must, rope, "Others cannot be loaded.")
    for number in ROPE_NUMBERS[kind]:
        if not _is_positive(scaling.get(number)):
            _refuse(key, f"with a positive {number!r}", rope)
    for number in ROPE_OPTIONAL:
        if number in scaling and not _is_positive(scaling[number]):
            _refuse(key, f"with a positive {number!r}, or none", rope)
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        _refuse(key, "with a 'high_freq_factor' above its 'low_freq_factor'", rope)


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether a value of a JSON file is an integer; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value <= MAX_ROPE_NUMBER
