"""What a drafter costs next to a target: bytes counted from the configs, times modelled.

Weights and KV are exact sums over the tensors of a checkpoint. Times are a roofline, and nothing
else: a pass takes max(bytes / bandwidth, flops / compute). Launches, sampling, scheduling and
communication cost nothing here, so a modelled speed-up is an upper bound, not a measurement.
No vLLM, no torch.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from failfast_vllm.config import FailFastConfig
from failfast_vllm.drafters.checks import (
    BlockSize,
    check_drafter_config,
    choose_drafter,
    find_block_size,
    undivided_size,
)
from failfast_vllm.drafters.families import (
    BLOCK_SIZE_NAMES,
    DIFFUSION_BLOCK_SIZES,
    FAMILIES,
    Family,
    family_of,
)
from failfast_vllm.drafters.layout import expected_shapes, is_integer
from failfast_vllm.tools.published_models import PUBLISHED_DRAFTERS, PUBLISHED_TARGETS

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
CONTEXT_LEN = 1024
# FailFast v3, 32B target, MATH, tau 0.4 (arXiv 2512.20573): drafts of 13.9 tokens, 5.6 accepted
PUBLISHED_DRAFT_LEN = 13.9
PUBLISHED_ACCEPTANCE_LENGTH = 6.6  # with the bonus token, vLLM's definition
VOCAB_PADDING = 64  # vLLM's VocabParallelEmbedding
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class Gpu(NamedTuple):
    """Data-sheet figures unless said otherwise."""

    name: str
    bandwidth: float  # bytes/s
    compute: float  # dense bf16 flop/s
    memory: float  # bytes
    source: str = "vendor data sheet"


GPUS = {
    gpu.name: gpu
    for gpu in (
        # the sheet says 989e12; large bf16 GEMMs were measured at about 790e12
        Gpu("H200", 4.8e12, 790e12, 141e9, "data-sheet bandwidth, measured bf16 compute"),
        Gpu("H100", 3.35e12, 989e12, 80e9),  # SXM5
        Gpu("A100-80G", 2.039e12, 312e12, 80e9),  # SXM4
        Gpu("L40S", 0.864e12, 362e12, 48e9),
        Gpu("A6000", 0.768e12, 154.8e12, 48e9),  # RTX A6000, GA102: the sheet's 309.7 is sparse
    )
}

SIZES = (
    "num_attention_heads",
    "hidden_size",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)
EXPERT_SIZES = ("moe_intermediate_size", "num_experts", "num_experts_per_tok")
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
# the layouts of targets: a family has the tensors of the model that it was trained from
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
    num_experts: int  # of a layer; 0: a dense MLP
    num_active_experts: int
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
    layout, config = _layout_of(name, config)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if dtype not in BYTES:
        raise ValueError(f"{name!r} must have a dtype of {', '.join(BYTES)}; got {dtype!r}.")
    part = _part_of(name, config, "moe_" * layout.has_experts + "intermediate_size", num_ranks)
    hidden, num_layers = part["hidden_size"], part["num_hidden_layers"]
    linear = experts = others = 0
    for tensor, dims in expected_shapes(layout, part).items():
        if ".experts." in tensor:
            experts += math.prod(dims)
        elif tensor.endswith("_proj.weight"):
            linear += math.prod(dims)
        elif tensor not in VOCABULARY:
            others += math.prod(dims)
    if layout.qk_norm and part.get("attention_bias"):
        others += num_layers * hidden  # Qwen3 then has one on o_proj too, which vLLM drops
    return Shape(
        hidden_size=hidden,
        vocab_size=part["vocab_size"],
        num_layers=num_layers,
        num_heads=part["num_attention_heads"],
        num_kv_heads=part["num_key_value_heads"],
        head_dim=part["head_dim"],
        linear=linear,
        experts=experts,
        others=others,
        num_experts=part["num_experts"] if layout.has_experts else 0,
        num_active_experts=part["num_experts_per_tok"] if layout.has_experts else 0,
        tied=bool(part.get("tie_word_embeddings", False)),
        value_bytes=BYTES[dtype],
        quantised_bits=_quantised_bits(part.get("quantization_config")),
    )


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
    mlp = EXPERT_SIZES if layout.has_experts else ("intermediate_size",)
    for key in SIZES + mlp:
        if not is_integer(filled.get(key)) or filled[key] < 1:
            got = filled.get(key)
            raise ValueError(f"{name!r} must have a positive integer {key!r}; got {got!r}.")
    if layout.has_experts and (
        filled.get("mlp_only_layers") or filled.get("decoder_sparse_step", 1) != 1
    ):
        raise ValueError(f"{name!r} mixes dense and expert layers; only all-expert ones are known.")
    filled["intermediate_size"] = filled.get("intermediate_size", 0)
    stated = filled.get("head_dim") or (128 if layout.states_head_dim else None)
    filled["head_dim"] = layout.head_dim({**filled, "head_dim": stated})
    return layout, filled


def _quantised_bits(quantisation: Any) -> float | None:
    if not isinstance(quantisation, Mapping):
        return None
    bits = quantisation.get("bits", 8 if quantisation.get("quant_method") == "fp8" else 0)
    return float(bits) if isinstance(bits, int) else 0.0


def _part_of(name: str, config: dict[str, Any], mlp: str, ranks: int) -> dict[str, Any]:
    """The sizes of one rank: KV heads are replicated when there are fewer than ranks."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if ranks == 1:
        return config
    if heads % ranks or config[mlp] % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise ValueError(
            f"--tensor-parallel-size must divide the {heads} heads "
            f"({kv_heads} KV) and the MLP of {name!r}; got {ranks}."
        )
    vocab = -(-config["vocab_size"] // VOCAB_PADDING) * VOCAB_PADDING
    return {
        **config,
        "num_attention_heads": heads // ranks,
        "num_key_value_heads": max(1, kv_heads // ranks),
        mlp: config[mlp] // ranks,
        "vocab_size": -(-vocab // ranks),
    }


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
    experts: float = shape.experts
    if experts:
        experts *= 1 - (1 - shape.num_active_experts / shape.num_experts) ** num_tokens
    return _bytes(shape, experts, num_embeddings=1)


def _bytes(shape: Shape, experts: float, num_embeddings: int) -> float:
    """With so many parameters of experts, and `num_embeddings` matrices of the vocabulary."""
    others = shape.others + num_embeddings * shape.vocab_size * shape.hidden_size
    if shape.quantised_bits is None:
        return (shape.linear + experts + others) * shape.value_bytes
    return (shape.linear + experts) * shape.quantised_bits / 8 + others * shape.value_bytes


def pass_ms(gpu: Gpu, shape: Shape, rows: Sequence[float], contexts: Sequence[float]) -> float:
    """Modelled time of one forward of a rank, lm_head on every row included.

    Args:
        rows: [num_seqs] rows of each sequence.
        contexts: [num_seqs] tokens of each sequence whose KV is read.

    Returns:
        Milliseconds: max(bytes / bandwidth, flops / compute).
    """
    assert shape.quantised_bits != 0, "the bytes of these weights are unknown"
    num_rows = sum(rows)
    bytes_read = read_bytes(shape, num_rows) + sum(contexts) * kv_bytes_per_token(shape)
    params = shape.linear + shape.others + shape.hidden_size * shape.vocab_size
    if shape.experts:
        params += shape.experts // shape.num_experts * shape.num_active_experts
    attention = 4 * shape.num_heads * shape.head_dim * shape.num_layers  # q.k and p.v
    pairs = sum(n * context for n, context in zip(rows, contexts, strict=True))
    flops = 2 * params * num_rows + attention * pairs
    return 1e3 * float(max(bytes_read / gpu.bandwidth, flops / gpu.compute))


@dataclass(frozen=True)
class CostModel:
    """Modelled times of a pair on one GPU type; the shapes are those of a rank."""

    gpu: Gpu
    target: Shape
    drafter: Shape

    def draft_ms(self, rows: Sequence[float], contexts: Sequence[float]) -> float:
        """One draft pass: [num_seqs] rows and cached tokens -> ms."""
        return pass_ms(self.gpu, self.drafter, rows, contexts)

    def verify_ms(self, tokens: Sequence[float], contexts: Sequence[float]) -> float:
        """One target step: [num_seqs] tokens (1 = no draft) and cached tokens -> ms."""
        return pass_ms(self.gpu, self.target, tokens, contexts)


@dataclass(frozen=True)
class Profile:
    """What a round is assumed to do, the same for every sequence and batch size."""

    acceptance_length: float  # tokens per round, with the bonus token
    passes_per_round: float
    draft_len: float  # tokens
    known_rows: float  # committed and live tokens encoded again, per pass

    @property
    def draft_rows(self) -> float:
        """Rows of one sequence in one pass; the whole draft counts in each, an upper bound."""
        return self.known_rows + self.draft_len


def profile_of(
    block_size: int, acceptance_length: float | None, passes_per_round: float | None
) -> Profile:
    """The published acceptance, in passes of the default `draft_increment` for this block.

    Raises:
        ValueError: more tokens per round than a draft of these passes can hold.
    """
    increment = FailFastConfig.from_user({}).for_block_size(block_size, {}).draft_increment
    passes = passes_per_round or PUBLISHED_DRAFT_LEN / increment
    accepted = acceptance_length or PUBLISHED_ACCEPTANCE_LENGTH
    draft_len = passes * increment
    if passes < 1 or not 1 <= accepted <= draft_len + 1:
        raise ValueError(
            f"--acceptance-length must be from 1 to {draft_len + 1:.1f} and --passes-per-round at "
            f"least 1 (each drafts {increment} tokens); got {accepted:g} and {passes:g}."
        )
    # half a block is live on average; each accepted token is committed once, in a first pass
    known_rows = (block_size - 1) / 2 + accepted / passes
    return Profile(accepted, passes, draft_len, known_rows)


class Line(NamedTuple):
    """One batch size; all four are modelled."""

    batch_size: int
    draft_pass_ms: float
    verify_ms: float
    plain_step_ms: float
    speedup: float


def model_line(costs: CostModel, profile: Profile, batch_size: int, context_len: int) -> Line:
    """A round of `batch_size` equal sequences against plain decoding of the same."""
    contexts = [context_len] * batch_size
    draft = costs.draft_ms([profile.draft_rows] * batch_size, contexts)
    verify = costs.verify_ms([profile.draft_len + 1] * batch_size, contexts)
    plain = costs.verify_ms([1] * batch_size, contexts)
    round_ms = profile.passes_per_round * draft + verify
    return Line(batch_size, draft, verify, plain, profile.acceptance_length * plain / round_ms)


@dataclass(frozen=True)
class Plan:
    """All that `failfast plan` prints. Bytes are of one rank."""

    target_name: str
    drafter_name: str
    family: Family
    block: BlockSize
    costs: CostModel
    profile: Profile
    batch_sizes: tuple[int, ...]
    context_len: int
    tensor_parallel_size: int
    draft_tensor_parallel_size: int

    @property
    def lines(self) -> list[Line]:
        """Modelled, by batch size; none where a model's bytes are unknown."""
        if 0 in (self.costs.target.quantised_bits, self.costs.drafter.quantised_bits):
            return []
        return [
            model_line(self.costs, self.profile, size, self.context_len)
            for size in self.batch_sizes
        ]

    @property
    def kv_share(self) -> float:
        """The drafter's part of the KV pool."""
        drafter = kv_bytes_per_token(self.costs.drafter)
        return drafter / (drafter + kv_bytes_per_token(self.costs.target))

    @property
    def logits_bytes(self) -> int:
        """Of the longest verification of the largest batch, in float32 (as it is sampled)."""
        num_tokens = FailFastConfig.from_user({}).num_speculative_tokens + 1
        vocab = self.costs.target.vocab_size * self.tensor_parallel_size  # gathered
        return max(self.batch_sizes) * num_tokens * vocab * 4

    @property
    def notes(self) -> list[str]:
        """Assumptions, and what does not add up."""
        gpu, profile = self.costs.gpu, self.profile
        notes = [
            f"modelled, not measured: a pass takes max(bytes / {gpu.bandwidth / 1e12:g} TB/s, "
            f"flops / {gpu.compute / 1e12:g} TFLOP/s) on {gpu.name} ({gpu.source}); launches, "
            "sampling, scheduling and communication cost nothing, so a speed-up is an upper bound",
            f"a round yields {profile.acceptance_length:g} tokens from {profile.draft_len:.1f} "
            f"drafted in {profile.passes_per_round:.2f} passes (default: FailFast's published "
            "mean of 13.9 drafted and 5.6 accepted, 32B on MATH); with other work or weights "
            "set --acceptance-length and --passes-per-round",
            f"{self.context_len} cached tokens per sequence, {profile.draft_rows:.1f} rows per "
            "sequence and draft pass (draft, half a block, tokens to commit), lm_head on each",
            "tokenizers are compared when vLLM starts, not here",
        ]
        for name, shape in (
            (self.target_name, self.costs.target),
            (self.drafter_name, self.costs.drafter),
        ):
            if not shape.exact:
                counted = (
                    f"linear layers at {shape.quantised_bits:g} bits, without scales"
                    if shape.quantised_bits
                    else "embeddings, biases and norms only, and no times"
                )
                notes.append(f"{name} is quantised: its weights are not exact ({counted})")
            if shape.num_experts:
                notes.append(f"{name}: experts are chosen evenly, as many as the tokens reach")
        if self.block.doubt:
            notes.append(
                f"{self.drafter_name} drafts in blocks of {self.block.size}: {self.block.doubt}"
            )
        if self.draft_tensor_parallel_size != self.tensor_parallel_size:
            notes.append(
                "the drafter's heads do not divide so: set 'draft_tensor_parallel_size' to 1"
            )
        weights = weight_bytes(self.costs.target) + weight_bytes(self.costs.drafter)
        if weights > gpu.memory:
            notes.append(f"the weights do not fit: {gpu.name} has {gpu.memory / 1e9:g} GB")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        target, drafter = self.costs.target, self.costs.drafter
        return {
            "target": self.target_name,
            "drafter": self.drafter_name,
            "family": self.family.name,
            "diffusion_block_size": self.block.size,
            "gpu": self.costs.gpu._asdict(),
            "tensor_parallel_size": self.tensor_parallel_size,
            "draft_tensor_parallel_size": self.draft_tensor_parallel_size,
            "weight_bytes": {"target": weight_bytes(target), "drafter": weight_bytes(drafter)},
            "weight_bytes_exact": {"target": target.exact, "drafter": drafter.exact},
            "kv_bytes_per_token": {
                "target": kv_bytes_per_token(target),
                "drafter": kv_bytes_per_token(drafter),
            },
            "drafter_share_of_kv": self.kv_share,
            "verification_logits_bytes": self.logits_bytes,
            "profile": asdict(self.profile),
            "context_len": self.context_len,
            "modelled": True,
            "by_batch_size": [{**line._asdict(), "modelled": True} for line in self.lines],
            "notes": self.notes,
        }


def make_plan(
    target: str,
    drafter: str | None = None,
    *,
    diffusion_block_size: int | None = None,
    gpu: str = "H200",
    concurrency: int | None = None,
    context_len: int = CONTEXT_LEN,
    tensor_parallel_size: int = 1,
    acceptance_length: float | None = None,
    passes_per_round: float | None = None,
) -> Plan:
    """Plan a pair; raises ValueError, one line, on anything unknown."""
    if gpu not in GPUS:
        raise ValueError(f"--gpu must be one of {', '.join(GPUS)}; got {gpu!r}.")
    target_name, target_config = load_config(target, PUBLISHED_TARGETS)
    whole = shape_of(target_name, target_config)
    chosen = drafter or choose_drafter(
        target_name, str(target_config.get("model_type")), whole.vocab_size
    )
    drafter_name, drafter_config = load_config(chosen, PUBLISHED_DRAFTERS)
    if diffusion_block_size not in (None, *DIFFUSION_BLOCK_SIZES):
        raise ValueError(
            f"--diffusion-block-size must be one of {BLOCK_SIZE_NAMES}; got {diffusion_block_size}."
        )
    family = check_drafter_config(drafter_name, drafter_config, diffusion_block_size)
    block = find_block_size(drafter_name, family, drafter_config, diffusion_block_size)
    # 12 heads on 8 ranks, say: each of them then holds the whole drafter
    undivided = undivided_size(family.filled(drafter_config), tensor_parallel_size)
    draft_ranks = 1 if undivided else tensor_parallel_size
    costs = CostModel(
        GPUS[gpu],
        shape_of(target_name, target_config, tensor_parallel_size),
        shape_of(drafter_name, drafter_config, draft_ranks),
    )
    return Plan(
        target_name,
        drafter_name,
        family,
        block,
        costs,
        profile_of(block.size, acceptance_length, passes_per_round),
        (concurrency,) if concurrency else BATCH_SIZES,
        context_len,
        tensor_parallel_size,
        draft_ranks,
    )


def load_config(
    name: str, published: Mapping[str, Mapping[str, Any]]
) -> tuple[str, Mapping[str, Any]]:
    """The config of a checkpoint directory, a config.json, or a published model; no network.

    Returns:
        The directory or the hub id, and the config.
    """
    path = Path(name)
    if path.exists():
        path = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read {path} ({error}); give a config.json.") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path} holds no JSON object; give a config.json.")
        return str(path.parent), config
    for hub_id, config in published.items():
        if name.lower() in (hub_id.lower(), hub_id.split("/")[1].lower()):
            return hub_id, config
    raise ValueError(
        f"{name!r} is neither a path nor one of {', '.join(published)}; "
        "give a checkpoint directory or a config.json."
    )


def render(plan: Plan) -> str:
    """The report for a reader."""
    target, drafter = plan.costs.target, plan.costs.drafter
    rank = " per rank" if plan.tensor_parallel_size > 1 else ""
    text = [
        f"target    {plan.target_name}",
        f"drafter   {plan.drafter_name} ({plan.family.name}, blocks of {plan.block.size})",
        f"weights   target {_size_text(target)}, drafter {_size_text(drafter)}{rank}",
        f"KV        target {kv_bytes_per_token(target) / 1024:g} KiB per token, drafter "
        f"{kv_bytes_per_token(drafter) / 1024:g} KiB{rank}: {plan.kv_share:.0%} of the pool",
        f"logits    {plan.logits_bytes / 1e6:.0f} MB float32 at most: "
        f"{max(plan.batch_sizes)} drafts of "
        f"{FailFastConfig.from_user({}).num_speculative_tokens} tokens, verified at once",
        "",
        *(f"- {note}" for note in plan.notes),
    ]
    if plan.lines:
        text += [
            "",
            f"{'batch':>5}{'draft pass ms':>17}{'verify ms':>17}{'plain step ms':>17}"
            f"{'speed-up':>17}",
            f"{'':>5}" + f"{'(modelled)':>17}" * 4,
        ]
    for line in plan.lines:
        cells = (line.draft_pass_ms, line.verify_ms, line.plain_step_ms)
        text.append(
            f"{line.batch_size:>5}"
            + "".join(f"{cell:>17.3f}" for cell in cells)
            + f"{line.speedup:>16.2f}x"
        )
    return "\n".join(text)


def _size_text(shape: Shape) -> str:
    count = weight_bytes(shape)
    size = f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
    return size if shape.exact else f"{size} (not exact)"
