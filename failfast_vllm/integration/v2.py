"""The drafter on vLLM's V2 model runner.

The runner offers each step to `propose`, after the accepted tokens are booked on the device. Once
they have gone out, vLLM's engine asks for drafts: `take_drafts`.
"""

import copy
import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from vllm.compilation.backends import set_model_tag
from vllm.compilation.cudagraph_pool import capture_pool
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.config.utils import replace
from vllm.distributed.parallel_state import graph_capture
from vllm.model_executor.model_loader import get_model
from vllm.platforms import current_platform
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.attn_utils import get_varlen_cudagraph_unsupported_backend
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator, DraftModelSpeculator

from failfast_vllm.drafters.cuda_graphs import cuda_graph
from failfast_vllm.drafters.hosted import HostedDraftModel, profile_pass
from failfast_vllm.drafters.parallel import drafter_group
from failfast_vllm.drafting.records import UNKNOWN, Drafts, Flags, to_device
from failfast_vllm.integration.ahead import CopiesInFlight
from failfast_vllm.integration.hooks import logger
from failfast_vllm.integration.session import Adapter, CopyAdapter, View
from failfast_vllm.integration.startup import drafters_config


class StepView(View):
    """`session.View` of an engine step; the runner's own state stays as it is until the next."""

    on_host: torch.Tensor | None = None  # the verdict, once the stream has got so far

    def __init__(
        self,
        adapter: "_Speculator",
        input_batch: Any,
        num_sampled: torch.Tensor,  # [num_reqs] int32
        num_speculative_tokens: int,
    ) -> None:
        self.adapter, self.states, self.batch = adapter, adapter.req_states, input_batch
        self.req_ids, self.num_reqs = input_batch.req_ids, input_batch.num_reqs
        self.num_sampled, self.num_tokens = num_sampled[: self.num_reqs], input_batch.num_tokens
        self.num_speculative_tokens = num_speculative_tokens
        verified = input_batch.num_draft_tokens_per_req
        self.num_verified = [0] * self.num_reqs if verified is None else verified.tolist()

    @property
    def may_go_ahead(self) -> bool:
        """A grammar waits for the tokens before; a copy of the table hides what is no token."""
        return (
            self.adapter.schedules_ahead
            and not self.batch.has_structured_output_reqs
            and self.adapter.embedded.keys().isdisjoint(self.req_ids)
        )

    def start_reading(self) -> None:
        """Launch the copy of the verdict: lengths, and the last tokens of each request.

        Before the step's tokens are waited for: its launches cost nothing while the target runs.
        """
        rows, limit = self.batch.idx_mapping, self.adapter.position_limit
        self.block_table = self.adapter.block_table(self.num_reqs)
        known = self.states.total_len.gpu[rows].long()
        computed = self.states.num_computed_tokens.gpu[rows].long().clamp(max=limit)
        committed = self.adapter.drafter.blocks.committed_lens(self.block_table, computed)
        lens = torch.stack((known, committed, computed, self.num_sampled.long()), dim=1)
        verdict = torch.cat((lens, self.last_ids(known)), dim=1)
        self.on_host = verdict.to("cpu", non_blocking=True)

    def last_ids(self, known: torch.Tensor) -> torch.Tensor:
        """[num_reqs, 1 + most verified] int64, the last of [num_reqs] `known` tokens."""
        rows, table = self.batch.idx_mapping, self.states.all_token_ids.gpu
        most = 1 + max(self.num_verified, default=0)
        columns = known[:, None] + torch.arange(-most, 0, device=self.adapter.device)
        last: torch.Tensor = table[rows[:, None], columns.clamp(0, table.shape[1] - 1)]
        return last.long()

    def read_outcome(self) -> None:
        """Wait for what `start_reading` copies."""
        if self.on_host is None:
            self.start_reading()
        assert self.on_host is not None
        wait_for_copies(self.adapter.device)
        on_host, most = self.on_host.numpy(), 1 + max(self.num_verified, default=0)
        self.known_lens, self.committed_lens, self.computed_lens, num_emitted = on_host[:, :4].T
        self.emitted = [
            ids[most - length :]
            for ids, length in zip(on_host[:, 4:].tolist(), num_emitted.tolist(), strict=True)
        ]

    def read_state(self, sampled: Flags) -> None:
        known, slots = self.known_lens, self.batch.idx_mapping_np
        request_end = self.states.max_seq_len[slots]  # prompt + max_tokens
        self.room = np.minimum(request_end, self.adapter.position_limit) - known - 1
        self.params = [self.adapter.params[slot] for slot in slots]
        self.token_ids, self.slots = self.states.all_token_ids.gpu, slots.astype(np.int64)
        embedded = self.adapter.embedded
        if embedded.keys().isdisjoint(self.req_ids):
            return
        self.slots = np.arange(self.num_reqs)  # in a copy: in the table vLLM reads 0
        self.token_ids = self.token_ids[self.batch.idx_mapping, : int(known.max())]
        for row, req_id in enumerate(self.req_ids):
            if (hidden := embedded.get(req_id)) is not None:
                self.token_ids[row, : len(hidden)].masked_fill_(hidden, UNKNOWN)

    def hand_out(self, drafts: Drafts) -> list[list[int]]:
        """The ids stay on the device, where the runner finds them; a grammar sees them, too."""
        longest, device = drafts.token_ids.shape[1], self.adapter.device
        lens = to_device(drafts.lens, device)
        drafted = torch.arange(longest, device=device) < lens[:, None]
        ids = torch.where(drafted, drafts.token_ids, 0)
        self.states.draft_tokens[self.batch.idx_mapping, :longest] = ids
        if self.batch.has_structured_output_reqs:
            return drafts.to_lists()
        return [[-1] * length for length in drafts.lens.tolist()]


