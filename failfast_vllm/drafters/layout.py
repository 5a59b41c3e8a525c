"""What a drafter's config.json must say, and the tensors that it asks for. No vLLM, no torch.

vLLM ignores or misreads much of what is refused here: a bias without a place, a sliding window, a
rope that it does not know.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
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
    sparse = _expert_shapes(config) if with_experts else {}
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
        "self_attn.q_proj.weight": (q_size, hidden),
        "self_attn.k_proj.weight": (kv_size, hidden),
        "self_attn.v_proj.weight": (kv_size, hidden),
        "self_attn.o_proj.weight": (hidden, q_size),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config.get("attention_bias", family.qkv_bias):
        shapes["self_attn.q_proj.bias"] = (q_size,)
        shapes["self_attn.k_proj.bias"] = (kv_size,)
        shapes["self_attn.v_proj.bias"] = (kv_size,)
    if family.qk_norm:
        shapes["self_attn.q_norm.weight"] = (head_dim,)
        shapes["self_attn.k_norm.weight"] = (head_dim,)
    return shapes


def _mlp_shapes(name: str, hidden: int, width: int) -> dict[str, Shape]:
    return {
        f"{name}.gate_proj.weight": (width, hidden),
        f"{name}.up_proj.weight": (width, hidden),
        f"{name}.down_proj.weight": (hidden, width),
    }


def _expert_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Of one layer: the router and all experts."""
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    shapes: dict[str, Shape] = {"mlp.gate.weight": (config["num_experts"], hidden)}
    for i in range(config["num_experts"]):
        shapes |= _mlp_shapes(f"mlp.experts.{i}", hidden, width)
    return shapes


def expert_layers(config: Mapping[str, Any]) -> frozenset[int]:
    """The layers that have experts in place of a dense MLP, by Qwen3-MoE's rule."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    layers = range(config["num_hidden_layers"])
    return frozenset(i for i in layers if i not in dense and (i + 1) % step == 0)


def check_config(model: str, family: Family, config: Mapping[str, Any]) -> None:
    """Refuse sizes that cannot be and settings that vLLM would not follow; raises ValueError."""
    fields = _Fields(model, family.filled(config))
    _check_settings(fields, family)
    sizes = {key: fields.integer(key, high) for key, high in SIZE_LIMITS.items()}
    _check_heads(fields, family, sizes)
    if family.has_experts:
        _check_experts(fields)
    _check_layers(fields, sizes["num_hidden_layers"])
    _check_rope(fields)


@dataclass(frozen=True)
class _Fields:
    """A config.json that is being checked."""

    model: str
    values: Mapping[str, Any]

    def refuse(
        self, key: str, must: str, got: Any, remedy: str = "Correct its config.json."
    ) -> NoReturn:
        raise ValueError(
            f"failfast: the drafter {self.model!r} must have {key!r} {must}; got {echo(got)}. "
            f"{remedy}"
        )

    def integer(self, key: str, high: int) -> int:
        value = self.values.get(key)
        if not is_integer(value) or not 1 <= value <= high:
            self.refuse(key, f"as an integer from 1 to {high}", value)
        return value


def _check_settings(fields: _Fields, family: Family) -> None:
    for key in ("quantization_config", "compression_config"):
        if fields.values.get(key) is not None:
            fields.refuse(key, "absent", fields.values[key], "Use its unquantised weights.")
    projections = {
        "attention_bias": (True,) if family.qkv_bias else (False, True),
        "qk_norm": (family.qk_norm,),
    }
    experts = {"norm_topk_prob": (False, True)} if family.has_experts else NO_EXPERTS
    for key, allowed in (ALLOWED | projections | experts).items():
        value = fields.values.get(key, allowed[0])
        if repr(value) not in map(repr, allowed):  # True is no 1 here
            names = " or ".join(map(json.dumps, allowed))
            fields.refuse(key, f"as {names}", value, "Another layout cannot be loaded.")


def _check_heads(fields: _Fields, family: Family, sizes: Mapping[str, int]) -> None:
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    kv_heads = sizes["num_key_value_heads"]
    if heads % kv_heads:
        what = f"as a divisor of 'num_attention_heads' ({heads})"
        fields.refuse("num_key_value_heads", what, kv_heads)
    if family.states_head_dim:
        head_dim = fields.integer("head_dim", MAX_HEAD_DIM)
        if head_dim % 2:
            fields.refuse("head_dim", "even", head_dim)
        return
    head_dim, rest = divmod(hidden, heads)
    if rest or head_dim % 2:
        what = f"that splits 'hidden_size' ({hidden}) into heads of even size"
        fields.refuse("num_attention_heads", what, heads)
    stated = fields.values.get("head_dim")
    if stated not in (None, head_dim):
        what = f"equal to 'hidden_size' / 'num_attention_heads' ({head_dim})"
        fields.refuse("head_dim", what, stated)


def _check_experts(fields: _Fields) -> None:
    sizes = {key: fields.integer(key, high) for key, high in EXPERT_LIMITS.items()}
    fields.integer("num_experts_per_tok", sizes["num_experts"])
    config = fields.values
    if "norm_topk_prob" not in config:  # both occur
        fields.refuse("norm_topk_prob", "as false or true", None)
    if "decoder_sparse_step" in config:
        fields.integer("decoder_sparse_step", SIZE_LIMITS["num_hidden_layers"])
    dense = config.get("mlp_only_layers")
    if dense is not None and not (isinstance(dense, list) and all(map(is_integer, dense))):
        fields.refuse("mlp_only_layers", "as a list of layer numbers", dense)
    if not expert_layers(config):
        what = "and 'decoder_sparse_step' that leave a layer with experts"
        fields.refuse("mlp_only_layers", what, dense, "Without experts it is another model.")


def _check_layers(fields: _Fields, num_layers: int) -> None:
    types = fields.values.get("layer_types")
    if types not in (None, ["full_attention"] * num_layers):
        what = "with 'full_attention' for each layer"
        fields.refuse("layer_types", what, types, "Others cannot be loaded.")
    epsilon = fields.values.get("rms_norm_eps", 1e-6)
    if not _is_positive(epsilon) or epsilon >= 1:
        fields.refuse("rms_norm_eps", "between 0 and 1", epsilon)


def _check_rope(fields: _Fields) -> None:
    theta = fields.values.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):  # the older name first
        rope = fields.values.get(key)
        if rope is not None:
            scaling = rope if isinstance(rope, dict) else {"rope_type": rope}
            _check_scaling(fields, key, rope, scaling)
            theta = scaling.get("rope_theta", theta)
    if not _is_positive(theta):
        fields.refuse("rope_theta", "as a positive number", theta)


def _check_scaling(fields: _Fields, key: str, rope: Any, scaling: Mapping[str, Any]) -> None:
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    if kind not in ROPE_NUMBERS or rope is not scaling or "mrope_section" in scaling:
        types = ", ".join(ROPE_NUMBERS)
        what = f"with a 'rope_type' among {types}"
        fields.refuse(key, what, rope, "Others cannot be loaded.")
    for number in ROPE_NUMBERS[kind]:
        if not _is_positive(scaling.get(number)):
            fields.refuse(key, f"with a positive {number!r}", rope)
    for number in ROPE_OPTIONAL:
        if number in scaling and not _is_positive(scaling[number]):
            fields.refuse(key, f"with a positive {number!r}, or none", rope)
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        fields.refuse(key, "with a 'high_freq_factor' above its 'low_freq_factor'", rope)


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether a value of a JSON file is an integer; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value <= MAX_ROPE_NUMBER
