"""What one step proposes and what becomes of it. NumPy and torch only."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.int64]

# What ended a draft. doubt: the policy. cap: num_speculative_tokens. load: the planner. budget:
# draft_budget. eos: it drafted a stop token. request: its own limit, max_tokens or the context.
STOP_REASONS = ("doubt", "cap", "load", "budget", "eos", "request")
DOUBT, CAP, LOAD, BUDGET, EOS, REQUEST = range(len(STOP_REASONS))


class Round(NamedTuple):
    """One draft of one request; once it is verified, also what the target made of it."""

    req_id: str
    num_drafted: int
    num_first: int  # tokens that its first pass was to draft; a policy may have cut it
    num_verified: int  # at least 1; less than `num_drafted` if the scheduler cut the draft
    num_accepted: int
    # of what passes drafted, also if it was not worth verifying; fewer with reused tokens
    confidences: npt.NDArray[np.float32]
    ends_at_stop: bool  # the draft's last token is a stop token
