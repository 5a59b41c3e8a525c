"""How often draft tokens are accepted, learned while serving. NumPy only.

`Calibration`: by confidence and position. A drafter's top-1 probability is not the probability that
the target accepts the token. One table per server, of confidence bins times position buckets,
counts what verification has found:

    pooled[i]   = (PRIOR * midpoint[i] + accepted[:, i]) / (PRIOR + count[:, i])    summed over :
    table[b, i] = (PRIOR * pooled[i] + accepted[b, i]) / (PRIOR + count[b, i])

so that an untouched cell says what its bin says elsewhere, and an untouched bin takes the drafter
at its word. Each row is then made monotone in the confidence (weighted isotonic regression) and old
observations fade exponentially.

The target rejects once per draft, and judges none after that. So a position is observed only if all
before it were accepted, and `probabilities` estimates the chance of a token *given* that.

`AcceptanceByPosition`: by position alone, for tokens that are not drafted yet.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from failfast_vllm.drafting.records import Lengths, Round
from failfast_vllm.planning.costs import FORGETTING, Floats

# Finer towards 1: a draft's survival is a product of numbers near 1.
CONFIDENCE_EDGES = np.array(
    [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999], dtype=np.float32
)
POSITION_EDGES = np.array([1, 2, 4, 8, 16, 32])  # a bucket starts at each
HALF_LIFE = 8192  # observed tokens after which an observation counts half

PRIOR = 8.0  # pseudo-observations that every estimate begins with
PRIOR_ACCEPTANCE = 0.85  # of the first position
UNTRIED = 0.97  # acceptance of a position that was never tried, as a share of the one before it
DECAY = 0.995  # per observed round: a memory of about 200 rounds


class Calibration:
    """An online map from confidence and position in the draft to the chance of acceptance.

    Args:
        half_life: observed tokens after which an observation counts half.
        edges: a bin of confidences starts at each, and one before the first.
        priors: chance of each bin until it is tried; None: the middle of the bin.
    """

    def __init__(
        self,
        half_life: float = HALF_LIFE,
        edges: npt.NDArray[np.float32] = CONFIDENCE_EDGES,
        priors: Floats | None = None,
    ) -> None:
        self.half_life, self.edges = half_life, edges
        bounds = np.concatenate(([0.0], edges, [1.0]))
        self.priors = (bounds[1:] + bounds[:-1]) / 2 if priors is None else priors
        shape = (len(POSITION_EDGES) + 1, len(edges) + 1)
        self.counts = np.zeros(shape)  # observations, faded
        self.accepted = np.zeros(shape)  # of them
        self._table: Floats | None = None

    def observe(self, rounds: Iterable[Round]) -> None:
        """Learn from verified drafts, in the order given; O(observed tokens)."""
        self.learn([(r.judged_confidences, r.num_accepted) for r in rounds])

    def learn(self, judged: Sequence[tuple[npt.NDArray[np.float32], int]]) -> None:
        """Learn from drafts: the confidences of their judged tokens, and how many were accepted."""
        if not judged:
            return
        seen = np.concatenate([confidences for confidences, _ in judged])
        positions = np.concatenate([np.arange(len(confidences)) for confidences, _ in judged])
        num_accepted = np.repeat([num for _, num in judged], [len(c) for c, _ in judged])
        cells = (position_buckets(positions), self.bins(seen))
        fading = 0.5 ** (seen.size / self.half_life)
        for table, values in (
            (self.counts, 1.0),
            (self.accepted, (positions < num_accepted).astype(np.float64)),
        ):
            table *= fading
            np.add.at(table, cells, values)
        self._table = None

    def fade(self) -> None:
        """Move slowly back to the prior."""
        self.counts *= 1.0 - FORGETTING
        self.accepted *= 1.0 - FORGETTING
        self._table = None

    def table(self) -> Floats:
        """[num_position_buckets, num_confidence_bins], non-decreasing along each row."""
        if self._table is None:
            counts = self.counts.sum(axis=0)
            pooled = (PRIOR * self.priors + self.accepted.sum(axis=0)) / (PRIOR + counts)
            weights = PRIOR + self.counts
            self._table = isotonic((PRIOR * pooled + self.accepted) / weights, weights)
        return self._table

    def probabilities(
        self, confidences: npt.NDArray[np.floating], positions: npt.NDArray[np.integer]
    ) -> Floats:
        """Chance that each token is accepted, given that all before it in its draft are.

        Args:
            confidences: top-1 probabilities, of any shape.
            positions: index of each token in its draft, from 0; broadcast to `confidences`.
        """
        found: Floats = self.table()[position_buckets(positions), self.bins(confidences)]
        return found

    def bins(self, confidences: npt.NDArray[np.floating]) -> npt.NDArray[np.intp]:
        """The column of each confidence in `table`."""
        return np.searchsorted(self.edges, confidences.astype(np.float32), side="right")

    def survival(self, confidences: npt.NDArray[np.floating], lens: Lengths) -> Floats:
        """Chance that each token of some drafts and all before it are accepted.

        Args:
            confidences: [num_seqs, longest] of their tokens.
            lens: [num_seqs] tokens that have a confidence; later ones count as sure.
        """
        places = np.arange(confidences.shape[1])
        chances = self.probabilities(confidences, places)
        survival: Floats = np.where(places < lens[:, None], chances, 1.0).cumprod(axis=1)
        return survival


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
    span = np.maximum(last - first, 0) + first + 1  # one beyond the last; a > b is masked below
    means = (sums[:, span] - sums[:, first]) / (totals[:, span] - totals[:, first])
    means = np.where(last >= first, means, np.inf)  # [num_rows, a, b]
    least = np.minimum.accumulate(means[:, :, ::-1], axis=2)[:, :, ::-1]
    most = np.maximum.accumulate(np.where(last >= first, least, -np.inf), axis=1)
    fitted: Floats = most[:, np.arange(n), np.arange(n)]
    return fitted


class AcceptanceByPosition:
    """P(token j is accepted | those before it were), learned from verification with decay.

    A position that was rarely tried is taken for a little worse than the one before it.
    """

    def __init__(self, max_len: int) -> None:
        self.trials = np.zeros(max_len)
        self.hits = np.zeros(max_len)
        self._sums: tuple[Floats, Floats] | None = None

    def observe(self, places: Lengths, alive: Floats, accepted: Floats) -> None:
        """Learn from tokens of drafts.

        Args:
            places: [n] position of each.
            alive: [n] chance that all before it were accepted: 1 or 0, between where not verified.
            accepted: [n] that it was, too.
        """
        max_len = len(self.trials)
        seen = np.bincount(places, alive, minlength=max_len)
        fading = DECAY**seen
        self.trials = self.trials * fading + seen
        self.hits = self.hits * fading + np.bincount(places, accepted, minlength=max_len)
        self._sums = None

    def forget(self, looks: float = 1.0) -> None:
        """Move slowly back to the prior; called after looks without drafts."""
        kept = (1.0 - FORGETTING) ** looks
        self.trials *= kept
        self.hits *= kept
        self._sums = None

    def gains(self, starts: Lengths | int, lens: Lengths) -> Floats:
        """Tokens expected of positions `start : start + len` if all before are accepted."""
        survival, sums = self._survival()
        stops = np.minimum(starts + lens, len(self.trials))
        starts = np.minimum(starts, len(self.trials))
        gains: Floats = (sums[stops] - sums[starts]) / survival[starts]
        return gains

    def _survival(self) -> tuple[Floats, Floats]:
        """[max_len + 1] chance that the first i are all accepted, and its sum over 1 to i."""
        if self._sums is None:
            chance, alive = PRIOR_ACCEPTANCE / UNTRIED, 1.0
            survival = [alive]
            for trials, hits in zip(self.trials.tolist(), self.hits.tolist(), strict=True):
                chance = (hits + PRIOR * UNTRIED * chance) / (trials + PRIOR)
                alive = max(alive * chance, 1e-9)
                survival.append(alive)
            alive_up_to = np.array(survival)
            self._sums = alive_up_to, np.concatenate(([0.0], alive_up_to[1:].cumsum()))
        return self._sums


def learn(
    rounds: Sequence[Round],
    calibration: Calibration,
    first: AcceptanceByPosition,
    growth: AcceptanceByPosition,
) -> None:
    """Learn from verified drafts, all that they drafted.

    What was drafted and not verified counts as often as its confidence says, else later positions
    would look better than they are.

    Args:
        first: of the first pass.
        growth: of the passes after it, counted from their beginning.
    """
    firsts, drafted, verified, accepted = np.array(
        [(r.num_first, len(r.confidences), r.num_verified, r.num_accepted) for r in rounds]
    ).T[:, :, None]
    places = np.arange(max(int(firsts.max()), int(drafted.max())))
    confidences = np.ones((len(rounds), len(places)), dtype=np.float32)
    confidences[places < drafted] = np.concatenate([r.confidences for r in rounds])
    chances = calibration.probabilities(confidences, places)
    chances[places >= drafted] = 0.0
    chances[places < accepted] = 1.0
    chances[(places == accepted) & (accepted < verified)] = 0.0
    alive = np.pad(chances.cumprod(axis=1), ((0, 0), (1, 0)), constant_values=1.0)
    for table, asked, begin in (
        (first, places < firsts, np.zeros_like(firsts)),
        (growth, (places >= firsts) & (places < drafted), firsts),
    ):
        where = (places - begin)[asked]
        table.observe(where, alive[:, :-1][asked], alive[:, 1:][asked])
    calibration.observe(rounds)
