"""The drafter on vLLM's V1 model runner: loading, KV allocation and memory profiling are vLLM's.

The runner offers each step to `postpone`, after the accepted tokens are booked. Once they have gone
out, vLLM's engine asks for drafts: `take_drafts`.
"""

import itertools
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from failfast_vllm.drafters.hosted import profile_pass
from failfast_vllm.drafters.parallel import drafter_group
from failfast_vllm.drafting.records import UNKNOWN, Flags, to_device
from failfast_vllm.integration.session import Adapter, CopyAdapter, View
from failfast_vllm.integration.startup import drafters_config

MIN_P_EPSILON = 1e-5  # below it vLLM takes min_p for 0


class _View(View):
    """`session.View` of an engine step; the runner's own state stays as it is until the next."""

    def __init__(
        self,
        adapter: "_Proposer",
        scheduler_output: Any,
        sampled_token_ids: list[list[int]],  # [num_reqs][0 or more]
        common_attn_metadata: Any,
    ) -> None:
        self.adapter, self.batch = adapter, adapter.runner.input_batch
        self.scheduler_output, self.metadata = scheduler_output, common_attn_metadata
        self.emitted, self.num_reqs = sampled_token_ids, len(sampled_token_ids)
        self.req_ids = self.batch.req_ids[: self.num_reqs]
        self.num_tokens = scheduler_output.total_num_scheduled_tokens

    def read_outcome(self) -> None:
        verified = self.scheduler_output.scheduled_spec_decode_tokens
        self.num_verified = [len(verified.get(r, ())) for r in self.req_ids]
        self.known_lens = self.batch.num_tokens_no_spec[: self.num_reqs].astype(np.int64)

    def read_state(self, sampled: Flags) -> None:
        known, limit = self.known_lens, self.adapter.position_limit
        self.num_speculative_tokens = self.scheduler_output.num_spec_tokens_to_schedule
        self.block_table = self.adapter.block_table(self.metadata, self.num_reqs)
        before = self.batch.num_computed_tokens_cpu[: self.num_reqs]  # this step
        at_most = to_device(np.minimum(before, limit), self.adapter.device)
        committed = self.adapter.drafter.blocks.committed_lens(self.block_table, at_most)
        self.committed_lens = committed.cpu().numpy()
        scheduled = self.scheduler_output.num_scheduled_tokens
        computed = before.astype(np.int64) + np.array([scheduled[r] for r in self.req_ids])
        self.computed_lens = np.minimum(np.where(sampled, known - 1, computed), limit)
        requests = [self.adapter.runner.requests[req_id] for req_id in self.req_ids]
        self.params = [request.sampling_params for request in requests]
        num_output = known - np.array([request.num_prompt_tokens for request in requests])
        most = map(_most_drafted, self.params, num_output.tolist(), itertools.repeat(limit))
        self.room = np.minimum(np.fromiter(most, dtype=np.int64), limit - known - 1)
        self.slots = np.arange(self.num_reqs)
        width = int(known.max(initial=0))
        tokens = torch.from_numpy(self.batch.token_ids_cpu[: self.num_reqs, :width])
        if self.batch.req_prompt_embeds:  # their ids are those of whoever had the row before
            is_id = torch.from_numpy(self.batch.is_token_ids[: self.num_reqs, :width])
            tokens = tokens.where(is_id, UNKNOWN)
        self.token_ids = tokens.to(self.adapter.device)


class _Proposer(Adapter):
    """What the V1 runner asks of both proposers below."""

    runner: Any  # known from the first step on
    kv_cache_gid, block_size = 0, 1

    def block_table(self, metadata: Any, num_reqs: int) -> torch.Tensor:
        table: torch.Tensor = metadata.block_table_tensor[:num_reqs]
        return table

    def postpone(
        self, scheduler_output: Any, sampled_token_ids: list[list[int]], common_attn_metadata: Any
    ) -> list[list[int]]:
        """The runner has booked a step's tokens, which nobody has seen yet: no drafts so far."""
        emitted = [list(ids) for ids in sampled_token_ids]  # a scheduler in this process cuts them
        self.postponed = _View(self, scheduler_output, emitted, common_attn_metadata)
        return [[]] * len(emitted)

    def begin(self, runner: Any, scheduler_output: Any) -> None:
        """Called by the runner before each step, also in steps without any request."""
        self.runner = runner
        self.nobody_asked()
        if self.session is not None:
            self.session.forget(scheduler_output.finished_req_ids)
            self.clear_new_pages(scheduler_output, self.kv_cache_gid, self.block_size)

    def drop_stale_budgets(self) -> None:
        """vLLM leaves a thinking budget in its row to a request without one that moves there."""
        batch = self.runner.input_batch
        if (budgets := batch.thinking_budget_state_holder) is None:
            return
        for row, req_id in enumerate(batch.req_ids):
            if self.runner.requests[req_id].sampling_params.thinking_token_budget is None:
                budgets._state.pop(row, None)


class FailFastProposer(_Proposer, DraftModelProposer):
    """vLLM's proposer interface over `drafter.Drafter`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config, device, runner)
        self.runner = runner

    def _raise_if_padded_drafter_batch_disabled(self) -> None:
        """Ragged drafts on the CPU are the point of this proposer."""

    def _raise_if_vocab_size_mismatch(self) -> None:
        """The padding of the vocabulary may differ; ids are checked against the tokenizers."""

    def _raise_if_draft_tp_mismatch(self) -> None:
        """A drafter that every rank holds whole is built and run in `drafter_group`."""

    def _create_draft_vllm_config(self) -> VllmConfig:
        return drafters_config(super()._create_draft_vllm_config(), self.vllm_config)

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
        if self.session is None:
            profile_pass(self.model, self.vllm_config, num_tokens, self.device)

    def initialize_attn_backend(
        self, kv_cache_config: Any, kernel_block_sizes: list[int] | None = None
    ) -> None:
        """Called by the runner once the KV cache is laid out."""
        super().initialize_attn_backend(kv_cache_config, kernel_block_sizes)
        size = kernel_block_sizes[self.kv_cache_gid] if kernel_block_sizes else self.block_size
        num_pages = kv_cache_config.num_blocks * (self.block_size // size)
        table_width = -(-self.position_limit // size)
        self.open_session(self._draft_attn_layer_names, size, num_pages, table_width)


class CopyProposer(CopyAdapter, _Proposer):
    """The same without a drafter: vLLM's runner builds it as a `custom_class`."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.vllm_config = vllm_config
        self.device = torch.device(vllm_config.device_config.device)
        self.set_up()

    def load_model(self, *of_target: Any) -> None:
        """There is none."""

    def propose(self, *unused: Any, **unused_too: Any) -> None:
        """vLLM asks for the method; `postpone` is called in its place."""

    def block_table(self, metadata: Any, num_reqs: int) -> torch.Tensor:
        return torch.empty(num_reqs, 0, dtype=torch.int32, device=self.device)


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
