"""When to draft further: one rule per class, on per-sequence tensors. Torch only.

A policy is asked after each increment of a draft. It never truncates: the increment it has seen
is kept, whatever its answer (arXiv 2512.20573, Algorithm 1).
"""

from dataclasses import dataclass
from typing import Protocol

import torch


class Policy(Protocol):
    """Says which sequences go on drafting."""

    def extend(self, confidences: torch.Tensor, draft_lens: torch.Tensor) -> torch.Tensor:
        """Decide after an increment.

        Args:
            confidences: [num_seqs, draft_increment] float32, top-1 probability of each token of
                the increment; 1.0 where a sequence had fewer positions left.
            draft_lens: [num_seqs] int64, tokens drafted so far, this increment included.

        Returns:
            [num_seqs] bool, True = draft another increment if the cap allows.
        """
        ...


@dataclass(frozen=True)
class FailFast:
    """Grow while every token of the increment is sure; stop at the first doubt.

    "Fail fast, win big" (arXiv 2512.20573, section 4): hard text gets one pass, easy text a long
    draft.
    """

    confidence_threshold: float

    def extend(self, confidences: torch.Tensor, draft_lens: torch.Tensor) -> torch.Tensor:
        return confidences.amin(dim=1) >= self.confidence_threshold


@dataclass(frozen=True)
class Fixed:
    """Always draft up to the cap: the static baseline."""

    def extend(self, confidences: torch.Tensor, draft_lens: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(draft_lens, dtype=torch.bool)


def make_policy(name: str, confidence_threshold: float) -> Policy:
    """Build the policy that the configuration names (see `config.POLICIES`)."""
    if name == "failfast":
        return FailFast(confidence_threshold)
    assert name == "fixed", name
    return Fixed()
