"""What is built once, before an engine serves."""

import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.utils import replace
from vllm.distributed import get_tp_group

from failfast_kernels import TokenConfidence
from failfast_vllm.config import METHOD
from failfast_vllm.drafters.hosted import HostedDraftModel, row_class
from failfast_vllm.drafters.parallel import keep_apart
from failfast_vllm.drafting.committed_blocks import CommittedBlocks
from failfast_vllm.drafting.copying import OwnText
from failfast_vllm.drafting.drafter import Drafter
from failfast_vllm.drafting.interfaces import CopyLane, Planner
from failfast_vllm.drafting.ledger import Ledger
from failfast_vllm.drafting.records import DraftBatch
from failfast_vllm.drafting.workspace import Geometry
from failfast_vllm.observe.counters import DraftStats
from failfast_vllm.observe.trace import TraceWriter
from failfast_vllm.planning.costs import Costs, CostTable
from failfast_vllm.planning.planner import LoadPlanner
from failfast_vllm.policies.table import make_policy

MAX_TURNS, MIN_TURNS, TURNS_SECONDS = 10, 3, 12.0  # of timing the models
SLOW_MS = 500.0  # wider passes than one that takes longer are extrapolated
WARM_UP_MS = 8000.0  # of that for each model, on a CPU; a busy one has it seem longer
ATTENDING_ROWS = 64  # of the pass that tells what attention takes
MAX_WARM_ROWS = 128  # of the target: with the drafter's they fit into oneDNN's cache of 1024


class TimedDraftModel(HostedDraftModel):
    stats: DraftStats  # counts the time that drafting spends in the model

    def forward(self, batch: DraftBatch) -> torch.Tensor:
        with self.stats.in_model():
            return super().forward(batch)

    def confidence(self, *rows: Any, **more: Any) -> TokenConfidence:
        with self.stats.in_model():
            return super().confidence(*rows, **more)


@dataclass
class NoDraftModel:
    """In place of the draft model where all drafts are copies: no pass is ever made."""

    vllm_config: VllmConfig
    device: torch.device

    def warm_up_kernels(self) -> None:
        """Nothing is compiled."""


def make_drafter(model: Any, kv_block_size: int, num_pages: int) -> Drafter:
    """Build the drafter, once the KV cache is laid out.

    Args:
        kv_block_size: tokens of a page: whole diffusion blocks, as our attention backend asks.
    """
    vllm_config, device = model.vllm_config, model.device
    knobs = vllm_config.additional_config[METHOD]
    target_vocab_size = vllm_config.model_config.get_vocab_size()
    stop_ids = stop_token_ids(vllm_config.model_config)
    geometry = Geometry(
        vocab_size=vllm_config.speculative_config.draft_model_config.get_vocab_size(),
        mask_token_id=knobs["mask_token_id"],
        kv_block_size=kv_block_size,
        max_num_rows=vllm_config.scheduler_config.max_num_batched_tokens,
        device=device,
        diffusion_block_size=knobs["diffusion_block_size"],
        logit_shift=knobs["logit_shift"],
        window=knobs["drafter_window"],
    )
    return Drafter(
        model,
        make_policy(knobs),
        Planner(knobs["draft_increment"]),
        geometry,
        CommittedBlocks(num_pages, geometry),
        stop_token_ids=torch.tensor(stop_ids, dtype=torch.int64, device=device),
        max_draft_len=knobs["num_speculative_tokens"],
        max_draft_budget=knobs["draft_budget"],
        copies=OwnText(target_vocab_size, device) if knobs["copies"] else CopyLane(),
    )


def start_serving(adapter: Any, runner: Any) -> None:
    """End a worker's start-up: measure the models, and forget what vLLM's warm-up drafted."""
    vllm_config, drafter, stats = adapter.vllm_config, adapter.drafter, adapter.stats
    knobs = vllm_config.additional_config[METHOD]
    if knobs["load_aware"]:
        target_step = functools.partial(adapter.target_step, runner)
        costs = measure_costs(target_step, drafter.model, vllm_config)
        drafter.planner = _planner(costs, knobs, vllm_config.scheduler_config.async_scheduling)
    stats.reset()
    if stats.trace is None:  # may be open: some start-ups end twice
        stats.trace = _trace_writer(vllm_config, drafter.geometry.kv_block_size)
    drafter.blocks.bits.zero_()
    adapter.session.ledger = Ledger()


def _trace_writer(vllm_config: VllmConfig, kv_block_size: int) -> TraceWriter | None:
    """Where rounds are written down, if asked for and this is the first rank of all."""
    knobs = dict(vllm_config.additional_config[METHOD])
    path, with_ids = knobs.pop("trace"), knobs.pop("trace_ids")
    ranks = vllm_config.parallel_config
    if path is None or ranks.rank or ranks.data_parallel_index:
        return None
    target, drafter = vllm_config.model_config, vllm_config.speculative_config.draft_model_config
    models = {"target": target.model, "drafter": drafter.model if knobs["drafts"] else "none"}
    header = {
        **{role: Path(name).name if Path(name).is_dir() else name for role, name in models.items()},
        "dtype": str(target.dtype).removeprefix("torch."),
        "max_num_seqs": vllm_config.scheduler_config.max_num_seqs,
        "kv_block_size": kv_block_size,
        **knobs,
    }
    return TraceWriter(path, header, with_ids)


