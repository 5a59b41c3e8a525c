"""What the adapters of both model runners share: the draft model inside vLLM's forward context.

An adapter says how a step's state is read and where drafts go; `HostedDraftModel` runs the passes
and counts them. vLLM owns the weights and the KV cache.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from vllm.config import VllmConfig
from vllm.config.utils import replace

from failfast_kernels import TokenConfidence, confidence_argmax, uses_triton
from failfast_vllm.attention import BlockDiffusionMetadata
from failfast_vllm.blocks import CommittedBlocks
from failfast_vllm.config import METHOD, POLICIES
from failfast_vllm.counts import Counts, Judged
from failfast_vllm.drafter import Candidates, DraftBatch, Drafter, Drafts
from failfast_vllm.families import MAX_DIFFUSION_BLOCK_SIZE
from failfast_vllm.graphs import Capture, PassGraphs, make_buckets, rows_per_seq
from failfast_vllm.learned_policy import PerRequest, make_policy
from failfast_vllm.load import Costs, CostTable, LoadPlanner
from failfast_vllm.paths import MAX_CANDIDATES, PathSearch
from failfast_vllm.policy import Outcome, Policy
from failfast_vllm.ranks import draft_context, drafter_group
from failfast_vllm.reuse import RejectedDrafts
from failfast_vllm.trace import TraceWriter

MAX_TURNS, MIN_TURNS, TURNS_SECONDS = 10, 3, 12.0  # of timing the models
WARM_UP_MS = 8000.0  # of that for each model, on a CPU; a busy one has it seem longer
MAX_WARM_ROWS = 128  # of the target: with the drafter's they fit into oneDNN's cache of 1024


def row_class(num_rows: int) -> int:
    """The next of a few row counts, at most an eighth more than `num_rows` from 32 on.

    oneDNN compiles a quarter of a megabyte for each row count and shape of weights that it meets.
    """
    step = 1 << max(2, (num_rows - 1).bit_length() - 4)
    return -(-num_rows // step) * step


class Round(NamedTuple):
    """One verified draft of one request."""

    req_id: str
    drafted: list[int]  # what the target verified
    emitted: list[int]  # accepted tokens and the bonus
    num_passes: int  # draft passes that the draft took
    confidences: list[float]  # of `drafted`, before the target judged it; fewer with reused tokens
    known_len: int  # tokens before the round
    num_rows: int  # of the draft passes
    step: int  # of the engine, from 1: the one that verified
    num_seqs: int  # in that step


class _Draft(NamedTuple):
    """What is kept of a draft until it is verified."""

    token_ids: list[int]
    num_passes: int
    confidences: list[float]
    num_rows: int


@dataclass
class DraftStats:
    """Counters since the engine started; `benchmarks/` and `failfast demo` read them."""

    num_steps: int = 0
    num_forwards: int = 0
    num_rows: int = 0
    forward_ms: float = 0.0  # inside the draft model
    total_ms: float = 0.0  # in the adapter's step, forwards included
    counts: Counts = field(default_factory=Counts, repr=False)  # for Prometheus
    on_round: Callable[[Round], None] | None = field(default=None, repr=False)
    drafts_only: bool = field(default=False, repr=False)  # rounds without one are not wanted
    _waits_since: float = field(default=0.0, repr=False)
    trace: TraceWriter | None = field(default=None, repr=False)  # gets the rounds, too
    _drafts: dict[str, _Draft] = field(default_factory=dict, repr=False)

    def reset(self) -> None:
        """Count from zero; receivers of rounds stay."""
        on_round, drafts_only, trace = self.on_round, self.drafts_only, self.trace
        self.__init__(on_round=on_round, drafts_only=drafts_only, trace=trace)  # type: ignore[misc]

    @property
    def wants_rounds(self) -> bool:
        return self.on_round is not None or self.trace is not None

    @property
    def wants_plain_rounds(self) -> bool:
        return self.trace is not None or (self.on_round is not None and not self.drafts_only)

    def count(self, drafts: Drafts, milliseconds: float) -> None:
        self.num_forwards += drafts.num_forwards
        self.num_rows += drafts.num_rows
        self.total_ms += milliseconds
        self.counts.drafted(drafts.num_forwards, drafts.num_rows, milliseconds)
        self.counts.stopped(drafts.stop_reasons[drafts.lens > 0])
        self._waits_since = time.perf_counter() if drafts.lens.any() else 0.0

    def step_began(self) -> None:
        """The target has verified what the step before has drafted."""
        self.num_steps += 1
        if self._waits_since:
            self.counts.verified((time.perf_counter() - self._waits_since) * 1e3)
            self._waits_since = 0.0

    def report(
        self, req_id: str, num_verified: int, emitted: list[int], known_len: int, num_seqs: int
    ) -> None:
        """Hand the round that has just been verified to whoever wants rounds.

        Args:
            known_len: tokens before the round.
            num_seqs: in the step that verified it.
        """
        draft = self._drafts.pop(req_id, _Draft([], 0, [], 0))
        verified = Round(
            req_id,
            draft.token_ids[:num_verified],
            emitted,
            draft.num_passes,
            draft.confidences[:num_verified],
            known_len,
            draft.num_rows,
            self.num_steps,
            num_seqs,
        )
        for receiver in (self.on_round, self.trace):
            if receiver is not None:
                receiver(verified)

    def remember(self, req_ids: Sequence[str], drafts: Drafts) -> None:
        """Keep what was drafted until it is reported."""
        lists, passes = drafts.to_lists(), drafts.num_passes.tolist()
        for i, req_id in enumerate(req_ids):
            confidences = drafts.confidences[i, : drafts.num_confidences[i]].tolist()
            self._drafts[req_id] = _Draft(lists[i], passes[i], confidences, int(drafts.seq_rows[i]))

    def forget(self, req_ids: Iterable[str]) -> None:
        """The requests have ended."""
        ended = list(req_ids)
        for req_id in ended:
            self._drafts.pop(req_id, None)
        if self.trace is not None:
            self.trace.forget(ended)


def new_pages(scheduler_output: Any, group: int, page_size: int, *, trusts_hits: bool) -> list[int]:
    """The KV pages that this step's requests did not have before.

    Args:
        group: the KV cache group of the drafter.
        page_size: tokens of a page, as the scheduler counts them.
        trusts_hits: False where something else than our commits may have filled a prefix hit.
    """

    def behind_hits(block_ids: Any, num_computed: int) -> list[int]:
        pages: list[int] = block_ids[group]
        return pages[num_computed // page_size :] if trusts_hits else pages

    pages = []
    for request in scheduler_output.scheduled_new_reqs:
        pages += behind_hits(request.block_ids, request.num_computed_tokens)
    cached = scheduler_output.scheduled_cached_reqs
    for req_id, block_ids, num_computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        if block_ids is not None:
            resumed = req_id in cached.resumed_req_ids
            pages += behind_hits(block_ids, num_computed) if resumed else block_ids[group]
    return pages


class Rounds:
    """Pairs each draft with its verification, for what learns from it: policies, reused drafts.

    An adapter calls `verified` before a step's drafts are made, `drafted` after.
    """

    def __init__(self, drafter: Drafter, counts: Counts) -> None:
        self.drafter = drafter
        self.counts = counts
        self._drafts = PerRequest[Outcome | None](None)  # nothing of them is verified yet

    def verified(
        self, req_ids: Sequence[str], num_verified: Sequence[int], num_emitted: Sequence[int]
    ) -> None:
        """Learn what became of the last draft of each request in the step.

        Args:
            num_verified: per request, draft tokens that the target has judged.
            num_emitted: accepted tokens and the bonus; 0 = the request was not sampled.
        """
        outcomes = []
        for req_id, verified, emitted in zip(req_ids, num_verified, num_emitted, strict=True):
            draft = self._drafts[req_id]
            if draft is not None and verified and emitted:
                outcomes.append(draft._replace(num_verified=verified, num_accepted=emitted - 1))
            if emitted:
                self._drafts.forget((req_id,))
        self.counts.judged(
            [Judged(o.confidences[: o.num_verified], o.num_accepted) for o in outcomes]
        )
        policy = self.drafter.policy
        if policy.calibration is not None:
            policy.calibration.observe(outcomes)
        policy.observe(outcomes)
        if self.drafter.rejected is not None:
            self.drafter.rejected.observe(outcomes)
        if self.drafter.planner is not None:
            self.drafter.planner.observe(outcomes)

    def drafted(self, req_ids: Sequence[str], drafts: Drafts) -> None:
        """Keep what was drafted until it is verified."""
        for i in drafts.lens.nonzero()[0].tolist():
            self._drafts[req_ids[i]] = Outcome(
                req_ids[i],
                num_drafted=int(drafts.lens[i]),
                num_first=int(drafts.first_lens[i]),
                num_verified=0,
                num_accepted=0,
                confidences=drafts.confidences[i, : drafts.num_confidences[i]],
                ends_at_stop=bool(
                    drafts.ends_at_stop[i] and drafts.lens[i] >= drafts.num_confidences[i]
                ),
            )

    def forget(self, req_ids: Iterable[str]) -> None:
        """The requests have ended."""
        self._drafts.forget(req_ids)
        self.drafter.policy.forget(req_ids)
        if self.drafter.paths is not None:
            self.drafter.paths.forget(req_ids)


class HostedDraftModel:
    """`drafter.DraftModel` on a model that vLLM has loaded.

    Args:
        table_width: columns of the block tables that passes will bring.
    """

    def __init__(
        self,
        model: Any,
        vllm_config: VllmConfig,
        layer_names: Iterable[str],
        stats: DraftStats,
        table_width: int,
        device: torch.device,
    ) -> None:
        knobs = vllm_config.additional_config[METHOD]  # type: ignore[index]
        self.model = model
        self.vllm_config = vllm_config
        self.layer_names = sorted(layer_names)
        self.num_draftable_tokens = knobs["num_draftable_tokens"]
        self.mask_token_id = knobs["mask_token_id"]
        self.diffusion_block_size = knobs["diffusion_block_size"]
        self.draft_increment = knobs["draft_increment"]
        self.stats = stats
        self.table_width = table_width
        self.device = device
        self.graphs: PassGraphs | None = None

    @property
    def attention(self) -> Any:
        """The first layer's attention: all layers have its shape."""
        layers = self.vllm_config.compilation_config.static_forward_context
        return layers[self.layer_names[0]]

    @torch.inference_mode()
    def warm_up_kernels(self, *, details: bool) -> None:
        """Launch every class of the Triton kernels, so that none is compiled while serving.

        Args:
            details: of the confidences that the policy asks for.
        """
        impl, kv_cache = self.attention.impl, self.attention.kv_cache
        if not uses_triton(kv_cache):
            return
        from failfast_kernels import block_attention, confidence

        block_attention.launch_every_class(impl.num_heads, kv_cache, self.diffusion_block_size)
        logits = self._logits(self._run(self.idle_pass(1, 1)))
        confidence.launch_every_class(
            logits, self.num_draftable_tokens, (self.mask_token_id,), details=details
        )

    def capture(self, capture: Capture, max_num_seqs: int) -> None:
        """Replay captured passes from now on, where one fits."""
        impl = self.attention.impl
        rows = rows_per_seq(
            impl.num_heads // impl.num_kv_heads, self.diffusion_block_size, self.draft_increment
        )
        max_num_rows = self.vllm_config.scheduler_config.max_num_batched_tokens
        buckets = make_buckets(max_num_seqs, max_num_rows, rows)
        self.graphs = PassGraphs(buckets, self.table_width, self.device)
        self.graphs.capture(capture, self._run)

    def idle_pass(self, num_seqs: int, num_rows: int) -> DraftBatch:
        """A pass that reads no prefix and commits nothing, of sequences of equal length."""
        rows = torch.arange(num_rows, device=self.device)
        starts = torch.arange(num_seqs + 1, device=self.device) * num_rows // num_seqs
        return DraftBatch(
            input_ids=torch.zeros_like(rows),
            positions=rows % max_positions(self.vllm_config),
            query_start_loc=starts,
            committed_lens=torch.zeros_like(starts[1:]),
            slot_mapping=None,
            block_table=torch.zeros(
                num_seqs, self.table_width, dtype=torch.int32, device=self.device
            ),
        )

    def forward(self, batch: DraftBatch) -> torch.Tensor:
        began = time.perf_counter()
        hidden_states = None if self.graphs is None else self.graphs.replay(batch)
        if hidden_states is None:
            num_rows = batch.input_ids.numel()
            hidden_states = self._run(self._widened(batch))[:num_rows]
        self.stats.forward_ms += (time.perf_counter() - began) * 1e3
        return hidden_states

    def _num_padding(self, num_rows: int) -> int:
        """Rows that a CPU adds, whose kernels are made for one row count."""
        if self.device.type != "cpu":
            return 0
        # a compiled model takes no more
        most: int = self.vllm_config.scheduler_config.max_num_batched_tokens
        return max(0, min(row_class(num_rows), most) - num_rows)

    def _widened(self, batch: DraftBatch) -> DraftBatch:
        """The pass with rows that belong to no sequence and commit nothing."""
        num = self._num_padding(batch.input_ids.numel())
        if not num:
            return batch
        slots = batch.slot_mapping
        return batch._replace(
            input_ids=F.pad(batch.input_ids, (0, num)),
            positions=F.pad(batch.positions, (0, num)),
            slot_mapping=slots if slots is None else F.pad(slots, (0, num), value=-1),
        )

    def _run(self, batch: DraftBatch) -> torch.Tensor:
        meta = BlockDiffusionMetadata(
            batch.query_start_loc,
            batch.committed_lens,
            batch.block_table,
            batch.slot_mapping,
            self.diffusion_block_size,
        )
        with (
            drafter_group(self.vllm_config),
            draft_context(dict.fromkeys(self.layer_names, meta), self.vllm_config),
        ):
            hidden_states: torch.Tensor = self.model(
                # int32 as in vLLM's dummy runs: a compiled model keeps no guard on the type
                input_ids=batch.input_ids.int(),
                positions=batch.positions,
            )
        return hidden_states

    def confidence(self, hidden_states: torch.Tensor, *, details: bool = False) -> TokenConfidence:
        began = time.perf_counter()
        confidence = self._confidence(self._logits(hidden_states), details)
        self.stats.forward_ms += (time.perf_counter() - began) * 1e3
        return confidence

    def candidates(
        self, hidden_states: torch.Tensor, *, details: bool = False
    ) -> tuple[TokenConfidence, Candidates]:
        began = time.perf_counter()
        logits = self._logits(hidden_states)
        confidence = self._confidence(logits, details)
        num = min(MAX_CANDIDATES + 1, self.num_draftable_tokens)  # one of them may be MASK
        logits, token_ids = logits[:, : self.num_draftable_tokens].topk(num)
        logits = logits.float().masked_fill(token_ids == self.mask_token_id, -torch.inf)
        shares = (logits - logits.amax(dim=1, keepdim=True)).exp()
        probabilities = (shares * confidence.probabilities[:, None]).nan_to_num(0.0)
        undefined = confidence.probabilities[:, None] == 0
        token_ids = torch.where(undefined, confidence.token_ids[:, None], token_ids)
        self.stats.forward_ms += (time.perf_counter() - began) * 1e3
        return confidence, Candidates(token_ids, probabilities)

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        num_rows = len(hidden_states)
        hidden_states = F.pad(hidden_states, (0, 0, 0, self._num_padding(num_rows)))
        with drafter_group(self.vllm_config):
            logits: torch.Tensor = self.model.compute_logits(hidden_states)
        return logits[:num_rows]

    def _confidence(self, logits: torch.Tensor, details: bool) -> TokenConfidence:
        forbidden = (self.mask_token_id,)
        return confidence_argmax(logits, self.num_draftable_tokens, forbidden, details=details)


