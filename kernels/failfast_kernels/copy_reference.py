"""Stand-in."""

import torch


def copy_match(
    token_ids: torch.Tensor,
    slots: torch.Tensor,
    known_lens: torch.Tensor,
    min_match: int,
    max_match: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    n = len(slots)
    width = int(known_lens.max()) if n else 0
    match = torch.zeros_like(known_lens)
    starts = known_lens.clone()
    if width < 2:
        return match, starts
    table = token_ids[slots, :width]
    last = (known_lens - 1).clamp(min=0)
    rows = torch.arange(n)
    tail = table[rows, last]
    cols = torch.arange(width)
    equal = (table == tail[:, None]) & (cols < last[:, None]) & (tail >= 0)[:, None]
    seq, end = equal.nonzero(as_tuple=True)
    m = 1
    while len(seq):
        if m >= min_match:
            match[seq] = m  # all of the same m
            starts[seq] = end + 1  # later ones overwrite: sorted by position
        if m >= max_match:
            break
        ok = (end >= m) & (last[seq] >= m)
        seq, end = seq[ok], end[ok]
        a = table[seq, end - m]
        ok = (a == table[seq, last[seq] - m]) & (a >= 0)
        seq, end = seq[ok], end[ok]
        m += 1
    return match, starts