@torch.inference_mode()
def measure_costs(
    target_step: Callable[[int], torch.Tensor],
    drafter: Any,
    vllm_config: VllmConfig,
    clock: Callable[[], float] = time.perf_counter,
) -> Costs:
    """Time steps of the target and passes of the drafter, in a few seconds; on all ranks alike.

    Args:
        target_step: runs the target over a number of tokens and returns logits of them.
    """
    knobs = vllm_config.additional_config[METHOD]
    scheduler, ranks = vllm_config.scheduler_config, vllm_config.parallel_config
    widest = min(scheduler.max_num_seqs + knobs["draft_budget"], scheduler.max_num_batched_tokens)
    in_lockstep = max(ranks.data_parallel_size, ranks.tensor_parallel_size) > 1
    sizes = [2**i for i in range(widest.bit_length())]
    target = _Timed(target_step, clock)
    draft_pass = functools.partial(_draft_pass, drafter)
    draft = _Timed(draft_pass if knobs["drafts"] else torch.zeros, clock)
    # a CPU compiles kernels per row count
    few = list(range(1, min(widest, MAX_WARM_ROWS) + 1))
    classes = sorted({row_class(size) for size in range(1, widest + 1)})
    for model, warm in ((target, few), (draft, classes)):
        sizes = model.first_times(sizes, until_slow=not in_lockstep)
        if drafter.device.type == "cpu" and not in_lockstep:
            model.warm_up(warm, sizes)
    num_rows = min(ATTENDING_ROWS, sizes[-1])
    num_keys = drafter.longest_prefix(num_rows) if knobs["drafts"] else 0
    attending = _Timed(functools.partial(draft_pass, num_keys=num_keys), clock)
    turns = [*itertools.product((target, draft), sizes), *[(attending, num_rows)] * (num_keys > 0)]
    ends = clock() + TURNS_SECONDS
    # in turns: a second that another process takes is not all of one model or size
    for turn in range(1, MAX_TURNS):
        if turn >= MIN_TURNS and clock() > ends and not in_lockstep:
            break
        for model, size in turns:
            model.time(size)
    slower_ms = attending.best.get(num_rows, 0.0) - draft.best[num_rows]
    score_ms = max(0.0, slower_ms) / max(num_rows * num_keys, 1)
    return Costs(draft.table(sizes), target.table(sizes), score_ms)


@dataclass
class _Timed:
    """A model, and the shortest time that each number of rows took it."""

    run: Callable[[int], torch.Tensor]
    clock: Callable[[], float]  # seconds
    best: dict[int, float] = field(default_factory=dict)  # milliseconds by rows

    def time(self, size: int) -> float:
        began = self.clock()
        self.run(size).amax().item()  # waits for the device
        self.best[size] = min(self.best.get(size, float("inf")), (self.clock() - began) * 1e3)
        return self.best[size]

    def first_times(self, sizes: list[int], *, until_slow: bool) -> list[int]:
        """Time each size; returns those that are worth more of it."""
        for i, size in enumerate(sizes):
            self.time(size)  # warms up
            if self.time(size) > SLOW_MS and until_slow:
                return sizes[: i + 1]
        return sizes

    def warm_up(self, warm_sizes: list[int], sizes: list[int]) -> None:
        """Run as many of `warm_sizes` as there is time for, by the times of `sizes`."""
        num = int((self.table(sizes)(warm_sizes).cumsum() < WARM_UP_MS).sum())
        # widest first: else the kernels of each size take a part of what the size before has
        # freed, and glibc searches all the gaps in between whenever a step allocates
        for size in reversed(warm_sizes[:num]):
            self.run(size)

    def table(self, sizes: list[int]) -> CostTable:
        return CostTable(sizes, [self.best[size] for size in sizes])


def _draft_pass(drafter: HostedDraftModel, size: int, num_keys: int = 0) -> torch.Tensor:
    """Sequences in the middle of a live block after `num_keys` tokens, each with an increment."""
    rows_each = drafter.diffusion_block_size // 2 + drafter.draft_increment
    num_seqs = max(1, size // rows_each)
    hidden_states = drafter.forward(drafter.idle_pass(num_seqs, size, num_keys))
    masks = hidden_states[: num_seqs * drafter.draft_increment]
    return drafter.confidence(masks).probabilities


def _planner(costs: Costs, knobs: dict[str, Any], schedules_ahead: bool) -> LoadPlanner:
    """Every rank gets the times of the first, now and while serving."""
    group = get_tp_group()

    def of_first_rank(times: list[float]) -> list[float]:
        shared = torch.tensor(times, dtype=torch.float64)
        torch.distributed.broadcast(shared, src=group.first_rank, group=group.cpu_group)
        return [float(ms) for ms in shared]

    cap, increment = knobs["num_speculative_tokens"], knobs["draft_increment"]
    agree = of_first_rank if group.world_size > 1 else list
    costs = group.broadcast_object(costs)
    options = {key: knobs[key] for key in ("drafts", "copies")}
    options["schedules_ahead"] = schedules_ahead
    return LoadPlanner(costs, cap, increment, learns=True, agree=agree, **options)


def stop_token_ids(model_config: Any) -> list[int]:
    """The target's end-of-sequence ids, from its generation config or its config.

    A multimodal target may have them in the config of its language model only.
    """
    found = [model_config.try_get_generation_config().get("eos_token_id")]
    for config in (model_config.hf_config, model_config.hf_text_config):
        found.append(getattr(config, "eos_token_id", None))
    eos: Any = next((ids for ids in found if ids is not None), [])
    return [int(i) for i in (eos if isinstance(eos, list) else [eos])]


def drafters_config(config: VllmConfig, target_config: VllmConfig) -> VllmConfig:
    """Drafter weights are never unpickled, whatever the target's load format."""
    if config.load_config.load_format != "dummy":
        config = replace(config, load_config=replace(config.load_config, load_format="safetensors"))
    return keep_apart(config, target_config)
