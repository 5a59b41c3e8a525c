"""Reuse of rejected drafts (FailFast, arXiv 2512.20573, Appendix E): longer drafts, no pass. Torch.

When the target corrects a draft, the tokens after the correction are lost, though they are often
right and only shifted. So when a new draft ends in doubt, its longest suffix is looked up in that
tail, and what followed there is appended:

    rejected:  a b X c d e f      the target said Y for X: the tail is c d e f
    new draft: a' c d             its longest suffix in the tail is c d
    proposed:  a' c d e f

Both come from tokens that are known, so the draft stays a function of the prefix.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from failfast_vllm.drafting.interfaces import Reuse
from failfast_vllm.drafting.records import Lengths, Round, to_device
from failfast_vllm.drafting.workspace import Judged, Masks


def continuation(
    drafts: torch.Tensor, lens: torch.Tensor, tails: torch.Tensor, tail_lens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What follows the longest suffix of each draft in its tail.

    Args:
        drafts: [n, longest_draft] int64; undefined beyond `lens`.
        lens: [n] int64, at least 1.
        tails: [n, longest_tail] int64; undefined beyond `tail_lens`.
        tail_lens: [n] int64, 0 = no tail.

    Returns:
        [n, longest_tail] int64 tokens, undefined beyond the second: [n] int64, how many; 0 where no
        suffix is in the tail or nothing follows it. Of equally long suffixes the first counts.
    """
    width = tails.shape[1]
    offsets = torch.arange(width, device=tails.device)
    if width == 0:
        return tails, torch.zeros_like(lens)
    from_end = lens[:, None] - 1 - offsets  # [n, i], column of the draft's i-th token from its end
    suffix = drafts.gather(1, from_end.clamp(0, drafts.shape[1] - 1))
    back = offsets[:, None] - offsets  # [j, i], column of the tail's i-th token before column j
    equal = tails[:, back.clamp(min=0)] == suffix[:, None, :]  # [n, j, i]
    equal &= (back >= 0) & (from_end >= 0)[:, None, :] & (offsets < tail_lens[:, None])[:, :, None]
    lengths = equal.long().cumprod(dim=2).sum(dim=2)  # [n, j], of the match that ends at column j
    longest, end = (lengths * width + (width - 1 - offsets)).max(dim=1)  # ties: the lowest column
    num_left = torch.where(longest >= width, tail_lens - 1 - end, 0)
    columns = (end[:, None] + 1 + offsets).clamp(max=width - 1)
    return tails.gather(1, columns), num_left


class RejectedDrafts(Reuse):
    """Each request's last draft from the token after the target's correction on.

    Only the drafts of the step before are kept: a request that was not in it has no tail.
    """

    _tails: torch.Tensor  # [num_seqs, longest] int64, undefined beyond their lengths
    _tail_lens: torch.Tensor  # [num_seqs] int64, 0 = no tail

    def __init__(self) -> None:
        self._token_ids = torch.empty(0, 0, dtype=torch.int64)
        self._rows: dict[str, int] = {}
        self._tail_of: dict[str, tuple[int, int, int]] = {}  # row, first column, length

    def begin(self, req_ids: Sequence[str]) -> None:
        found = [self._tail_of.get(req_id, (0, 0, 0)) for req_id in req_ids]
        plan: Lengths = np.array(found, dtype=np.int64).reshape(-1, 3).T.copy()
        device = self._token_ids.device
        rows, firsts, self._tail_lens = to_device(plan, device)
        columns = firsts[:, None] + torch.arange(int(plan[2].max(initial=0)), device=device)
        columns = columns.clamp(max=max(0, self._token_ids.shape[1] - 1))
        self._tails = self._token_ids[rows[:, None], columns]

    def append(self, canvas: torch.Tensor, masks: Masks, judged: Judged) -> torch.Tensor:
        ends, goes_on, stopped = judged
        seqs, first_columns = masks.owners[:, 0], masks.first_columns
        last = canvas.shape[1] - 1  # takes what is not appended
        columns = first_columns[:, None] + torch.arange(last, device=canvas.device)
        drafts = canvas[seqs[:, None], columns.clamp(max=last)]
        tokens, num_tokens = continuation(drafts, ends, self._tails[seqs], self._tail_lens[seqs])
        room = torch.where(goes_on | stopped, 0, masks.caps - ends)
        num_tokens = torch.minimum(num_tokens, room)
        offsets = torch.arange(tokens.shape[1], device=canvas.device)
        columns = (first_columns + ends)[:, None] + offsets
        columns = torch.where(offsets < num_tokens[:, None], columns, last)
        canvas[seqs[:, None], columns] = tokens
        return num_tokens

    def remember(self, req_ids: Sequence[str], token_ids: torch.Tensor) -> None:
        self._token_ids = token_ids
        self._rows = {req_id: row for row, req_id in enumerate(req_ids)}
        self._tail_of = {}

    def observe(self, rounds: Sequence[Round]) -> None:
        for verified in rounds:
            if (row := self._rows.get(verified.req_id)) is not None:
                first = verified.num_accepted + 1
                length = max(0, verified.num_drafted - first)
                self._tail_of[verified.req_id] = row, first, length

    def forget(self, req_ids: Iterable[str]) -> None:
        for req_id in req_ids:
            self._rows.pop(req_id, None)
            self._tail_of.pop(req_id, None)
