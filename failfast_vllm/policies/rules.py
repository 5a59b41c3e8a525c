"""How long a draft gets: one rule per class, on per-sequence tensors. Torch only.

A policy is asked after each increment of a draft where the draft ends if it ends here, and whether
to draft another increment. `failfast` and `fixed` judge increments, which they keep whole. The
token rules judge tokens: the draft ends *after* the first token at which the rule fires, so that no
token is dropped for its own probability, and goes on while no token has fired.

What learns from verification is in `learned_policy`.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch

from failfast_vllm.drafting.interfaces import DraftSoFar, Policy, Verdict
from failfast_vllm.drafting.records import LOAD


@dataclass(frozen=True)
class FailFast(Policy):
    """Grow while every token is sure; stop at the first doubt, and keep the doubtful increment.

    "Fail fast, win big" (arXiv 2512.20573, Algorithm 1): min(p) >= tau. Hard text gets one pass,
    easy text a long draft.
    """

    confidence_threshold: float

    def extend(self, draft: DraftSoFar) -> Verdict:
        return Verdict(draft.lens, draft.confidences.amin(dim=1) >= self.confidence_threshold)


@dataclass(frozen=True)
class Fixed(Policy):
    """Always draft up to the cap: the static baseline."""

    def extend(self, draft: DraftSoFar) -> Verdict:
        return Verdict(draft.lens, torch.ones_like(draft.lens, dtype=torch.bool))


@dataclass(frozen=True)
class Goodput(Policy):
    """One pass, of the length that maximises (1 + sum of s_i) / (draft ms + verify ms).

    s_i are calibrated survivals. `load.LoadPlanner` chooses the length before the pass and what to
    verify after it; nothing is left to decide here (SmartSpec / TurboSpec, arXiv 2406.14066).
    """

    ends_by = LOAD

    def extend(self, draft: DraftSoFar) -> Verdict:
        return Verdict(draft.lens, torch.zeros_like(draft.lens, dtype=torch.bool))


class TokenRule(Policy):
    """A rule that fires at a token: the draft ends after it."""

    @abstractmethod
    def fires(self, draft: DraftSoFar) -> torch.Tensor:
        """[n, longest] bool, whether the draft may end after each token; ignored beyond `lens`."""

    def extend(self, draft: DraftSoFar) -> Verdict:
        columns = torch.arange(draft.confidences.shape[1], device=draft.lens.device)
        fired = self.fires(draft) & (columns < draft.lens[:, None])
        ends = torch.where(fired, columns + 1, draft.lens[:, None]).amin(dim=1)
        return Verdict(ends, ~fired.any(dim=1))


@dataclass(frozen=True)
class Confidence(TokenRule):
    """p_i < c: assisted generation's dynamic threshold (Hugging Face transformers)."""

    confidence_threshold: float

    def fires(self, draft: DraftSoFar) -> torch.Tensor:
        return draft.confidences < self.confidence_threshold


@dataclass(frozen=True)
class Svip(TokenRule):
    """sqrt(c * H_i) > h, on the draft's entropy (SVIP, arXiv 2411.18462)."""

    entropy_factor: float
    entropy_threshold: float
    needs_entropy = True

    def fires(self, draft: DraftSoFar) -> torch.Tensor:
        assert draft.entropies is not None
        return (self.entropy_factor * draft.entropies).sqrt() > self.entropy_threshold


@dataclass(frozen=True)
class Survival(TokenRule):
    """s_i = p_1 * ... * p_i < eps (FlexDraft, arXiv 2605.20022).

    One token longer than theirs, max{i: s_i >= eps}: the token that fires stays.
    """

    survival_threshold: float

    def fires(self, draft: DraftSoFar) -> torch.Tensor:
        return draft.confidences.cumprod(dim=1) < self.survival_threshold
