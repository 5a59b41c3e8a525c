"""Algorithm 1 of FailFast over a ragged batch: one forward pass per increment. No vLLM here.

The rows of one pass, for each sequence, at absolute positions:

    committed          final              known      + drafted         + draft_increment
    |  blocks to commit  |  live known tokens |  drafted tokens  |  MASK MASK MASK ...  |
      KV is written        KV is never written; encoded again in every pass

`final` is the last multiple of the diffusion block size that the target has computed. So the first
pass commits the newly complete blocks and denoises in one forward; later passes start at `final`.
The logit at position i predicts token i + `logit_shift` (see `families`).

Differences from the authors' code, each a rule of `tests/literal.py` (theirs in brackets):
one pass fills all masks of an increment (one or more per sub-block of 8, which is filled and judged
to its end); the same pass commits complete blocks (a pass of its own, whose last logit is the next
block's first token, without a confidence); MASK rows behind the increment are left out (up to the
block's end); an increment may cross a block's end; it is judged as soon as it is filled (after the
next filling pass, where a commit filled its end); the cap is exact (it counts confidences); a draft
may touch any number of blocks (three); KV of committed blocks is never made again (in every round
whose prefix has other blocks than the last pass over blocks left, and for short ones it is wrong).

Lengths live on the host, tokens on the device: rows are planned with NumPy, a pass needs two small
copies to the device, and `_denoise` makes the only copy back.
"""

import time
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from failfast_vllm.drafting.committed_blocks import CommittedBlocks
from failfast_vllm.drafting.interfaces import DraftModel, DraftSoFar, Policy
from failfast_vllm.drafting.path_search import PathSearch
from failfast_vllm.drafting.records import (
    BUDGET,
    CAP,
    EOS,
    LOAD,
    REQUEST,
    UNKNOWN,
    Candidates,
    DraftBatch,
    Drafts,
    DraftStep,
    Lengths,
    share,
    to_device,
)
from failfast_vllm.drafting.reuse import RejectedDrafts, RejectedTokens, continuation
from failfast_vllm.planning.planner import LoadPlanner


class _Judged(NamedTuple):
    """What the drafts of a step are judged by, and what came of it; updated in place."""

    signals: torch.Tensor  # [1 or 2, num_seqs, width] float32: confidence 1.0, entropy 0.0 so far
    rejected: RejectedTokens | None  # None: not reused
    confidences: npt.NDArray[np.float32]  # these three as in `Drafts`
    num_confidences: Lengths
    ends_at_stop: npt.NDArray[np.bool_]


def _postponing(step: DraftStep, drafts: npt.NDArray[np.bool_]) -> DraftStep:
    """The step in which sequences without a draft need no row at all."""
    return replace(
        step,
        known_lens=np.where(drafts, step.known_lens, step.committed_lens),
        final_lens=np.where(drafts, step.final_lens, step.committed_lens),
        max_draft_lens=np.where(drafts, step.max_draft_lens, 0),
    )