def make_drafter(
    model: Any,
    vllm_config: VllmConfig,
    layer_names: Iterable[str],
    stats: DraftStats,
    kv_block_size: int,
    num_pages: int,
    table_width: int,
    device: torch.device,
) -> Drafter:
    """Build the drafter once the KV cache is laid out; raises ValueError on an unfit page size."""
    if kv_block_size % MAX_DIFFUSION_BLOCK_SIZE:
        raise ValueError(
            f"failfast: the KV page must be a multiple of {MAX_DIFFUSION_BLOCK_SIZE} tokens; "
            f"got {kv_block_size}. Leave --block-size out."
        )
    assert vllm_config.speculative_config is not None
    knobs = vllm_config.additional_config[METHOD]  # type: ignore[index]
    return Drafter(
        HostedDraftModel(model, vllm_config, layer_names, stats, table_width, device),
        _make_policy(knobs),
        draft_increment=knobs["draft_increment"],
        vocab_size=vllm_config.speculative_config.draft_model_config.get_vocab_size(),
        mask_token_id=knobs["mask_token_id"],
        stop_token_ids=torch.tensor(
            stop_token_ids(vllm_config.model_config), dtype=torch.int64, device=device
        ),
        kv_block_size=kv_block_size,
        blocks=CommittedBlocks(num_pages, kv_block_size, knobs["diffusion_block_size"], device),
        max_draft_budget=knobs["draft_budget"],
        max_draft_len=knobs["num_speculative_tokens"],
        max_num_rows=vllm_config.scheduler_config.max_num_batched_tokens,
        diffusion_block_size=knobs["diffusion_block_size"],
        logit_shift=knobs["logit_shift"],
        reuse_rejected=knobs["reuse_rejected"],
        paths=PathSearch() if knobs["path_search"] else None,
    )


