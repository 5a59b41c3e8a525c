"""What the algorithm asks of a model, a policy, a planner and its options.

All of them are deterministic: every rank of a tensor-parallel group runs its own and must decide
alike. What is no abstract class is its own default.

No torch is imported: configurations are checked without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from failfast_vllm.drafting.records import BUDGET, DOUBT, Copies, FirstPass, Lengths

if TYPE_CHECKING:
    import torch

    from failfast_kernels import TokenConfidence
    from failfast_vllm.drafting.records import Candidates, DraftBatch, DraftStep, Round
    from failfast_vllm.drafting.workspace import Masks, Workspace

    Confidences = npt.NDArray[np.floating]


class DraftModel(Protocol):
    """What the drafter needs of a model."""

    def forward(self, batch: DraftBatch) -> torch.Tensor:
        """Run all layers; returns hidden states [num_rows, hidden_size]."""

    def confidence(self, hidden_states: torch.Tensor, *, details: bool = False) -> TokenConfidence:
        """Best token after each row and its probability; MASK and foreign ids never win.

        `details` asks for the entropy, too.
        """

    def candidates(
        self, hidden_states: torch.Tensor, *, details: bool = False
    ) -> tuple[TokenConfidence, Candidates]:
        """The same, and the most probable tokens; MASK and foreign ids have probability 0."""


class Observer:
    """Who learns from verification."""

    def observe(self, rounds: Sequence[Round]) -> None:
        """Learn from the step's verified drafts, in the order of the batch."""

    def forget(self, req_ids: Iterable[str]) -> None:
        """Drop what belongs to requests that have ended."""


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


class Policy(Observer, ABC):
    """A rule for the length of drafts."""

    needs_entropy = False
    ends_by = DOUBT  # why a draft that does not go on is complete: index into STOP_REASONS
    calibration: Observer | None = None  # kept up to date for it, if it has one

    def begin(self, req_ids: Sequence[str], max_draft_lens: Lengths) -> Lengths:
        """Prepare a step; called once, before its first increment.

        Returns `max_draft_lens`, [num_seqs], or less: most tokens to draft; 0 = no draft.
        """
        return max_draft_lens

    @abstractmethod
    def extend(self, draft: DraftSoFar) -> Verdict:
        """After an increment: where the draft ends if it ends here, and whether it goes on."""


class Planner(Observer):
    """Decides what pays at this load: lengths of passes, and what is worth verifying.

    The default is the paper's rule: drafts grow as the policy says, at any load.
    """

    postpones_commits = False  # the blocks of a sequence wait until it is drafted for
    refusal = BUDGET  # why a draft ends that the policy would go on with: index into STOP_REASONS

    def __init__(self, draft_increment: int) -> None:
        self.draft_increment = draft_increment  # most tokens of each pass after the first

    def step_began(self, req_ids: Sequence[str], num_tokens: int) -> bool:
        """The target has just verified `num_tokens` tokens: whether to consider drafting."""
        return True

    def first(self, asked: FirstPass) -> tuple[Lengths, Lengths]:
        """Increments of the first pass, [num_seqs], and tokens to copy instead, [num_seqs]."""
        return np.minimum(asked.wanted, self.draft_increment), np.zeros_like(asked.wanted)

    def pass_took(self, size: tuple[int, int], ms: float) -> None:
        """A draft pass, from planning its rows to its tokens.

        Args:
            size: its rows, and its pairs of a row and a key.
        """

    def following(
        self,
        wanted: Lengths,
        live_rows: Lengths,
        first_lens: Lengths,
        draft_lens: Lengths,
        confidences: Confidences,
    ) -> Lengths:
        """Increments of the next pass, [num_seqs]; 0 = that draft is complete.

        Args:
            wanted: [num_seqs] most tokens that each may still draft; 0 where the policy stopped.
            live_rows: [num_seqs] known and drafted tokens that a pass encodes again.
            first_lens: [num_seqs] tokens that the first pass was to draft.
            draft_lens: [num_seqs] tokens drafted so far.
            confidences: [num_seqs, longest] of the tokens drafted so far.
        """
        return np.minimum(wanted, self.draft_increment)

    def keep(
        self,
        draft_lens: Lengths,
        num_confidences: Lengths,
        confidences: Confidences,
        match_lens: Lengths,
    ) -> Lengths:
        """How much of each draft is worth verifying, [num_seqs].

        Args:
            draft_lens: [num_seqs] tokens drafted.
            num_confidences: [num_seqs] of them with a confidence; the others are copied.
            confidences: [num_seqs, at least the longest draft].
            match_lens: [num_seqs] see `Drafts`.
        """
        return draft_lens

    def step_ended(self, req_ids: Sequence[str]) -> None:
        """The drafts of the step are made; the target is next."""

    def stood_still(self, seconds: float) -> None:
        """For so long nobody has asked the engine for its next step."""


class TokenChooser(Observer):
    """Chooses the tokens of an increment; the default takes the most probable of each mask."""

    def see(self, step: DraftStep) -> None:
        """Read a step's known tokens, before anything is drafted."""

    def choose(
        self,
        model: DraftModel,
        hidden_states: torch.Tensor,
        work: Workspace,
        masks: Masks,
        *,
        details: bool,
    ) -> TokenConfidence:
        """A token and its confidence for each mask, [n * longest].

        Args:
            hidden_states: [n * longest, hidden_size] of the rows that predict `masks`.
            details: whether entropies are asked for.
        """
        return model.confidence(hidden_states, details=details)


class CopyLane:
    """Finds text to draft without a pass; the default finds none."""

    def find(self, step: DraftStep) -> Copies:
        """What each sequence may copy after its known tokens."""
        nothing = step.token_ids.new_empty((len(step.slots), 0)).long()
        return Copies(np.zeros(len(step.slots), dtype=np.int64), nothing)
