"""The drafter on vLLM's V1 model runner: an adapter that owns no algorithm.

vLLM builds it where it would build its own `DraftModelProposer`, so loading, KV allocation and
memory profiling are vLLM's. Once per engine step, after the accepted tokens are booked, the runner
offers the step to `postpone`. Once its tokens have gone out, vLLM's engine asks for drafts:
`take_drafts`.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from failfast_vllm.drafters.hosted import max_positions, profile_pass
from failfast_vllm.drafters.parallel import drafter_group, keep_apart
from failfast_vllm.drafting.drafter import Drafter
from failfast_vllm.drafting.records import UNKNOWN, DraftStep, Lengths, to_device
from failfast_vllm.integration.requests import asked
from failfast_vllm.integration.session import DraftStats, Rounds, new_pages
from failfast_vllm.integration.startup import make_drafter, safetensors_only, stop_token_ids

MIN_P_EPSILON = 1e-5  # below it vLLM takes min_p for 0


class _Step(NamedTuple):
    """An engine step as the runner describes it; its own state stays as it is until the next."""

    scheduler_output: Any
    sampled_token_ids: list[list[int]]  # [num_reqs][0 or more]
    common_attn_metadata: Any


class FailFastProposer(DraftModelProposer):
    """vLLM's proposer interface over `drafter.Drafter`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config, device, runner)
        self.runner = runner
        self.eos_token_ids = frozenset(stop_token_ids(vllm_config.model_config))
        # a KV connector fills pages that our commits know nothing of: what it brings is not trusted
        self.foreign_kv = vllm_config.kv_transfer_config is not None
        self.stats = DraftStats()
        self.drafter: Drafter | None = None  # these two set by `initialize_attn_backend`
        self.rounds: Rounds | None = None
        self._postponed: _Step | None = None  # set by `postpone`

    @property
    def position_limit(self) -> int:
        """Not kept: vLLM may lower the target's limit to what its KV cache holds (auto-fit)."""
        return max_positions(self.vllm_config)

    def _raise_if_padded_drafter_batch_disabled(self) -> None:
        """Ragged drafts on the CPU are the point of this proposer."""

    def _raise_if_vocab_size_mismatch(self) -> None:
        """The padding of the vocabulary may differ; ids are checked against the tokenizers."""

    def _raise_if_draft_tp_mismatch(self) -> None:
        """A drafter that every rank holds whole is built and run in `ranks.drafter_group`."""

    def _create_draft_vllm_config(self) -> VllmConfig:
        draft_config = safetensors_only(super()._create_draft_vllm_config())
        return keep_apart(draft_config, self.vllm_config)

    def load_model(self, target_model: torch.nn.Module) -> None:
        """A drafter of text takes nothing from its target: vLLM would look for an image token."""
        super().load_model(torch.nn.Module())

    def _get_model(self) -> torch.nn.Module:
        with drafter_group(self.vllm_config):
            model: torch.nn.Module = super()._get_model()
        return model

    def dummy_run(self, num_tokens: int, **kwargs: Any) -> None:
        """Called by the runner to profile and warm up, and on a data-parallel rank without work.

        Only the first, before there is a KV cache, needs a pass: ours wait for no other rank.
        """
        if self.drafter is None:
            profile_pass(self.model, self.vllm_config, num_tokens, self.device)

    def initialize_attn_backend(
        self, kv_cache_config: Any, kernel_block_sizes: list[int] | None = None
    ) -> None:
        """Called by the runner once the KV cache is laid out."""
        super().initialize_attn_backend(kv_cache_config, kernel_block_sizes)
        kv_block_size = (
            kernel_block_sizes[self.kv_cache_gid] if kernel_block_sizes else self.block_size
        )
        self.drafter = make_drafter(
            self.model,
            self.vllm_config,
            self._draft_attn_layer_names,
            self.stats,
            kv_block_size,
            kv_cache_config.num_blocks * (self.block_size // kv_block_size),
            -(-self.position_limit // kv_block_size),
            self.device,
        )
        self.rounds = Rounds(self.drafter, self.stats.counts)

    def postpone(
        self, scheduler_output: Any, sampled_token_ids: list[list[int]], common_attn_metadata: Any
    ) -> list[list[int]]:
        """The runner has booked a step's tokens, which nobody has seen yet: no drafts so far."""
        emitted = [list(ids) for ids in sampled_token_ids]  # a scheduler in this process cuts them
        self._postponed = _Step(scheduler_output, emitted, common_attn_metadata)
        return [[]] * len(emitted)

    def take_drafts(self) -> DraftTokenIds | None:
        """What the scheduler is told of the postponed step; None where there is none."""
        step, self._postponed = self._postponed, None
        if step is None:
            return None
        lists = self._draft(*step)
        drafts = DraftTokenIds([], [])  # nothing for the scheduler to go through
        if any(lists):
            drafts = DraftTokenIds(self.runner.input_batch.req_ids, lists)
        drafts.failfast_counts = self.stats.counts.take()  # type: ignore[attr-defined]
        return drafts

    @torch.inference_mode()
    def _draft(
        self, scheduler_output: Any, sampled_token_ids: list[list[int]], common_attn_metadata: Any
    ) -> list[list[int]]:
        """One engine step: commit, draft, and return a list per request (`[]` = no draft)."""
        assert self.drafter is not None
        assert self.rounds is not None
        began = time.perf_counter()
        self.stats.step_began()
        batch, planner = self.runner.input_batch, self.drafter.planner
        num_reqs = len(sampled_token_ids)
        req_ids = batch.req_ids[:num_reqs]
        verified = scheduler_output.scheduled_spec_decode_tokens
        if self.stats.wants_plain_rounds or (self.stats.wants_rounds and verified):
            ends = batch.num_tokens_no_spec[:num_reqs].tolist()
            for req_id, emitted, end in zip(req_ids, sampled_token_ids, ends, strict=True):
                num = len(verified.get(req_id, ()))
                if emitted and (num or self.stats.wants_plain_rounds):
                    self.stats.report(req_id, num, list(emitted), end - len(emitted), num_reqs)
        num_tokens = scheduler_output.total_num_scheduled_tokens
        if not planner.step_began(req_ids, num_tokens):
            return [[]] * num_reqs
        table = common_attn_metadata.block_table_tensor[:num_reqs]
        computed = np.minimum(batch.num_computed_tokens_cpu[:num_reqs], self.position_limit)
        computed_lens = to_device(computed, self.device)
        committed = self.drafter.blocks.committed_lens(table, computed_lens).cpu().numpy()
        step = self._gather(scheduler_output, sampled_token_ids, table, committed)
        num_verified = [len(verified.get(req_id, ())) for req_id in req_ids]
        self.rounds.verified(req_ids, num_verified, [len(ids) for ids in sampled_token_ids])
        drafts = self.drafter.propose(step)
        self.rounds.drafted(req_ids, drafts)
        lists = drafts.to_lists()
        self.stats.count(drafts, (time.perf_counter() - began) * 1e3)
        if self.stats.wants_rounds:
            self.stats.remember(req_ids, drafts)
        planner.step_ended(req_ids)
        return lists

    def target_step(self, runner: Any) -> Callable[[int], torch.Tensor]:
        """A step of the target, without attention, over a number of tokens."""

        def step(num_tokens: int) -> torch.Tensor:
            positions = torch.arange(num_tokens, device=self.device) % self.position_limit
            ids = torch.zeros_like(positions).int()
            with set_forward_context(None, self.vllm_config, num_tokens=num_tokens):
                hidden_states = runner.model(input_ids=ids, positions=positions)
                logits: torch.Tensor = runner.model.compute_logits(hidden_states)
            return logits

        return step

    def begin(self, scheduler_output: Any) -> None:
        """Called by the runner before each step, also in steps without any request."""
        self._postponed = None  # nobody has asked for its drafts
        if self.drafter is None or self.rounds is None:
            return
        self.rounds.forget(scheduler_output.finished_req_ids)
        self.stats.forget(scheduler_output.finished_req_ids)
        pages = new_pages(
            scheduler_output, self.kv_cache_gid, self.block_size, trusts_hits=not self.foreign_kv
        )
        self.drafter.blocks.clear(pages, self.block_size)

    def drop_stale_budgets(self) -> None:
        """vLLM leaves a thinking budget in its row to a request without one that moves there."""
        batch = self.runner.input_batch
        budgets = batch.thinking_budget_state_holder
        if budgets is not None:
            for row, req_id in enumerate(batch.req_ids):
                if self.runner.requests[req_id].sampling_params.thinking_token_budget is None:
                    budgets._state.pop(row, None)

    def _gather(
        self,
        scheduler_output: Any,
        sampled_token_ids: list[list[int]],
        table: torch.Tensor,
        committed: Lengths,
    ) -> DraftStep:
        """The runner's state after bookkeeping, as tensors over its requests."""
        assert self.drafter is not None
        batch = self.runner.input_batch
        num_reqs = len(sampled_token_ids)
        req_ids = batch.req_ids[:num_reqs]
        scheduled = np.array([scheduler_output.num_scheduled_tokens[r] for r in req_ids])
        known = batch.num_tokens_no_spec[:num_reqs].astype(np.int64)
        computed = batch.num_computed_tokens_cpu[:num_reqs].astype(np.int64)  # before this step
        sampled = np.array([bool(ids) for ids in sampled_token_ids], dtype=bool)
        now_computed = np.where(sampled, known - 1, computed + scheduled)

        limit = self.position_limit
        size = self.drafter.diffusion_block_size
        final = np.maximum(np.minimum(now_computed, limit) // size * size, committed)

        requests = [self.runner.requests[req_id] for req_id in req_ids]
        wanted = asked(
            [request.sampling_params for request in requests],
            sampled_token_ids,
            self.eos_token_ids,
            scheduler_output.num_spec_tokens_to_schedule,
        )
        room = np.empty(num_reqs, dtype=np.int64)
        for i, request in enumerate(requests):
            num_output = int(known[i]) - request.num_prompt_tokens
            room[i] = min(
                _most_drafted(request.sampling_params, num_output, limit), limit - known[i] - 1
            )
        max_draft_lens = np.minimum(wanted.max_draft_lens, np.maximum(room, 0))
        ended = sampled & (wanted.ended | (room < 0))

        width = int(known.max(initial=0))
        tokens = torch.from_numpy(batch.token_ids_cpu[:num_reqs, :width])
        if batch.req_prompt_embeds:  # behind them are ids of whoever had the row before
            is_id = torch.from_numpy(batch.is_token_ids[:num_reqs, :width])
            tokens = tokens.where(is_id, UNKNOWN)
        return DraftStep(
            req_ids=req_ids,
            token_ids=tokens.to(self.device),
            slots=np.arange(num_reqs),
            block_table=table,
            known_lens=np.where(sampled, known, final),
            committed_lens=committed,
            final_lens=np.where(ended, committed, final),
            max_draft_lens=np.where(sampled & ~ended, max_draft_lens, 0),
            draft_budget=self.drafter.draft_budget(num_reqs),
            stops_at_eos=wanted.stops_at_eos,
            min_confidences=wanted.min_confidences,
        )


def _most_drafted(params: Any, num_output_tokens: int, max_positions: int) -> int:
    """Tokens after which a draft of one request must end (V1 only; V2 has none of these limits).

    vLLM samples the token after an accepted draft with all of a request's logits processors, and
    the drafted tokens with most of them.
    """
    if params.min_p > MIN_P_EPSILON or params.logit_bias:
        return 0  # both are left out for drafted tokens
    if params.thinking_token_budget is not None:
        return 0  # vLLM may force a second end of thinking after one that was drafted
    num_left: int = (params.max_tokens or max_positions) - num_output_tokens
    if params.min_tokens > num_output_tokens:
        # the token after a draft may not be a stop token either, however long the draft
        num_left = min(num_left, params.min_tokens - num_output_tokens)
    return num_left - 1
