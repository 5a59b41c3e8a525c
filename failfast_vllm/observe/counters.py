"""What a worker counts. NumPy only."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from failfast_vllm.drafting.records import STOP_REASONS, Drafts, Round
from failfast_vllm.observe.trace import TraceWriter

NUM_BINS = 10  # of confidence
CONFIDENCE_SCALE = 1000  # confidences are added up as integers
NUM_SCALARS = 7  # see `DraftStats.take`
Confidences = npt.NDArray[np.float32]
NUM_COUNTS = NUM_SCALARS + len(STOP_REASONS) + 3 * NUM_BINS


class DraftStats:
    """Counters since the engine started, and who is told of its rounds.

    `failfast bench` and `benchmarks/` read and set them.
    """

    def __init__(self) -> None:
        self.on_round: Callable[[Round], None] | None = None
        self.drafts_only = False  # it wants no rounds without a draft
        self.trace: TraceWriter | None = None
        self.reset()

    def reset(self) -> None:
        """Count from zero; receivers of rounds stay."""
        self.num_steps = self.num_forwards = self.num_rows = 0
        self.num_drafting_steps = 0  # the planner did not rest
        self.total_ms = 0.0  # in these, the draft model included
        self.forward_ms = 0.0  # inside the draft model
        self.verify_ms = 0.0
        self.num_copied = self.num_copied_accepted = 0  # tokens that were verified, accepted
        self.stops = np.zeros(len(STOP_REASONS), dtype=np.int64)  # drafts made, by reason
        self.bins = np.zeros((3, NUM_BINS), dtype=np.int64)  # judged, accepted, confidence
        self._taken = np.zeros(NUM_COUNTS, dtype=np.int64)
        self._has_news = False  # since they were taken
        self._began = self._waits_since = 0.0  # the latter for a verification; 0.0 = for none

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Count the time that is spent inside of it."""
        began = time.perf_counter()
        yield
        self.forward_ms += (time.perf_counter() - began) * 1e3

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
            self.verify_ms += (self._began - self._waits_since) * 1e3
            self._waits_since = 0.0

    def stood_still(self, seconds: float) -> None:
        """For so long nobody has asked the engine for its next step."""
        self._waits_since += seconds * bool(self._waits_since)

    def step_ended(self, drafts: Drafts) -> None:
        """The drafts of the step are made and handed out."""
        now = time.perf_counter()
        self._has_news = True
        self.num_drafting_steps += 1
        self.num_forwards += drafts.num_forwards
        self.num_rows += drafts.num_rows
        self.total_ms += (now - self._began) * 1e3
        reasons = drafts.stop_reasons[drafts.lens > 0]
        self.stops += np.bincount(reasons, minlength=len(STOP_REASONS))
        self._waits_since = now if drafts.lens.any() else 0.0

    def observe(self, rounds: Sequence[Round]) -> None:
        """Fill the bins of the reliability diagram, and count what was copied."""
        if not rounds:
            return
        self._has_news = True
        self.num_copied += sum(r.num_copied for r in rounds)
        self.num_copied_accepted += sum(r.num_copied_accepted for r in rounds)
        judged = np.concatenate([r.judged_confidences for r in rounds])
        if not judged.size:  # all was copied
            return
        accepted = np.concatenate([r.confidences[: r.num_accepted] for r in rounds])
        sums = _by_bin(judged), _by_bin(accepted), _by_bin(judged, judged * CONFIDENCE_SCALE)
        self.bins += np.stack(sums).round().astype(np.int64)

    def tell(self, rounds: Sequence[Round]) -> None:
        """Tell the receivers, rounds without a draft included where they want them."""
        if self.on_round is not None:
            for found in rounds:
                if found.num_verified or not self.drafts_only:
                    self.on_round(found)
        if self.trace is not None:
            self.trace.observe(rounds)

    def take(self) -> list[int]:
        """What was counted since it was last asked, `NUM_COUNTS` integers; [] if nothing was."""
        if not self._has_news:
            return []
        self._has_news = False
        times = self.total_ms * 1e3, self.verify_ms * 1e3
        copied = self.num_copied, self.num_copied_accepted
        scalars = self.num_forwards, self.num_rows, *map(int, times), self.num_drafting_steps
        counts = np.concatenate((scalars, copied, self.stops, self.bins.ravel()))
        news: list[int] = (counts - self._taken).tolist()
        self._taken = counts
        return news

    def forget(self, req_ids: Iterable[str]) -> None:
        """The requests have ended."""
        if self.trace is not None:
            self.trace.forget(req_ids)


def _by_bin(confidences: Confidences, weights: Confidences | None = None) -> npt.NDArray[Any]:
    bins = np.minimum((confidences * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    return np.bincount(bins, weights, NUM_BINS)
