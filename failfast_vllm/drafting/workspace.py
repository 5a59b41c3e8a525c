"""One step's drafts while they grow: tokens on the device, lengths on the host.

The rows of one pass, for each sequence, at absolute positions:

    committed          final              known      + drafted         + increment
    |  blocks to commit  |  live known tokens |  drafted tokens  |  MASK MASK MASK ...  |
      KV is written        KV is never written; encoded again in every pass

Rows are planned with NumPy: a pass needs two small copies to the device, an increment one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from failfast_kernels import TokenConfidence
from failfast_vllm.drafting import records
from failfast_vllm.drafting.records import (
    UNKNOWN,
    Copies,
    DraftBatch,
    Drafts,
    DraftStep,
    Flags,
    Lengths,
)

Tokens = TypeVar("Tokens", Lengths, torch.Tensor)


@dataclass(frozen=True)
class Geometry:
    """What a drafter's passes are made of; fixed at start-up."""

    vocab_size: int  # of the drafter; it reads MASK where the target has an id beyond it, or none
    mask_token_id: int
    kv_block_size: int  # tokens per page of the KV cache, a multiple of `diffusion_block_size`
    max_num_rows: int  # of one forward; more are split. Verification has as many
    device: torch.device  # of all tensors
    diffusion_block_size: int = 32  # tokens of a block, which is committed when it is complete
    logit_shift: int = 1  # the logit at position i predicts token i + `logit_shift`
    window: int | None = None  # committed tokens that a pass attends to at least; None: all

    def __post_init__(self) -> None:
        assert self.kv_block_size % self.diffusion_block_size == 0

    def window_starts(self, final_lens: Tokens) -> Tokens:
        """The position from which on each sequence is attended to: where a page begins.

        Args:
            final_lens: as in `DraftStep`; an array or a tensor.
        """
        if self.window is None:
            return final_lens * 0
        return (final_lens - self.window).clip(0) // self.kv_block_size * self.kv_block_size


class Masks(NamedTuple):
    """The masks of one increment, [n, longest], and the drafts that they extend, [n].

    The first three are on the host, the others on the device. Where a mask is not valid, it has the
    row of its draft's first mask, and the last column and place of the workspace.
    """

    seqs: Lengths  # [n] sequence of each draft
    valid: Flags  # [n, longest] false after a draft's last mask
    places: Lengths  # [n, longest] position in the draft
    rows: torch.Tensor  # [n, longest] row of the pass that predicts it
    columns: torch.Tensor  # [n, longest] of the canvas
    owners: torch.Tensor  # [n, longest] the same as `seqs`
    positions: torch.Tensor  # [n, longest] the same as `places`
    may_stop: torch.Tensor  # [n, longest] 1 where a stop token ends the draft
    lens: torch.Tensor  # [n] tokens drafted, these included
    first_columns: torch.Tensor  # [n] of the draft in the canvas
    caps: torch.Tensor  # [n] most tokens of the draft after this increment, copied ones included


class Judged(NamedTuple):
    """What becomes of drafts after an increment; [n], on the device."""

    ends: torch.Tensor  # int64, tokens up to where the draft ends if it ends here
    goes_on: torch.Tensor  # bool, the policy would draft another increment
    stopped: torch.Tensor  # bool, the draft ends with a stop token


