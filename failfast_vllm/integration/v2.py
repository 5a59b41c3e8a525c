"""The drafter on vLLM's V2 model runner: an adapter that owns no algorithm.

vLLM builds it in `init_speculator`. Once per engine step, after the accepted tokens are booked on
the device, the runner offers the step to `propose`. Once its tokens have gone out, vLLM's engine
asks for drafts: `take_drafts`. vLLM's own report has one length for all requests; ours has each
request's.
"""

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.compilation.backends import set_model_tag
from vllm.compilation.cudagraph_pool import capture_pool
from vllm.config import VllmConfig
from vllm.config.utils import replace
from vllm.distributed.parallel_state import graph_capture
from vllm.model_executor.model_loader import get_model
from vllm.platforms import current_platform
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from failfast_vllm.drafters.cuda_graphs import cuda_graph
from failfast_vllm.drafters.hosted import HostedDraftModel, max_positions, profile_pass
from failfast_vllm.drafters.parallel import drafter_group, keep_apart
from failfast_vllm.drafting.drafter import Drafter
from failfast_vllm.drafting.records import UNKNOWN, Drafts, DraftStep, Lengths, to_device
from failfast_vllm.integration.requests import asked
from failfast_vllm.integration.session import DraftStats, Rounds, new_pages
from failfast_vllm.integration.startup import make_drafter, safetensors_only, stop_token_ids


class _Step(NamedTuple):
    """An engine step as the runner describes it; its own state stays as it is until the next."""

    input_batch: Any
    num_sampled: torch.Tensor  # [num_reqs] int32
    num_speculative_tokens: int


