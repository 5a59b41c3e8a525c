"""One step of drafting, and what the adapters of both model runners have in common."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.outputs import DraftTokenIds

from failfast_vllm.drafters.hosted import max_positions
from failfast_vllm.drafting.drafter import Drafter
from failfast_vllm.drafting.ledger import Ledger
from failfast_vllm.drafting.records import Drafts, DraftStep, Flags, Lengths
from failfast_vllm.integration.requests import asked
from failfast_vllm.integration.startup import (
    NoDraftModel,
    TimedDraftModel,
    make_drafter,
    stop_token_ids,
)
from failfast_vllm.observe.counters import DraftStats


class View:
    """An adapter's reading of its runner, once a step's tokens are booked: all of [num_reqs]."""

    req_ids: Sequence[str]
    num_tokens: int  # that the target has computed in the step
    # what came of the last drafts
    num_verified: Sequence[int]  # draft tokens that the target has verified
    emitted: Sequence[Sequence[int]]  # accepted tokens and the bonus; none: not sampled
    known_lens: Lengths  # prompt and accepted tokens
    # what the next are made from
    token_ids: torch.Tensor  # these three as in `DraftStep`
    slots: Lengths
    block_table: torch.Tensor
    committed_lens: Lengths  # tokens whose KV the drafter has
    computed_lens: Lengths  # tokens whose KV the target has, as far as the drafter can follow
    room: Lengths  # most tokens of a draft before the request's end; negative: it has ended
    params: Sequence[Any]  # vLLM's SamplingParams
    num_speculative_tokens: int  # most tokens of a draft

    @property
    def may_go_ahead(self) -> bool:
        """Whether copies of the steps after it may be found once those are scheduled."""
        return False

    def read_outcome(self) -> None:
        """Read what came of the last drafts: on V2 the copy from the device."""

    def read_state(self, sampled: Flags) -> None:
        """Read the rest; `sampled` says for which requests tokens were emitted."""

    def hand_out(self, drafts: Drafts) -> list[list[int]]:
        """Give drafts to the runner; returns what the scheduler is told of each."""
        return drafts.to_lists()


@dataclass
class Session:
    """The way of a step: what the last drafts brought, who learns from it, the next drafts."""

    drafter: Drafter
    stats: DraftStats
    eos_token_ids: frozenset[int]  # the target's
    ledger: Ledger = field(default_factory=Ledger)
    goes_ahead: bool = False  # copies are scheduled ahead: `CopiesInFlight` has taken over

    def step(self, view: View) -> DraftTokenIds | None:
        """Draft for the requests of a step; returns what the scheduler is told, None: nothing."""
        stats = self.stats
        stats.step_began()
        planner = self.drafter.planner
        goes_ahead = planner.ahead is not None and view.may_go_ahead and not stats.wants_plain
        rests = not planner.step_began(view.req_ids, view.num_tokens) or goes_ahead
        idle = rests and not (len(self.ledger) or stats.wants_plain)
        lists = [] if idle else self._draft(view, rests)
        self.goes_ahead = goes_ahead
        if goes_ahead:
            return report(stats.take(), (1, 0.0), ahead={})
        counts, rest = stats.take(), self._rest()
        return report(counts, rest, view.req_ids, lists) if counts or rest or any(lists) else None

    def _rest(self) -> tuple[int, float] | None:
        """Behind which of the coming steps to ask for drafts again, and how few requests end it."""
        if len(self.ledger) or self.stats.wants_plain:
            return None
        planner = self.drafter.planner
        steps = planner.steps_to_look
        return (steps, planner.fewest_at_rest) if steps > 1 else None

    @property
    def looks_next(self) -> bool:
        """Whether it is likely that the next step's outcome will be read."""
        return not self.goes_ahead and self._rest() is None

    def leave_ahead(self) -> None:
        """Copies wait for the end of a step again, beginning with the next one."""
        self.goes_ahead, planner = False, self.drafter.planner
        planner.step_ended([], 0)  # what was measured before is interrupted
        if planner.ahead is not None:
            planner.ahead.rested([], 0)

    def rested(self, view: View) -> None:
        """The engine has gone on: nobody will ask for the drafts of this step."""
        self.stats.step_began()
        planner = self.drafter.planner
        rested = planner.ahead.rested if self.goes_ahead and planner.ahead else planner.rested
        rested(view.req_ids, view.num_tokens)

    @torch.inference_mode()
    def _draft(self, view: View, rests: bool) -> list[list[int]]:
        """Settle, learn, commit and draft; no more than the first two while the planner rests."""
        stats, planner, req_ids = self.stats, self.drafter.planner, view.req_ids
        view.read_outcome()
        outcome = view.num_verified, view.emitted, view.known_lens.tolist()
        rounds = self.ledger.settle(
            req_ids, *outcome, step=stats.num_steps, plain=stats.wants_plain
        )
        stats.tell(rounds)
        verified = [r for r in rounds if r.num_verified]
        if verified or not rests:
            stats.observe(verified)
            planner.observe(verified)
        if rests:
            return []
        drafts = self.drafter.propose(self._gather(view))
        lists = view.hand_out(drafts) if drafts.lens.any() else []
        self.ledger.open(req_ids, drafts, drafts.to_lists() if stats.wants_token_ids else ())
        stats.step_ended(drafts)
        planner.step_ended(req_ids, int(drafts.lens.sum()))
        return lists

    def forget(self, req_ids: Iterable[str]) -> None:
        """The requests have ended."""
        self.ledger.forget(req_ids)
        self.stats.forget(req_ids)

    def _gather(self, view: View) -> DraftStep:
        """What a step asks of the drafter."""
        drafter, sampled = self.drafter, np.array([bool(ids) for ids in view.emitted], dtype=bool)
        view.read_state(sampled)
        wanted = asked(view.params, view.emitted, self.eos_token_ids, view.num_speculative_tokens)
        max_draft_lens = np.minimum(wanted.max_draft_lens, np.maximum(view.room, 0))
        ended = sampled & (wanted.ended | (view.room < 0))
        size = drafter.geometry.diffusion_block_size
        final = view.computed_lens // size * size
        # what no window reaches any more is never committed
        committed = np.maximum(view.committed_lens, drafter.geometry.window_starts(final))
        return DraftStep(
            req_ids=view.req_ids,
            token_ids=view.token_ids,
            slots=view.slots,
            block_table=view.block_table,
            known_lens=np.where(sampled, view.known_lens, final),
            committed_lens=committed,
            final_lens=np.where(ended, committed, final),
            max_draft_lens=np.where(sampled & ~ended, max_draft_lens, 0),
            draft_budget=drafter.draft_budget(len(view.req_ids)),
            stops_at_eos=wanted.stops_at_eos,
            min_confidences=wanted.min_confidences,
        )


