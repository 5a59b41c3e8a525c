"""What verification found of drafts, added up for reports: lengths, positions, confidences."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from failfast_vllm.observe.counters import NUM_BINS


@dataclass
class Tally:
    """What verification found of some drafts.

    A token was judged if all before it in its draft were accepted.
    """

    num_drafts: int = 0
    num_drafted: int = 0  # tokens
    num_accepted: int = 0
    num_passes: int = 0  # of the drafter
    lengths: Counter[int] = field(default_factory=Counter)  # draft length -> drafts
    drafted: Counter[int] = field(default_factory=Counter)  # position -> tokens
    accepted: Counter[int] = field(default_factory=Counter)
    judged: Counter[int] = field(default_factory=Counter)  # confidence bin -> tokens
    right: Counter[int] = field(default_factory=Counter)  # of them accepted
    confidence: Counter[int] = field(default_factory=Counter)  # of them the sum

    def add(
        self, num_drafted: int, num_accepted: int, num_passes: int, confidences: Sequence[float]
    ) -> None:
        """Count one verified draft, which is not empty; `confidences` may be fewer than tokens."""
        self.num_drafts += 1
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        self.num_passes += num_passes
        self.lengths[num_drafted] += 1
        self.drafted.update(range(num_drafted))
        self.accepted.update(range(num_accepted))
        for position, confidence in enumerate(confidences[: num_accepted + 1]):
            where = min(int(confidence * NUM_BINS), NUM_BINS - 1)
            self.judged[where] += 1
            self.right[where] += position < num_accepted
            self.confidence[where] += confidence  # type: ignore[assignment]

    def update(self, other: "Tally") -> None:
        for part in fields(self):
            mine, theirs = getattr(self, part.name), getattr(other, part.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            else:
                setattr(self, part.name, mine + theirs)

    def to_dict(self) -> dict[str, Any]:
        rounds = max(1, self.num_drafts)
        return {
            "acceptance_length": round(1 + self.num_accepted / rounds, 3),
            "passes_per_round": round(self.num_passes / rounds, 3),
            "drafts": self.num_drafts,
            "drafted_tokens": self.num_drafted,
            "accepted_tokens": self.num_accepted,
            "draft_lengths": {str(n): self.lengths[n] for n in sorted(self.lengths)},
            "drafted_per_position": _by_position(self.drafted),
            "accepted_per_position": _by_position(self.accepted),
            "reliability": [
                {
                    "bin": f"{i / NUM_BINS:.1f}-{(i + 1) / NUM_BINS:.1f}",
                    "count": self.judged[i],
                    "accepted": self.right[i],
                    "mean_confidence": round(self.confidence[i] / self.judged[i], 4),
                }
                for i in sorted(self.judged)
            ],
        }


def _by_position(counts: Counter[int]) -> list[int]:
    return [counts[i] for i in range(max(counts, default=-1) + 1)]
