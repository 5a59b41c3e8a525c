"""How much to draft at this load: what the next tokens are expected to bring, and what they cost.

Throughput of a step is (tokens emitted) / (draft time + verification time). Before the first pass
`LoadPlanner.first` chooses the length that maximises it over the whole batch, and no draft at all
where that is best; after each pass `LoadPlanner.following` chooses the sequences that go on. A
policy says where a draft may grow, the planner where it pays. After SmartSpec and TurboSpec (arXiv
2406.14066) and vLLM's adaptive verification.

Everything is deterministic in what it is given, so that the ranks of a tensor-parallel group agree;
times must therefore come from one rank. NumPy only.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from failfast_vllm.calibration import Calibration, Verified

logger = logging.getLogger("vllm.failfast")

Lengths = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Committing what was skipped pays over the rounds that follow; answers may end after few.
AMORTISED_ROUNDS = 8
# A draft must promise this much more than none: times and acceptance are only estimates.
MARGIN = 1.05
# A step of plain decoding among many with drafts, to know what it takes.
PROBE_STEPS = 64
# Where drafting does not pay, this many steps are not looked at.
REST_STEPS = 16
PRIOR_ACCEPTANCE, PRIOR_TRIALS = 0.85, 8.0
DECAY = 0.995  # per observed round: a memory of about 200 rounds
FORGETTING = 0.01  # per step without drafts: what was learned long ago gets another try


class CostTable:
    """Milliseconds by size, linear between measured sizes and beyond the last.

    Args:
        sizes: rising, at least one.
        ms: measured times; made monotone, since more rows never cost less than fewer.
    """

    def __init__(self, sizes: list[int], ms: list[float]) -> None:
        assert len(sizes) == len(ms) > 0
        self.sizes = np.array(sizes, dtype=np.float64)
        self.ms = np.maximum.accumulate(np.array(ms, dtype=np.float64))

    def __call__(self, size: npt.ArrayLike) -> Floats:
        """Time of a pass of `size` rows; 0 for 0 rows."""
        size = np.asarray(size, dtype=np.float64)
        found = np.interp(size, self.sizes, self.ms)
        if len(self.sizes) > 1:
            slope = (self.ms[-1] - self.ms[-2]) / (self.sizes[-1] - self.sizes[-2])
            found = found + slope * np.maximum(size - self.sizes[-1], 0.0)
        else:
            found = found * np.maximum(size / self.sizes[-1], 1.0)
        return np.where(size > 0, found, 0.0)

    def correct(self, size: int, ms: float, rate: float = 0.1) -> None:
        """Move the table towards a measured time, as a factor on its neighbourhood."""
        expected = float(self(size))
        if expected <= 0.0:
            return
        nearness = np.exp(-np.abs(np.log2(self.sizes / size)))  # 1 here, 1/e at half and double
        ratio = min(max(ms / expected, 0.25), 4.0)  # a hiccup moves little
        self.ms = np.maximum.accumulate(self.ms * ratio ** (rate * nearness))


@dataclass
class Costs:
    """Times of this server's parts of a step."""

    draft: CostTable  # a draft pass, by rows
    verify: CostTable  # a step of the target with all around it, by tokens


class AcceptanceByPosition:
    """P(token j is accepted | those before it were), learned from verification with decay."""

    def __init__(self, max_len: int) -> None:
        self.trials = np.full(max_len, PRIOR_TRIALS)
        self.hits = self.trials * PRIOR_ACCEPTANCE

    def observe(self, draft_lens: Lengths, accepted_lens: Lengths) -> None:
        """Learn from verified drafts; positions behind the first rejection say nothing."""
        for drafted, accepted in zip(draft_lens.tolist(), accepted_lens.tolist(), strict=True):
            seen = min(accepted + 1, drafted)
            if not seen:
                continue
            self.hits[:seen] *= DECAY
            self.trials[:seen] *= DECAY
            self.trials[:seen] += 1.0
            self.hits[: min(accepted, drafted)] += 1.0

    def forget(self) -> None:
        """A step without drafts: move slowly back to the prior."""
        self.trials += FORGETTING * (PRIOR_TRIALS - self.trials)
        self.hits += FORGETTING * (PRIOR_TRIALS * PRIOR_ACCEPTANCE - self.hits)

    def gains(self, starts: Lengths, lens: Lengths) -> Floats:
        """Tokens expected of positions `start : start + len` if all before are accepted."""
        logs = np.log(np.maximum(self.hits, 1e-9) / np.maximum(self.trials, 1e-9)).clip(max=0.0)
        ends = np.concatenate(([0.0], logs.cumsum()))  # log survival up to each position
        survival = np.exp(ends[1:])
        sums = np.concatenate(([0.0], survival.cumsum()))
        stops = np.minimum(starts + lens, len(survival))
        starts = np.minimum(starts, len(survival))
        gains: Floats = (sums[stops] - sums[starts]) / np.maximum(np.exp(ends[starts]), 1e-9)
        return gains


