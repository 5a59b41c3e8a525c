"""How often a draft token of a given confidence is accepted, learned while serving. NumPy only.

A drafter's top-1 probability is not the probability that the target accepts the token. One table
per server, of confidence bins times position buckets, counts what verification has found:

    pooled[i]   = (PRIOR * midpoint[i] + accepted[:, i]) / (PRIOR + count[:, i])    summed over :
    table[b, i] = (PRIOR * pooled[i] + accepted[b, i]) / (PRIOR + count[b, i])

so that an untouched cell says what its bin says elsewhere, and an untouched bin takes the drafter
at its word. Each row is then made monotone in the confidence (weighted isotonic regression) and old
observations fade exponentially.

The target rejects once per draft: the tokens before are accepted, those behind it were never
judged. So a position is observed only if all before it were accepted; `probabilities` estimates
the chance of a token *given* that, which is what a product over a draft needs.
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Finer towards 1: a draft's survival is a product of numbers near 1.
CONFIDENCE_EDGES = np.array(
    [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999], dtype=np.float32
)
POSITION_EDGES = np.array([1, 2, 4, 8, 16, 32])  # a bucket starts at each
PRIOR = 8.0  # pseudo-observations behind each level of the table
HALF_LIFE = 8192  # observed tokens after which an observation counts half


class Verified(Protocol):
    """What a draft's verification must say; `policy.Round` does."""

    @property
    def num_verified(self) -> int: ...
    @property
    def num_accepted(self) -> int: ...
    @property
    def confidences(self) -> npt.NDArray[np.float32]: ...


class Reliability(NamedTuple):
    """A reliability diagram; bins without observations are left out."""

    confidences: Floats  # [num_bins] mean confidence
    acceptances: Floats  # [num_bins] accepted share
    counts: Floats  # [num_bins] observations, faded

    @property
    def expected_calibration_error(self) -> float:
        """Mean distance between confidence and acceptance, weighted by the observations."""
        if not self.counts.size:
            return 0.0
        gaps = np.abs(self.confidences - self.acceptances)
        return float((gaps * self.counts).sum() / self.counts.sum())


class Calibration:
    """An online map from confidence and position in the draft to the chance of acceptance."""

    def __init__(self, half_life: float = HALF_LIFE) -> None:
        self.half_life = half_life
        shape = (len(POSITION_EDGES) + 1, len(CONFIDENCE_EDGES) + 1)
        self._counts = np.zeros(shape)
        self._accepted = np.zeros(shape)
        self._confidences = np.zeros(shape)  # sums
        self._table: Floats | None = None

    def observe(self, outcomes: Iterable[Verified]) -> None:
        """Learn from verified drafts, in the order given; O(observed tokens)."""
        confidences, positions, accepted = [], [], []
        for outcome in outcomes:
            num = min(outcome.num_accepted + 1, outcome.num_verified, len(outcome.confidences))
            confidences.append(outcome.confidences[:num])
            positions.append(np.arange(num))
            accepted.append(np.arange(num) < outcome.num_accepted)
        if not confidences:
            return
        seen = np.concatenate(confidences)
        cells = (position_buckets(np.concatenate(positions)), confidence_bins(seen))
        fading = 0.5 ** (seen.size / self.half_life)
        for table, values in (
            (self._counts, 1.0),
            (self._accepted, np.concatenate(accepted).astype(np.float64)),
            (self._confidences, seen.astype(np.float64)),
        ):
            table *= fading
            np.add.at(table, cells, values)
        self._table = None

    def table(self) -> Floats:
        """[num_position_buckets, num_confidence_bins], non-decreasing along each row."""
        if self._table is None:
            edges = np.concatenate(([0.0], CONFIDENCE_EDGES, [1.0]))
            midpoints = (edges[1:] + edges[:-1]) / 2
            counts = self._counts.sum(axis=0)
            pooled = (PRIOR * midpoints + self._accepted.sum(axis=0)) / (PRIOR + counts)
            weights = PRIOR + self._counts
            self._table = isotonic((PRIOR * pooled + self._accepted) / weights, weights)
        return self._table

    def probabilities(
        self, confidences: npt.NDArray[np.floating], positions: npt.NDArray[np.integer]
    ) -> Floats:
        """Chance that each token is accepted, given that all before it in its draft are.

        Args:
            confidences: top-1 probabilities, of any shape.
            positions: index of each token in its draft, from 0; broadcast to `confidences`.
        """
        found: Floats = self.table()[position_buckets(positions), confidence_bins(confidences)]
        return found

    def reliability(self) -> Reliability:
        """What was observed, by confidence bin, over all positions."""
        counts = self._counts.sum(axis=0)
        seen = counts > 0
        return Reliability(
            self._confidences.sum(axis=0)[seen] / counts[seen],
            self._accepted.sum(axis=0)[seen] / counts[seen],
            counts[seen],
        )


def confidence_bins(confidences: npt.NDArray[np.floating]) -> npt.NDArray[np.intp]:
    """The column of each confidence in `Calibration.table`."""
    return np.searchsorted(CONFIDENCE_EDGES, confidences.astype(np.float32), side="right")


def position_buckets(positions: npt.NDArray[np.integer]) -> npt.NDArray[np.intp]:
    """The row of each position in `Calibration.table`."""
    return np.searchsorted(POSITION_EDGES, positions, side="right")


def isotonic(values: Floats, weights: Floats) -> Floats:
    """The non-decreasing rows nearest to `values` [num_rows, n] in weighted least squares.

    The min-max form of the pool-adjacent-violators solution (Robertson, Wright and Dykstra 1988):
    fit[i] = max over a <= i of min over b >= i of the weighted mean of values[a..b].
    """
    n = values.shape[1]
    sums = np.pad((values * weights).cumsum(axis=1), ((0, 0), (1, 0)))
    totals = np.pad(weights.cumsum(axis=1), ((0, 0), (1, 0)))
    first, last = np.arange(n)[:, None], np.arange(n)
    span = np.maximum(last - first, 0) + first + 1  # one behind the last; a > b is masked below
    means = (sums[:, span] - sums[:, first]) / (totals[:, span] - totals[:, first])
    means = np.where(last >= first, means, np.inf)  # [num_rows, a, b]
    least = np.minimum.accumulate(means[:, :, ::-1], axis=2)[:, :, ::-1]
    most = np.maximum.accumulate(np.where(last >= first, least, -np.inf), axis=1)
    fitted: Floats = most[:, np.arange(n), np.arange(n)]
    return fitted