class Drafter:
    """Drafts for all sequences of a step.

    Args:
        max_draft_len: most tokens of a draft; steps may ask for less.
        max_num_rows: rows that one forward may have; more are split. Verification has as many.
        max_draft_budget: tokens that one step may draft over all sequences.
        vocab_size: of the drafter; it reads MASK where the target has an id beyond it, or none.
        mask_token_id: the drafter's MASK.
        stop_token_ids: [num_ids] int64, tokens after which a draft ends.
        blocks: which blocks of the KV cache are committed.
        planner: decides what pays at this load; None: drafts grow as the policy says.
        reuse_rejected: lengthen doubtful drafts by what was rejected before (see `reuse`).
        paths: chooses among a pass's candidates; None: the most probable token of each mask.
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
        max_draft_len: int,
        max_num_rows: int,
        max_draft_budget: int,
        diffusion_block_size: int = 32,
        logit_shift: int = 1,
        blocks: CommittedBlocks,
        planner: LoadPlanner | None = None,
        reuse_rejected: bool = False,
        paths: PathSearch | None = None,
    ) -> None:
        assert kv_block_size % diffusion_block_size == 0
        self.model = model
        self.policy = policy
        self.draft_increment = draft_increment
        self.vocab_size = vocab_size
        self.mask_token_id = mask_token_id
        self.stop_token_ids = stop_token_ids
        self.kv_block_size = kv_block_size
        self.max_draft_len = max_draft_len
        self.max_num_rows = max_num_rows
        self.max_draft_budget = max_draft_budget
        self.diffusion_block_size = diffusion_block_size
        self.logit_shift = logit_shift
        self.blocks = blocks
        self.planner = planner
        self.rejected = RejectedDrafts() if reuse_rejected else None
        self.paths = paths
        self.device = stop_token_ids.device

    def draft_budget(self, num_seqs: int) -> int:
        """Tokens that a step of `num_seqs` may draft.

        Verification has one row more for each, and half of the rest is left to prompts: vLLM
        schedules what runs, drafts included, before what waits, which would starve.
        """
        return max(0, min(self.max_draft_budget, (self.max_num_rows - num_seqs) // 2))

    def propose(self, step: DraftStep) -> Drafts:
        """Commit every newly complete block and draft for the sequences that may have a draft.

        With a planner, commits wait until a sequence is drafted for.
        """
        if self.paths is not None:
            self._see(self.paths, step)
        asked_lens = step.max_draft_lens
        step = replace(step, max_draft_lens=self.policy.begin(step.req_ids, step.max_draft_lens))
        first_lens = increments = self._first_increments(step)
        drafts = increments > 0
        if self.planner is not None:
            step = _postponing(step, drafts)
        canvas = self._canvas(step)
        judged = self._judged(step)
        draft_lens = np.zeros_like(step.known_lens)
        num_passes, seq_rows = np.zeros_like(draft_lens), np.zeros_like(draft_lens)
        num_forwards = num_rows = 0
        willing = np.zeros_like(drafts)  # to go on, were it allowed to

        starts = step.committed_lens
        ends = np.where(drafts, step.known_lens + increments, step.final_lens)
        active = np.flatnonzero(ends > starts)
        if (ends - starts).sum() > self.max_num_rows:
            num_forwards, num_rows = self._commit_in_parts(step, canvas)
            seq_rows += step.final_lens - step.committed_lens
            starts = step.final_lens
            active = np.flatnonzero(drafts)

        while active.size:
            goes_on = np.zeros_like(drafts)
            spare = step.draft_budget - int((draft_lens + increments).sum())
            for seqs in self._split(active, ends - starts):
                began = time.perf_counter()
                first_rows, batch = self._rows(step, canvas, seqs, starts, ends)
                hidden_states = self.model.forward(batch)
                num_forwards, num_rows = num_forwards + 1, num_rows + batch.input_ids.numel()
                seq_rows[seqs] += (ends - starts)[seqs]
                growing = seqs[drafts[seqs]]
                if not growing.size:
                    continue
                frontier = step.known_lens[growing] + draft_lens[growing]
                draft_lens[growing], goes_on[growing] = self._denoise(
                    step,
                    canvas,
                    judged,
                    growing,
                    hidden_states,
                    first_rows[drafts[seqs]] + frontier - self.logit_shift - starts[growing],
                    increments[growing],
                    draft_lens[growing],
                    spare // active.size,
                )
                num_passes[growing] += 1
                if self.planner is not None:  # the pass has ended: its verdict is on the host
                    self.planner.pass_took(
                        batch.input_ids.numel(), (time.perf_counter() - began) * 1e3
                    )
            starts = step.final_lens
            willing[active] = goes_on[active]
            wanted = np.where(goes_on, step.max_draft_lens - draft_lens, 0)
            increments = self._next_increments(step, wanted, first_lens, draft_lens, judged)
            active = np.flatnonzero(increments)
            ends = step.known_lens + draft_lens + increments

        stop_reasons = self._stop_reasons(step, asked_lens, draft_lens, willing, judged)
        if self.planner is not None:
            kept = self.planner.keep(draft_lens, judged.num_confidences, judged.confidences)
            stop_reasons[kept < draft_lens] = LOAD
            draft_lens = kept
        token_ids = self._drafted(step, canvas, draft_lens)
        if self.rejected is not None:
            self.rejected.remember(step.req_ids, token_ids)
        return Drafts(
            token_ids,
            draft_lens,
            first_lens,
            num_passes,
            num_forwards,
            num_rows,
            judged.confidences,
            judged.num_confidences,
            judged.ends_at_stop,
            stop_reasons,
            seq_rows,
        )

    def _stop_reasons(
        self,
        step: DraftStep,
        asked_lens: Lengths,
        draft_lens: Lengths,
        willing: npt.NDArray[np.bool_],
        judged: "_Judged",
    ) -> Lengths:
        """[num_seqs] what ended each draft; meaningless where there is none."""
        spent = draft_lens.sum() >= step.draft_budget
        refused = LOAD if self.planner is not None and not spent else BUDGET
        reasons = np.where(willing, refused, self.policy.ends_by)
        own_limit = np.where(asked_lens < self.max_draft_len, REQUEST, CAP)
        reasons = np.where(draft_lens >= step.max_draft_lens, own_limit, reasons)
        return np.where(judged.ends_at_stop, EOS, reasons)

    def _first_increments(self, step: DraftStep) -> Lengths:
        """[num_seqs] what the first pass drafts; 0 = no draft."""
        if self.planner is None:
            increments = np.minimum(step.max_draft_lens, self.draft_increment)
        else:
            increments = self.planner.first(
                step.max_draft_lens,
                step.known_lens - step.final_lens,
                step.final_lens - step.committed_lens,
            )
        return share(increments, step.draft_budget)

    def _next_increments(
        self,
        step: DraftStep,
        wanted: Lengths,
        first_lens: Lengths,
        draft_lens: Lengths,
        judged: "_Judged",
    ) -> Lengths:
        """[num_seqs] what the next pass drafts, of `wanted` tokens at most; 0 = complete."""
        if self.planner is None:
            increments = np.minimum(wanted, self.draft_increment)
        else:
            increments = self.planner.following(
                wanted,
                step.known_lens - step.final_lens + draft_lens,
                np.minimum(first_lens, draft_lens),
                draft_lens,
                judged.confidences[:, : int(draft_lens.max(initial=0))],
            )
        return share(increments, step.draft_budget - int(draft_lens.sum()))

    def _denoise(
        self,
        step: DraftStep,
        canvas: torch.Tensor,
        judged: "_Judged",
        seqs: Lengths,
        hidden_states: torch.Tensor,
        first_rows: Lengths,
        increments: Lengths,
        draft_lens: Lengths,
        max_reused: int,
    ) -> tuple[Lengths, npt.NDArray[np.bool_]]:
        """Fill the increment of `seqs` from one pass: their new lengths, and which of them go on.

        `first_rows` are the rows that predict the first MASK of each sequence. `canvas` and
        `judged` are updated in place; positions that a sequence does not have go to their last
        columns. A draft that ends in doubt may get up to `max_reused` rejected tokens on top.
        """
        offsets = np.arange(increments.max())
        valid = offsets < increments[:, None]  # [n, longest increment]
        first_columns = (step.known_lens - step.committed_lens)[seqs]
        positions = np.where(valid, draft_lens[:, None] + offsets, judged.confidences.shape[1] - 1)
        lens = draft_lens + increments
        plan = np.empty((8, *valid.shape), dtype=np.int64)
        plan[0] = first_rows[:, None] + np.where(valid, offsets, 0)
        plan[1] = np.where(valid, first_columns[:, None] + positions, canvas.shape[1] - 1)
        plan[2] = seqs[:, None]
        plan[3] = valid & step.stops_at_eos[seqs, None]
        plan[4] = positions
        plan[5] = lens[:, None]
        plan[6] = first_columns[:, None]
        plan[7] = np.minimum(step.max_draft_lens[seqs], lens + max_reused)[:, None]
        rows, columns, owners, may_stop, places, *per_seq = self._to_device(plan)
        owner = owners[:, 0]
        new_lens, starts, caps = (plane[:, 0] for plane in per_seq)
        entropic = self.policy.needs_entropy
        masks = hidden_states[rows.flatten()]
        if self.paths is None:
            confidence = self.model.confidence(masks, details=entropic)
            token_ids = confidence.token_ids.view_as(rows)
            sure = confidence.probabilities.view_as(rows)
        else:
            confidence, candidates = self.model.candidates(masks, details=entropic)
            begins = first_columns + draft_lens
            token_ids, sure = self._path(self.paths, canvas, seqs, begins, candidates, valid)
        canvas[owners, columns] = token_ids
        judged.signals[0, owners, places] = sure
        if entropic:
            assert confidence.entropies is not None
            judged.signals[1, owners, places] = confidence.entropies.view_as(rows)
        signals = judged.signals[:, owner, : int(lens.max())]
        ends, goes_on = self.policy.extend(
            DraftSoFar(owner, new_lens, signals[0], signals[1] if entropic else None)
        )
        if step.min_confidences is not None and step.min_confidences.any():
            asked = self._to_device(step.min_confidences[seqs])
            goes_on = goes_on & (signals[0].amin(dim=1) >= asked)
        is_stop = (token_ids[:, :, None] == self.stop_token_ids).any(dim=2) & may_stop.bool()
        first_stop = torch.where(is_stop, places + 1, ends[:, None] + 1).amin(dim=1)
        stopped = first_stop <= ends
        ends = torch.minimum(ends, first_stop)
        num_reused = torch.zeros_like(ends)
        if judged.rejected is not None:
            room = torch.where(goes_on | stopped, 0, caps - ends)
            num_reused = self._reuse(canvas, judged.rejected, owner, starts, ends, room)
        # float64 holds both the lengths and the probabilities exactly
        flags = torch.stack((ends, num_reused, goes_on & ~stopped, stopped), dim=1).double()
        report = torch.cat((flags, sure.double()), dim=1)

        report_np = report.cpu().numpy()  # the copy back, once per increment
        ends_np, reused_np = report_np[:, :2].astype(np.int64).T
        judged.confidences[seqs[:, None], positions] = report_np[:, 4:]
        judged.num_confidences[seqs] = ends_np
        judged.ends_at_stop[seqs] = report_np[:, 3] > 0
        lens = ends_np + reused_np
        return lens, (report_np[:, 2] > 0) & (lens < step.max_draft_lens[seqs])

    def _see(self, paths: PathSearch, step: DraftStep) -> None:
        """Count what the sequences have said since the last step that was looked at."""
        rows, positions = paths.unseen(step.req_ids, step.known_lens)
        columns = positions[:, None] + np.array([-2, -1, 0])
        slots = self._to_device(step.slots[rows][:, None])
        grams = step.token_ids[slots, self._to_device(np.maximum(columns, 0))].cpu().numpy()
        paths.trigrams.see(np.where(columns < 0, UNKNOWN, grams))

    def _path(
        self,
        paths: PathSearch,
        canvas: torch.Tensor,
        seqs: Lengths,
        first_columns: Lengths,
        candidates: Candidates,
        valid: npt.NDArray[np.bool_],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and confidences of `seqs`, whose first masks are at `first_columns`; [n, longest].

        A copy to the host and one back, on top of the one that every increment makes.
        """
        columns = first_columns[:, None] + np.array([-2, -1])
        at = self._to_device(np.array((np.broadcast_to(seqs[:, None], columns.shape), columns)))
        before = np.where(columns < 0, UNKNOWN, canvas[at[0], at[1].clamp(min=0)].cpu().numpy())
        ids, probabilities = (part.view(*valid.shape, -1).cpu().numpy() for part in candidates)
        path = paths.best(before, ids, probabilities, valid)
        return self._to_device(path.token_ids), self._to_device(path.confidences)

    def _reuse(
        self,
        canvas: torch.Tensor,
        rejected: RejectedTokens,
        seqs: torch.Tensor,
        first_columns: torch.Tensor,
        lens: torch.Tensor,
        room: torch.Tensor,
    ) -> torch.Tensor:
        """Append up to `room` rejected tokens to each draft in `canvas`: [n], how many."""
        last = canvas.shape[1] - 1
        columns = first_columns[:, None] + torch.arange(last, device=self.device)
        drafts = canvas[seqs[:, None], columns.clamp(max=last)]
        tokens, num_tokens = continuation(drafts, lens, rejected.tails[seqs], rejected.lens[seqs])
        num_tokens = torch.minimum(num_tokens, room)
        offsets = torch.arange(tokens.shape[1], device=self.device)
        columns = (first_columns + lens)[:, None] + offsets
        columns = torch.where(offsets < num_tokens[:, None], columns, last)
        canvas[seqs[:, None], columns] = tokens
        return num_tokens

    def _judged(self, step: DraftStep) -> "_Judged":
        num_seqs, width = len(step.known_lens), int(step.max_draft_lens.max(initial=0)) + 1
        signals = torch.ones(1 + self.policy.needs_entropy, num_seqs, width, device=self.device)
        signals[1:] = 0.0
        return _Judged(
            signals,
            self.rejected.tokens(step.req_ids) if self.rejected is not None else None,
            np.ones((num_seqs, width), dtype=np.float32),
            np.zeros(num_seqs, dtype=np.int64),
            np.zeros(num_seqs, dtype=bool),
        )

    def _canvas(self, step: DraftStep) -> torch.Tensor:
        """[num_seqs, width] int64: the uncommitted tokens, then MASK, from `committed_lens` on."""
        uncommitted = step.known_lens - step.committed_lens
        width = int((uncommitted + step.max_draft_lens).max(initial=0)) + 1
        plan = self._to_device(np.array((step.slots, step.committed_lens, uncommitted)))
        slots, committed, known = plan[:, :, None]
        columns = torch.arange(width, device=self.device)
        tokens = step.token_ids[slots, (committed + columns).clamp(max=step.token_ids.shape[1] - 1)]
        foreign = (tokens >= self.vocab_size) | (tokens == UNKNOWN)
        return tokens.long().masked_fill_(foreign | (columns >= known), self.mask_token_id)

    def _rows(
        self,
        step: DraftStep,
        canvas: torch.Tensor,
        seqs: Lengths,
        starts: Lengths,
        ends: Lengths,
    ) -> tuple[Lengths, DraftBatch]:
        """The pass over positions `starts:ends` of `seqs`; also the first row of each."""
        lens = (ends - starts)[seqs]
        query_start_loc = np.concatenate(([0], lens.cumsum()))
        num_rows = int(query_start_loc[-1])
        row_seqs = np.repeat(seqs, lens)
        positions = np.arange(num_rows) + np.repeat(starts[seqs] - query_start_loc[:-1], lens)
        commits = positions < step.final_lens[row_seqs]
        columns = positions - step.committed_lens[row_seqs]
        per_row = self._to_device(np.array((positions, row_seqs, columns, commits)))
        per_seq = self._to_device(np.array((query_start_loc[:-1], starts[seqs], seqs)))
        slot_mapping = None
        if commits.any():
            pages = step.block_table[per_row[1], per_row[0] // self.kv_block_size].long()
            slots = pages * self.kv_block_size + per_row[0] % self.kv_block_size
            slot_mapping = torch.where(per_row[3].bool(), slots, -1)
            self.blocks.mark(slot_mapping)
        batch = DraftBatch(
            input_ids=canvas[per_row[1], per_row[2]],
            positions=per_row[0],
            query_start_loc=torch.nn.functional.pad(per_seq[0], (0, 1), value=num_rows),
            committed_lens=per_seq[1],
            slot_mapping=slot_mapping,
            block_table=step.block_table[per_seq[2]],
        )
        return query_start_loc[:-1], batch

    def _split(self, seqs: Lengths, num_rows: Lengths) -> list[Lengths]:
        """Consecutive parts of `seqs` of at most `max_num_rows` rows each (usually one part)."""
        if num_rows[seqs].sum() <= self.max_num_rows:
            return [seqs]
        parts, part_rows, begin = [], 0, 0
        for i, rows in enumerate(num_rows[seqs].tolist()):
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
        Returns the numbers of forwards and rows.
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
        starts, ends = step.committed_lens.copy(), step.committed_lens.copy()
        for i in range(0, len(blocks), per_pass):
            part = np.array(blocks[i : i + per_pass])
            seqs = np.unique(part[:, 1])
            starts[seqs] = [part[part[:, 1] == seq, 0].min() for seq in seqs]
            ends[seqs] = [part[part[:, 1] == seq, 0].max() + size for seq in seqs]
            self.model.forward(self._rows(step, canvas, seqs, starts, ends)[1])
        return -(-len(blocks) // per_pass), len(blocks) * size

    def _drafted(self, step: DraftStep, canvas: torch.Tensor, draft_lens: Lengths) -> torch.Tensor:
        """[num_seqs, longest] int64: what was drafted, cut out of `canvas`."""
        offsets = np.arange(draft_lens.max(initial=0))
        columns = (step.known_lens - step.committed_lens)[:, None] + offsets
        return canvas.gather(1, self._to_device(np.minimum(columns, canvas.shape[1] - 1)))

    def _to_device(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return to_device(array, self.device)
