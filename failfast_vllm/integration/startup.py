"""What is built and measured once, before an engine serves."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.utils import replace

from failfast_vllm.config import METHOD, POLICIES
from failfast_vllm.drafters.families import MAX_DIFFUSION_BLOCK_SIZE
from failfast_vllm.drafters.hosted import HostedDraftModel, row_class
from failfast_vllm.drafting.committed_blocks import CommittedBlocks
from failfast_vllm.drafting.drafter import Drafter
from failfast_vllm.drafting.path_search import PathSearch
from failfast_vllm.drafting.reuse import RejectedDrafts
from failfast_vllm.integration.session import DraftStats, Rounds, adapter_of
from failfast_vllm.observe.trace import TraceWriter
from failfast_vllm.planning.costs import Costs, CostTable
from failfast_vllm.planning.planner import LoadPlanner
from failfast_vllm.policies.learned import make_policy
from failfast_vllm.policies.rules import Policy

MAX_TURNS, MIN_TURNS, TURNS_SECONDS = 10, 3, 12.0  # of timing the models
WARM_UP_MS = 8000.0  # of that for each model, on a CPU; a busy one has it seem longer
MAX_WARM_ROWS = 128  # of the target: with the drafter's they fit into oneDNN's cache of 1024


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
