"""What is built once, before an engine serves."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.utils import replace

from failfast_kernels import TokenConfidence
from failfast_vllm.config import METHOD
from failfast_vllm.drafters.families import MAX_DIFFUSION_BLOCK_SIZE
from failfast_vllm.drafters.hosted import HostedDraftModel
from failfast_vllm.drafting.committed_blocks import CommittedBlocks
from failfast_vllm.drafting.drafter import Drafter
from failfast_vllm.drafting.interfaces import (
    BestTokens,
    NoReuse,
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
from failfast_vllm.integration.session import adapter_of
from failfast_vllm.observe.counters import DraftStats, Stopwatch
from failfast_vllm.observe.trace import TraceWriter
from failfast_vllm.planning.costs import Costs
from failfast_vllm.planning.planner import LoadPlanner
from failfast_vllm.policies.table import make_policy


class TimedDraftModel(HostedDraftModel):
    """The draft model, with a stopwatch on what drafting asks of it."""

    def __init__(
        self,
        model: Any,
        vllm_config: VllmConfig,
        layer_names: Iterable[str],
        table_width: int,
        device: torch.device,
        watch: Stopwatch,
    ) -> None:
        super().__init__(model, vllm_config, layer_names, table_width, device)
        self.watch = watch

    def forward(self, batch: DraftBatch) -> torch.Tensor:
        with self.watch:
            return super().forward(batch)

    def confidence(self, hidden_states: torch.Tensor, *, details: bool = False) -> TokenConfidence:
        with self.watch:
            return super().confidence(hidden_states, details=details)

    def candidates(
        self, hidden_states: torch.Tensor, *, details: bool = False
    ) -> tuple[TokenConfidence, Candidates]:
        with self.watch:
            return super().candidates(hidden_states, details=details)


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
    knobs = vllm_config.additional_config[METHOD]  # type: ignore[index]
    return Drafter(
        TimedDraftModel(model, vllm_config, layer_names, table_width, device, stats.in_model),
        make_policy(knobs["policy"], knobs, knobs["num_speculative_tokens"]),
        Unplanned(knobs["draft_increment"]),
        _geometry(vllm_config, kv_block_size, device),
        CommittedBlocks(num_pages, kv_block_size, knobs["diffusion_block_size"], device),
        stop_token_ids=torch.tensor(
            stop_token_ids(vllm_config.model_config), dtype=torch.int64, device=device
        ),
        max_draft_len=knobs["num_speculative_tokens"],
        max_draft_budget=knobs["draft_budget"],
        tokens=_make_tokens(knobs),
        reuse=_make_reuse(knobs),
    )


def _geometry(vllm_config: VllmConfig, kv_block_size: int, device: torch.device) -> Geometry:
    assert vllm_config.speculative_config is not None
    knobs = vllm_config.additional_config[METHOD]  # type: ignore[index]
    return Geometry(
        vocab_size=vllm_config.speculative_config.draft_model_config.get_vocab_size(),
        mask_token_id=knobs["mask_token_id"],
        kv_block_size=kv_block_size,
        max_num_rows=vllm_config.scheduler_config.max_num_batched_tokens,
        device=device,
        diffusion_block_size=knobs["diffusion_block_size"],
        logit_shift=knobs["logit_shift"],
    )


def _make_tokens(knobs: dict[str, Any]) -> TokenChooser:
    return PathSearch() if knobs["path_search"] else BestTokens()


def _make_reuse(knobs: dict[str, Any]) -> Reuse:
    return RejectedDrafts() if knobs["reuse_rejected"] else NoReuse()


def start_serving(runner: Any) -> None:
    """End a worker's start-up: measure the models, and forget what vLLM's warm-up drafted."""
    adapter = adapter_of(runner)
    vllm_config, session, stats = adapter.vllm_config, adapter.session, adapter.stats
    drafter = session.drafter
    knobs = vllm_config.additional_config[METHOD]
    if knobs["load_aware"]:
        costs = measure_costs(adapter.target_step(runner), drafter.model, vllm_config)
        drafter.planner = make_planner(costs, vllm_config)
    stats.reset()
    if stats.trace is None:  # may be open: some start-ups end twice
        stats.trace = _trace_writer(vllm_config, drafter.geometry.kv_block_size)
    drafter.policy = make_policy(knobs["policy"], knobs, knobs["num_speculative_tokens"])
    drafter.tokens, drafter.reuse = _make_tokens(knobs), _make_reuse(knobs)
    drafter.blocks.bits.zero_()
    session.ledger = Ledger()


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
    """The target's end-of-sequence ids, from its generation config or its config.

    A multimodal target may have them in the config of its language model only.
    """
    found = [model_config.try_get_generation_config().get("eos_token_id")]
    for config in (model_config.hf_config, model_config.hf_text_config):
        found.append(getattr(config, "eos_token_id", None))
    eos: Any = next((ids for ids in found if ids is not None), [])
    return [int(i) for i in (eos if isinstance(eos, list) else [eos])]


def safetensors_only(draft_vllm_config: VllmConfig) -> VllmConfig:
    """Drafter weights are never unpickled, whatever the target's load format."""
    if draft_vllm_config.load_config.load_format == "dummy":
        return draft_vllm_config
    load_config = replace(draft_vllm_config.load_config, load_format="safetensors")
    return replace(draft_vllm_config, load_config=load_config)