class Workspace(Drafts):
    """Rows, positions and slots of a step's passes, and what they have drafted so far.

    Args:
        first_lens: [num_seqs] increments of the first pass; 0 = no draft.
    """

    def __init__(self, step: DraftStep, first_lens: Lengths, geometry: Geometry) -> None:
        self.step, self.first_lens, self.geometry = step, first_lens, geometry
        num_seqs, width = len(first_lens), int(step.max_draft_lens.max(initial=0)) + 1
        zeros = np.zeros((4, num_seqs), dtype=np.int64)
        self.lens, self.num_passes, self.seq_rows, self.num_confidences = zeros
        self.num_forwards = self.num_rows = 0
        self.ends_at_stop = np.zeros(num_seqs, dtype=bool)  # a pass drafted a stop token
        self.willing = np.zeros(num_seqs, dtype=bool)  # to go on, were it allowed to
        self.confidences = np.ones((num_seqs, width), dtype=np.float32)
        # the same on the device
        self.device_confidences = torch.ones(num_seqs, width, device=geometry.device)
        # canvas column of each sequence's first drafted token
        self.first_columns = step.known_lens - step.committed_lens
        self.window_starts = geometry.window_starts(step.final_lens)
        self.canvas = self._canvas()
        self.grow(first_lens)
        self.starts = step.committed_lens  # the first pass commits, too

    def _canvas(self) -> torch.Tensor:
        """[num_seqs, width] int64: the uncommitted tokens, then MASK, from `committed_lens` on."""
        step, geometry = self.step, self.geometry
        width = int((self.first_columns + step.max_draft_lens).max(initial=0)) + 1
        plan = self.to_device(np.array((step.slots, step.committed_lens, self.first_columns)))
        slots, committed, known = plan[:, :, None]
        columns = torch.arange(width, device=geometry.device)
        tokens = step.token_ids[slots, (committed + columns).clamp(max=step.token_ids.shape[1] - 1)]
        foreign = (tokens >= geometry.vocab_size) | (tokens == UNKNOWN)
        return tokens.long().masked_fill_(foreign | (columns >= known), geometry.mask_token_id)

    def copy(self, copies: Copies, lens: Lengths) -> None:
        """Draft [num_seqs] `lens` tokens of `copies` for sequences without a first pass.

        Drafts of passes that agree with theirs are lengthened by them.
        """
        self.copies = copies
        if not lens.any():
            return
        self.lens = lens
        places, last = np.arange(lens.max()), self.canvas.shape[1] - 1
        # the last column takes what is not copied
        columns = np.where(places < lens[:, None], self.first_columns[:, None] + places, last)
        self.canvas.scatter_(1, self.to_device(columns), copies.token_ids[:, : len(places)])

    @property
    def match_lens(self) -> Lengths:  # type: ignore[override]
        return self.copies.match_lens + self.num_confidences

    def grow(self, increments: Lengths) -> None:
        """Plan the next pass: [num_seqs] masks of each; 0 = that draft is complete."""
        step = self.step
        self.increments = increments
        self.starts = step.final_lens  # [num_seqs] first position of each in the next pass
        ends = step.known_lens + self.lens + increments
        # one after its last position; in the first pass some sequences only commit
        self.ends = np.where(increments > 0, ends, step.final_lens)

    def parts(self, seqs: Lengths) -> list[Lengths]:
        """Consecutive parts of `seqs` whose rows fit one pass each (usually one part)."""
        num_rows, most = (self.ends - self.starts)[seqs], self.geometry.max_num_rows
        if num_rows.sum() <= most:
            return [seqs]
        parts: list[list[int]] = []
        room = 0
        for seq, rows in zip(seqs.tolist(), num_rows.tolist(), strict=True):
            if rows > room:
                parts.append([])
                room = most
            parts[-1].append(seq)
            room -= rows
            assert room >= 0
        return [np.array(part) for part in parts]

    def commits_in_parts(self) -> Iterator[tuple[Lengths, Lengths, Lengths]]:
        """Passes that commit all complete blocks, where they do not fit one pass with the drafts.

        Blocks go in the order of their positions, over all sequences: a sequence that shares
        pages through a prefix hit of this very step starts after the blocks that it shares.

        Yields:
            Of each pass the sequences, and [num_seqs] first positions and those after the last;
            nothing where the first pass commits.
        """
        step, size = self.step, self.geometry.diffusion_block_size
        if (self.ends - self.starts).sum() <= self.geometry.max_num_rows:
            return
        spans = zip(step.committed_lens.tolist(), step.final_lens.tolist(), strict=True)
        blocks = sorted(
            (position, seq)
            for seq, (start, end) in enumerate(spans)
            for position in range(start, end, size)
        )
        per_pass = max(1, self.geometry.max_num_rows // size)
        starts = step.committed_lens
        for i in range(0, len(blocks), per_pass):
            owners = [seq for _, seq in blocks[i : i + per_pass]]
            ends = starts + size * np.bincount(owners, minlength=len(starts))
            yield np.flatnonzero(ends > starts), starts, ends
            starts = ends
        self.starts = step.final_lens

    def rows(self, seqs: Lengths, starts: Lengths, ends: Lengths) -> tuple[Lengths, DraftBatch]:
        """The pass over positions `starts:ends` of `seqs`; also the first row of each."""
        step, page = self.step, self.geometry.kv_block_size
        lens = (ends - starts)[seqs]
        query_start_loc = np.concatenate(([0], lens.cumsum()))
        num_rows = int(query_start_loc[-1])
        row_seqs = np.repeat(seqs, lens)
        positions = np.arange(num_rows) + np.repeat(starts[seqs] - query_start_loc[:-1], lens)
        commits = positions < step.final_lens[row_seqs]
        columns = positions - step.committed_lens[row_seqs]
        per_row = self.to_device(np.array((positions, row_seqs, columns, commits)))
        # the last column is of no sequence
        plan = np.zeros((4, len(query_start_loc)), dtype=np.int64)
        plan[0], plan[1, :-1], plan[2, :-1] = query_start_loc, starts[seqs], seqs
        plan[3, :-1] = self.window_starts[seqs]
        per_seq = self.to_device(plan)
        slot_mapping = None
        if commits.any():
            pages = step.block_table[per_row[1], per_row[0] // page].long()
            slot_mapping = torch.where(per_row[3].bool(), pages * page + per_row[0] % page, -1)
        batch = DraftBatch(
            input_ids=self.canvas[per_row[1], per_row[2]],
            positions=per_row[0],
            query_start_loc=per_seq[0],
            committed_lens=per_seq[1, :-1] - per_seq[3, :-1],
            slot_mapping=slot_mapping,
            block_table=self._pages(per_seq[2, :-1], per_seq[3, :-1] // page),
        )
        self.num_forwards += 1
        self.num_rows += num_rows
        self.seq_rows[seqs] += lens
        return query_start_loc[:-1], batch

    def _pages(self, seqs: torch.Tensor, first_pages: torch.Tensor) -> torch.Tensor:
        """Rows `seqs` of the block table, from the page on in which each window begins."""
        table = self.step.block_table[seqs]
        if self.geometry.window is None:
            return table
        columns = torch.arange(table.shape[1], device=table.device) + first_pages[:, None]
        return table.gather(1, columns.clamp(max=table.shape[1] - 1))

    def num_scores(self, seqs: Lengths) -> int:
        """Pairs of a row and a key that it attends to, in the pass that is planned."""
        windows = self.window_starts[seqs]
        return int(records.num_scores(self.starts[seqs] - windows, self.ends[seqs] - windows))

    def masks(self, seqs: Lengths, first_rows: Lengths, max_copied: int) -> Masks:
        """The masks of `seqs` in the pass that is planned.

        Args:
            first_rows: [n] first row of each in the pass.
            max_copied: see `Masks.caps`.
        """
        step, lens, increments = self.step, self.lens[seqs], self.increments[seqs]
        offsets = np.arange(increments.max())
        valid = offsets < increments[:, None]
        before = (step.known_lens - self.starts)[seqs] + lens - self.geometry.logit_shift
        places = np.where(valid, lens[:, None] + offsets, self.confidences.shape[1] - 1)
        columns = self.first_columns[seqs, None] + places
        new_lens = lens + increments
        plan = np.empty((8, *valid.shape), dtype=np.int64)
        plan[0] = (first_rows + before)[:, None] + np.where(valid, offsets, 0)
        plan[1] = np.where(valid, columns, self.canvas.shape[1] - 1)
        plan[2] = seqs[:, None]
        plan[3] = places
        plan[4] = valid & step.stops_at_eos[seqs, None]
        plan[5] = new_lens[:, None]
        plan[6] = self.first_columns[seqs, None]
        plan[7] = np.minimum(step.max_draft_lens[seqs], new_lens + max_copied)[:, None]
        *per_mask, new, first_columns, caps = self.to_device(plan)
        per_draft = (plane[:, 0] for plane in (new, first_columns, caps))
        return Masks(seqs, valid, places, *per_mask, *per_draft)

    def fill(self, masks: Masks, found: TokenConfidence) -> torch.Tensor:
        """Write what was found for each mask, one row each.

        Returns:
            [n, longest draft] confidences of all that was drafted, 1.0 beyond a draft.
        """
        self.canvas[masks.owners, masks.columns] = found.token_ids.view_as(masks.rows)
        probabilities = found.probabilities.view_as(masks.rows)
        self.device_confidences[masks.owners, masks.positions] = probabilities
        longest = int((self.lens + self.increments)[masks.seqs].max())
        return self.device_confidences[masks.owners[:, 0], :longest]

    def _append_copies(self, masks: Masks, judged: Judged) -> torch.Tensor:
        """Lengthen drafts that agree with what their sequence may copy; [n] int64, by how much."""
        if not self.copies.match_lens[masks.seqs].any():
            return torch.zeros_like(judged.ends)
        seqs, last = masks.owners[:, 0], self.canvas.shape[1] - 1
        copies = self.copies.token_ids[seqs]
        places = torch.arange(copies.shape[1], device=copies.device)
        columns = (masks.first_columns[:, None] + places).clamp(max=last)
        drafts, ends = self.canvas[seqs[:, None], columns], judged.ends[:, None]
        agrees = ((drafts == copies) | (places >= ends)).all(dim=1) & ~judged.stopped
        num_copied = torch.where(agrees, masks.caps - judged.ends, 0)
        copied = (places >= ends) & (places < ends + num_copied[:, None])
        self.canvas[seqs[:, None], torch.where(copied, columns, last)] = copies
        return num_copied

    def settle(self, masks: Masks, sure: torch.Tensor, judged: Judged) -> None:
        """Note on the host what an increment has brought: the only copy back of an increment.

        Args:
            sure: [n, longest] confidence of each mask.
        """
        copied = self._append_copies(masks, judged)
        ends, goes_on, stopped = judged
        goes_on = goes_on & (copied == 0)
        # float32 holds the lengths exactly
        verdicts = torch.stack((ends, copied, goes_on, stopped), dim=1)
        report = torch.cat((verdicts, sure), dim=1).cpu().numpy()
        seqs, (num_judged, num_copied) = masks.seqs, report[:, :2].astype(np.int64).T
        self.confidences[seqs[:, None], masks.places] = report[:, 4:]
        self.num_confidences[seqs] = num_judged
        self.ends_at_stop[seqs] = ends_here = report[:, 3] > 0
        self.lens[seqs] = num_judged + num_copied
        self.num_passes[seqs] += 1
        self.willing[seqs] = (report[:, 2] > 0) & ~ends_here

    def drafted(self, lens: Lengths) -> torch.Tensor:
        """[num_seqs, longest] int64: what was drafted, cut out of the canvas."""
        columns = self.first_columns[:, None] + np.arange(lens.max(initial=0))
        return self.canvas.gather(1, self.to_device(np.minimum(columns, self.canvas.shape[1] - 1)))

    def to_device(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return records.to_device(array, self.geometry.device)