def report(
    counts: list[int],
    rest: tuple[int, float] | None,
    req_ids: Sequence[str] = (),
    drafts: list[list[int]] | None = None,
    ahead: dict[str, int] | None = None,
) -> DraftTokenIds:
    """What the engine is told behind a step.

    Args:
        counts: see `DraftStats.take`.
        rest: behind which of the coming steps to ask again, and how few requests end it.
        req_ids, drafts: of the next step.
        ahead: request -> most tokens of its copy in the next step, which is found on the device;
            None: copies wait for a step's end.
    """
    # without a draft there is nothing for the scheduler to go through
    told = DraftTokenIds(list(req_ids), drafts) if drafts and any(drafts) else DraftTokenIds([], [])
    told.failfast_counts = counts  # type: ignore[attr-defined]
    told.failfast_rest = rest  # type: ignore[attr-defined]
    told.failfast_ahead = ahead  # type: ignore[attr-defined]
    return told


class Adapter:
    """Mixed into one of vLLM's proposers: opens a session, and drafts when it is asked to."""

    vllm_config: VllmConfig
    device: torch.device
    model: torch.nn.Module  # the drafter's
    session: Session | None = None  # set by `open_session`
    postponed: View | None = None  # the step that `take_drafts` drafts for

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.set_up()

    def set_up(self) -> None:
        """The part of the construction that is not vLLM's."""
        self.eos_token_ids = frozenset(stop_token_ids(self.vllm_config.model_config))
        self.stats = DraftStats()
        # a KV connector fills pages that our commits know nothing of: what it brings is not trusted
        self.foreign_kv = self.vllm_config.kv_transfer_config is not None

    def open_session(
        self, layer_names: Iterable[str], kv_block_size: int, num_pages: int, table_width: int
    ) -> None:
        """Build the drafter; its KV cache is laid out.

        Args:
            kv_block_size: tokens of a page, as the kernels count them.
            num_pages: of as many tokens.
            table_width: columns of the block tables.
        """
        model = TimedDraftModel(self.model, self.vllm_config, layer_names, table_width, self.device)
        model.stats = self.stats
        self.draft_with(make_drafter(model, kv_block_size, num_pages))

    def draft_with(self, drafter: Drafter) -> None:
        self.session = Session(drafter, self.stats, self.eos_token_ids)

    @property
    def drafter(self) -> Drafter:
        assert self.session is not None
        return self.session.drafter

    @property
    def position_limit(self) -> int:
        """Not kept: vLLM may lower the target's limit to what its KV cache holds (auto-fit)."""
        return max_positions(self.vllm_config)

    def nobody_asked(self) -> None:
        """The next step has begun: what was postponed stays undrafted."""
        unasked, self.postponed = self.postponed, None
        if unasked is not None and self.session is not None:
            self.session.rested(unasked)

    def take_drafts(self) -> DraftTokenIds | None:
        """What the scheduler is told of the postponed step; None where there is none."""
        view, self.postponed = self.postponed, None
        if view is None:
            return None
        assert self.session is not None
        return self.session.step(view)

    def target_step(self, runner: Any, num_tokens: int) -> torch.Tensor:
        """Logits of a step of the target, as vLLM runs it: in a graph if one fits."""
        hidden_states, _ = runner._dummy_run(num_tokens, skip_eplb=True)
        logits: torch.Tensor = runner.model.compute_logits(hidden_states[:num_tokens])
        return logits

    def clear_new_pages(self, scheduler_output: Any, group: int, page_size: int) -> None:
        """Note that nothing is committed to the pages that this step's requests have got."""
        pages = new_pages(scheduler_output, group, page_size, trusts_hits=not self.foreign_kv)
        self.drafter.blocks.clear(pages, page_size)


