"""What one step proposes and what becomes of it. NumPy and torch only."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.int64]

# What ended a draft. doubt: the policy. cap: num_speculative_tokens. load: the planner. budget:
# draft_budget. eos: it drafted a stop token. request: its own limit, max_tokens or the context.
STOP_REASONS = ("doubt", "cap", "load", "budget", "eos", "request")
DOUBT, CAP, LOAD, BUDGET, EOS, REQUEST = range(len(STOP_REASONS))


NO_CONFIDENCES = np.empty(0, dtype=np.float32)


@dataclass(eq=False)
class Round:
    """One draft of one request; once it is verified, also what the target made of it.

    A step of the target without a draft is a round, too, with `num_verified` 0.
    """

    req_id: str
    num_drafted: int = 0
    num_first: int = 0  # tokens that its first pass was to draft; a policy may have cut it
    num_verified: int = 0  # less than `num_drafted` if the scheduler cut the draft
    num_accepted: int = 0
    # of what passes drafted, also if it was not worth verifying; fewer with reused tokens
    confidences: npt.NDArray[np.float32] = field(default_factory=lambda: NO_CONFIDENCES)
    ends_at_stop: bool = False  # the draft's last token is a stop token
    num_passes: int = 0  # draft passes that the draft took
    num_rows: int = 0  # of this sequence in them
    token_ids: Sequence[int] = ()  # [num_drafted]; empty unless somebody wants them
    emitted: Sequence[int] = ()  # accepted tokens and the bonus
    known_len: int = 0  # tokens before the round
    step: int = 0  # of the engine, from 1: the one that verified
    num_seqs: int = 0  # in that step

    @property
    def drafted(self) -> list[int]:
        """What the target verified, in token ids; empty if nobody wanted them."""
        return list(self.token_ids[: self.num_verified])

    @property
    def verified_confidences(self) -> npt.NDArray[np.float32]:
        """Of the tokens that the target verified."""
        return self.confidences[: self.num_verified]

    @property
    def judged_confidences(self) -> npt.NDArray[np.float32]:
        """Of the tokens that it judged: it judges none beyond the first that it rejects."""
        return self.confidences[: min(self.num_verified, self.num_accepted + 1)]
