"""What is built once, before an engine serves."""

import functools
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.utils import replace
from vllm.distributed import get_tp_group

from failfast_kernels import TokenConfidence
from failfast_vllm.config import METHOD
from failfast_vllm.drafters.families import MAX_DIFFUSION_BLOCK_SIZE
from failfast_vllm.drafters.hosted import HostedDraftModel
from failfast_vllm.drafters.parallel import keep_apart
from failfast_vllm.drafting.committed_blocks import CommittedBlocks
from failfast_vllm.drafting.drafter import Drafter
from failfast_vllm.drafting.interfaces import (
    BestTokens,
    NoReuse,
    Policy,
    Reuse,
    TokenChooser,
    Unplanned,
)
from failfast_vllm.drafting.ledger import Ledger
from failfast_vllm.drafting.path_search import PathSearch
from failfast_vllm.drafting.records import Candidates, DraftBatch
from failfast_vllm.drafting.reuse import RejectedDrafts
from failfast_vllm.drafting.workspace import Geometry
from failfast_vllm.integration.measure import measure_costs
from failfast_vllm.observe.counters import Stopwatch
from failfast_vllm.observe.trace import TraceWriter
from failfast_vllm.planning.costs import Costs
from failfast_vllm.planning.planner import LoadPlanner
from failfast_vllm.policies.table import make_policy


class TimedDraftModel(HostedDraftModel):
    """The draft model, with a stopwatch on what drafting asks of it."""

    watch: Stopwatch

    def forward(self, batch: DraftBatch) -> torch.Tensor:
        with self.watch:
            return super().forward(batch)

    def confidence(self, *rows: Any, **more: Any) -> TokenConfidence:
        with self.watch:
            return super().confidence(*rows, **more)

    def candidates(self, *rows: Any, **more: Any) -> tuple[TokenConfidence, Candidates]:
        with self.watch:
            return super().candidates(*rows, **more)


def make_drafter(model: HostedDraftModel, kv_block_size: int, num_pages: int) -> Drafter:
    """Build the drafter once the KV cache is laid out; raises ValueError on an unfit page size."""
    if kv_block_size % MAX_DIFFUSION_BLOCK_SIZE:
        raise ValueError(
            f"failfast: the KV page must be a multiple of {MAX_DIFFUSION_BLOCK_SIZE} tokens; "
            f"got {kv_block_size}. Leave --block-size out."
        )
    vllm_config, device = model.vllm_config, model.device
    knobs = vllm_config.additional_config[METHOD]
    policy, tokens, reuse = _learners(knobs)
    stop_ids = stop_token_ids(vllm_config.model_config)
    return Drafter(
        model,
        policy,
        Unplanned(knobs["draft_increment"]),
        Geometry(
            vocab_size=vllm_config.speculative_config.draft_model_config.get_vocab_size(),
            mask_token_id=knobs["mask_token_id"],
            kv_block_size=kv_block_size,
            max_num_rows=vllm_config.scheduler_config.max_num_batched_tokens,
            device=device,
            diffusion_block_size=knobs["diffusion_block_size"],
            logit_shift=knobs["logit_shift"],
        ),
        CommittedBlocks(num_pages, kv_block_size, knobs["diffusion_block_size"], device),
        stop_token_ids=torch.tensor(stop_ids, dtype=torch.int64, device=device),
        max_draft_len=knobs["num_speculative_tokens"],
        max_draft_budget=knobs["draft_budget"],
        tokens=tokens,
        reuse=reuse,
    )


def _learners(knobs: dict[str, Any]) -> tuple[Policy, TokenChooser, Reuse]:
    """What learns while the engine serves, as new."""
    return (
        make_policy(knobs["policy"], knobs, knobs["num_speculative_tokens"]),
        PathSearch() if knobs["path_search"] else BestTokens(),
        RejectedDrafts() if knobs["reuse_rejected"] else NoReuse(),
    )


def start_serving(adapter: Any, runner: Any) -> None:
    """End a worker's start-up: measure the models, and forget what vLLM's warm-up drafted."""
    vllm_config, drafter, stats = adapter.vllm_config, adapter.drafter, adapter.stats
    knobs = vllm_config.additional_config[METHOD]
    if knobs["load_aware"]:
        target_step = functools.partial(adapter.target_step, runner)
        drafter.planner = _planner(measure_costs(target_step, drafter.model, vllm_config), knobs)
    stats.reset()
    if stats.trace is None:  # may be open: some start-ups end twice
        stats.trace = _trace_writer(vllm_config, drafter.geometry.kv_block_size)
    drafter.policy, drafter.tokens, drafter.reuse = _learners(knobs)
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
    names = {role: Path(of.model) for role, of in (("target", target), ("drafter", drafter))}
    header = {
        **{role: path.name if path.is_dir() else str(path) for role, path in names.items()},
        "dtype": str(target.dtype).removeprefix("torch."),
        "max_num_seqs": vllm_config.scheduler_config.max_num_seqs,
        "kv_block_size": kv_block_size,
        **knobs,
    }
    return TraceWriter(path, header, with_ids)


def _planner(costs: Costs, knobs: dict[str, Any]) -> LoadPlanner:
    """Every rank gets the times of the first, now and while serving."""
    group = get_tp_group()
    cap, increment = knobs["num_speculative_tokens"], knobs["draft_increment"]
    if group.world_size == 1:
        return LoadPlanner(costs, cap, increment, learns=True)

    def of_first_rank(times: list[float]) -> list[float]:
        shared = torch.tensor(times, dtype=torch.float64)
        torch.distributed.broadcast(shared, src=group.first_rank, group=group.cpu_group)
        agreed: list[float] = shared.tolist()
        return agreed

    planner = LoadPlanner(group.broadcast_object(costs), cap, increment, learns=True)
    planner.agree = of_first_rank
    return planner


def stop_token_ids(model_config: Any) -> list[int]:
    """The target's end-of-sequence ids, from its generation config or its config.

    A multimodal target may have them in the config of its language model only.
    """
    configs = (model_config.hf_config, model_config.hf_text_config)
    found = [model_config.try_get_generation_config().get("eos_token_id")]
    found += [getattr(config, "eos_token_id", None) for config in configs]
    eos: Any = next((ids for ids in found if ids is not None), [])
    return [int(i) for i in (eos if isinstance(eos, list) else [eos])]


def drafters_config(config: VllmConfig, target_config: VllmConfig) -> VllmConfig:
    """Drafter weights are never unpickled, whatever the target's load format."""
    if config.load_config.load_format != "dummy":
        config = replace(config, load_config=replace(config.load_config, load_format="safetensors"))
    return keep_apart(config, target_config)
