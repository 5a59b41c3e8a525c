"""What a worker counts for `metrics`: integers that are cheap to add up and to send. NumPy only."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from failfast_vllm.drafting.records import STOP_REASONS

NUM_BINS = 10  # of confidence
CONFIDENCE_SCALE = 1000  # confidences are added up as integers
SCALARS = ("draft_passes", "draft_rows", "draft_us", "verify_us", "steps")
NUM_COUNTS = len(SCALARS) + len(STOP_REASONS) + 3 * NUM_BINS


class Judged(NamedTuple):
    """Draft tokens that the target has judged; behind the first rejection it judges none."""

    confidences: npt.NDArray[np.float32]  # [n]
    num_accepted: int  # the first so many


class Counts:
    """What a worker has counted since it was last asked."""

    def __init__(self) -> None:
        self.scalars = dict.fromkeys(SCALARS, 0)
        self.stops = np.zeros(len(STOP_REASONS), dtype=np.int64)  # drafts made, by reason
        self.bins = np.zeros((3, NUM_BINS), dtype=np.int64)  # judged, accepted, confidence

    def drafted(self, passes: int, rows: int, milliseconds: float) -> None:
        """A step's drafts are made."""
        self.scalars["draft_passes"] += passes
        self.scalars["draft_rows"] += rows
        self.scalars["draft_us"] += int(milliseconds * 1e3)
        self.scalars["steps"] += 1

    def stopped(self, reasons: npt.NDArray[np.int64]) -> None:
        """Why each draft of a step is not longer, [num_drafts]."""
        self.stops += np.bincount(reasons, minlength=len(STOP_REASONS))

    def verified(self, milliseconds: float) -> None:
        """From the end of a step's drafts to the end of their verification."""
        self.scalars["verify_us"] += int(milliseconds * 1e3)

    def judged(self, drafts: Sequence[Judged]) -> None:
        """Fill the bins of the reliability diagram."""
        seen = [confidences[: accepted + 1] for confidences, accepted in drafts]
        if not seen:
            return
        confidences = np.concatenate(seen)
        lens = np.array([len(part) for part in seen])
        places = np.arange(len(confidences)) - np.repeat(lens.cumsum() - lens, lens)
        accepted = places < np.repeat([judged.num_accepted for judged in drafts], lens)
        bins = np.minimum((confidences * NUM_BINS).astype(np.int64), NUM_BINS - 1)
        self.bins[0] += np.bincount(bins, minlength=NUM_BINS)
        self.bins[1] += np.bincount(bins[accepted], minlength=NUM_BINS)
        weights = np.bincount(bins, confidences * CONFIDENCE_SCALE, minlength=NUM_BINS)
        self.bins[2] += weights.round().astype(np.int64)

    def take(self) -> list[int]:
        """`NUM_COUNTS` integers, which are zero again afterwards; none if nothing was counted."""
        counts = [*self.scalars.values(), *self.stops.tolist(), *self.bins.flatten().tolist()]
        if not any(counts):
            return []
        self.__init__()  # type: ignore[misc]
        return counts
