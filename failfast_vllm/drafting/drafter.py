"""Algorithm 1 of FailFast over a ragged batch: one forward pass per increment. No vLLM here.

`final` is the last multiple of the diffusion block size that the target has computed. So the first
pass commits the newly complete blocks and denoises in one forward; later passes start at `final`.
The picture in `workspace` shows the rows of a pass.

Differences from the authors' code, each a rule of `tests/support/literal.py` (theirs in brackets):
one pass fills all masks of an increment (one or more per sub-block of 8, which is filled and judged
to its end); the same pass commits complete blocks (a pass of its own, whose last logit is the next
block's first token, without a confidence); MASK rows after the increment are left out (up to the
block's end); an increment may cross a block's end; it is judged as soon as it is filled (after the
next filling pass, where a commit filled its end); the cap is exact (it counts confidences); a draft
may touch any number of blocks (three); KV of committed blocks is never made again (in every round
whose prefix has other blocks than the last pass over blocks left, and for short ones it is wrong).
"""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from failfast_vllm.drafting.committed_blocks import CommittedBlocks
from failfast_vllm.drafting.interfaces import (
    BestTokens,
    DraftModel,
    DraftSoFar,
    NoReuse,
    Planner,
    Policy,
    Reuse,
    TokenChooser,
)
from failfast_vllm.drafting.records import (
    BUDGET,
    CAP,
    EOS,
    LOAD,
    REQUEST,
    DraftBatch,
    Drafts,
    DraftStep,
    Flags,
    Lengths,
    share,
)
from failfast_vllm.drafting.workspace import Geometry, Judged, Masks, Workspace