class CopyAdapter(Adapter):
    """An adapter without a drafter: all drafts are copies, which need no KV and no pages."""

    def set_up(self) -> None:
        super().set_up()
        self.draft_with(make_drafter(NoDraftModel(self.vllm_config, self.device), 1, 0))

    @property
    def position_limit(self) -> int:
        limit: int = self.vllm_config.model_config.max_model_len
        return limit

    def clear_new_pages(self, scheduler_output: Any, group: int, page_size: int) -> None:
        """Nothing is committed to pages."""


def new_pages(scheduler_output: Any, group: int, page_size: int, *, trusts_hits: bool) -> list[int]:
    """The KV pages that this step's requests did not have before.

    Args:
        group: the KV cache group of the drafter.
        page_size: tokens of a page, as the scheduler counts them.
        trusts_hits: False where something else than our commits may have filled a prefix hit.
    """
    pages: list[int] = []

    def add(block_ids: Any, num_hit: int) -> None:
        pages.extend(block_ids[group][num_hit // page_size if trusts_hits else 0 :])

    for request in scheduler_output.scheduled_new_reqs:
        add(request.block_ids, request.num_computed_tokens)
    cached = scheduler_output.scheduled_cached_reqs
    for req_id, block_ids, num_computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        if block_ids is not None:
            add(block_ids, num_computed if req_id in cached.resumed_req_ids else 0)
    return pages


def adapter_of(runner: Any) -> Any:
    """The adapter of a model runner: `FailFastProposer` (V1), `FailFastSpeculator` (V2) or None."""
    return getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
