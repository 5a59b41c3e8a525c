"""One step of drafting, for the adapters of both model runners."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.outputs import DraftTokenIds

from failfast_vllm.drafting.drafter import Drafter
from failfast_vllm.drafting.ledger import Ledger
from failfast_vllm.drafting.records import Drafts, DraftStep, Lengths, Round
from failfast_vllm.integration.requests import asked
from failfast_vllm.observe.counters import DraftStats


class Outcome(NamedTuple):
    """What the target made of the last drafts."""

    emitted: Sequence[Sequence[int]]  # [num_reqs], accepted tokens and the bonus; none: not sampled
    known_lens: Lengths  # [num_reqs], prompt and accepted tokens


class State(NamedTuple):
    """What the next drafts are made from; arrays of [num_reqs]."""

    token_ids: torch.Tensor  # these three as in `DraftStep`
    slots: Lengths
    block_table: torch.Tensor
    committed_lens: Lengths  # tokens whose KV the drafter has
    computed_lens: Lengths  # tokens whose KV the target has, as far as the drafter can follow
    room: Lengths  # most tokens of a draft before the request's end; negative: it has ended
    params: Sequence[Any]  # vLLM's SamplingParams
    num_speculative_tokens: int


class View(Protocol):
    """An adapter's reading of its runner, once a step's tokens are booked."""

    req_ids: Sequence[str]
    num_tokens: int  # that the target has computed in the step

    @property
    def num_verified(self) -> Sequence[int]:
        """[num_reqs] draft tokens that the target has verified."""
        ...

    def outcome(self) -> Outcome:
        """Read what came of the last drafts: on V2 the copy from the device."""
        ...

    def state(self, sampled: npt.NDArray[np.bool_]) -> State:
        """Read the rest; [num_reqs] `sampled` says for which requests tokens were emitted."""
        ...

    def hand_out(self, drafts: Drafts) -> list[list[int]]:
        """Give drafts to the runner; returns what the scheduler is told of each."""
        ...


class Session:
    """The way of a step: what the last drafts brought, who learns from it, the next drafts.

    Args:
        eos_token_ids: the target's.
    """

    def __init__(self, drafter: Drafter, stats: DraftStats, eos_token_ids: frozenset[int]) -> None:
        self.drafter = drafter
        self.stats = stats
        self.eos_token_ids = eos_token_ids
        self.ledger = Ledger()

    def step(self, view: View) -> DraftTokenIds:
        """Draft for the requests of a step; returns what the scheduler is told."""
        lists = self._draft(view)
        report = DraftTokenIds([], [])  # nothing for the scheduler to go through
        if any(lists):
            report = DraftTokenIds(view.req_ids, lists)
        report.failfast_counts = self.stats.counts.take()  # type: ignore[attr-defined]
        return report

    @torch.inference_mode()
    def _draft(self, view: View) -> list[list[int]]:
        """Settle, learn, commit and draft; nothing while the planner rests."""
        stats, planner, req_ids = self.stats, self.drafter.planner, view.req_ids
        stats.step_began()
        rests = not planner.step_began(req_ids, view.num_tokens)
        if rests and not stats.wants_plain:
            return []
        outcome = view.outcome()
        rounds = self.ledger.settle(
            req_ids,
            view.num_verified,
            outcome.emitted,
            outcome.known_lens.tolist(),
            step=stats.num_steps,
            plain=stats.wants_plain,
        )
        stats.observe(rounds)
        if rests:
            return []
        self.learn([r for r in rounds if r.num_verified])
        drafts = self.drafter.propose(self._gather(view, *outcome))
        lists = view.hand_out(drafts)
        self.ledger.open(req_ids, drafts, drafts.to_lists() if stats.wants_token_ids else ())
        stats.step_ended(drafts)
        planner.step_ended(req_ids)
        return lists

    def learn(self, rounds: Sequence[Round]) -> None:
        """Tell those who learn from verified drafts, always in this order."""
        policy = self.drafter.policy
        calibrations = () if policy.calibration is None else (policy.calibration,)
        for observer in (
            self.stats.counts,
            *calibrations,
            policy,
            self.drafter.reuse,
            self.drafter.planner,
        ):
            observer.observe(rounds)

    def forget(self, req_ids: Iterable[str]) -> None:
        """The requests have ended."""
        self.ledger.forget(req_ids)
        self.stats.forget(req_ids)
        self.drafter.policy.forget(req_ids)
        self.drafter.reuse.forget(req_ids)
        self.drafter.tokens.forget(req_ids)

    def _gather(
        self, view: View, emitted: Sequence[Sequence[int]], known_lens: Lengths
    ) -> DraftStep:
        """What a step asks of the drafter."""
        drafter, sampled = self.drafter, np.array([bool(ids) for ids in emitted], dtype=bool)
        state = view.state(sampled)
        wanted = asked(state.params, emitted, self.eos_token_ids, state.num_speculative_tokens)
        max_draft_lens = np.minimum(wanted.max_draft_lens, np.maximum(state.room, 0))
        ended = sampled & (wanted.ended | (state.room < 0))
        size, committed = drafter.geometry.diffusion_block_size, state.committed_lens
        final = np.maximum(state.computed_lens // size * size, committed)
        return DraftStep(
            req_ids=view.req_ids,
            token_ids=state.token_ids,
            slots=state.slots,
            block_table=state.block_table,
            known_lens=np.where(sampled, known_lens, final),
            committed_lens=committed,
            final_lens=np.where(ended, committed, final),
            max_draft_lens=np.where(sampled & ~ended, max_draft_lens, 0),
            draft_budget=drafter.draft_budget(len(view.req_ids)),
            stops_at_eos=wanted.stops_at_eos,
            min_confidences=wanted.min_confidences,
        )


def adapter_of(runner: Any) -> Any:
    """The adapter of a model runner: `FailFastProposer` (V1), `FailFastSpeculator` (V2) or None."""
    return getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
