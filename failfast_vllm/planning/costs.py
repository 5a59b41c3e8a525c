"""What the parts of a step take on this server: measured at start-up, corrected while serving."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

FAR = 1e7  # rows; a table is extrapolated up to there
HICCUP = 4.0  # a measurement counts as at most this multiple of what was expected
COST_MEMORY = 20.0  # measurements near a size that its time is averaged over
FORGETTING = 0.01  # per look without drafts: what was learned long ago gets another try
OVERHEAD_RATE = 0.1  # weight of the last step in averages of what is not in a table
LEARNED_STEPS = 4  # plain steps that are one measurement

# So many steps rest after a look at drafting that was in vain. It takes at most that share of them,
# as far as the most steps allow.
REST_STEPS, MOST_REST_STEPS, LOOK_SHARE = 16, 128, 0.01


class CostTable:
    """Milliseconds by size, linear between measured sizes and beyond the last.

    Args:
        sizes: rising, at least one.
        ms: measured times. What else runs can only add to them, and more rows never cost less than
            fewer: no size takes more than a larger one was seen to take.
    """

    def __init__(self, sizes: list[int], ms: list[float]) -> None:
        assert len(sizes) == len(ms) > 0
        self.sizes = np.array(sizes, dtype=np.float64)
        # 0 rows take nothing, less than measured as much as the least, more than it ever more
        self._knots = np.concatenate(([0.0, 1e-9], self.sizes, [FAR]))
        self._values = np.zeros(len(self._knots))
        self._set(np.minimum.accumulate(np.array(ms, dtype=np.float64)[::-1])[::-1])
        self._start = self._values.copy()
        self._extra = np.zeros(len(sizes))  # found while serving, on top of that
        self._weights = np.zeros(len(sizes))
        self._nearness: dict[int, tuple[Floats, Floats]] = {}  # by size that was measured

    @property
    def ms(self) -> Floats:
        """Time by size: a view, made anew each time, since a pickled one would be a copy."""
        return self._values[2:-1]

    def __call__(self, size: npt.NDArray[Any] | list[int] | float) -> Floats:
        """Time of a pass of `size` rows; 0 for 0 rows."""
        return np.asarray(np.interp(size, self._knots, self._values))

    def _set(self, ms: Floats) -> None:
        self.ms[:] = np.maximum.accumulate(ms)
        self._values[1] = self.ms[0]
        slope = self.ms[-1] / self.sizes[-1]
        if len(ms) > 1:
            slope = (self.ms[-1] - self.ms[-2]) / (self.sizes[-1] - self.sizes[-2])
        self._values[-1] = self.ms[-1] + slope * (FAR - self.sizes[-1])

    def correct(self, size: int, ms: float) -> float:
        """Learn from a measured time: what it takes beyond the start-up time, near `size`.

        An average over the last measurements, weighted by how near they were. Sizes at which
        nothing was measured follow the nearest ones, smaller ones in proportion. The time at
        start-up counts as one measurement unless this one refutes it: nothing takes less time than
        it takes. Returns the time that counted, which is less than `ms` for a hiccup.
        """
        ms = min(ms, HICCUP * float(self(size)))
        start, start_here = self._start[2:-1], float(np.interp(size, self._knots, self._start))
        near = self._nearness.get(size)
        if near is None:
            nearness = np.exp(-3.0 * np.abs(np.log2(self.sizes / size)))  # .05 at half and double
            below = max(int(np.searchsorted(self.sizes, size, "right")) - 1, 0)
            share = np.ones(len(start))
            share[:below] = start[:below] / start_here
            near = self._nearness[size] = nearness, share
        nearness, share = near
        at_start = nearness
        if ms < start_here:  # the machine was busy at the start, for all sizes
            at_start, share = 0.0 * nearness, start / start_here
        more = np.maximum(self._weights, at_start) + nearness
        # many measurements far away weigh less than one here
        self._weights = np.maximum(self._weights, np.minimum(more, COST_MEMORY * nearness))
        extra = (ms - start_here) * share
        self._extra += nearness / self._weights * (extra - self._extra)
        self._set(np.maximum(start + self._extra, 1e-6))
        return ms

    def forget(self, looks: float = 1.0) -> None:
        """Move slowly back to the start-up times; called after looks without drafts."""
        kept = (1.0 - FORGETTING) ** looks
        self._weights *= kept
        self._extra *= kept
        self._set(self._start[2:-1] + self._extra)


class Costs:
    """Times of this server's parts of a step.

    Args:
        draft: a draft pass that attends to little, by rows.
        verify: a step of the target with all around it, by tokens.
        score_ms: of a draft pass, by pairs of a row and a key that it attends to.
    """

    def __init__(self, draft: CostTable, verify: CostTable, score_ms: float = 0.0) -> None:
        self.draft = draft
        self.verify = verify
        self.score_ms = score_ms
        # a step without drafts takes less: it has its own measurements
        self.plain = CostTable(verify.sizes.astype(int).tolist(), verify.ms.tolist())
        self.overhead_ms = 0.0  # of drafting, outside the passes
        self.look_ms = 0.0  # what a look in vain adds to a plain step

    def forget(self, looks: float = 1.0) -> None:
        self.draft.forget(looks)
        self.verify.forget(looks)

    def rest_steps(self, num_seqs: int) -> int:
        """Steps without a look after one in vain."""
        steps = self.look_ms / (LOOK_SHARE * float(self.plain(num_seqs)))
        return int(min(max(steps, REST_STEPS), MOST_REST_STEPS))

    def looked(self, num_seqs: int, drafting_ms: float, steps_ms: float, num_steps: int) -> None:
        """Learn what a look in vain adds to plain steps; a hiccup counts little.

        Args:
            drafting_ms: of the look itself.
            steps_ms: of the steps of the target that may have waited for it or for the next one.
        """
        ms = drafting_ms + max(0.0, steps_ms - num_steps * float(self.plain(num_seqs)))
        if self.look_ms:
            ms = min(ms, HICCUP * self.look_ms)
        self.look_ms += (OVERHEAD_RATE if self.look_ms else 1.0) * (ms - self.look_ms)

    def rested(self, num_seqs: int, steps_ms: list[float]) -> None:
        """Learn from plain steps in a row."""
        for i in range(0, len(steps_ms), LEARNED_STEPS):
            part = steps_ms[i : i + LEARNED_STEPS]
            self.plain.correct(num_seqs, sum(part) / len(part))

    def draft_ms(self, rows: npt.NDArray[Any], num_scores: npt.NDArray[Any]) -> Floats:
        """Time of draft passes by their size, see `Planner.pass_took`."""
        return self.draft(rows) + self.score_ms * num_scores

    def learn_drafting(
        self, sizes: list[tuple[int, int]], passes_ms: list[float], ms: float
    ) -> list[float]:
        """Learn from a step's draft passes.

        Args:
            sizes: of each pass, see `Planner.pass_took`.
            passes_ms: time of each pass.
            ms: time of drafting, the passes included.

        Returns:
            The times of the passes that counted, see `CostTable.correct`.
        """
        counted = [self._learn_pass(*one) for one in zip(sizes, passes_ms, strict=True)]
        overhead_ms = min(ms - sum(passes_ms), sum(passes_ms))  # a hiccup moves little
        self.overhead_ms += OVERHEAD_RATE * (overhead_ms - self.overhead_ms)
        return counted

    def _learn_pass(self, size: tuple[int, int], ms: float) -> float:
        """More time than expected goes to the rows, less to attention first."""
        num_rows, num_scores = size
        scores_ms = self.score_ms * num_scores
        expected_ms = float(self.draft(num_rows))
        if num_scores and ms < expected_ms + scores_ms:
            scores_ms = max(0.0, ms - expected_ms)
            self.score_ms += OVERHEAD_RATE * (scores_ms / num_scores - self.score_ms)
        return self.draft.correct(num_rows, ms - scores_ms) + scores_ms


class StepTimer:
    """Measures the parts of a step: draft passes, all of drafting, and the target's step after it.

    Args:
        clock: the time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._passes: list[tuple[tuple[int, int], float]] = []  # size and ms of each
        self._began = 0.0  # drafting
        self._waits_since = 0.0  # for the target

    def pass_took(self, size: tuple[int, int], ms: float) -> None:
        self._passes.append((size, ms))

    def drafting_ended(self) -> None:
        self._waits_since = self.clock()

    def rested(self) -> float:
        """End a step, and begin one without drafting; returns its ms."""
        seconds = self.clock() - self._waits_since
        self.stood_still(seconds)
        return seconds * 1e3

    def stood_still(self, seconds: float) -> None:
        """Leave out time in which nobody has asked for the next step."""
        self._began += seconds
        self._waits_since += seconds

    def lap(self) -> tuple[list[tuple[int, int]], list[float]]:
        """End a step and begin the next one, with drafting.

        Returns:
            The size of each draft pass of the step that ends, and in ms: its drafting, the
            target's step, and each of these passes.
        """
        now = self.clock()
        seconds = self._waits_since - self._began, now - self._waits_since
        passes, self._passes, self._began = self._passes, [], now
        ms = [part * 1e3 for part in seconds] + [ms for _, ms in passes]
        return [size for size, _ in passes], ms
