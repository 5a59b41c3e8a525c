"""What a drafter costs next to a target: bytes counted from the configs, times modelled.

Weights and KV are exact sums over the tensors of a checkpoint. Times are a roofline, and nothing
else: a pass takes max(bytes / bandwidth, flops / compute). Launches, sampling, scheduling and
communication cost nothing here, so a modelled speed-up is an upper bound, not a measurement.
No vLLM, no torch.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
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
from failfast_vllm.drafters.families import BLOCK_SIZE_NAMES, DIFFUSION_BLOCK_SIZES, Family
from failfast_vllm.tools.model_size import (
    Shape,
    kv_bytes_per_token,
    read_bytes,
    shape_of,
    weight_bytes,
)
from failfast_vllm.tools.published_models import GPUS, PUBLISHED_DRAFTERS, PUBLISHED_TARGETS, Gpu

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
CONTEXT_LEN = 1024
# FailFast v3, 32B target, MATH, tau 0.4 (arXiv 2512.20573): drafts of 13.9 tokens, 5.6 accepted
PUBLISHED_DRAFT_LEN = 13.9
PUBLISHED_ACCEPTANCE_LENGTH = 6.6  # with the bonus token, vLLM's definition


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
    params = shape.linear + shape.experts * shape.share + shape.others
    params += shape.hidden_size * shape.vocab_size
    attention = 4 * shape.num_heads * shape.head_dim * shape.num_layers  # q.k and p.v
    pairs = sum(n * context for n, context in zip(rows, contexts, strict=True))
    flops = 2 * params * num_rows + attention * pairs
    return 1e3 * float(max(bytes_read / gpu.bandwidth, flops / gpu.compute))


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


@dataclass(frozen=True)
class Plan:
    """All that `failfast plan` prints. Bytes are of one rank."""

    target_name: str
    drafter_name: str
    family: Family
    block: BlockSize
    gpu: Gpu
    target: Shape
    drafter: Shape
    profile: Profile
    batch_sizes: tuple[int, ...]
    context_len: int
    tensor_parallel_size: int
    draft_tensor_parallel_size: int

    @property
    def lines(self) -> list[Line]:
        """Modelled, by batch size; none where a model's bytes are unknown."""
        if 0 in (self.target.quantised_bits, self.drafter.quantised_bits):
            return []
        return [self._line(batch_size) for batch_size in self.batch_sizes]

    def _line(self, batch_size: int) -> Line:
        """A round of `batch_size` equal sequences against plain decoding of the same."""
        profile, contexts = self.profile, [self.context_len] * batch_size
        draft = pass_ms(self.gpu, self.drafter, [profile.draft_rows] * batch_size, contexts)
        verify = pass_ms(self.gpu, self.target, [profile.draft_len + 1] * batch_size, contexts)
        plain = pass_ms(self.gpu, self.target, [1] * batch_size, contexts)
        round_ms = profile.passes_per_round * draft + verify
        return Line(batch_size, draft, verify, plain, profile.acceptance_length * plain / round_ms)

    @property
    def kv_share(self) -> float:
        """The drafter's part of the KV pool."""
        drafter = kv_bytes_per_token(self.drafter)
        return drafter / (drafter + kv_bytes_per_token(self.target))

    @property
    def logits_bytes(self) -> int:
        """Of the longest verification of the largest batch, in float32 (as it is sampled)."""
        num_tokens = FailFastConfig.from_user({}).num_speculative_tokens + 1
        vocab = self.target.vocab_size * self.tensor_parallel_size  # gathered
        return max(self.batch_sizes) * num_tokens * vocab * 4

    @property
    def notes(self) -> list[str]:
        """Assumptions, and what does not add up."""
        gpu, profile = self.gpu, self.profile
        return [
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
            *_weight_notes(self.target_name, self.target),
            *_weight_notes(self.drafter_name, self.drafter),
            *self._doubts(),
        ]

    def _doubts(self) -> Iterator[str]:
        if self.block.doubt:
            yield f"{self.drafter_name} drafts in blocks of {self.block.size}: {self.block.doubt}"
        if self.draft_tensor_parallel_size != self.tensor_parallel_size:
            yield "the drafter's heads do not divide so: set 'draft_tensor_parallel_size' to 1"
        if weight_bytes(self.target) + weight_bytes(self.drafter) > self.gpu.memory:
            yield f"the weights do not fit: {self.gpu.name} has {self.gpu.memory / 1e9:g} GB"

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        shapes = {"target": self.target, "drafter": self.drafter}
        return {
            "target": self.target_name,
            "drafter": self.drafter_name,
            "family": self.family.name,
            "diffusion_block_size": self.block.size,
            "gpu": self.gpu._asdict(),
            "tensor_parallel_size": self.tensor_parallel_size,
            "draft_tensor_parallel_size": self.draft_tensor_parallel_size,
            "weight_bytes": {key: weight_bytes(shape) for key, shape in shapes.items()},
            "weight_bytes_exact": {key: shape.exact for key, shape in shapes.items()},
            "kv_bytes_per_token": {key: kv_bytes_per_token(s) for key, s in shapes.items()},
            "drafter_share_of_kv": self.kv_share,
            "verification_logits_bytes": self.logits_bytes,
            "profile": asdict(self.profile),
            "context_len": self.context_len,
            "modelled": True,
            "by_batch_size": [{**line._asdict(), "modelled": True} for line in self.lines],
            "notes": self.notes,
        }


def _weight_notes(name: str, shape: Shape) -> Iterator[str]:
    if not shape.exact:
        counted = (
            f"linear layers at {shape.quantised_bits:g} bits, without scales"
            if shape.quantised_bits
            else "embeddings, biases and norms only, and no times"
        )
        yield f"{name} is quantised: its weights are not exact ({counted})"
    if shape.experts:
        yield f"{name}: experts are chosen evenly, as many as the tokens reach"


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
    name, config = load_config(target, PUBLISHED_TARGETS)
    vocab_size = shape_of(name, config).vocab_size
    drafter = drafter or choose_drafter(name, str(config.get("model_type")), vocab_size)
    drafter, drafter_config = load_config(drafter, PUBLISHED_DRAFTERS)
    if diffusion_block_size not in (None, *DIFFUSION_BLOCK_SIZES):
        raise ValueError(
            f"--diffusion-block-size must be one of {BLOCK_SIZE_NAMES}; got {diffusion_block_size}."
        )
    family = check_drafter_config(drafter, drafter_config, diffusion_block_size)
    block = find_block_size(drafter, family, drafter_config, diffusion_block_size)
    # 12 heads on 8 ranks, say: each of them then holds the whole drafter
    undivided = undivided_size(family.filled(drafter_config), tensor_parallel_size)
    draft_ranks = 1 if undivided else tensor_parallel_size
    return Plan(
        name,
        drafter,
        family,
        block,
        GPUS[gpu],
        shape_of(name, config, tensor_parallel_size),
        shape_of(drafter, drafter_config, draft_ranks),
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
    target, drafter = plan.target, plan.drafter
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
