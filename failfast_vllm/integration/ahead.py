"""Copies in steps that vLLM schedules ahead, on the V2 runner and without a drafter.

    step t ends     the device verifies its copies, and finds those of step t + 1
    meanwhile       step t + 1 is prepared; what came of step t is on its way to the host
    then            the worker is asked how many tokens step t + 2 shall verify: from the matches
                    that step t has found, the last that are known

So nothing waits for the host. A copy may turn out to be shorter than its place in the step, or not
to be there: the rest of the place holds id 0, which the target verifies as any other.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.outputs import DraftTokenIds

from failfast_vllm.drafting.copying import OwnText
from failfast_vllm.drafting.interfaces import AheadPlanner
from failfast_vllm.drafting.records import NOT_KNOWN, Copies, Drafts, Round, share
from failfast_vllm.integration.requests import asked
from failfast_vllm.integration.session import report

if TYPE_CHECKING:
    from failfast_vllm.integration.v2 import CopySpeculator, StepView


@dataclass
class _Step:
    """A step that runs, and what it leaves."""

    view: "StepView"
    matches: Mapping[str, int]  # that the lengths of its copies were chosen from
    # [num_reqs, 3 or more] on its way to the host: known tokens, emitted ones, match length; then,
    # if they are wanted, the ids of the last tokens and of those verified
    on_host: torch.Tensor
    copied: torch.cuda.Event | None = None  # None: there is no stream to wait for
    ended: set[str] = field(default_factory=set)  # requests whose tokens of it vLLM may leave out


class CopiesInFlight:
    """The copies of the steps in flight: the session's part while it goes ahead."""

    def __init__(self, adapter: "CopySpeculator", planner: AheadPlanner) -> None:
        self.adapter, self.planner = adapter, planner
        self.looks = True  # steps find copies for those after them
        self.steps: list[_Step] = []  # not read, the oldest first
        self.matches: dict[str, int] = {}  # that the lengths for the next step are chosen from
        # of each request: its most tokens in a draft and in all; the last known tokens and match
        self.limits: dict[str, tuple[int, int]] = {}
        self.known: dict[str, tuple[int, int]] = {}

    def find(self, view: "StepView") -> torch.Tensor:
        """The copies of the next step, [num_reqs, num_speculative_steps] int64; nothing waits."""
        adapter, batch, states = self.adapter, view.batch, view.states
        rows = batch.idx_mapping.long()
        known, table = states.total_len.gpu[rows].long(), states.all_token_ids.gpu
        longest = int(batch.seq_lens_cpu_upper_bound.numpy().max()) + 1
        lane, num_tokens = adapter.drafter.copies, adapter.num_speculative_steps
        assert isinstance(lane, OwnText)
        match_lens, ids = lane.find_ahead(table, rows, known, longest, num_tokens)
        outcome = torch.stack((known, view.num_sampled.long(), match_lens), dim=1)
        if adapter.stats.wants_token_ids:
            verified = states.draft_tokens[rows, : max(view.num_verified)]
            outcome = torch.cat((outcome, view.last_ids(known), verified), dim=1)
        step = _Step(view, self.matches, outcome.to("cpu", non_blocking=True))
        if adapter.device.type == "cuda":
            step.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            step.copied.record()
        self.steps.append(step)
        for req_id, slot in zip(view.req_ids, batch.idx_mapping_np.tolist(), strict=True):
            if req_id not in self.limits:
                own = asked([adapter.params[slot]], [()], frozenset(), num_tokens)
                self.limits[req_id] = int(own.max_draft_lens[0]), int(states.max_seq_len[slot])
        return ids

    def report(self) -> DraftTokenIds:
        """What the engine is told before it schedules the next step."""
        session, stats, planner = self.adapter.session, self.adapter.stats, self.planner
        assert session is not None
        stats.step_began()
        while len(self.steps) > 1:  # the newest still runs
            self._read(self.steps.pop(0))
        newest = self.steps[-1].view if self.steps else None
        looked, self.looks, self.matches = self.looks, True, {}
        if stats.wants_plain or not (newest is None or newest.may_go_ahead):
            session.leave_ahead()
            return report(stats.take(), None)
        if newest is None or not looked:
            return report(stats.take(), (1, 0.0), ahead={})
        lens = self._choose(newest)
        steps_to_rest = planner.steps_to_rest(newest.num_reqs)
        if steps_to_rest:
            self.looks, self.steps, self.matches, lens = False, [], {}, {}
            self.known.clear()
        return report(stats.take(), (max(1, steps_to_rest), 0.0), ahead=lens)

    def _choose(self, view: "StepView") -> dict[str, int]:
        """Tokens of each request's copy in the next step."""
        adapter, req_ids = self.adapter, view.req_ids
        known, matches = np.array([self.known.get(req_id, (0, NOT_KNOWN)) for req_id in req_ids]).T
        most, ends = np.array([self.limits.get(req_id, (0, 0)) for req_id in req_ids]).T
        lens = self.planner.choose(np.minimum(most, np.maximum(ends - known - 1, 0)), matches)
        lens = share(lens, adapter.drafter.draft_budget(view.num_reqs))
        self.matches = dict(zip(req_ids, matches.tolist(), strict=True))
        adapter.stats.step_ended(Drafts.of_copies(Copies(matches, torch.empty(0, 0)), lens))
        return dict(zip(req_ids, lens.tolist(), strict=True))

    def _read(self, step: _Step) -> None:
        """Learn what came of a step's copies, and what is known now."""
        if step.copied is not None:
            step.copied.synchronize()
        stats, view, most = self.adapter.stats, step.view, 1 + max(step.view.num_verified)
        rounds = []
        for req_id, verified, (known, emitted, match, *ids) in zip(
            view.req_ids, view.num_verified, step.on_host.tolist(), strict=True
        ):
            if not emitted or req_id in step.ended:
                continue
            self.known[req_id] = known, match
            if verified:
                rounds.append(
                    Round(
                        req_id,
                        num_drafted=verified,
                        num_verified=verified,
                        num_accepted=emitted - 1,
                        token_ids=ids[most : most + verified],
                        emitted=ids[most - emitted : most],
                        known_len=known - emitted,
                        step=stats.num_steps,
                        num_seqs=view.num_reqs,
                        match_len=step.matches.get(req_id, NOT_KNOWN),
                    )
                )
        if step.on_host.shape[1] > 3:  # else nobody wanted them when the step ran
            stats.tell(rounds)
        stats.observe(rounds)
        self.planner.observe([r for r in rounds if r.match_len != NOT_KNOWN])
        self.planner.step_ended(view.req_ids, view.num_tokens, sum(view.num_verified))

    def forget(self, req_ids: Iterable[str]) -> None:
        """The requests have ended; what a step brings that is not read yet is not theirs."""
        for req_id in req_ids:
            self.limits.pop(req_id, None)
            self.known.pop(req_id, None)
            for step in self.steps:
                step.ended.add(req_id)
