"""How long a draft gets: one rule per class, on per-sequence tensors; no torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from failfast_vllm.drafting.interfaces import Policy
from failfast_vllm.policies.parameters import number

if TYPE_CHECKING:
    import torch

    from failfast_vllm.drafting.interfaces import Verdict


@dataclass(frozen=True)
class FailFast(Policy):
    """min(p) >= tau; the doubtful increment is kept (FailFast, arXiv 2512.20573, Algorithm 1)."""

    confidence_threshold: float = number(
        0.45, 0, 1, "a draft goes on while every token is at least this probable"
    )

    def extend(self, lens: torch.Tensor, confidences: torch.Tensor) -> Verdict:
        return lens, confidences.amin(dim=1) >= self.confidence_threshold


@dataclass(frozen=True)
class Fixed(Policy):
    """Always draft up to the cap: the static baseline."""

    one_pass = True

    def extend(self, lens: torch.Tensor, confidences: torch.Tensor) -> Verdict:
        return lens, lens > 0  # always: no draft is empty
