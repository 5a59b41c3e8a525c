"""Algorithm 1 of FailFast over a ragged batch: one forward pass per increment. No vLLM here.

The rows of one pass, for each sequence, at absolute positions:

    committed          final              known      + drafted         + draft_increment
    |  blocks to commit  |  live known tokens |  drafted tokens  |  MASK MASK MASK ...  |
      KV is written        KV is never written; encoded again in every pass

`final` is the last multiple of the diffusion block size that the target has computed. So the first
pass commits the newly complete blocks and denoises in one forward; later passes start at `final`.
The logit at position i predicts token i + 1 (Fast-dLLM v2's shift).

Differences from the authors' Algorithm 1, each with a test of its own:
all masks of an increment are read from one pass (theirs: one pass per sub-block of 8), trailing
MASK rows of the last block are left out, increments may cross a block's end, the cap is exact,
and only drafted positions count for the confidence.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from failfast_kernels import TokenConfidence
from failfast_vllm.policy import Policy


@dataclass(frozen=True)
class DraftStep:
    """All sequences of one engine step. Lengths are int64 tensors of [num_seqs]."""

    token_ids: torch.Tensor  # [num_seqs, max_model_len] int, known tokens; the rest is undefined
    known_lens: torch.Tensor  # prompt and accepted tokens
    committed_lens: torch.Tensor  # tokens whose KV is in the cache; multiples of the block size
    final_lens: torch.Tensor  # tokens whose KV must be there after this step; likewise
    max_draft_lens: torch.Tensor  # most tokens to draft; 0 = commit only
    stops_at_eos: torch.Tensor  # [num_seqs] bool, the draft ends after a stop token
    block_table: torch.Tensor  # [num_seqs, max_pages] int


class DraftBatch(NamedTuple):
    """The rows of one forward pass."""

    input_ids: torch.Tensor  # [num_rows] int64
    positions: torch.Tensor  # [num_rows] int64
    query_start_loc: torch.Tensor  # [num_seqs + 1] int64
    committed_lens: torch.Tensor  # [num_seqs] int64, position of each sequence's first row
    slot_mapping: torch.Tensor | None  # [num_rows] int64, -1 = not committed; None: none is
    block_table: torch.Tensor  # [num_seqs, max_pages] int


class DraftModel(Protocol):
    """What the drafter needs of a model."""

    def forward(self, batch: DraftBatch) -> torch.Tensor:
        """Run all layers; returns hidden states [num_rows, hidden_size]."""
        ...

    def confidence(self, hidden_states: torch.Tensor) -> TokenConfidence:
        """Best token after each row and its probability; MASK and foreign ids never win."""
        ...


class Drafts(NamedTuple):
    """What one step proposes, and what it took."""

    token_ids: list[list[int]]  # one list per sequence, empty = no draft
    num_passes: list[int]  # increments drafted per sequence
    num_forwards: int
    num_rows: int  # over all forwards


class Drafter:
    """Drafts for all sequences of a step.

    Args:
        max_num_rows: rows that one forward may have; more are split.
        vocab_size: of the drafter; it reads MASK where the target has an id beyond it.
        mask_token_id: the drafter's MASK.
        stop_token_ids: [num_ids] int64, tokens after which a draft ends.
        kv_block_size: tokens per page of the KV cache, a multiple of `diffusion_block_size`.
    """

    def __init__(
        self,
        model: DraftModel,
        policy: Policy,
        *,
        draft_increment: int,
        vocab_size: int,
        mask_token_id: int,
        stop_token_ids: torch.Tensor,
        kv_block_size: int,
        max_num_rows: int,
        diffusion_block_size: int = 32,
    ) -> None:
        assert kv_block_size % diffusion_block_size == 0
        self.model = model
        self.policy = policy
        self.draft_increment = draft_increment
        self.vocab_size = vocab_size
        self.mask_token_id = mask_token_id
        self.stop_token_ids = stop_token_ids
        self.kv_block_size = kv_block_size
        self.max_num_rows = max_num_rows
        self.diffusion_block_size = diffusion_block_size

    def propose(self, step: DraftStep) -> Drafts:
        """Commit every newly complete block and draft for the sequences that may have a draft."""
        canvas = self._canvas(step)
        num_seqs = step.known_lens.numel()
        device = step.known_lens.device
        starts = step.committed_lens
        draft_lens = torch.zeros(num_seqs, dtype=torch.int64, device=device)
        num_passes = torch.zeros_like(draft_lens)
        num_forwards = num_rows = 0

        drafts = step.max_draft_lens > 0
        active = torch.nonzero(drafts | (starts < step.final_lens)).squeeze(1)
        increments = step.max_draft_lens.clamp(max=self.draft_increment)
        ends = torch.where(drafts, step.known_lens + increments, step.final_lens)
        if int((ends - starts)[active].sum()) > self.max_num_rows:
            forwards, rows = self._commit_in_parts(step, canvas)
            num_forwards, num_rows = num_forwards + forwards, num_rows + rows
            starts = step.final_lens
            active = torch.nonzero(drafts).squeeze(1)

        while active.numel():
            grown = []
            for seqs in self._split(active, (ends - starts)[active]):
                batch = self._rows(step, canvas, seqs, starts[seqs], ends[seqs])
                hidden_states = self.model.forward(batch)
                num_forwards, num_rows = num_forwards + 1, num_rows + batch.input_ids.numel()
                growing = seqs[drafts[seqs]]
                if growing.numel() == 0:
                    continue
                first_rows = batch.query_start_loc[:-1][drafts[seqs]]
                frontier = step.known_lens[growing] + draft_lens[growing]
                goes_on = self._denoise(
                    step,
                    canvas,
                    growing,
                    hidden_states,
                    first_rows + frontier - 1 - starts[growing],
                    increments[growing],
                    draft_lens,
                )
                num_passes[growing] += 1
                grown.append(growing[goes_on])
            starts = step.final_lens
            active = torch.cat(grown) if grown else active[:0]
            increments = (step.max_draft_lens - draft_lens).clamp(max=self.draft_increment)
            ends = step.known_lens + draft_lens + increments

        return Drafts(
            self._to_lists(step, canvas, draft_lens), num_passes.tolist(), num_forwards, num_rows
        )

    def _denoise(
        self,
        step: DraftStep,
        canvas: torch.Tensor,
        seqs: torch.Tensor,
        hidden_states: torch.Tensor,
        first_rows: torch.Tensor,
        increments: torch.Tensor,
        draft_lens: torch.Tensor,
    ) -> torch.Tensor:
        """Fill the increment of `seqs` from one pass; returns which of them go on, [n] bool.

        `first_rows` [n] are the rows that predict the first MASK of each sequence. `canvas` and
        `draft_lens` are updated in place.
        """
        offsets = torch.arange(self.draft_increment, device=seqs.device)
        valid = offsets < increments[:, None]  # [n, draft_increment]
        rows = first_rows[:, None] + torch.where(valid, offsets, 0)
        confidence = self.model.confidence(hidden_states[rows.flatten()])
        token_ids = confidence.token_ids.view_as(rows)
        probabilities = confidence.probabilities.view_as(rows).masked_fill(~valid, 1.0)

        columns = (step.known_lens - step.committed_lens + draft_lens)[seqs][:, None] + offsets
        canvas[seqs[:, None].expand_as(rows)[valid], columns[valid]] = token_ids[valid]

        is_stop = torch.isin(token_ids, self.stop_token_ids) & valid
        is_stop &= step.stops_at_eos[seqs][:, None]
        stopped = is_stop.any(dim=1)
        until_stop = torch.where(stopped, is_stop.int().argmax(dim=1) + 1, increments)
        draft_lens[seqs] += until_stop
        lens = draft_lens[seqs]
        has_room = lens < step.max_draft_lens[seqs]
        return self.policy.extend(probabilities, lens) & ~stopped & has_room

    def _canvas(self, step: DraftStep) -> torch.Tensor:
        """[num_seqs, width] int64: the uncommitted tokens, then MASK, from `committed_lens` on."""
        uncommitted = step.known_lens - step.committed_lens
        width = int((uncommitted + step.max_draft_lens).max()) if uncommitted.numel() else 0
        columns = torch.arange(width, device=uncommitted.device)
        source = (step.committed_lens[:, None] + columns).clamp(max=step.token_ids.shape[1] - 1)
        tokens = step.token_ids.gather(1, source).long()
        foreign = tokens >= self.vocab_size
        return tokens.masked_fill_(foreign | (columns >= uncommitted[:, None]), self.mask_token_id)

    def _rows(
        self,
        step: DraftStep,
        canvas: torch.Tensor,
        seqs: torch.Tensor,
        starts: torch.Tensor,
        ends: torch.Tensor,
    ) -> DraftBatch:
        """The pass over positions `starts:ends` of `seqs`, each start on the block grid."""
        lens = ends - starts
        query_start_loc = torch.zeros(seqs.numel() + 1, dtype=torch.int64, device=seqs.device)
        torch.cumsum(lens, 0, out=query_start_loc[1:])
        num_rows = int(query_start_loc[-1])
        owners = torch.repeat_interleave(lens, output_size=num_rows)  # index into `seqs`
        row_seqs = seqs[owners]
        offsets = torch.arange(num_rows, device=seqs.device) - query_start_loc[owners]
        positions = starts[owners] + offsets
        slot_mapping = None
        if bool((starts < step.final_lens[seqs]).any()):
            pages = step.block_table[row_seqs, positions // self.kv_block_size].long()
            slots = pages * self.kv_block_size + positions % self.kv_block_size
            slot_mapping = torch.where(positions < step.final_lens[row_seqs], slots, -1)
        return DraftBatch(
            input_ids=canvas[row_seqs, positions - step.committed_lens[row_seqs]],
            positions=positions,
            query_start_loc=query_start_loc,
            committed_lens=starts,
            slot_mapping=slot_mapping,
            block_table=step.block_table[seqs],
        )

    def _split(self, seqs: torch.Tensor, num_rows: torch.Tensor) -> list[torch.Tensor]:
        """Consecutive parts of `seqs` of at most `max_num_rows` rows each (usually one part)."""
        if int(num_rows.sum()) <= self.max_num_rows:
            return [seqs]
        parts, part_rows, begin = [], 0, 0
        for i, rows in enumerate(num_rows.tolist()):
            assert rows <= self.max_num_rows
            if part_rows + rows > self.max_num_rows:
                parts.append(seqs[begin:i])
                begin, part_rows = i, 0
            part_rows += rows
        parts.append(seqs[begin:])
        return parts

    def _commit_in_parts(self, step: DraftStep, canvas: torch.Tensor) -> tuple[int, int]:
        """Commit all complete blocks when they do not fit one pass together with the drafts.

        Blocks go in the order of their positions, over all sequences: a sequence that shares
        pages through a prefix hit of this very step starts behind the blocks that it shares.
        """
        size = self.diffusion_block_size
        blocks = sorted(
            (position, seq)
            for seq, (start, end) in enumerate(
                zip(step.committed_lens.tolist(), step.final_lens.tolist(), strict=True)
            )
            for position in range(start, end, size)
        )
        per_pass = max(1, self.max_num_rows // size)
        for i in range(0, len(blocks), per_pass):
            part = np.array(blocks[i : i + per_pass])
            seqs = np.unique(part[:, 1])
            starts = [part[part[:, 1] == seq, 0].min() for seq in seqs]
            ends = [part[part[:, 1] == seq, 0].max() + size for seq in seqs]
            device = canvas.device
            batch = self._rows(
                step,
                canvas,
                torch.as_tensor(seqs, device=device),
                torch.tensor(np.array(starts), device=device),
                torch.tensor(np.array(ends), device=device),
            )
            self.model.forward(batch)
        return -(-len(blocks) // per_pass), len(blocks) * size

    def _to_lists(
        self, step: DraftStep, canvas: torch.Tensor, draft_lens: torch.Tensor
    ) -> list[list[int]]:
        """The device-to-host copy of a step's drafts."""
        longest = int(draft_lens.max()) if draft_lens.numel() else 0
        columns = (step.known_lens - step.committed_lens)[:, None]
        columns = columns + torch.arange(longest, device=canvas.device)
        drafted = canvas.gather(1, columns.clamp(max=canvas.shape[1] - 1)).tolist()
        return [row[:length] for row, length in zip(drafted, draft_lens.tolist(), strict=True)]