class FailFastSpeculator(DraftModelSpeculator):
    """vLLM's speculator interface over `drafter.Drafter`. Synchronous scheduling only."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, req_states: Any) -> None:
        super().__init__(vllm_config, device)
        self.req_states = req_states
        self.eos_token_ids = frozenset(stop_token_ids(vllm_config.model_config))
        self.params: list[Any] = [None] * self.max_num_reqs  # SamplingParams by state slot
        self.embedded: dict[str, torch.Tensor] = {}  # request -> [prompt_len] bool: no id there
        # a KV connector fills pages that our commits know nothing of: what it brings is not trusted
        self.foreign_kv = vllm_config.kv_transfer_config is not None
        self.stats = DraftStats()
        self.drafter: Drafter | None = None  # these two set by `set_attn`
        self.rounds: Rounds | None = None
        self._postponed: _Step | None = None  # set by `propose`

    @property
    def position_limit(self) -> int:
        """Not kept: vLLM may lower the target's limit to what its KV cache holds (auto-fit)."""
        return max_positions(self.vllm_config)

    def load_draft_model(
        self, target_model: torch.nn.Module, target_attn_layer_names: set[str]
    ) -> torch.nn.Module:
        draft_config = replace(
            self.vllm_config,
            model_config=self.draft_model_config,
            quant_config=None,
            parallel_config=replace(self.speculative_config.draft_parallel_config),
        )
        draft_config = keep_apart(safetensors_only(draft_config), self.vllm_config)
        with drafter_group(self.vllm_config), set_model_tag("draft_model"):
            model: torch.nn.Module = get_model(vllm_config=draft_config, prefix="draft_model")
        return model

    def set_attn(
        self,
        model_state: Any,
        kv_cache_config: Any,
        block_tables: Any,
        target_input_buffers: Any,
        target_attn_groups: Any,
    ) -> None:
        """Called by the runner once the KV cache is laid out.

        On a GPU twice: the first cache only tells how much memory graphs take.
        """
        self.drafter = self.rounds = None  # graphs over the first cache go before the second comes
        super().set_attn(
            model_state, kv_cache_config, block_tables, target_input_buffers, target_attn_groups
        )
        groups = [
            i
            for i, group in enumerate(kv_cache_config.kv_cache_groups)
            if self.draft_attn_layer_names & set(group.layer_names)
        ]
        assert len(groups) == 1, "one KV page shape for target and drafter, checked at start-up"
        self.kv_group = groups[0]
        self.page_size = kv_cache_config.kv_cache_groups[self.kv_group].kv_cache_spec.block_size
        num_pages_per_block = self.page_size // block_tables.block_sizes[self.kv_group]
        self.drafter = make_drafter(
            self.model,
            self.vllm_config,
            self.draft_attn_layer_names,
            self.stats,
            block_tables.block_sizes[self.kv_group],
            kv_cache_config.num_blocks * num_pages_per_block,
            block_tables.input_block_tables[self.kv_group].shape[1],
            self.device,
        )
        self.rounds = Rounds(self.drafter, self.stats.counts)

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Nothing to set up: `capture` makes its own graphs."""

    @torch.inference_mode()
    def capture(self) -> None:
        """Called by the runner where it captures its own graphs; ours share their memory pool."""
        if self.speculative_config.enforce_eager:
            return
        assert self.drafter is not None
        hosted = self.drafter.model
        assert isinstance(hosted, HostedDraftModel)
        # read now: while vLLM profiles the memory of graphs, the pool is another one
        shared = current_platform.get_global_graph_pool()
        pool = functools.partial(capture_pool, shared, self.vllm_config)
        with graph_capture(device=self.device):
            hosted.capture(functools.partial(cuda_graph, pool=pool), self.max_num_reqs)

    def add_requests(self, scheduler_output: Any) -> None:
        """Called after the runner has put new and resumed requests into their state slots."""
        self._postponed = None  # nobody has asked for its drafts
        if self.drafter is not None:
            pages = new_pages(
                scheduler_output, self.kv_group, self.page_size, trusts_hits=not self.foreign_kv
            )
            self.drafter.blocks.clear(pages, self.page_size)
        for request in scheduler_output.scheduled_new_reqs:
            slot = self.req_states.req_id_to_index[request.req_id]
            self.params[slot] = request.sampling_params
            if request.prompt_embeds is not None:
                is_id = request.prompt_is_token_ids or [False] * request.prompt_len
                self.embedded[request.req_id] = to_device(~np.array(is_id), self.device)

    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """The runner has booked a step's tokens, which nobody has seen yet: no drafts so far.

        Returns:
            [num_reqs, num_speculative_steps] zeros: vLLM's warm-up schedules all columns, so that
            each must be an id.
        """
        if dummy_run:  # also on a data-parallel rank without work: our passes wait for no other
            if is_profile:
                profile_pass(self.model, self.vllm_config, input_batch.num_tokens, self.device)
        else:
            if num_speculative_tokens is None:
                num_speculative_tokens = self.num_speculative_steps
            self._postponed = _Step(input_batch, num_sampled, num_speculative_tokens)
        no_drafts: torch.Tensor = self.draft_tokens[: input_batch.num_reqs].fill_(0)
        return no_drafts

    def take_drafts(self) -> DraftTokenIds | None:
        """What the scheduler is told of the postponed step; None where there is none.

        The ids stay on the device, where the runner finds them; a grammar has to see them, too.
        """
        step, self._postponed = self._postponed, None
        if step is None:
            return None
        drafts = self._draft(*step)
        report = DraftTokenIds([], [])  # nothing for the scheduler to go through
        if drafts is not None and drafts.lens.any():
            if step.input_batch.has_structured_output_reqs:
                lists = drafts.to_lists()
            else:
                lists = [[-1] * length for length in drafts.lens.tolist()]
            report = DraftTokenIds(step.input_batch.req_ids, lists)
        report.failfast_counts = self.stats.counts.take()  # type: ignore[attr-defined]
        return report

    @torch.inference_mode()
    def _draft(
        self,
        input_batch: Any,
        num_sampled: torch.Tensor,
        num_speculative_tokens: int,
    ) -> Drafts | None:
        """One engine step: commit and draft; None while the planner rests."""
        assert self.drafter is not None
        assert self.rounds is not None
        began = time.perf_counter()
        self.stats.step_began()
        planner, req_ids = self.drafter.planner, input_batch.req_ids
        rests = not planner.step_began(req_ids, input_batch.num_tokens)
        if rests and not self.stats.wants_plain_rounds:
            return None
        num_verified = input_batch.num_draft_tokens_per_req
        if num_verified is None:
            num_verified = np.zeros(input_batch.num_reqs, dtype=np.int64)
        step, emitted = self._gather(
            input_batch, num_sampled, 1 + int(num_verified.max(initial=0)), num_speculative_tokens
        )
        if self.stats.wants_rounds:
            self._report_rounds(step, num_verified.tolist(), emitted)
        if rests:
            return None
        self.rounds.verified(req_ids, num_verified.tolist(), [len(ids) for ids in emitted])
        drafts = self.drafter.propose(step)
        self.rounds.drafted(req_ids, drafts)
        longest = drafts.token_ids.shape[1]
        lens = to_device(drafts.lens, self.device)
        drafted = torch.arange(longest, device=self.device) < lens[:, None]
        ids = torch.where(drafted, drafts.token_ids, 0)
        self.req_states.draft_tokens[input_batch.idx_mapping, :longest] = ids
        self.stats.count(drafts, (time.perf_counter() - began) * 1e3)
        if self.stats.wants_rounds:
            self.stats.remember(req_ids, drafts)
        planner.step_ended(req_ids)
        return drafts

    def target_step(self, runner: Any) -> Callable[[int], torch.Tensor]:
        """A step of the target over a number of tokens, as vLLM runs it: in a graph if one fits."""

        def step(num_tokens: int) -> torch.Tensor:
            hidden_states, _ = runner._dummy_run(num_tokens, skip_eplb=True)
            logits: torch.Tensor = runner.model.compute_logits(hidden_states[:num_tokens])
            return logits

        return step

    def forget(self, req_ids: Iterable[str]) -> None:
        """The requests have ended; also called in steps without any other."""
        for req_id in req_ids:
            self.embedded.pop(req_id, None)
        if self.rounds is not None:
            self.rounds.forget(req_ids)
            self.stats.forget(req_ids)

    def _gather(
        self,
        input_batch: Any,
        num_sampled: torch.Tensor,
        most_emitted: int,
        num_speculative_tokens: int,
    ) -> tuple[DraftStep, list[list[int]]]:
        """The runner's state after verification; also the tokens that each request emitted."""
        assert self.drafter is not None
        states, rows = self.req_states, input_batch.idx_mapping
        num_reqs = input_batch.num_reqs
        known_lens = states.total_len.gpu[rows].long()
        computed_lens = states.num_computed_tokens.gpu[rows].long().clamp(max=self.position_limit)
        table = self.block_tables.input_block_tables[self.kv_group][:num_reqs]
        columns = known_lens[:, None] + torch.arange(-most_emitted, 0, device=self.device)
        columns = columns.clamp(0, states.all_token_ids.gpu.shape[1] - 1)
        verdict = torch.cat(
            (
                known_lens[:, None],
                self.drafter.blocks.committed_lens(table, computed_lens)[:, None],
                computed_lens[:, None],
                num_sampled[:num_reqs, None].long(),
                states.all_token_ids.gpu[rows[:, None], columns].long(),
            ),
            dim=1,
        )
        on_host = verdict.cpu().numpy()  # the copy back
        known, committed, now_computed, emitted_lens = on_host[:, :4].T
        emitted = [
            ids[most_emitted - length :]
            for ids, length in zip(on_host[:, 4:].tolist(), emitted_lens.tolist(), strict=True)
        ]
        sampled = emitted_lens > 0

        size = self.drafter.diffusion_block_size
        final = now_computed // size * size

        request_end = states.max_seq_len[input_batch.idx_mapping_np]  # prompt + max_tokens
        room = np.minimum(request_end, self.position_limit) - known - 1
        wanted = asked(
            [self.params[slot] for slot in input_batch.idx_mapping_np],
            emitted,
            self.eos_token_ids,
            num_speculative_tokens,
        )
        max_draft_lens = np.minimum(wanted.max_draft_lens, np.maximum(room, 0))
        ended = sampled & (wanted.ended | (room < 0))
        token_ids, slots = self._token_ids(input_batch, int(known.max(initial=0)))
        step = DraftStep(
            req_ids=input_batch.req_ids,
            token_ids=token_ids,
            slots=slots,
            block_table=table,
            known_lens=np.where(sampled, known, final),
            committed_lens=committed,
            final_lens=np.where(ended, committed, final),
            max_draft_lens=np.where(sampled & ~ended, max_draft_lens, 0),
            draft_budget=self.drafter.draft_budget(num_reqs),
            stops_at_eos=wanted.stops_at_eos,
            min_confidences=wanted.min_confidences,
        )
        return step, emitted

    def _token_ids(self, input_batch: Any, width: int) -> tuple[torch.Tensor, Lengths]:
        """Tokens up to the longest request's end, and each request's row among them."""
        table = self.req_states.all_token_ids.gpu
        if self.embedded.keys().isdisjoint(input_batch.req_ids):
            return table, input_batch.idx_mapping_np.astype(np.int64)
        token_ids = table[input_batch.idx_mapping, :width]  # a copy: in the table vLLM reads 0
        for row, req_id in enumerate(input_batch.req_ids):
            if req_id in self.embedded:
                hidden = self.embedded[req_id]
                token_ids[row, : len(hidden)].masked_fill_(hidden, UNKNOWN)
        return token_ids, np.arange(input_batch.num_reqs)

    def _report_rounds(
        self, step: DraftStep, num_verified: list[int], emitted: list[list[int]]
    ) -> None:
        known_lens, num_seqs = step.known_lens.tolist(), len(emitted)
        for req_id, num, ids, known in zip(
            step.req_ids, num_verified, emitted, known_lens, strict=True
        ):
            if ids and (num or self.stats.wants_plain_rounds):
                self.stats.report(req_id, num, ids, known - len(ids), num_seqs)
