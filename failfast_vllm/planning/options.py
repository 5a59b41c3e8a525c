"""What the first pass of a step could be: how long, and for whom. NumPy only."""

from typing import NamedTuple

import numpy as np

from failfast_vllm.drafting.records import Lengths
from failfast_vllm.planning.costs import Floats

# A sequence that a pass leaves out has more than twice as many rows to commit as the one before it
# in the order, and these on top.
ALIKE_COMMITS = 64


class Options(NamedTuple):
    """No pass, then each length of one for each number of sequences; [num_options] each.

    The last three say whose pass is how long.
    """

    tokens: Floats  # that the step emits
    fair_tokens: Floats  # that count, see `even_out`
    ms: Floats  # of the step, a share of the next included
    backlog_ms: Floats  # of committing what was skipped
    lens: Lengths  # [num_lengths, num_seqs] by place in the order
    order: Lengths  # [num_seqs] sequences, those with the least to commit first
    lasts: Lengths  # [num_lasts] places in the order after which a pass may end

    def lens_of(self, option: int) -> Lengths:
        """[num_seqs] tokens of each sequence in the first pass of an option, from 1 on."""
        length, last = divmod(option - 1, len(self.lasts))
        lens: Lengths = self.lens[length].copy()
        lens[self.lasts[last] + 1 :] = 0
        chosen: Lengths = np.empty_like(lens)
        chosen[self.order] = lens
        return chosen


def least_commits_first(commit_rows: Lengths) -> tuple[Lengths, Lengths]:
    """Sort sequences by what they have to commit, and find where far more follows.

    Returns:
        `order` and `lasts` of `Options`.
    """
    order = np.argsort(commit_rows, kind="stable")
    rows = commit_rows[order]
    jumps = rows[1:] > 2 * rows[:-1] + ALIKE_COMMITS
    return order, np.append(np.flatnonzero(jumps), len(rows) - 1)


def even_out(tokens: Floats, without: Floats, lasts: Lengths) -> Floats:
    """The tokens of each option, less where a pass leaves sequences out.

    Those wait for the drafts of the others, and a batch ends with its last sequence. So what counts
    is the geometric mean of both groups' tokens per sequence.

    Args:
        tokens: [1 + num_lengths * num_lasts] that the step emits, by option.
        without: [num_seqs] of each sequence, if it is left out; in the order.
        lasts: see `Options`.
    """
    num_seqs = len(without)
    num_in = np.tile(lasts + 1, (len(tokens) - 1) // len(lasts))
    tokens_out = without.sum() - without.cumsum()[num_in - 1]
    num_out = num_seqs - num_in
    each_in = (tokens[1:] - tokens_out) / num_in
    each_out = np.where(num_out > 0, tokens_out, 1.0) / np.maximum(num_out, 1)
    mean = each_in ** (num_in / num_seqs) * each_out ** (num_out / num_seqs)
    return np.concatenate((tokens[:1], num_seqs * mean))
