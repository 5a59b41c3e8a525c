"""What travels through a draft: the step, the rows of a pass, the drafts and what becomes of them.

NumPy and torch only; torch is imported in functions, for configurations are checked without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Lengths = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

MAX_SPECULATIVE_TOKENS = 128  # MAX_SPEC_LEN of vLLM's rejection sampler
UNKNOWN = -1  # instead of a token id: before the first token, or given as an embedding
NO_TOKEN = -2  # where there is nothing to copy
NOT_KNOWN = -1  # in place of a match length: the steps of a request that could tell have not ended

# What ended a draft. doubt: the policy. cap: num_speculative_tokens. load: the planner. budget:
# draft_budget. eos: it drafted a stop token. request: its own limit, max_tokens or the context.
# copy: its last tokens are copied.
STOP_REASONS = ("doubt", "cap", "load", "budget", "eos", "request", "copy")
DOUBT, CAP, LOAD, BUDGET, EOS, REQUEST, COPY = range(len(STOP_REASONS))


@dataclass(frozen=True)
class DraftStep:
    """All sequences of one engine step. Lengths are host arrays of [num_seqs]."""

    req_ids: Sequence[str]
    # [num_slots, max_len] int, known tokens, UNKNOWN where there is an embedding instead; the rest
    # is undefined
    token_ids: torch.Tensor
    slots: Lengths  # row of each sequence in `token_ids`
    block_table: torch.Tensor  # [num_seqs, max_pages] int
    known_lens: Lengths  # prompt and accepted tokens
    committed_lens: Lengths  # tokens whose KV is in the cache; multiples of the block size
    final_lens: Lengths  # tokens whose KV must be there after this step; likewise
    max_draft_lens: Lengths  # most tokens to draft; 0 = commit only
    draft_budget: int  # most tokens to draft over all sequences
    stops_at_eos: Flags  # the draft ends after a stop token
    min_confidences: npt.NDArray[np.float32]  # an increment with a token below it is the last

    def passing_only(self, passes: Flags) -> DraftStep:
        """The step in which sequences without a draft pass need no rows: their commits wait."""
        return replace(
            self,
            known_lens=np.where(passes, self.known_lens, self.committed_lens),
            final_lens=np.where(passes, self.final_lens, self.committed_lens),
        )


class FirstPass(NamedTuple):
    """What the first pass of a step would be; host arrays of [num_seqs]."""

    wanted: Lengths  # most tokens that each sequence may draft
    live_rows: Lengths  # known tokens that the pass encodes again
    commit_rows: Lengths  # tokens whose blocks it would commit
    seen_lens: Lengths  # committed tokens, these included, that it attends to
    match_lens: Lengths  # see `Copies`


class DraftBatch(NamedTuple):
    """The rows of one forward pass."""

    input_ids: torch.Tensor  # [num_rows] int64
    positions: torch.Tensor  # [num_rows] int64
    query_start_loc: torch.Tensor  # [num_seqs + 1] int64
    # [num_seqs] int64, tokens of each before its first row, in the pages of `block_table`
    committed_lens: torch.Tensor
    slot_mapping: torch.Tensor | None  # [num_rows] int64, -1 = not committed; None: none is
    block_table: torch.Tensor  # [num_seqs, max_pages] int


class Copies(NamedTuple):
    """What each sequence of a step may copy."""

    match_lens: Lengths  # [num_seqs] tokens that stood before it in both places; 0 = no copy
    token_ids: torch.Tensor  # [num_seqs, longest draft] int64, NO_TOKEN where there is none


class Drafts:
    """What one step proposes, and what it took."""

    token_ids: torch.Tensor  # [num_seqs, longest] int64, on the device; undefined beyond `lens`
    lens: Lengths  # [num_seqs], 0 = no draft
    first_lens: Lengths  # [num_seqs] tokens that the first pass was to draft
    num_passes: Lengths  # [num_seqs] increments drafted
    num_forwards: int
    num_rows: int  # over all forwards
    confidences: npt.NDArray[np.float32]  # [num_seqs, cap], of `num_confidences` tokens each
    # [num_seqs] tokens of passes: less than `lens` if the others are copied, more if it was cut
    num_confidences: Lengths
    match_lens: Lengths  # [num_seqs] tokens that matched before the first that is copied
    stop_reasons: Lengths  # [num_seqs] index into STOP_REASONS; meaningless where there is no draft
    seq_rows: Lengths  # [num_seqs], of `num_rows`

    @staticmethod
    def of_copies(copies: Copies, lens: Lengths) -> Drafts:
        """Those of a step without a pass: [num_seqs] `lens` tokens of each copy."""
        drafts, zeros = Drafts(), np.zeros((4, len(lens)), dtype=np.int64)
        drafts.lens, drafts.token_ids, drafts.match_lens = lens, copies.token_ids, copies.match_lens
        drafts.first_lens, drafts.num_passes, drafts.num_confidences, drafts.seq_rows = zeros
        drafts.num_forwards = drafts.num_rows = 0
        drafts.confidences = np.ones((len(lens), int(lens.max(initial=0))), dtype=np.float32)
        drafts.stop_reasons = np.full_like(lens, COPY)
        return drafts

    def to_lists(self) -> list[list[int]]:
        """One list per sequence: a copy to the host."""
        rows = self.token_ids.tolist()
        return [row[:length] for row, length in zip(rows, self.lens.tolist(), strict=True)]


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
    # of what passes drafted, also if it was not worth verifying; the tokens after it are copied
    confidences: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    num_passes: int = 0  # draft passes that the draft took
    num_rows: int = 0  # of this sequence in them
    token_ids: Sequence[int] = ()  # [num_drafted]; empty unless somebody wants them
    emitted: Sequence[int] = ()  # accepted tokens and the bonus
    known_len: int = 0  # tokens before the round
    step: int = 0  # of the engine, from 1: the one that verified
    num_seqs: int = 0  # in that step
    match_len: int = 0  # tokens that matched before the first that is copied

    @property
    def drafted(self) -> list[int]:
        """What the target verified, in token ids; empty if nobody wanted them."""
        return list(self.token_ids[: self.num_verified])

    @property
    def num_copied(self) -> int:
        """Tokens that the target verified and no pass drafted."""
        return max(0, self.num_verified - len(self.confidences))

    @property
    def num_copied_accepted(self) -> int:
        return max(0, self.num_accepted - len(self.confidences))

    @property
    def judged_confidences(self) -> npt.NDArray[np.float32]:
        """Of the tokens that it judged: it judges none beyond the first that it rejects."""
        return self.confidences[: min(self.num_verified, self.num_accepted + 1)]


def share(increments: Lengths, budget: int) -> Lengths:
    """Cut increments to a budget, evenly: the longest first, of equals the last sequences first.

    Args:
        increments: [num_seqs], changed in place and returned.
    """
    while increments.sum() > budget:
        seqs = np.flatnonzero(increments == increments.max())
        surplus = int(increments.sum()) - budget
        increments[seqs[-surplus:]] -= 1
    return increments


def num_scores(firsts: Lengths, ends: Lengths) -> Lengths:
    """Pairs of a row and a key that rows `firsts` to `ends` attend to, summed over the last axis.

    Args:
        firsts: [..., num_seqs] keys before the first row of each sequence.
        ends: likewise, those up to its last row.
    """
    pairs: Lengths = ((ends * ends - firsts * firsts) // 2).sum(axis=-1)
    return pairs


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy from the host without waiting for the device, which pageable memory would."""
    import torch

    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
