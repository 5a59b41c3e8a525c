"""How long a draft gets: one rule per class, on per-sequence tensors.

These are the default and the rules worth comparing it with; `alternatives` holds those of other
papers. Torch is imported in functions, for configurations are checked without it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from failfast_vllm.drafting.interfaces import DraftSoFar, Policy, Verdict
from failfast_vllm.drafting.records import LOAD, Lengths, to_device
from failfast_vllm.planning.acceptance import CONFIDENCE_EDGES, Calibration, position_buckets
from failfast_vllm.policies.parameters import integer, number

if TYPE_CHECKING:
    import torch


class NamedPolicy(Policy):
    """A policy in `table.POLICIES`: a dataclass of its parameters."""

    default_cap = 60  # num_speculative_tokens unless the user gives it
    one_pass = False  # the length is known before the first pass, which drafts all of it
    needs_planner = False  # it has no rule without load awareness


@dataclass(frozen=True)
class FailFast(NamedPolicy):
    """min(p) >= tau; the doubtful increment is kept (FailFast, arXiv 2512.20573, Algorithm 1)."""

    confidence_threshold: float = number(
        0.45, 0, 1, "a draft goes on while every token is at least this probable"
    )

    def extend(self, draft: DraftSoFar) -> Verdict:
        return Verdict(draft.lens, draft.confidences.amin(dim=1) >= self.confidence_threshold)


@dataclass(eq=False)
class Fixed(NamedPolicy):
    """Always draft up to the cap: the static baseline."""

    one_pass = True

    def extend(self, draft: DraftSoFar) -> Verdict:
        return Verdict(draft.lens, draft.lens > 0)  # always: no draft is empty


@dataclass(frozen=True)
class Goodput(NamedPolicy):
    """One pass, whose length the planner chooses (SmartSpec / TurboSpec, arXiv 2406.14066)."""

    one_pass = True
    needs_planner = True
    ends_by = LOAD

    def extend(self, draft: DraftSoFar) -> Verdict:
        return Verdict(draft.lens, draft.lens < 0)  # never


class TokenRule(NamedPolicy):
    """The draft ends after the first token at which the rule fires, and goes on while none has."""

    @abstractmethod
    def fires(self, draft: DraftSoFar) -> torch.Tensor:
        """[n, longest] bool, whether the draft may end after each token; ignored beyond `lens`."""

    def extend(self, draft: DraftSoFar) -> Verdict:
        num_before = (self.fires(draft).cumsum(dim=1) == 0).sum(dim=1)  # the first that fires
        return Verdict((num_before + 1).minimum(draft.lens), num_before >= draft.lens)


@dataclass(frozen=True)
class Confidence(TokenRule):
    """p_i < c: assisted generation's dynamic threshold (Hugging Face transformers)."""

    confidence_threshold: float = number(
        0.4, 0, 1, "a draft ends after the first token less probable than this"
    )

    def fires(self, draft: DraftSoFar) -> torch.Tensor:
        return draft.confidences < self.confidence_threshold


@dataclass(eq=False)
class SpecDecPlusPlus(TokenRule):
    """1 - f_1 * ... * f_i > h: the chance of a rejection so far (SpecDec++, arXiv 2405.19715).

    Theirs is a trained head; here f is the calibrated confidence, learned while serving.
    """

    default_cap = 20

    rejection_threshold: float = number(
        0.3, 0, 1, "a draft ends where a rejection is more probable than this"
    )
    min_draft_len: int = integer(2, 1, None, "the rule ends no draft before this many tokens")
    calibration: Calibration = field(default_factory=Calibration)
    _table: npt.NDArray[np.float32] = field(init=False, repr=False)  # [longest draft, num_bins]

    def begin(self, req_ids: Sequence[str], max_draft_lens: Lengths) -> Lengths:
        buckets = position_buckets(np.arange(max_draft_lens.max(initial=0)))
        self._table = self.calibration.table()[buckets].astype(np.float32)
        return max_draft_lens

    def fires(self, draft: DraftSoFar) -> torch.Tensor:
        import torch

        device = draft.seqs.device
        table, edges = to_device(self._table, device), to_device(CONFIDENCE_EDGES, device)
        bins = torch.bucketize(draft.confidences, edges, right=True)
        rows = torch.arange(bins.shape[1], device=device)
        rejection = 1.0 - table[rows, bins].cumprod(dim=1)
        return (rejection > self.rejection_threshold) & (rows >= self.min_draft_len - 1)
