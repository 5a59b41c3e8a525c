"""How large models are: sums over the tensors that a config.json asks for. No vLLM, no torch."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from failfast_vllm.drafters.families import FAMILIES, Family, family_of
from failfast_vllm.drafters.layout import expected_shapes, is_integer

VOCAB_PADDING = 64  # vLLM's VocabParallelEmbedding
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
SIZES = (
    "num_attention_heads",
    "hidden_size",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)
EXPERTS = ("num_experts", "num_experts_per_tok")
# a family has the tensors of the target that it was trained from
LAYOUTS = {family.base_type: family for family in reversed(FAMILIES)}


@dataclass(frozen=True)
class Shape:
    """One tensor-parallel rank's part of a decoder; weights in numbers of parameters."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    linear: int  # of linear layers, experts apart
    experts: int  # of all experts
    others: int  # of norms, biases and routers
    share: float  # of the experts that a token reaches
    tied: bool  # lm_head is the embedding
    value_bytes: int  # of a weight that is not quantised, and of a KV value
    quantised_bits: float | None  # of a linear layer's weight; 0: the config does not say

    @property
    def exact(self) -> bool:
        """Whether every byte of the weights is known: no scales and zero points of unknown size."""
        return self.quantised_bits is None


def shape_of(name: str, config: Mapping[str, Any], num_ranks: int = 1) -> Shape:
    """The shape of each of `num_ranks` parts of the model that a `config.json` describes.

    Raises:
        ValueError: a model type whose tensors are not known here, a missing field, or heads or an
            MLP that vLLM cannot divide.
    """
    layout, whole = _layout_of(name, config)
    mlp = "moe_intermediate_size" if layout.has_experts else "intermediate_size"
    part = _part_of(name, whole, mlp, num_ranks)
    counts = Counter[str]()
    for tensor, dims in expected_shapes(layout, part).items():
        counts[_kind(tensor)] += math.prod(dims)
    if layout.qk_norm and part.get("attention_bias"):  # Qwen3 then has one on o_proj, too
        counts["others"] += part["num_hidden_layers"] * part["hidden_size"]
    dtype = str(part.get("dtype") or part.get("torch_dtype") or "bfloat16")
    if dtype not in BYTES:
        raise ValueError(f"{name!r} must have a dtype of {', '.join(BYTES)}; got {dtype!r}.")
    return Shape(
        hidden_size=part["hidden_size"],
        vocab_size=part["vocab_size"],
        num_layers=part["num_hidden_layers"],
        num_heads=part["num_attention_heads"],
        num_kv_heads=part["num_key_value_heads"],
        head_dim=part["head_dim"],
        linear=counts["linear"],
        experts=counts["experts"],
        others=counts["others"],
        share=part["num_experts_per_tok"] / part["num_experts"] if layout.has_experts else 0,
        tied=bool(part.get("tie_word_embeddings", False)),
        value_bytes=BYTES[dtype],
        quantised_bits=_quantised_bits(part.get("quantization_config")),
    )


def _kind(tensor: str) -> str:
    if tensor in ("model.embed_tokens.weight", "lm_head.weight"):
        return "vocabulary"
    if ".experts." in tensor:
        return "experts"
    return "linear" if tensor.endswith("_proj.weight") else "others"


def _layout_of(name: str, config: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family with a model's tensors, and its config with all sizes; raises ValueError."""
    family, model_type = family_of(config.get("architectures")), config.get("model_type")
    layout = family or LAYOUTS.get(str(model_type))
    if layout is None:
        raise ValueError(
            f"the tensors of {name!r} are not known (model type {model_type!r}); "
            f"give a config of {', '.join(sorted(LAYOUTS))} or of a drafter."
        )
    # of a target all must be stated, but transformers' Qwen3Config has heads of 128
    filled = family.filled(config) if family else dict(config)
    mlp = ("moe_intermediate_size", *EXPERTS) if layout.has_experts else ("intermediate_size",)
    for key in SIZES + mlp:
        value = filled.get(key)
        if not is_integer(value) or value < 1:
            raise ValueError(f"{name!r} must have a positive integer {key!r}; got {value!r}.")
    is_mixed = filled.get("mlp_only_layers") or filled.get("decoder_sparse_step", 1) != 1
    if layout.has_experts and is_mixed:
        raise ValueError(f"{name!r} mixes dense and expert layers; only all-expert ones are known.")
    heads = {"head_dim": 128} if layout.qk_norm else {}
    filled["head_dim"] = layout.head_dim({**heads, **filled})
    return layout, {"intermediate_size": 0, **filled}


def _part_of(name: str, config: dict[str, Any], mlp: str, ranks: int) -> dict[str, Any]:
    """The sizes of one rank: KV heads are replicated when there are fewer than ranks."""
    if ranks == 1:
        return config
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % ranks or config[mlp] % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise ValueError(
            f"--tensor-parallel-size must divide the {heads} heads "
            f"({kv_heads} KV) and the MLP of {name!r}; got {ranks}."
        )
    padded = -(-config["vocab_size"] // VOCAB_PADDING) * VOCAB_PADDING
    return {
        **config,
        "num_attention_heads": heads // ranks,
        "num_key_value_heads": max(1, kv_heads // ranks),
        mlp: config[mlp] // ranks,
        "vocab_size": -(-padded // ranks),
    }


def _quantised_bits(quantisation: Any) -> float | None:
    if not isinstance(quantisation, Mapping):
        return None
    bits = quantisation.get("bits", 8 if quantisation.get("quant_method") == "fp8" else 0)
    return float(bits) if isinstance(bits, int) else 0.0


def weight_bytes(shape: Shape) -> int:
    """Bytes of all tensors; of a quantised checkpoint without its scales and zero points."""
    return int(_bytes(shape, shape.experts, num_embeddings=1 if shape.tied else 2))


def kv_bytes_per_token(shape: Shape) -> int:
    """Bytes of keys and values of one token, all layers, at the dtype of the weights."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * shape.value_bytes


def read_bytes(shape: Shape, num_tokens: float) -> float:
    """Bytes of weights that one pass over `num_tokens` reads.

    Of an untied embedding a pass reads its tokens' rows only: neglected. Of experts it reads those
    that some token chose, here every choice as likely as any other.
    """
    experts = shape.experts * (1 - (1 - shape.share) ** num_tokens)
    return _bytes(shape, experts, num_embeddings=1)


def _bytes(shape: Shape, experts: float, num_embeddings: int) -> float:
    """With so many parameters of experts, and `num_embeddings` matrices of the vocabulary."""
    others = shape.others + num_embeddings * shape.vocab_size * shape.hidden_size
    if shape.quantised_bits is None:
        return (shape.linear + experts + others) * shape.value_bytes
    return (shape.linear + experts) * shape.quantised_bits / 8 + others * shape.value_bytes
