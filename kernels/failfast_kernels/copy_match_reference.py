"""The specification of `copy_match`, in plain PyTorch: prompt lookup for a ragged batch."""

from typing import NamedTuple

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
    rows = token_ids[slots, :max_known_len]
    lens = _match_lens(rows, known_lens, max_match)
    longest = lens.amax(dim=1)
    positions = torch.arange(rows.shape[1], device=rows.device)
    ends = torch.where(lens == longest[:, None], positions, 0).amax(dim=1)
    found = longest >= min_match
    return SuffixMatches(
        torch.where(found, longest, 0).long(), torch.where(found, ends + 1, known_lens)
    )


def _match_lens(rows: torch.Tensor, known_lens: torch.Tensor, max_match: int) -> torch.Tensor:
    """[num_seqs, width] int32, how many tokens up to each position agree with the end."""
    width = rows.shape[1]
    last = known_lens[:, None] - 1
    equal = torch.arange(width, device=rows.device) < last
    lens = torch.zeros_like(equal, dtype=torch.int32)
    for i in range(min(max_match, width)):
        token = rows.gather(1, (last - i).clamp(min=0))
        equal[:, i:] &= rows[:, : width - i] == token
        equal[:, :i] = False
        equal &= token >= 0
        lens += equal
        if not equal.any():
            break
    return lens
