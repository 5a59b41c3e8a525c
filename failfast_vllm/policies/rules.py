"""How long a draft gets: one rule per class, on per-sequence tensors. Torch only.

A policy is asked after each increment of a draft where the draft ends if it ends here, and whether
to draft another increment. `failfast` and `fixed` judge increments, which they keep whole. The
token rules judge tokens: the draft ends *after* the first token at which the rule fires, so that no
token is dropped for its own probability, and goes on while no token has fired.

What learns from verification is in `learned_policy`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from failfast_vllm.drafting.records import DOUBT, LOAD, Lengths, Round
from failfast_vllm.planning.acceptance import Calibration


class DraftSoFar(NamedTuple):
    """What some sequences of a step have drafted, the last increment included."""

    seqs: torch.Tensor  # [n] int64, index of each sequence in the step
    lens: torch.Tensor  # [n] int64, tokens drafted
    confidences: torch.Tensor  # [n, longest] float32, top-1 probability; 1.0 beyond `lens`
    entropies: torch.Tensor | None  # likewise, nats, 0.0 beyond `lens`; None: not asked for


class Verdict(NamedTuple):
    """What a policy says after an increment."""

    lens: torch.Tensor  # [n] int64, where the draft is cut: from 1 to the tokens drafted
    goes_on: torch.Tensor  # [n] bool, draft another increment if the cap allows; cuts nothing


class Policy(ABC):
    """A rule for the length of drafts.

    Deterministic: every rank of a tensor-parallel group runs its own and must decide alike.
    """

    needs_entropy = False
    learns = False  # whether it wants `observe`
    ends_by = DOUBT  # why a draft that does not go on is complete, see `counts`
    calibration: Calibration | None = None  # kept up to date for it, if it has one

    def begin(self, req_ids: Sequence[str], max_draft_lens: Lengths) -> Lengths:
        """Prepare a step; called once, before its first increment.

        Args:
            max_draft_lens: [num_seqs] most tokens to draft; 0 = no draft.

        Returns:
            [num_seqs] the same or less.
        """
        return max_draft_lens

    @abstractmethod
    def extend(self, draft: DraftSoFar) -> Verdict:
        """Decide after an increment."""

    def observe(self, outcomes: Sequence[Round]) -> None:  # noqa: B027 - most do not learn
        """Learn from the step's verified drafts, in the order of the batch."""

    def forget(self, req_ids: Iterable[str]) -> None:  # noqa: B027
        """Drop what belongs to requests that have ended."""


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