def _make_policy(knobs: dict[str, Any]) -> Policy:
    parameters = {name: knobs[name] for name in POLICIES[knobs["policy"]]}
    return make_policy(knobs["policy"], parameters, knobs["num_speculative_tokens"])


def adapter_of(runner: Any) -> Any:
    """The adapter of a model runner: `FailFastProposer` (V1), `FailFastSpeculator` (V2) or None."""
    return getattr(runner, "drafter", None) or getattr(runner, "speculator", None)


def start_serving(runner: Any) -> None:
    """End a worker's start-up: measure the models, and forget what vLLM's warm-up drafted."""
    adapter = adapter_of(runner)
    vllm_config, drafter, stats = adapter.vllm_config, adapter.drafter, adapter.stats
    knobs = vllm_config.additional_config[METHOD]
    if knobs["load_aware"]:
        costs = measure_costs(adapter.target_step(runner), drafter.model, vllm_config)
        drafter.planner = make_planner(costs, vllm_config)
    stats.reset()
    if stats.trace is None:  # may be open: some start-ups end twice
        stats.trace = _trace_writer(vllm_config, drafter.kv_block_size)
    drafter.policy = _make_policy(knobs)
    drafter.rejected = RejectedDrafts() if knobs["reuse_rejected"] else None
    drafter.paths = PathSearch() if knobs["path_search"] else None
    drafter.blocks.bits.zero_()
    adapter.rounds = Rounds(drafter, stats.counts)