class Drafter:
    """Drafts for all sequences of a step.

    Args:
        policy: where a draft may grow, and where it is cut.
        planner: what pays at this load; `Unplanned` drafts as the policy says.
        blocks: which blocks of the KV cache are committed.
        stop_token_ids: [num_ids] int64, tokens after which a draft ends.
        max_draft_len: most tokens of a draft; steps may ask for less.
        max_draft_budget: tokens that one step may draft over all sequences.
        tokens: chooses the token of each mask.
        reuse: lengthens drafts that end in doubt.
        clock: seconds; passes are timed with it.
    """

    def __init__(
        self,
        model: DraftModel,
        policy: Policy,
        planner: Planner,
        geometry: Geometry,
        blocks: CommittedBlocks,
        *,
        stop_token_ids: torch.Tensor,
        max_draft_len: int,
        max_draft_budget: int,
        tokens: TokenChooser | None = None,
        reuse: Reuse | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model = model
        self.policy = policy
        self.planner = planner
        self.geometry = geometry
        self.blocks = blocks
        self.stop_token_ids = stop_token_ids
        self.max_draft_len = max_draft_len
        self.max_draft_budget = max_draft_budget
        self.tokens = tokens or BestTokens()
        self.reuse = reuse or NoReuse()
        self.clock = clock

    @property
    def diffusion_block_size(self) -> int:
        return self.geometry.diffusion_block_size

    @property
    def draft_increment(self) -> int:
        return self.planner.draft_increment

    def draft_budget(self, num_seqs: int) -> int:
        """Tokens that a step of `num_seqs` may draft.

        Verification has one row more for each, and half of the rest is left to prompts: vLLM
        schedules what runs, drafts included, before what waits, which would starve.
        """
        return max(0, min(self.max_draft_budget, (self.geometry.max_num_rows - num_seqs) // 2))

    def propose(self, step: DraftStep) -> Drafts:
        """Commit every newly complete block and draft for the sequences that may have a draft."""
        self.tokens.see(step)
        work = self._begin(step)
        for seqs, starts, ends in work.commits_in_parts():
            self._forward(work.rows(seqs, starts, ends)[1])
        while (active := work.active()).size:
            goes_on = np.zeros_like(work.willing)
            spare = work.spare_budget() // active.size
            for seqs in work.parts(active):
                goes_on[seqs] = self._pass(work, seqs, spare)
            work.willing[active] = goes_on[active]
            work.grow(self._increments(work, goes_on))
        return self._finish(work, step.max_draft_lens)

    def _begin(self, step: DraftStep) -> Workspace:
        """Decide for whom to draft, and how far in the first pass."""
        step = replace(step, max_draft_lens=self.policy.begin(step.req_ids, step.max_draft_lens))
        live, commits = step.known_lens - step.final_lens, step.final_lens - step.committed_lens
        first = share(self.planner.first(step.max_draft_lens, live, commits), step.draft_budget)
        if self.planner.postpones_commits:
            step = step.drafting_only(first > 0)
        self.reuse.begin(step.req_ids)
        return Workspace(step, first, self.geometry, has_entropies=self.policy.needs_entropy)

    def _forward(self, batch: DraftBatch) -> torch.Tensor:
        if batch.slot_mapping is not None:
            self.blocks.mark(batch.slot_mapping)
        return self.model.forward(batch)

    def _pass(self, work: Workspace, seqs: Lengths, max_reused: int) -> Flags:
        """One pass over `seqs`: which of them the policy would go on with."""
        began = self.clock()
        first_rows, batch = work.rows(seqs, work.starts, work.ends)
        hidden_states = self._forward(batch)
        goes_on = np.zeros(len(seqs), dtype=bool)
        grows = work.increments[seqs] > 0
        if grows.any():
            masks = work.masks(seqs[grows], first_rows[grows], max_reused)
            goes_on[grows] = self._denoise(work, masks, hidden_states)
            # the pass has ended: its verdict is on the host
            self.planner.pass_took(batch.input_ids.numel(), (self.clock() - began) * 1e3)
        return goes_on

    def _denoise(self, work: Workspace, masks: Masks, hidden_states: torch.Tensor) -> Flags:
        """Fill the masks of one pass: [n] which of their drafts the policy would go on with."""
        found = self.tokens.choose(
            self.model,
            hidden_states[masks.rows.flatten()],
            work,
            masks,
            details=self.policy.needs_entropy,
        )
        work.fill(masks, found)
        judged = self._judge(work, masks, found.token_ids.view_as(masks.rows))
        num_reused = self.reuse.append(work.canvas, masks, judged)
        return work.settle(masks, found.probabilities.view_as(masks.rows), judged, num_reused)

    def _judge(self, work: Workspace, masks: Masks, token_ids: torch.Tensor) -> Judged:
        signals = work.signals_of(masks)
        entropies = signals[1] if self.policy.needs_entropy else None
        ends, goes_on = self.policy.extend(
            DraftSoFar(masks.owners[:, 0], masks.lens, signals[0], entropies)
        )
        if work.step.min_confidences.any():
            asked = work.to_device(work.step.min_confidences[masks.seqs])
            goes_on = goes_on & (signals[0].amin(dim=1) >= asked)
        is_stop = (token_ids[:, :, None] == self.stop_token_ids).any(dim=2) & masks.may_stop.bool()
        first_stop = torch.where(is_stop, masks.positions + 1, ends[:, None] + 1).amin(dim=1)
        return Judged(torch.minimum(ends, first_stop), goes_on, first_stop <= ends)

    def _increments(self, work: Workspace, goes_on: Flags) -> Lengths:
        """[num_seqs] what the next pass drafts; 0 = that draft is complete."""
        step = work.step
        increments = self.planner.following(
            np.where(goes_on, step.max_draft_lens - work.lens, 0),
            step.known_lens - step.final_lens + work.lens,
            np.minimum(work.first_lens, work.lens),
            work.lens,
            work.confidences[:, : int(work.lens.max(initial=0))],
        )
        return share(increments, step.draft_budget - int(work.lens.sum()))

    def _finish(self, work: Workspace, asked_lens: Lengths) -> Drafts:
        """Keep what is worth verifying."""
        stop_reasons = self._stop_reasons(work, asked_lens)
        lens = self.planner.keep(work.lens, work.num_confidences, work.confidences)
        stop_reasons[lens < work.lens] = LOAD
        token_ids = work.drafted(lens)
        self.reuse.remember(work.step.req_ids, token_ids)
        return Drafts(
            token_ids,
            lens,
            work.first_lens,
            work.num_passes,
            work.num_forwards,
            work.num_rows,
            work.confidences,
            work.num_confidences,
            work.ends_at_stop,
            stop_reasons,
            work.seq_rows,
        )

    def _stop_reasons(self, work: Workspace, asked_lens: Lengths) -> Lengths:
        """[num_seqs] what ended each draft; meaningless where there is none."""
        spent = work.lens.sum() >= work.step.draft_budget
        refused = BUDGET if spent else self.planner.refusal
        reasons = np.where(work.willing, refused, self.policy.ends_by)
        own_limit = np.where(asked_lens < self.max_draft_len, REQUEST, CAP)
        reasons = np.where(work.lens >= work.step.max_draft_lens, own_limit, reasons)
        return np.where(work.ends_at_stop, EOS, reasons)
