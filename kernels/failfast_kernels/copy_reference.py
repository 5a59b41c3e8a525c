"""Where a text repeats itself: the specification, and the way of hosts."""

import numpy as np
import numpy.typing as npt
import torch


def copy_match(
    token_ids: torch.Tensor,
    slots: torch.Tensor,
    known_lens: torch.Tensor,
    min_match: int,
    max_match: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The longest suffix of each text that stands earlier in it; of equals the last one.

    Args:
        token_ids: [num_slots, max_len] int; negative ones match nothing.
        slots: [n] int64 row of each text.
        known_lens: [n] int64 its tokens; what follows them is not read.
        min_match, max_match: fewest and most tokens that are compared.

    Returns:
        [n] int64 tokens that match, 0 where they are fewer than `min_match`, and [n] int64 index
        of the token after the earlier place, `known_lens` where there is none.
    """
    table, found = token_ids.numpy(), np.zeros((2, len(slots)), dtype=np.int64)
    for i, (slot, known) in enumerate(zip(slots.tolist(), known_lens.tolist(), strict=True)):
        length, start = _longest(table[slot, :known], max_match)
        found[:, i] = (length, start) if length >= min_match else (0, known)
    match_lens, starts = torch.from_numpy(found)
    return match_lens, starts


def _longest(text: npt.NDArray[np.integer], max_match: int) -> tuple[int, int]:
    last, length = len(text) - 1, 0
    if last < 1 or text[last] < 0:
        return 0, len(text)
    ends = np.flatnonzero(text[:last] == text[last])  # of the matches so far
    start = len(text)
    while ends.size:
        length, start = length + 1, int(ends[-1]) + 1
        if length == max_match or text[last - length] < 0:
            break
        ends = ends[ends >= length]
        ends = ends[text[ends - length] == text[last - length]]
    return length, start
