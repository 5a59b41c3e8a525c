"""The drafter on vLLM's V1 model runner: an adapter that owns no algorithm.

vLLM builds it where it would build its own `DraftModelProposer`, so loading, KV allocation and
memory profiling are vLLM's. Once per engine step, after the accepted tokens are booked, the runner
calls `draft` and schedules the lists that it returns.

What is committed needs no state: every step commits all blocks that the target has completed, so
the cache holds exactly the blocks below the step's first computed position - also after a prefix
hit or a preemption.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.utils import replace
from vllm.forward_context import set_forward_context
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from failfast_kernels import TokenConfidence, confidence_argmax
from failfast_vllm.attention import BlockDiffusionMetadata
from failfast_vllm.config import DIFFUSION_BLOCK_SIZE, METHOD
from failfast_vllm.drafter import DraftBatch, Drafter, DraftStep
from failfast_vllm.policy import make_policy


class Round(NamedTuple):
    """One verified draft of one request."""

    req_id: str
    drafted: list[int]  # what the target verified
    emitted: list[int]  # accepted tokens and the bonus
    num_passes: int  # draft passes that the draft took


@dataclass
class DraftStats:
    """Counters since the engine started; `benchmarks/` and `failfast demo` read them."""

    num_steps: int = 0
    num_forwards: int = 0
    num_rows: int = 0
    forward_ms: float = 0.0  # inside the draft model
    total_ms: float = 0.0  # in `draft`, forwards included
    on_round: Callable[[Round], None] | None = field(default=None, repr=False)


class FailFastProposer(DraftModelProposer):
    """vLLM's proposer interface over `drafter.Drafter`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config, device, runner)
        self.runner = runner
        self.knobs = vllm_config.additional_config[METHOD]
        self.max_positions = int(self.draft_model_config.hf_config.max_position_embeddings)
        self.stop_token_ids = _stop_token_ids(vllm_config.model_config)
        self.stats = DraftStats()
        self._drafter: Drafter | None = None  # set by `initialize_attn_backend`
        self._passes: dict[str, int] = {}  # request -> passes of its current draft

    def _raise_if_padded_drafter_batch_disabled(self) -> None:
        """Ragged drafts on the CPU are the point of this proposer."""

    def _raise_if_vocab_size_mismatch(self) -> None:
        """The padding of the vocabulary may differ; ids are checked against the tokenizers."""

    def _create_draft_vllm_config(self) -> VllmConfig:
        config = super()._create_draft_vllm_config()
        if config.load_config.load_format == "dummy":
            return config
        return replace(config, load_config=replace(config.load_config, load_format="safetensors"))

    def initialize_attn_backend(
        self, kv_cache_config: Any, kernel_block_sizes: list[int] | None = None
    ) -> None:
        """Called by the runner once the KV cache is laid out."""
        super().initialize_attn_backend(kv_cache_config, kernel_block_sizes)
        kv_block_size = (
            kernel_block_sizes[self.kv_cache_gid] if kernel_block_sizes else self.block_size
        )
        if kv_block_size % DIFFUSION_BLOCK_SIZE:
            raise ValueError(
                f"failfast: the KV page must be a multiple of {DIFFUSION_BLOCK_SIZE} tokens; "
                f"got {kv_block_size}. Leave --block-size out."
            )
        self._layer_names = sorted(self._draft_attn_layer_names)
        self._drafter = Drafter(
            self,
            make_policy(self.knobs["policy"], self.knobs["confidence_threshold"]),
            draft_increment=self.knobs["draft_increment"],
            vocab_size=self.draft_model_config.get_vocab_size(),
            mask_token_id=self.knobs["mask_token_id"],
            stop_token_ids=torch.tensor(self.stop_token_ids, device=self.device),
            kv_block_size=kv_block_size,
            max_num_rows=self.max_num_tokens,
            diffusion_block_size=DIFFUSION_BLOCK_SIZE,
        )

    def draft(
        self, scheduler_output: Any, sampled_token_ids: list[list[int]], common_attn_metadata: Any
    ) -> list[list[int]]:
        """One engine step: commit, draft, and return a list per request (`[]` = no draft)."""
        assert self._drafter is not None
        began = time.perf_counter()
        step = self._gather(scheduler_output, sampled_token_ids, common_attn_metadata)
        drafts = self._drafter.propose(step)
        lists = drafts.to_lists()
        stats = self.stats
        stats.num_steps += 1
        stats.num_forwards += drafts.num_forwards
        stats.num_rows += drafts.num_rows
        stats.total_ms += (time.perf_counter() - began) * 1e3
        if stats.on_round is not None:
            self._report_rounds(stats.on_round, scheduler_output, sampled_token_ids, drafts)
        return lists

    def forward(self, batch: DraftBatch) -> torch.Tensor:
        """`drafter.DraftModel`: run the model over the rows of one pass."""
        began = time.perf_counter()
        meta = BlockDiffusionMetadata(
            batch.query_start_loc, batch.committed_lens, batch.block_table, batch.slot_mapping
        )
        with set_forward_context(
            dict.fromkeys(self._layer_names, meta),
            self.vllm_config,
            num_tokens=batch.input_ids.numel(),
            slot_mapping={},
        ):
            hidden_states: torch.Tensor = self.model(
                # int32 as in `dummy_run`: a compiled model keeps no guard on the type
                input_ids=batch.input_ids.int(),
                positions=batch.positions,
            )
        self.stats.forward_ms += (time.perf_counter() - began) * 1e3
        return hidden_states

    def confidence(self, hidden_states: torch.Tensor) -> TokenConfidence:
        """`drafter.DraftModel`: best token after each row, and its probability."""
        began = time.perf_counter()
        logits = self.model.compute_logits(hidden_states)
        confidence = confidence_argmax(
            logits, self.knobs["num_draftable_tokens"], (self.knobs["mask_token_id"],)
        )
        self.stats.forward_ms += (time.perf_counter() - began) * 1e3
        return confidence

    def _gather(
        self, scheduler_output: Any, sampled_token_ids: list[list[int]], common_attn_metadata: Any
    ) -> DraftStep:
        """The runner's state after bookkeeping, as tensors over its requests."""
        batch = self.runner.input_batch
        num_reqs = len(sampled_token_ids)
        req_ids = batch.req_ids[:num_reqs]
        scheduled = np.array([scheduler_output.num_scheduled_tokens[r] for r in req_ids])
        known = batch.num_tokens_no_spec[:num_reqs].astype(np.int64)
        computed = batch.num_computed_tokens_cpu[:num_reqs].astype(np.int64)  # before this step
        sampled = np.array([bool(ids) for ids in sampled_token_ids], dtype=bool)
        now_computed = np.where(sampled, known - 1, computed + scheduled)

        limit = min(self.max_model_len, self.max_positions)
        size = DIFFUSION_BLOCK_SIZE
        committed = np.minimum(computed, limit) // size * size
        final = np.maximum(np.minimum(now_computed, limit) // size * size, committed)

        # a draft of k emits up to k + 1 tokens; the step's token budget is shared evenly
        cap = min(
            scheduler_output.num_spec_tokens_to_schedule,
            self.max_num_tokens // max(1, num_reqs) - 1,
        )
        room = np.empty(num_reqs, dtype=np.int64)
        stops_at_eos = np.empty(num_reqs, dtype=bool)
        for i, req_id in enumerate(req_ids):
            request = self.runner.requests[req_id]
            params = request.sampling_params
            stops_at_eos[i] = not params.ignore_eos
            num_left = (params.max_tokens or limit) - (known[i] - request.num_prompt_tokens)
            ended = sampled[i] and self._ends(params, sampled_token_ids[i][-1])
            room[i] = 0 if ended else min(cap, num_left - 1, limit - known[i] - 1)
        max_draft_lens = np.where(sampled, np.maximum(room, 0), 0)

        width = int(known.max(initial=0))
        tokens = torch.from_numpy(batch.token_ids_cpu[:num_reqs, :width])
        return DraftStep(
            token_ids=tokens.to(self.device),
            slots=np.arange(num_reqs),
            block_table=common_attn_metadata.block_table_tensor[:num_reqs],
            known_lens=np.where(sampled, known, final),
            committed_lens=committed,
            final_lens=final,
            max_draft_lens=max_draft_lens,
            stops_at_eos=stops_at_eos,
        )

    def _ends(self, params: Any, token_id: int) -> bool:
        """Whether the scheduler is about to finish the request at this token."""
        if token_id in (params.stop_token_ids or ()):
            return True
        return not params.ignore_eos and token_id in self.stop_token_ids

    def _report_rounds(
        self,
        on_round: Callable[[Round], None],
        scheduler_output: Any,
        sampled_token_ids: list[list[int]],
        drafts: Any,
    ) -> None:
        verified = scheduler_output.scheduled_spec_decode_tokens
        req_ids = self.runner.input_batch.req_ids
        for i, emitted in enumerate(sampled_token_ids):
            if emitted:
                drafted = list(verified.get(req_ids[i], ()))
                num_passes = self._passes.pop(req_ids[i], 0)
                on_round(Round(req_ids[i], drafted, list(emitted), num_passes))
            self._passes[req_ids[i]] = int(drafts.num_passes[i])


def _stop_token_ids(model_config: Any) -> list[int]:
    """The target's end-of-sequence ids, from its generation config or its config."""
    eos = model_config.try_get_generation_config().get("eos_token_id")
    if eos is None:
        eos = getattr(model_config.hf_config, "eos_token_id", None)
    return [] if eos is None else [int(i) for i in (eos if isinstance(eos, list) else [eos])]