def _trace_writer(vllm_config: VllmConfig, kv_block_size: int) -> TraceWriter | None:
    """Where rounds are written down, if asked for and this is the first rank of all."""
    knobs = dict(vllm_config.additional_config[METHOD])  # type: ignore[index]
    path, with_ids = knobs.pop("trace"), knobs.pop("trace_ids")
    ranks = vllm_config.parallel_config
    if path is None or ranks.rank or ranks.data_parallel_index:
        return None
    assert vllm_config.speculative_config is not None
    models = {
        "target": vllm_config.model_config.model,
        "drafter": vllm_config.speculative_config.draft_model_config.model,
    }
    header = {
        **{role: Path(name).name if Path(name).is_dir() else name for role, name in models.items()},
        "dtype": str(vllm_config.model_config.dtype).removeprefix("torch."),
        "max_num_seqs": vllm_config.scheduler_config.max_num_seqs,
        "kv_block_size": kv_block_size,
        **knobs,
    }
    return TraceWriter(path, header, with_ids)


@torch.inference_mode()
def profile_pass(
    model: Any, vllm_config: VllmConfig, num_tokens: int, device: torch.device
) -> None:
    """A pass without attention, and the memory of the largest step: for vLLM's memory profile.

    vLLM profiles the verification of one token per request. Ours has `draft_budget` over all of
    them, for each of which the target makes a row of logits. V1 copies them up to three times in
    float32, V2 once and in parts of at most `get_max_chunk_logits` rows.
    """
    positions = torch.arange(num_tokens, device=device) % max_positions(vllm_config)
    knobs = vllm_config.additional_config[METHOD]  # type: ignore[index]
    num_rows = vllm_config.scheduler_config.max_num_seqs + knobs["draft_budget"]
    with drafter_group(vllm_config), draft_context(None, vllm_config):
        hidden_states = model(input_ids=torch.zeros_like(positions).int(), positions=positions)
        logits = model.compute_logits(hidden_states[:num_rows])
    num_copies, num_copied = 3, num_rows
    if vllm_config.use_v2_model_runner:
        from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits

        num_copies, num_copied = 1, get_max_chunk_logits(vllm_config.model_config.get_vocab_size())
    copies = [logits[:num_copied].float() for _ in range(num_copies)]
    del copies, logits


