"""What a worker counts. NumPy only."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from failfast_vllm.drafting.records import STOP_REASONS, Drafts, Round
from failfast_vllm.observe.trace import TraceWriter

NUM_BINS = 10  # of confidence
CONFIDENCE_SCALE = 1000  # confidences are added up as integers
SCALARS = ("draft_passes", "draft_rows", "draft_us", "verify_us", "steps")
NUM_COUNTS = len(SCALARS) + len(STOP_REASONS) + 3 * NUM_BINS


class Counts:
    """What a worker has counted for `metrics` since it was last asked.

    Integers: cheap to add up and to send.
    """

    def __init__(self) -> None:
        self.scalars = dict.fromkeys(SCALARS, 0)
        self._array = np.zeros(NUM_COUNTS - len(SCALARS), dtype=np.int64)  # its two parts:
        self.stops = self._array[: len(STOP_REASONS)]  # drafts made, by reason
        bins = self._array[len(STOP_REASONS) :]
        self.bins = bins.reshape(3, NUM_BINS)  # judged, accepted, confidence

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

    def observe(self, rounds: Sequence[Round]) -> None:
        """Fill the bins of the reliability diagram."""
        seen = [r.judged_confidences for r in rounds]
        if not seen:
            return
        confidences = np.concatenate(seen)
        bins = np.minimum((confidences * NUM_BINS).astype(np.int64), NUM_BINS - 1)
        judged = np.bincount(bins, minlength=NUM_BINS)
        self.bins[:2] += judged
        end, rejected = 0, []
        for found, part in zip(rounds, seen, strict=True):
            end += len(part)
            if found.num_accepted < len(part):  # the last one was not accepted
                rejected.append(end - 1)
        if rejected:
            self.bins[1] -= np.bincount(bins[rejected], minlength=NUM_BINS)
        weights = np.bincount(bins, confidences * CONFIDENCE_SCALE, minlength=NUM_BINS)
        self.bins[2] += weights.round().astype(np.int64)

    def take(self) -> list[int]:
        """`NUM_COUNTS` integers, which are zero again afterwards; none if nothing was counted."""
        counts = [*self.scalars.values(), *self._array.tolist()]
        if not any(counts):
            return []
        self.scalars = dict.fromkeys(SCALARS, 0)
        self._array.fill(0)
        return counts


class Stopwatch:
    """Adds up the time that is spent inside of it."""

    def __init__(self) -> None:
        self.ms = 0.0
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.ms += (time.perf_counter() - self._began) * 1e3


@dataclass
class DraftStats:
    """Counters since the engine started, and who is told of its rounds.

    `benchmarks/` and `failfast demo` read and set them.
    """

    num_steps: int = 0
    num_forwards: int = 0
    num_rows: int = 0
    total_ms: float = 0.0  # in steps that drafted, the draft model included
    in_model: Stopwatch = field(default_factory=Stopwatch, repr=False)
    counts: Counts = field(default_factory=Counts, repr=False)
    on_round: Callable[[Round], None] | None = field(default=None, repr=False)
    drafts_only: bool = field(default=False, repr=False)  # it wants no rounds without a draft
    trace: TraceWriter | None = field(default=None, repr=False)
    _began: float = field(default=0.0, repr=False)
    _waits_since: float = field(default=0.0, repr=False)  # for a verification; 0.0 = for none

    @property
    def forward_ms(self) -> float:
        """Time inside the draft model."""
        return self.in_model.ms

    @property
    def wants_plain(self) -> bool:
        """Whether somebody wants rounds without a draft."""
        return self.trace is not None or (self.on_round is not None and not self.drafts_only)

    @property
    def wants_token_ids(self) -> bool:
        """Whether somebody wants `Round.token_ids`, which V2 must copy from the device."""
        return self.on_round is not None or (self.trace is not None and self.trace.with_ids)

    def step_began(self) -> None:
        """The target has verified what the step before has drafted."""
        self._began = time.perf_counter()
        self.num_steps += 1
        if self._waits_since:
            self.counts.verified((self._began - self._waits_since) * 1e3)
            self._waits_since = 0.0

    def step_ended(self, drafts: Drafts) -> None:
        """The drafts of the step are made and handed out."""
        now = time.perf_counter()
        milliseconds = (now - self._began) * 1e3
        self.num_forwards += drafts.num_forwards
        self.num_rows += drafts.num_rows
        self.total_ms += milliseconds
        self.counts.drafted(drafts.num_forwards, drafts.num_rows, milliseconds)
        self.counts.stopped(drafts.stop_reasons[drafts.lens > 0])
        self._waits_since = now if drafts.lens.any() else 0.0

    def observe(self, rounds: Sequence[Round]) -> None:
        """Tell the receivers, rounds without a draft included where they want them."""
        if self.on_round is not None:
            for found in rounds:
                if found.num_verified or not self.drafts_only:
                    self.on_round(found)
        if self.trace is not None:
            self.trace.observe(rounds)

    def forget(self, req_ids: Iterable[str]) -> None:
        """The requests have ended."""
        if self.trace is not None:
            self.trace.forget(req_ids)

    def reset(self) -> None:
        """Count from zero; receivers of rounds stay."""
        self.num_steps = self.num_forwards = self.num_rows = 0
        self.total_ms = self.in_model.ms = self._waits_since = 0.0
        self.counts.take()