class Decision(NamedTuple):
    """One choice of the planner, for the log."""

    num_seqs: int
    lengths: list[int]  # considered: of the first pass, or how many sequences go on
    tokens_per_second: list[float]  # expected of each
    chosen: int


@dataclass
class LoadPlanner:
    """Chooses increments that raise the expected tokens per second of the whole batch.

    Args:
        costs: measured times.
        acceptance: learned from verification.
        calibration: of the drafter's confidences.
        draft_increment: tokens of each pass after the first.
        learns: whether the costs follow what passes and steps take; only where there is one rank.
    """

    costs: Costs
    acceptance: AcceptanceByPosition
    calibration: Calibration
    draft_increment: int
    learns: bool = False
    last: Decision | None = field(default=None, repr=False)
    _spent_ms: float = field(default=0.0, repr=False)  # predicted of this step's passes
    _passes_ms: float = field(default=0.0, repr=False)  # measured
    _overhead_ms: float = field(default=0.0, repr=False)  # of drafting, outside the passes
    _began: float = field(default=0.0, repr=False)
    _steps_to_probe: int = field(default=PROBE_STEPS, repr=False)
    _steps_to_rest: int = field(default=0, repr=False)
    _rests_from: int = field(default=0, repr=False)  # sequences
    _waits_since: float = field(default=0.0, repr=False)
    _running: frozenset[str] = field(default=frozenset(), repr=False)

    def step_began(self, req_ids: Sequence[str], num_tokens: int) -> None:
        """The target has just verified `num_tokens` tokens."""
        self._began, self._passes_ms = time.perf_counter(), 0.0
        waited_ms = (self._began - self._waits_since) * 1e3
        # a request that is new may have come to an idle engine
        if self.learns and self._running.issuperset(req_ids):
            self.costs.verify.correct(num_tokens, waited_ms)

    def step_ended(self, req_ids: Sequence[str]) -> None:
        """The drafts of the step are made; the target is next."""
        self._running = frozenset(req_ids)
        self._waits_since = time.perf_counter()
        if self.learns and self._passes_ms:
            overhead_ms = (self._waits_since - self._began) * 1e3 - self._passes_ms
            self._overhead_ms += 0.1 * (overhead_ms - self._overhead_ms)

    def rests(self, num_seqs: int) -> bool:
        """Whether this step need not be looked at: drafting did not pay with as many sequences."""
        self._steps_to_rest -= 1
        return self._steps_to_rest >= 0 and num_seqs >= 0.8 * self._rests_from

    def pass_took(self, num_rows: int, ms: float) -> None:
        """A draft pass, from planning its rows to its tokens."""
        self._passes_ms += ms
        if self.learns:
            self.costs.draft.correct(num_rows, ms)

    def observe(self, outcomes: Sequence[Verified]) -> None:
        """Learn from a step's verified drafts; without any, forget a little."""
        if not outcomes:
            self.acceptance.forget()
            return
        self.calibration.observe(outcomes)
        self.acceptance.observe(
            np.array([outcome.num_verified for outcome in outcomes]),
            np.array([outcome.num_accepted for outcome in outcomes]),
        )

    def first(self, wanted: Lengths, live_rows: Lengths, commit_rows: Lengths) -> Lengths:
        """Increments of the first pass, [num_seqs]; all 0 where drafting does not pay.

        Args:
            wanted: [num_seqs] most tokens that each may draft.
            live_rows: [num_seqs] known tokens that a pass encodes again.
            commit_rows: [num_seqs] tokens whose blocks a pass would commit.
        """
        drafting = wanted > 0
        num_seqs = int(drafting.sum())
        self._spent_ms = 0.0
        if not num_seqs:
            return np.zeros_like(wanted)
        wanted_here, live = wanted[drafting], live_rows[drafting]
        options = np.arange(int(wanted_here.max()) + 1)  # one pass may fill a long draft
        lens = np.minimum(options[:, None], wanted_here)  # [options, num_seqs]
        zeros = np.zeros_like(lens)
        tokens = num_seqs + self.acceptance.gains(zeros, lens).sum(axis=1)
        rows = np.where(options > 0, (lens + live).sum(axis=1), 0)
        extra_ms = float(self.costs.draft(commit_rows.sum())) / AMORTISED_ROUNDS + self._overhead_ms
        draft_ms = self.costs.draft(rows) + np.where(options > 0, extra_ms, 0.0)
        verify_ms = self.costs.verify(num_seqs + lens.sum(axis=1))
        rates = tokens / (verify_ms + draft_ms)
        rates[0] *= MARGIN
        best = int(rates.argmax())
        if best == 0:
            self._steps_to_rest, self._rests_from = REST_STEPS, num_seqs
        elif self.learns:
            self._steps_to_probe -= 1
            if self._steps_to_probe == 0:
                self._steps_to_probe, best = PROBE_STEPS, 0
        self._spent_ms = float(draft_ms[best])
        self._decided(Decision(num_seqs, options.tolist(), (rates * 1e3).tolist(), best))
        return np.where(drafting, np.minimum(best, wanted), 0)

    def following(
        self,
        wanted: Lengths,
        live_rows: Lengths,
        draft_lens: Lengths,
        confidences: npt.NDArray[np.floating],
    ) -> Lengths:
        """Increments of the next pass, [num_seqs]; 0 = that draft is complete.

        Args:
            wanted: [num_seqs] most tokens that each may still draft; 0 where the policy stopped.
            live_rows: [num_seqs] known and drafted tokens that a pass encodes again.
            draft_lens: [num_seqs] tokens drafted so far.
            confidences: [num_seqs, longest] of the tokens drafted so far, 1.0 behind them.
        """
        places = np.arange(confidences.shape[1])
        chances = self.calibration.probabilities(confidences, places)
        survival = np.where(places < draft_lens[:, None], chances, 1.0).prod(axis=1)
        increments = np.minimum(wanted, self.draft_increment)
        gains = survival * self.acceptance.gains(draft_lens, increments)
        order = np.argsort(-np.where(increments > 0, gains, -1.0), kind="stable")
        order = order[: int((increments > 0).sum())]
        if not len(order):
            return increments
        num_tokens = int((draft_lens > 0).sum() + draft_lens.sum())
        expected = float((draft_lens > 0).sum()) + float(
            self.acceptance.gains(np.zeros_like(draft_lens), draft_lens).sum()
        )
        counts = np.arange(len(order) + 1)
        more_gain = np.concatenate(([0.0], gains[order].cumsum()))
        more_tokens = np.concatenate(([0], increments[order].cumsum()))
        more_rows = np.concatenate(([0], (increments + live_rows)[order].cumsum()))
        draft_ms = self.costs.draft(more_rows)
        verify_ms = self.costs.verify(num_tokens + more_tokens)
        rates = (expected + more_gain) / (self._spent_ms + draft_ms + verify_ms)
        rates[0] *= MARGIN
        best = int(rates.argmax())
        self._spent_ms += float(draft_ms[best])
        self._decided(Decision(len(order), counts.tolist(), (rates * 1e3).tolist(), best))
        chosen = np.zeros_like(increments)
        chosen[order[:best]] = increments[order[:best]]
        return chosen

    def _decided(self, decision: Decision) -> None:
        self.last = decision
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("failfast: %s", decision)
