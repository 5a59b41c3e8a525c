"""How long a draft gets: one rule per class, on per-sequence tensors.

A policy is asked after each increment of a draft where the draft ends if it ends here, and whether
to draft another increment. `failfast` and `fixed` judge increments, which they keep whole. The
token rules judge tokens: the draft ends *after* the first token at which the rule fires, so that no
token is dropped for its own probability, and goes on while no token has fired.

Here are the default and the rules that it is worth comparing with. `alternatives` and `bandit` hold
those of other papers, none of which measured better than the default.

Torch is imported in functions: the fields of these classes are what configurations are checked
against, also by commands that start without torch, which takes seconds to import.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from failfast_vllm.drafting.interfaces import DraftSoFar, Policy, Verdict
from failfast_vllm.drafting.records import LOAD, Lengths
from failfast_vllm.planning.acceptance import CONFIDENCE_EDGES, Calibration, position_buckets
from failfast_vllm.policies.parameters import length, number

if TYPE_CHECKING:
    import torch


class NamedPolicy(Policy):
    """A policy that users choose by its name in `table.POLICIES`: a dataclass of its parameters."""

    default_cap = 60  # num_speculative_tokens unless the user gives it
    one_pass = False  # the length is known before the first pass, which drafts all of it
    needs_planner = False  # it has no rule without load awareness
    is_arm = True  # a bandit may choose it


@dataclass(frozen=True)
class FailFast(NamedPolicy):
    """Grow while every token is sure; stop at the first doubt, and keep the doubtful increment.

    "Fail fast, win big" (arXiv 2512.20573, Algorithm 1): min(p) >= tau. Hard text gets one pass,
    easy text a long draft.
    """

    confidence_threshold: float = number(
        0.45, 0, 1, "a draft goes on while every token is at least this probable"
    )

    def extend(self, draft: DraftSoFar) -> Verdict:
        return Verdict(draft.lens, draft.confidences.amin(dim=1) >= self.confidence_threshold)


@dataclass(frozen=True)
class Fixed(NamedPolicy):
    """Always draft up to the cap: the static baseline."""

    one_pass = True

    def extend(self, draft: DraftSoFar) -> Verdict:
        return Verdict(draft.lens, draft.lens > 0)  # always: no draft is empty


@dataclass(frozen=True)
class Goodput(NamedPolicy):
    """One pass, of the length that maximises (1 + sum of s_i) / (draft ms + verify ms).

    s_i are calibrated survivals. The planner chooses the length before the pass and what to verify
    after it; nothing is left to decide here (SmartSpec / TurboSpec, arXiv 2406.14066).
    """

    one_pass = True
    needs_planner = True
    is_arm = False
    ends_by = LOAD

    def extend(self, draft: DraftSoFar) -> Verdict:
        return Verdict(draft.lens, draft.lens < 0)  # never


class TokenRule(NamedPolicy):
    """A rule that fires at a token: the draft ends after it."""

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
    min_draft_len: int = length(2, 1, "the rule ends no draft before this many tokens")
    calibration: Calibration = field(default_factory=Calibration)
    _table: torch.Tensor = field(init=False, repr=False)  # [longest draft, num_bins]
    _edges: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        import torch

        self._edges = torch.from_numpy(CONFIDENCE_EDGES)

    def begin(self, req_ids: Sequence[str], max_draft_lens: Lengths) -> Lengths:
        import torch

        buckets = position_buckets(np.arange(max_draft_lens.max(initial=0)))
        self._table = torch.from_numpy(self.calibration.table()[buckets]).float()
        return max_draft_lens

    def fires(self, draft: DraftSoFar) -> torch.Tensor:
        import torch

        device = draft.seqs.device
        table = self._table.to(device, non_blocking=True)
        self._edges = self._edges.to(device)
        bins = torch.bucketize(draft.confidences, self._edges, right=True)
        rows = torch.arange(bins.shape[1], device=device)
        rejection = 1.0 - table[rows, bins].cumprod(dim=1)
        return (rejection > self.rejection_threshold) & (rows >= self.min_draft_len - 1)
