"""Algorithm 1 of FailFast over a ragged batch: one forward pass per increment. No vLLM here.

`final` is the last multiple of the diffusion block size that the target has computed. So the first
pass commits the newly complete blocks and denoises in one forward; later passes start at `final`.
The picture in `workspace` shows the rows of a pass.

`tests/support/literal.py` has each difference from the authors' code, as a rule of its own, and
docs/decisions/0002-one-pass-per-increment.md says what they are worth.
"""

import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field

import numpy as np
import torch

from failfast_vllm.drafting import records
from failfast_vllm.drafting.committed_blocks import CommittedBlocks
from failfast_vllm.drafting.interfaces import CopyLane, DraftModel, Planner, Policy
from failfast_vllm.drafting.records import DraftBatch, Drafts, DraftStep, FirstPass, Lengths, share
from failfast_vllm.drafting.workspace import Geometry, Judged, Masks, Workspace


@dataclass(eq=False, repr=False)
class Drafter:
    """Drafts for all sequences of a step."""

    model: DraftModel
    policy: Policy
    planner: Planner
    geometry: Geometry
    blocks: CommittedBlocks
    _: KW_ONLY
    stop_token_ids: torch.Tensor  # [num_ids] int64, tokens after which a draft ends
    max_draft_len: int  # most tokens of a draft; steps may ask for less
    max_draft_budget: int  # tokens that one step may draft over all sequences
    copies: CopyLane = field(default_factory=CopyLane)
    clock: Callable[[], float] = time.perf_counter  # seconds; passes are timed with it

    def draft_budget(self, num_seqs: int) -> int:
        """Tokens that a step of `num_seqs` may draft.

        Verification has one row more for each, and half of the rest is left to prompts: vLLM
        schedules what runs, drafts included, before what waits, which would starve.
        """
        return max(0, min(self.max_draft_budget, (self.geometry.max_num_rows - num_seqs) // 2))

    def propose(self, step: DraftStep) -> Drafts:
        """Commit every newly complete block and draft for the sequences that may have a draft."""
        drafts = self._begin(step)
        if isinstance(drafts, Workspace):
            self._passes(drafts)
            drafts.stop_reasons = self._stop_reasons(drafts)
            self._keep(drafts)
        return drafts

    def _begin(self, step: DraftStep) -> Workspace | Drafts:
        """Decide for whom to draft, and how far in the first pass; `Drafts`: no pass is needed."""
        copies, final = self.copies.find(step), step.final_lens
        asked = FirstPass(
            wanted=step.max_draft_lens,
            live_rows=step.known_lens - final,
            commit_rows=final - step.committed_lens,
            seen_lens=final - self.geometry.window_starts(final),
            match_lens=copies.match_lens,
        )
        first, copied = self.planner.first(asked)
        first = share(first, step.draft_budget)
        copied = share(copied, step.draft_budget - int(first.sum()))
        postpones = self.planner.postpones_commits
        if not (first.any() or (not postpones and asked.commit_rows.any())):
            return Drafts.of_copies(copies, copied)
        if postpones:
            step = step.passing_only(first > 0)
        work = Workspace(step, first, self.geometry)
        work.copy(copies, copied)
        return work

    def _passes(self, work: Workspace) -> None:
        for seqs, starts, ends in work.commits_in_parts():
            self._forward(work.rows(seqs, starts, ends)[1])
        while (active := np.flatnonzero(work.ends > work.starts)).size:
            spare = work.step.draft_budget - int((work.lens + work.increments).sum())
            for seqs in work.parts(active):
                self._pass(work, seqs, spare // active.size)
            work.grow(self._increments(work))

    def _forward(self, batch: DraftBatch) -> torch.Tensor:
        if batch.slot_mapping is not None:
            self.blocks.mark(batch.slot_mapping)
        return self.model.forward(batch)

    def _pass(self, work: Workspace, seqs: Lengths, max_copied: int) -> None:
        """One pass over `seqs`; a draft may get `max_copied` tokens on top of its increment."""
        began, num_scores = self.clock(), work.num_scores(seqs)
        first_rows, batch = work.rows(seqs, work.starts, work.ends)
        hidden_states = self._forward(batch)
        grows = work.increments[seqs] > 0
        if not grows.any():
            return
        masks = work.masks(seqs[grows], first_rows[grows], max_copied)
        rows = hidden_states[masks.rows.flatten()]
        found = self.model.confidence(rows)
        confidences = work.fill(masks, found)
        judged = self._judge(work, masks, found.token_ids.view_as(masks.rows), confidences)
        work.settle(masks, found.probabilities.view_as(masks.rows), judged)
        # the pass has ended: its verdict is on the host
        size = batch.input_ids.numel(), num_scores
        self.planner.pass_took(size, (self.clock() - began) * 1e3)

    def _judge(
        self, work: Workspace, masks: Masks, token_ids: torch.Tensor, confidences: torch.Tensor
    ) -> Judged:
        ends, goes_on = self.policy.extend(masks.lens, confidences)
        if work.step.min_confidences.any():
            asked = work.to_device(work.step.min_confidences[masks.seqs])
            goes_on = goes_on & (confidences.amin(dim=1) >= asked)
        is_stop = (token_ids[:, :, None] == self.stop_token_ids).any(dim=2) & masks.may_stop.bool()
        first_stop = torch.where(is_stop, masks.positions + 1, ends[:, None] + 1).amin(dim=1)
        return Judged(torch.minimum(ends, first_stop), goes_on, first_stop <= ends)

    def _increments(self, work: Workspace) -> Lengths:
        """[num_seqs] what the next pass drafts; 0 = that draft is complete."""
        step, lens = work.step, work.lens
        increments = self.planner.following(
            np.where(work.willing & (work.increments > 0), step.max_draft_lens - lens, 0),
            step.known_lens - step.final_lens + lens,
            work.first_lens,
            lens,
            work.confidences[:, : int(lens.max(initial=0))],
        )
        return share(increments, step.draft_budget - int(lens.sum()))

    def _keep(self, work: Workspace) -> None:
        """Keep what is worth verifying."""
        per_seq = work.lens, work.num_confidences, work.confidences, work.match_lens
        lens = self.planner.keep(*per_seq)
        work.stop_reasons[lens < work.lens] = records.LOAD
        work.lens = lens
        work.token_ids = work.drafted(lens)

    def _stop_reasons(self, work: Workspace) -> Lengths:
        """[num_seqs] what ended each draft; meaningless where there is none."""
        asked_lens = work.step.max_draft_lens
        spent = work.lens.sum() >= work.step.draft_budget
        refused = records.BUDGET if spent else self.planner.refusal
        reasons = np.where(work.willing, refused, records.DOUBT)
        own_limit = np.where(asked_lens < self.max_draft_len, records.REQUEST, records.CAP)
        reasons = np.where(work.lens >= asked_lens, own_limit, reasons)
        reasons = np.where(work.lens > work.num_confidences, records.COPY, reasons)
        return np.where(work.ends_at_stop, records.EOS, reasons)