def wait_for_copies(device: torch.device) -> None:
    """Wait until what was to be copied to the host is there."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class _Speculator(Adapter):
    """What the V2 runner asks of both speculators below."""

    max_num_reqs: int
    num_speculative_steps: int
    draft_tokens: torch.Tensor  # [max_num_reqs, num_speculative_steps] int64
    kv_group: int  # of the drafter's layers
    page_size: int
    block_tables: Any
    schedules_ahead = False  # may do so with copies

    def block_table(self, num_reqs: int) -> torch.Tensor:
        table: torch.Tensor = self.block_tables.input_block_tables[self.kv_group][:num_reqs]
        return table

    def keep_requests(self, req_states: Any) -> None:
        self.req_states = req_states
        self.params: list[Any] = [None] * self.max_num_reqs  # SamplingParams by state slot
        self.embedded: dict[str, torch.Tensor] = {}  # request -> [prompt_len] bool: no id there

    def profile(self, num_tokens: int) -> None:
        profile_pass(self.model, self.vllm_config, num_tokens, self.device)

    def add_requests(self, scheduler_output: Any) -> None:
        """Called after the runner has put new and resumed requests into their state slots."""
        self.nobody_asked()
        if self.session is not None:
            self.clear_new_pages(scheduler_output, self.kv_group, self.page_size)
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
        *unused: Any,
        dummy_run: bool = False,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
        **unused_too: Any,
    ) -> torch.Tensor:
        """The runner has booked a step's tokens, which nobody has seen yet: no drafts so far.

        Returns [num_reqs, num_speculative_steps] copies that are scheduled ahead, or zeros: vLLM's
        warm-up takes each for an id.
        """
        if not dummy_run:
            most = num_speculative_tokens
            most = self.num_speculative_steps if most is None else most
            view = self.postponed = StepView(self, input_batch, num_sampled, most)
            if self.session is not None and self.session.looks_next:
                view.start_reading()
            if (copies := self.find_ahead(view)) is not None:
                return copies
        elif is_profile:  # not on a data-parallel rank without work: our passes wait for no other
            self.profile(input_batch.num_tokens)
        no_drafts: torch.Tensor = self.draft_tokens[: input_batch.num_reqs].fill_(0)
        return no_drafts

    def find_ahead(self, view: StepView) -> torch.Tensor | None:
        """Copies for a step that is scheduled already; None: there are none."""
        return None

    def forget(self, req_ids: Iterable[str]) -> None:
        """The requests have ended; also called in steps without any other."""
        for req_id in req_ids:
            self.embedded.pop(req_id, None)
        if self.session is not None:
            self.session.forget(req_ids)


class FailFastSpeculator(_Speculator, DraftModelSpeculator):
    """vLLM's speculator interface over `drafter.Drafter`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, req_states: Any) -> None:
        super().__init__(vllm_config, device)
        self.keep_requests(req_states)

    def load_draft_model(self, *of_target: Any) -> torch.nn.Module:
        schedule = copy.copy(self.vllm_config.scheduler_config)
        schedule.async_scheduling = False  # vLLM checks the copy, and a CPU's platform changes it
        draft_config = replace(
            self.vllm_config,
            scheduler_config=schedule,
            model_config=self.draft_model_config,
            quant_config=None,
            parallel_config=replace(self.speculative_config.draft_parallel_config),
        )
        draft_config = drafters_config(draft_config, self.vllm_config)
        with drafter_group(self.vllm_config), set_model_tag("draft_model"):
            model: torch.nn.Module = get_model(vllm_config=draft_config, prefix="draft_model")
        return model

    def set_attn(
        self, model_state: Any, kv_cache_config: Any, block_tables: Any, *of_target: Any
    ) -> None:
        """Called by the runner once the KV cache is laid out.

        On a GPU twice: the first cache only tells how much memory graphs take.
        """
        self.session = None  # graphs over the first cache go before the second comes
        super().set_attn(model_state, kv_cache_config, block_tables, *of_target)
        groups, names = kv_cache_config.kv_cache_groups, self.draft_attn_layer_names
        # one KV page shape for target and drafter, checked at start-up
        (self.kv_group,) = (i for i, g in enumerate(groups) if names & set(g.layer_names))
        self.page_size = groups[self.kv_group].kv_cache_spec.block_size
        size = block_tables.block_sizes[self.kv_group]
        num_pages = kv_cache_config.num_blocks * (self.page_size // size)
        table_width = block_tables.input_block_tables[self.kv_group].shape[1]
        self.open_session(names, size, num_pages, table_width)

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Nothing to set up: `capture` makes its own graphs."""

    @torch.inference_mode()
    def capture(self) -> None:
        """Called by the runner where it captures its own graphs; ours share their memory pool."""
        if self.speculative_config.enforce_eager:
            return
        hosted = self.drafter.model
        assert isinstance(hosted, HostedDraftModel)
        # read now: while vLLM profiles the memory of graphs, the pool is another one
        shared = current_platform.get_global_graph_pool()
        pool = functools.partial(capture_pool, shared, self.vllm_config)
        with graph_capture(device=self.device):
            hosted.capture(functools.partial(cuda_graph, pool=pool), self.max_num_reqs)


class CopySpeculator(CopyAdapter, _Speculator, BaseSpeculator):
    """The same without a drafter."""

    supports_mm_inputs, draft_logits = False, None
    in_flight: CopiesInFlight | None = None  # copies are scheduled ahead
    draft_attn_layer_names: frozenset[str] = frozenset()
    kv_group, page_size = 0, 1

    def __init__(self, vllm_config: VllmConfig, device: torch.device, req_states: Any) -> None:
        self.vllm_config, self.device = vllm_config, device
        self.max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        self.num_speculative_steps = vllm_config.num_speculative_tokens
        shape = self.max_num_reqs, self.num_speculative_steps
        self.draft_tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self.keep_requests(req_states)
        self.set_up()
        # in a process of its own the worker answers only once the step in flight has ended
        alone = vllm_config.parallel_config.distributed_executor_backend == "uni"
        self.schedules_ahead = alone and vllm_config.scheduler_config.async_scheduling

    def find_ahead(self, view: StepView) -> torch.Tensor | None:
        """See `_Speculator`."""
        if self.in_flight is None or not self.in_flight.looks:
            return None
        return self.in_flight.find(view)

    def add_requests(self, scheduler_output: Any) -> None:
        super().add_requests(scheduler_output)
        if self.in_flight is not None:  # a session of several requests goes on with other limits
            self.in_flight.forget(r.req_id for r in scheduler_output.scheduled_new_reqs)

    def take_drafts(self) -> DraftTokenIds | None:
        """See `Adapter`; where copies are scheduled ahead, their lengths in the next step."""
        if self.in_flight is not None:
            self.postponed = None
            told = self.in_flight.report()
        else:
            told = super().take_drafts()
        planner = self.drafter.planner.ahead
        assert self.session is not None
        if not self.session.goes_ahead or planner is None:
            self.in_flight = None
        elif self.in_flight is None:
            self.in_flight = CopiesInFlight(self, planner)
        return told

    def forget(self, req_ids: Iterable[str]) -> None:
        super().forget(req_ids)
        if self.in_flight is not None:
            self.in_flight.forget(req_ids)

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """No pass, no graph."""

    def capture(self) -> None:
        """No pass, no graph."""

    def profile(self, num_tokens: int) -> None:
        """No pass, no memory."""

    def block_table(self, num_reqs: int) -> torch.Tensor:
        return torch.empty(num_reqs, 0, dtype=torch.int32, device=self.device)


def widen_target_graphs(runner: Any) -> None:
    """Plan FULL graphs for the target's steps with drafts of any lengths; none is captured yet.

    vLLM captures decode graphs for 1 + K tokens of every request, which ragged drafts almost never
    have. We ask for those of its adaptive verification, for any mix of 1 to 1 + K tokens, and for
    graphs of one token per request, for steps without drafts.
    """
    graphs = runner.cudagraph_manager
    mode = graphs.cudagraph_mode
    if not mode.separate_routine() or mode.decode_mode() != CUDAGraphMode.FULL:
        return  # no graphs, graphs of pieces, or graphs that fit any batch
    groups = runner.kv_cache_config.kv_cache_groups
    target_layers = {name for group in groups for name in group.layer_names}
    target_layers -= runner.speculator.draft_attn_layer_names
    refusing = get_varlen_cudagraph_unsupported_backend(
        runner.attn_groups, runner.vllm_config, runner.decode_query_len, target_layers
    )
    if refusing is None:
        graphs.varlen_decode = True
        graphs._candidates, graphs._capture_descs = {}, {}
        graphs._init_candidates()
    else:
        logger.warning(
            "failfast: steps with drafts run without full CUDA graphs, which %s does not replay "
            "for drafts of different lengths; choose another --attention-backend, "
            "FLASH_ATTN on Hopper or TRITON_ATTN.",
            refusing[0],
        )
    _add_plain_graphs(graphs)


def _add_plain_graphs(graphs: Any) -> None:
    """Graphs of one token per request; steps without drafts prefer them to wider ones."""
    sizes = graphs.compilation_config.cudagraph_capture_sizes or []
    sizes = sorted(size for size in sizes if size <= graphs.max_num_reqs)
    for loras in graphs.lora_capture_cases:
        smaller = 0
        for size in sizes:
            plain = BatchExecutionDescriptor(
                cg_mode=CUDAGraphMode.FULL,
                num_tokens=size,
                num_reqs=size,
                uniform_token_count=1,
                num_active_loras=loras,
            )
            graphs._capture_descs.setdefault(CUDAGraphMode.FULL, []).append(plain)
            for num_tokens in range(smaller, size + 1):
                graphs._candidates.setdefault((num_tokens, loras), []).insert(0, plain)
            smaller = size + 1
    graphs._capture_descs.get(CUDAGraphMode.FULL, []).sort(key=lambda desc: -desc.num_tokens)
