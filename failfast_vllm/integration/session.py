"""What the adapters of both model runners share: drafts, and what became of them."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from failfast_vllm.drafting.drafter import Drafter
from failfast_vllm.drafting.ledger import PerRequest
from failfast_vllm.drafting.records import Drafts
from failfast_vllm.drafting.records import Round as Outcome
from failfast_vllm.observe.counters import Counts, Judged
from failfast_vllm.observe.trace import TraceWriter


class Round(NamedTuple):
    """One verified draft of one request."""

    req_id: str
    drafted: list[int]  # what the target verified
    emitted: list[int]  # accepted tokens and the bonus
    num_passes: int  # draft passes that the draft took
    confidences: list[float]  # of `drafted`, before the target judged it; fewer with reused tokens
    known_len: int  # tokens before the round
    num_rows: int  # of the draft passes
    step: int  # of the engine, from 1: the one that verified
    num_seqs: int  # in that step


class _Draft(NamedTuple):
    """What is kept of a draft until it is verified."""

    token_ids: list[int]
    num_passes: int
    confidences: list[float]
    num_rows: int


@dataclass
class DraftStats:
    """Counters since the engine started; `benchmarks/` and `failfast demo` read them."""

    num_steps: int = 0
    num_forwards: int = 0
    num_rows: int = 0
    forward_ms: float = 0.0  # inside the draft model
    total_ms: float = 0.0  # in the adapter's step, forwards included
    counts: Counts = field(default_factory=Counts, repr=False)  # for Prometheus
    on_round: Callable[[Round], None] | None = field(default=None, repr=False)
    drafts_only: bool = field(default=False, repr=False)  # rounds without one are not wanted
    _waits_since: float = field(default=0.0, repr=False)
    trace: TraceWriter | None = field(default=None, repr=False)  # gets the rounds, too
    _drafts: dict[str, _Draft] = field(default_factory=dict, repr=False)

    def reset(self) -> None:
        """Count from zero; receivers of rounds stay."""
        on_round, drafts_only, trace = self.on_round, self.drafts_only, self.trace
        self.__init__(on_round=on_round, drafts_only=drafts_only, trace=trace)  # type: ignore[misc]

    @property
    def wants_rounds(self) -> bool:
        return self.on_round is not None or self.trace is not None

    @property
    def wants_plain_rounds(self) -> bool:
        return self.trace is not None or (self.on_round is not None and not self.drafts_only)

    def count(self, drafts: Drafts, milliseconds: float) -> None:
        self.num_forwards += drafts.num_forwards
        self.num_rows += drafts.num_rows
        self.total_ms += milliseconds
        self.counts.drafted(drafts.num_forwards, drafts.num_rows, milliseconds)
        self.counts.stopped(drafts.stop_reasons[drafts.lens > 0])
        self._waits_since = time.perf_counter() if drafts.lens.any() else 0.0

    def step_began(self) -> None:
        """The target has verified what the step before has drafted."""
        self.num_steps += 1
        if self._waits_since:
            self.counts.verified((time.perf_counter() - self._waits_since) * 1e3)
            self._waits_since = 0.0

    def report(
        self, req_id: str, num_verified: int, emitted: list[int], known_len: int, num_seqs: int
    ) -> None:
        """Hand the round that has just been verified to whoever wants rounds.

        Args:
            known_len: tokens before the round.
            num_seqs: in the step that verified it.
        """
        draft = self._drafts.pop(req_id, _Draft([], 0, [], 0))
        verified = Round(
            req_id,
            draft.token_ids[:num_verified],
            emitted,
            draft.num_passes,
            draft.confidences[:num_verified],
            known_len,
            draft.num_rows,
            self.num_steps,
            num_seqs,
        )
        for receiver in (self.on_round, self.trace):
            if receiver is not None:
                receiver(verified)

    def remember(self, req_ids: Sequence[str], drafts: Drafts) -> None:
        """Keep what was drafted until it is reported."""
        lists, passes = drafts.to_lists(), drafts.num_passes.tolist()
        for i, req_id in enumerate(req_ids):
            confidences = drafts.confidences[i, : drafts.num_confidences[i]].tolist()
            self._drafts[req_id] = _Draft(lists[i], passes[i], confidences, int(drafts.seq_rows[i]))

    def forget(self, req_ids: Iterable[str]) -> None:
        """The requests have ended."""
        ended = list(req_ids)
        for req_id in ended:
            self._drafts.pop(req_id, None)
        if self.trace is not None:
            self.trace.forget(ended)


def new_pages(scheduler_output: Any, group: int, page_size: int, *, trusts_hits: bool) -> list[int]:
    """The KV pages that this step's requests did not have before.

    Args:
        group: the KV cache group of the drafter.
        page_size: tokens of a page, as the scheduler counts them.
        trusts_hits: False where something else than our commits may have filled a prefix hit.
    """

    def behind_hits(block_ids: Any, num_computed: int) -> list[int]:
        pages: list[int] = block_ids[group]
        return pages[num_computed // page_size :] if trusts_hits else pages

    pages = []
    for request in scheduler_output.scheduled_new_reqs:
        pages += behind_hits(request.block_ids, request.num_computed_tokens)
    cached = scheduler_output.scheduled_cached_reqs
    for req_id, block_ids, num_computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        if block_ids is not None:
            resumed = req_id in cached.resumed_req_ids
            pages += behind_hits(block_ids, num_computed) if resumed else block_ids[group]
    return pages


class Rounds:
    """Pairs each draft with its verification, for what learns from it: policies, reused drafts.

    An adapter calls `verified` before a step's drafts are made, `drafted` after.
    """

    def __init__(self, drafter: Drafter, counts: Counts) -> None:
        self.drafter = drafter
        self.counts = counts
        self._drafts = PerRequest[Outcome | None](None)  # nothing of them is verified yet

    def verified(
        self, req_ids: Sequence[str], num_verified: Sequence[int], num_emitted: Sequence[int]
    ) -> None:
        """Learn what became of the last draft of each request in the step.

        Args:
            num_verified: per request, draft tokens that the target has judged.
            num_emitted: accepted tokens and the bonus; 0 = the request was not sampled.
        """
        outcomes = []
        for req_id, verified, emitted in zip(req_ids, num_verified, num_emitted, strict=True):
            draft = self._drafts[req_id]
            if draft is not None and verified and emitted:
                outcomes.append(draft._replace(num_verified=verified, num_accepted=emitted - 1))
            if emitted:
                self._drafts.forget((req_id,))
        self.counts.judged(
            [Judged(o.confidences[: o.num_verified], o.num_accepted) for o in outcomes]
        )
        policy = self.drafter.policy
        if policy.calibration is not None:
            policy.calibration.observe(outcomes)
        policy.observe(outcomes)
        self.drafter.reuse.observe(outcomes)
        self.drafter.planner.observe(outcomes)

    def drafted(self, req_ids: Sequence[str], drafts: Drafts) -> None:
        """Keep what was drafted until it is verified."""
        for i in drafts.lens.nonzero()[0].tolist():
            self._drafts[req_ids[i]] = Outcome(
                req_ids[i],
                num_drafted=int(drafts.lens[i]),
                num_first=int(drafts.first_lens[i]),
                num_verified=0,
                num_accepted=0,
                confidences=drafts.confidences[i, : drafts.num_confidences[i]],
                ends_at_stop=bool(
                    drafts.ends_at_stop[i] and drafts.lens[i] >= drafts.num_confidences[i]
                ),
            )

    def forget(self, req_ids: Iterable[str]) -> None:
        """The requests have ended."""
        self._drafts.forget(req_ids)
        self.drafter.policy.forget(req_ids)
        self.drafter.tokens.forget(req_ids)
        self.drafter.reuse.forget(req_ids)


def adapter_of(runner: Any) -> Any:
    """The adapter of a model runner: `FailFastProposer` (V1), `FailFastSpeculator` (V2) or None."""
    return getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