@torch.inference_mode()
def measure_costs(
    target_step: Callable[[int], torch.Tensor], drafter: HostedDraftModel, vllm_config: VllmConfig
) -> Costs:
    """Time steps of the target and passes of the drafter, in a few seconds; on all ranks alike.

    A step takes more than its forward pass: the planner learns the rest.

    Args:
        target_step: runs the target over a number of tokens and returns logits of them.
    """
    knobs = vllm_config.additional_config[METHOD]  # type: ignore[index]
    scheduler = vllm_config.scheduler_config
    widest = min(scheduler.max_num_seqs + knobs["draft_budget"], scheduler.max_num_batched_tokens)
    ranks = vllm_config.parallel_config
    in_lockstep = max(ranks.data_parallel_size, ranks.tensor_parallel_size) > 1

    def draft_pass(size: int) -> torch.Tensor:
        """Sequences in the middle of a live block, each with an increment of masks."""
        rows_each = drafter.diffusion_block_size // 2 + drafter.draft_increment
        num_seqs = max(1, size // rows_each)
        hidden_states = drafter.forward(drafter.idle_pass(num_seqs, size))
        masks = hidden_states[: num_seqs * drafter.draft_increment]
        return drafter.confidence(masks).probabilities

    def milliseconds(run: Callable[[int], torch.Tensor], size: int) -> float:
        began = time.perf_counter()
        run(size).amax().item()  # waits for the device
        return (time.perf_counter() - began) * 1e3

    sizes = [2**i for i in range(widest.bit_length())]
    best = np.full((2, len(sizes)), np.inf)  # milliseconds of the target and the drafter
    models = list(zip((target_step, draft_pass), best, strict=True))

    def time_once(i: int, models: list[Any]) -> None:
        for run, times in models:
            times[i] = min(times[i], milliseconds(run, sizes[i]))

    # a CPU compiles kernels per row count
    classes = sorted({row_class(size) for size in range(1, widest + 1)})
    warm_sizes = list(range(1, min(widest, MAX_WARM_ROWS) + 1)), classes
    for model, warm in zip(models, warm_sizes, strict=True):
        for i in range(len(sizes)):
            time_once(i, [model, model])  # the first warms up
            if model[1][i] > 500 and not in_lockstep:
                sizes = sizes[: i + 1]  # wider passes are extrapolated
                break
        if drafter.device.type == "cpu" and not in_lockstep:
            costs = CostTable(sizes, model[1][: len(sizes)].tolist())
            num = int((costs(warm).cumsum() < WARM_UP_MS).sum())
            # widest first: else the kernels of each size take a part of what the size before has
            # freed, and glibc searches all the gaps in between whenever a step allocates
            for size in reversed(warm[:num]):
                milliseconds(model[0], size)
    ends = time.perf_counter() + TURNS_SECONDS
    # in turns: a second that another process takes is not all of one model or size
    for turn in range(1, MAX_TURNS):
        if turn >= MIN_TURNS and time.perf_counter() > ends and not in_lockstep:
            break
        for i in range(len(sizes)):
            time_once(i, models)
    verify, draft = (CostTable(sizes, times[: len(sizes)].tolist()) for times in best)
    return Costs(draft, verify)


def make_planner(costs: Costs, vllm_config: VllmConfig) -> LoadPlanner:
    """Build the load planner; every rank gets the times of the first, now and while serving."""
    from vllm.distributed import get_tp_group

    knobs = vllm_config.additional_config[METHOD]  # type: ignore[index]
    group = get_tp_group()

    def of_first_rank(times: list[float]) -> list[float]:
        shared = torch.tensor(times, dtype=torch.float64)
        torch.distributed.broadcast(shared, src=group.first_rank, group=group.cpu_group)
        agreed: list[float] = shared.tolist()
        return agreed

    several = group.world_size > 1
    planner = LoadPlanner(
        group.broadcast_object(costs) if several else costs,
        knobs["num_speculative_tokens"],
        knobs["draft_increment"],
        learns=True,
    )
    if several:
        planner.agree = of_first_rank
    return planner


def stop_token_ids(model_config: Any) -> list[int]:
    """The target's end-of-sequence ids, from its generation config or its config."""
    eos = model_config.try_get_generation_config().get("eos_token_id")
    if eos is None:
        eos = getattr(model_config.hf_config, "eos_token_id", None)
    return [] if eos is None else [int(i) for i in (eos if isinstance(eos, list) else [eos])]


def safetensors_only(draft_vllm_config: VllmConfig) -> VllmConfig:
    """Drafter weights are never unpickled, whatever the target's load format."""
    if draft_vllm_config.load_config.load_format == "dummy":
        return draft_vllm_config
    load_config = replace(draft_vllm_config.load_config, load_format="safetensors")
    return replace(draft_vllm_config, load_config=load_config)


def max_positions(vllm_config: VllmConfig) -> int:
    """Tokens that both the target and the drafter can hold."""
    assert vllm_config.speculative_config is not None
    drafter = vllm_config.speculative_config.draft_model_config.hf_config
    target_limit: int = vllm_config.model_config.max_model_len
    return min(target_limit, int(drafter.max_position_embeddings))
