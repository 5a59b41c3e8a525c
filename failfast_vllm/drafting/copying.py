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

from failfast_kernels import match_suffixes
from failfast_vllm.drafting.interfaces import CopyLane
from failfast_vllm.drafting.records import NO_TOKEN, Copies, DraftStep, to_device

MIN_MATCH, MAX_MATCH = 1, 8  # tokens that are compared; the planner says what a length is worth


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
        match_lens, starts = match_suffixes(
            step.token_ids, slots, known, MIN_MATCH, MAX_MATCH, int(step.known_lens.max())
        )
        found = np.where(wanted > 0, match_lens.cpu().numpy(), 0)
        if not found.any():
            return Copies(found, starts[:, None][:, :0])
        offsets = torch.arange(int(wanted.max()), device=self.device)
        columns = starts[:, None] + offsets % (known - starts).clamp(min=1)[:, None]
        columns = columns.clamp(max=step.token_ids.shape[1] - 1)
        tokens = step.token_ids[slots[:, None], columns].long().clamp(0, self.vocab_size - 1)
        return Copies(found, tokens.masked_fill(match_lens[:, None] == 0, NO_TOKEN))
