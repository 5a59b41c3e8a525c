"""How often copied tokens are accepted, and how many are worth verifying. NumPy only."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from failfast_vllm.drafting.records import Lengths, Round
from failfast_vllm.planning.acceptance import HALF_LIFE, Calibration
from failfast_vllm.planning.costs import HICCUP, REST_STEPS, Floats
from failfast_vllm.planning.guard import SAME_LOAD

MATCH_EDGES = np.array([2, 3, 4, 5, 6, 8, 12, 16], dtype=np.float32)  # of match lengths
# of the next token of each bin until it is tried; measured on answers of a chat model
MATCH_PRIORS = np.array([0.25, 0.5, 0.65, 0.7, 0.75, 0.78, 0.85, 0.92, 0.97])
COPY_MARGIN = 1.01  # gain from which copies are verified: times are estimates
FEWEST_LOOKS, LOOK_RATE = 32, 0.02  # looks before a verdict; weight of the last one in the averages
LEAST = 0.02  # chance below which a token is not even considered


class CopyAcceptance:
    """Learns the chance of a copied token from the length of the match and its place in the copy.

    Args:
        max_len: most tokens of a copy.
        edges: a bin of match lengths starts at each, and one before the first.
        priors: chance of the next token of each bin until it is tried.
        half_life: see `Calibration`.
    """

    def __init__(
        self,
        max_len: int,
        edges: npt.NDArray[np.float32] = MATCH_EDGES,
        priors: Floats = MATCH_PRIORS,
        half_life: float = HALF_LIFE,
    ) -> None:
        self.calibration = Calibration(half_life, edges, priors)
        self.least = int(edges[0]) - 1  # match length of the first bin
        self.places = np.arange(max_len)
        self._survival: Floats | None = None

    def survival(self, match_lens: Lengths) -> Floats:
        """[num_seqs, max_len] chance that each token of a copy and all before it are accepted.

        Args:
            match_lens: [num_seqs] tokens that matched before the copy; less than the first bin
                has: no copy.
        """
        edges = self.calibration.edges
        if self._survival is None:
            lens = np.concatenate(([self.least], edges))[:, None]
            chances = self.calibration.probabilities(lens, self.places)
            self._survival = np.concatenate((0.0 * chances[:1], chances.cumprod(axis=1)))
        bins = 1 + np.searchsorted(edges, match_lens, side="right")
        found: Floats = self._survival[np.where(match_lens >= self.least, bins, 0)]
        return found

    def forget(self) -> None:
        """Called after some steps without a draft: what was learned long ago gets another try."""
        self.calibration.fade()
        self._survival = None

    def observe(self, rounds: Sequence[Round]) -> None:
        """Learn from copies that were verified; the target judges none after a rejected token."""
        judged = []
        for r in rounds:
            num_accepted = r.num_accepted - len(r.confidences)  # of the copy
            if r.num_copied and num_accepted >= 0:
                num_judged = min(num_accepted + 1, r.num_copied)
                judged.append((np.full(num_judged, r.match_len, np.float32), num_accepted))
        if judged:
            self.calibration.learn(judged)
            self._survival = None


class LookBalance:
    """Says whether looking for copies is worth its time at this load.

    A look takes host time in each step. Where the copies that it finds are expected to bring less
    than that, only one step in so many looks.
    """

    def __init__(self) -> None:
        self._num_seqs = 0  # of the load that the averages are of
        self._num_looks = 0
        self._gain_ms = self.cost_ms = 0.0  # per look
        self.steps_to_rest = 0

    def step_began(self, num_seqs: int) -> bool:
        """Returns whether to look in this step."""
        if not SAME_LOAD * self._num_seqs <= num_seqs <= self._num_seqs / SAME_LOAD:
            self._num_seqs, self._num_looks, self.steps_to_rest = num_seqs, 0, 0
        self.steps_to_rest -= 1
        return self.steps_to_rest < 0

    def looked(self, gain_ms: float, looks: float = 1.0, rest_steps: int = REST_STEPS) -> None:
        """The copies of a step are expected to save so much time; if that is too little, rest.

        Args:
            looks: that would be over if none had been left out.
        """
        self._num_looks += 1
        kept = (1.0 - self._rate) ** looks
        self._gain_ms = kept * self._gain_ms + (1.0 - kept) * gain_ms
        if self._num_looks >= FEWEST_LOOKS and self._gain_ms < self.cost_ms:
            self.steps_to_rest = rest_steps

    def took(self, ms: float) -> None:
        """The last look, with what was copied: hiccups count little."""
        if self.cost_ms:
            ms = min(ms, HICCUP * self.cost_ms)
        self.cost_ms += self._rate * (ms - self.cost_ms)

    @property
    def _rate(self) -> float:
        return max(1.0 / max(self._num_looks, 1), LOOK_RATE)


def choose_copies(
    survival: Floats, wanted: Lengths, verify: Callable[[Lengths], Floats], plain_ms: float
) -> Lengths:
    """The copies that maximise the tokens per ms of a step without draft passes.

    Those that copy nothing wait for the others, so what counts is the geometric mean of both
    groups' tokens per sequence, as in `options.even_out`. Tokens are taken by their chance.

    Args:
        survival: [num_seqs, max_len] see `CopyAcceptance.survival`.
        wanted: [num_seqs] most tokens that each may draft.
        verify: ms of the target's step by its tokens.
        plain_ms: of a step without drafts.

    Returns:
        [num_seqs] lengths.
    """
    num_seqs = len(wanted)
    places = np.arange(survival.shape[1])
    seqs, columns = np.nonzero((survival > LEAST) & (places < wanted[:, None]))
    if not len(seqs):
        return np.zeros_like(wanted)
    gains = survival[seqs, columns]
    order = np.argsort(-gains, kind="stable")  # of equals the earlier: copies stay whole
    counts = np.arange(1, len(order) + 1)
    num_in = (columns[order] == 0).cumsum()  # sequences that copy
    each_in = 1.0 + gains[order].cumsum() / num_in
    rates = num_seqs * each_in ** (num_in / num_seqs) / verify(num_seqs + counts)
    best = int(rates.argmax())
    if rates[best] * plain_ms <= COPY_MARGIN * num_seqs:
        return np.zeros_like(wanted)
    return np.bincount(seqs[order[: best + 1]], minlength=num_seqs)
