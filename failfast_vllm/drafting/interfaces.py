"""What the algorithm asks of a model, a policy, a planner and a copy lane.

All of them are deterministic: every rank of a tensor-parallel group runs its own and must decide
alike. What is no abstract class is its own default.

No torch is imported: configurations are checked without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from failfast_vllm.drafting.records import BUDGET, Copies, FirstPass, Lengths

if TYPE_CHECKING:
    import torch

    from failfast_kernels import TokenConfidence
    from failfast_vllm.drafting.records import DraftBatch, DraftStep, Round

    Confidences = npt.NDArray[np.floating]
    Verdict = tuple[torch.Tensor, torch.Tensor]  # see `Policy.extend`


class DraftModel(Protocol):
    """What the drafter needs of a model."""

    def forward(self, batch: DraftBatch) -> torch.Tensor:
        """Run all layers; returns hidden states [num_rows, hidden_size]."""

    def confidence(self, hidden_states: torch.Tensor) -> TokenConfidence:
        """Best token after each row and its probability; MASK and foreign ids never win."""


class Policy(ABC):
    """A rule for the length of drafts: a dataclass of its parameters."""

    one_pass = False  # the length is known before the first pass, which drafts all of it

    @abstractmethod
    def extend(self, lens: torch.Tensor, confidences: torch.Tensor) -> Verdict:
        """Judge drafts after an increment.

        Args:
            lens: [n] int64, tokens drafted.
            confidences: [n, longest] float32, of all of them; 1.0 beyond `lens`.

        Returns:
            [n] int64, where each draft is cut, from 1 to `lens`, and [n] bool, whether another
            increment is drafted if the cap allows.
        """


class AheadPlanner(Protocol):
    """Decides how many copied tokens to verify in steps that are scheduled ahead."""

    def choose(self, wanted: Lengths, match_lens: Lengths) -> Lengths:
        """Tokens to verify of each copy in the next step to be scheduled, [num_seqs].

        Args:
            wanted: [num_seqs] most tokens that each sequence may draft.
            match_lens: [num_seqs] tokens that matched before the copies of the step that runs;
                NOT_KNOWN: there is no such step yet.
        """

    def steps_to_rest(self, num_seqs: int) -> int:
        """For how many steps not to look at copies, from now on; called once per step that looks.

        Args:
            num_seqs: that run.
        """

    def observe(self, rounds: Sequence[Round]) -> None:
        """Learn from a step's verified copies; `match_len` of each is what `choose` was given."""

    def step_ended(self, req_ids: Sequence[str], num_tokens: int, num_drafted: int) -> None:
        """A step that looks for copies is over; learn what it took.

        Args:
            num_tokens: that the target has computed in it.
            num_drafted: copied tokens among them.
        """

    def rested(self, req_ids: Sequence[str], num_tokens: int) -> None:
        """The same of a step that does not look."""

    def stood_still(self, seconds: float) -> None:
        """For so long nobody has asked the engine for its next step."""


class Planner:
    """Decides what pays at this load: lengths of passes, and what is worth verifying.

    The default is the paper's rule: drafts grow as the policy says, at any load.
    """

    ahead: AheadPlanner | None = None  # for copies that are scheduled ahead; None: they wait
    postpones_commits = False  # the blocks of a sequence wait until it is drafted for
    refusal = BUDGET  # why a draft ends that the policy would go on with: index into STOP_REASONS

    def __init__(self, draft_increment: int) -> None:
        self.draft_increment = draft_increment  # most tokens of each pass after the first

    def step_began(self, req_ids: Sequence[str], num_tokens: int) -> bool:
        """The target has just verified `num_tokens` tokens: whether to consider drafting."""
        return True

    def rested(self, req_ids: Sequence[str], num_tokens: int) -> None:
        """The same of a step for which nobody has asked for drafts, see `steps_to_look`."""

    @property
    def steps_to_look(self) -> int:
        """Which of the coming steps considers drafting again: 1 is the next."""
        return 1

    @property
    def fewest_at_rest(self) -> float:
        """With fewer sequences than so many, the next step considers it."""
        return 0.0

    def observe(self, rounds: Sequence[Round]) -> None:
        """Learn from the step's verified drafts, in the order of the batch."""

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

    def step_ended(self, req_ids: Sequence[str], num_drafted: int) -> None:
        """The drafts of the step are made, `num_drafted` tokens; the target is next."""

    def stood_still(self, seconds: float) -> None:
        """For so long nobody has asked the engine for its next step."""


class CopyLane:
    """Finds text to draft without a pass; the default finds none."""

    def warm_up(self) -> None:
        """Called once, before the engine serves."""

    def find(self, step: DraftStep) -> Copies:
        """What each sequence may copy after its known tokens."""
        nothing = step.token_ids.new_empty((len(step.slots), 0)).long()
        return Copies(np.zeros(len(step.slots), dtype=np.int64), nothing)
