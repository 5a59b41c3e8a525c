"""The copy lane: what a sequence may copy from its own text, without a draft pass. Torch.

The longest suffix of the known tokens that stands earlier in the same sequence is looked up; what
followed it there may follow here:

    known:  a b c d e ... a b c        the suffix a b c stood before
    copy:                       d e ...

A copy that reaches the end of the known tokens goes on with itself. No other sequence is read, so
a draft stays a function of its own prefix.
"""

import numpy as np
import torch

from failfast_kernels import continue_matches, match_suffixes
from failfast_vllm.drafting.interfaces import CopyLane
from failfast_vllm.drafting.records import NO_TOKEN, Copies, DraftStep, to_device

MIN_MATCH, MAX_MATCH = 1, 16  # tokens that are compared; the planner says what a length is worth


class OwnText(CopyLane):
    """Copies of a sequence's prompt and of what has been generated for it.

    Args:
        vocab_size: of the target; an id beyond it (the place of an image) is drafted as another.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device

    def find(self, step: DraftStep) -> Copies:
        wanted = step.max_draft_lens
        slots, known = to_device(np.array((step.slots, step.known_lens)), self.device)
        texts, longest = (step.token_ids, slots, known), int(step.known_lens.max())
        match_lens, starts = match_suffixes(*texts, MIN_MATCH, MAX_MATCH, longest)
        found = np.where(wanted > 0, match_lens.cpu().numpy(), 0)
        if not found.any():
            return Copies(found, starts[:, None][:, :0])
        ids = self.vocab_size, NO_TOKEN
        return Copies(found, continue_matches(*texts, starts, int(wanted.max()), *ids))

    def find_ahead(
        self,
        token_ids: torch.Tensor,
        slots: torch.Tensor,
        known_lens: torch.Tensor,
        longest_known: int,
        num_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for a step that is scheduled already; waits for nothing.

        Args:
            token_ids: see `DraftStep`.
            slots, known_lens: [num_seqs] int64, likewise, but on the device.
            longest_known: no sequence has more known tokens.
            num_tokens: of each copy.

        Returns:
            [num_seqs] `match_lens` of `Copies`, and [num_seqs, num_tokens] int64 ids; 0 where there
            is nothing to copy.
        """
        texts = token_ids, slots, known_lens
        found = match_suffixes(*texts, MIN_MATCH, MAX_MATCH, longest_known)
        ids = continue_matches(*texts, found.starts, num_tokens, self.vocab_size, 0)
        return found.match_lens, ids

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Launch the kernels once, so that none is compiled while serving."""
        texts = torch.zeros(1, 4, dtype=torch.int32, device=self.device)
        slots, known = to_device(np.array(([0], [4])), self.device)
        found = match_suffixes(texts, slots, known, MIN_MATCH, MAX_MATCH, 4)
        continue_matches(texts, slots, known, found.starts, 4, self.vocab_size, NO_TOKEN)
