"""How much to draft at this load: what the next tokens are expected to bring, and what they cost.

Throughput of a step is (tokens emitted) / (draft time + verification time). Before the first pass
`LoadPlanner.first` chooses the length that maximises it over the whole batch, and no draft at all
where that is best; after each pass `LoadPlanner.following` chooses the sequences that go on. A
policy says where a draft may grow, the planner where it pays. After SmartSpec and TurboSpec (arXiv
2406.14066) and vLLM's adaptive verification.

Everything is deterministic in what it is given, so that the ranks of a tensor-parallel group agree;
times must therefore come from one rank. NumPy only.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Committing a long prefix that was skipped pays over the rounds that follow; this many are counted.
AMORTISED_ROUNDS = 32
# A draft must promise this much more than none: times and acceptance are only estimates.
MARGIN = 1.02
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
    verify: CostTable  # a step of the target, by tokens
    overhead_ms: float = 0.0  # of a step, whatever is drafted


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
        draft_increment: longest increment of one pass.
    """

    costs: Costs
    acceptance: AcceptanceByPosition
    draft_increment: int
    last: Decision | None = field(default=None, repr=False)
    _spent_ms: float = field(default=0.0, repr=False)

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
        debt_ms = float(self.costs.draft(commit_rows.sum())) / AMORTISED_ROUNDS
        draft_ms = self.costs.draft(rows) + np.where(options > 0, debt_ms, 0.0)
        verify_ms = self.costs.verify(num_seqs + lens.sum(axis=1))
        rates = tokens / (self.costs.overhead_ms + verify_ms + draft_ms)
        rates[0] *= MARGIN
        best = int(rates.argmax())
        self._spent_ms = float(draft_ms[best])
        self.last = Decision(num_seqs, options.tolist(), (rates * 1e3).tolist(), best)
        return np.where(drafting, np.minimum(best, wanted), 0)

    def following(
        self, wanted: Lengths, live_rows: Lengths, draft_lens: Lengths, survival: Floats
    ) -> Lengths:
        """Increments of the next pass, [num_seqs]; 0 = that draft is complete.

        Args:
            wanted: [num_seqs] most tokens that each may still draft; 0 where the policy stopped.
            live_rows: [num_seqs] known and drafted tokens that a pass encodes again.
            draft_lens: [num_seqs] tokens drafted so far.
            survival: [num_seqs] probability that all of them are accepted.
        """
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
        rates = (expected + more_gain) / (
            self.costs.overhead_ms + self._spent_ms + draft_ms + verify_ms
        )
        rates[0] *= MARGIN
        best = int(rates.argmax())
        self._spent_ms += float(draft_ms[best])
        self.last = Decision(len(order), counts.tolist(), (rates * 1e3).tolist(), best)
        chosen = np.zeros_like(increments)
        chosen[order[:best]] = increments[order[:best]]
        return chosen
