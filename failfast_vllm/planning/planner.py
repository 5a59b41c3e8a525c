"""How much to draft at this load: what the next tokens are expected to bring, and what they cost.

Throughput is (tokens emitted) / (draft time + verification time). Three choices per step, each over
the whole batch:

- `LoadPlanner.first`: whose first pass is how long, to maximise it; 0 where no draft is best. Those
  left out, since they have much to commit, wait for the others' drafts: see `options.even_out`.
- `LoadPlanner.following`, after each pass: which sequences go on.
- `LoadPlanner.keep`, at the end: which drafted tokens are worth verifying.

The first fixes the rate r in tokens per ms, an average over rounds. The others see what this round
looks like, and take what brings more than its time would bring elsewhere: maximise tokens - r * ms
(Dinkelbach's form of a ratio). A policy says where a draft may grow, the planner where it pays.
After SmartSpec and TurboSpec (arXiv 2406.14066) and vLLM's adaptive verification.

The choices are functions of `costs` (times) and `acceptance` (chances), which learn while serving;
`guard` compares what came of them with plain decoding and may overrule them.

Everything is deterministic in what it is given, so that the ranks of a tensor-parallel group agree:
they learn the times of the first rank. NumPy only.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from failfast_vllm.drafting.interfaces import Planner
from failfast_vllm.drafting.records import LOAD, FirstPass, Lengths, Round, num_scores
from failfast_vllm.planning.acceptance import AcceptanceByPosition, Calibration, learn
from failfast_vllm.planning.ahead import CopiesAhead
from failfast_vllm.planning.copies import CopyAcceptance, LookBalance, choose_copies
from failfast_vllm.planning.costs import REST_STEPS, Costs, Floats, StepTimer
from failfast_vllm.planning.guard import TRY_ROUNDS, Guard
from failfast_vllm.planning.options import Options, even_out, least_commits_first

# Hysteresis: start drafting only for a gain of a tenth, since times and acceptance are estimates
# and a start costs commits; continue while at least break-even.
MARGIN = 1.1
LEARNING_STEPS = 8  # steps whose drafts are learned from at once

# Committing what was skipped has to pay within so many rounds: answers may end after few.
AMORTISED_ROUNDS = 2

# The first steps of a rest say nothing of the others: where steps are scheduled ahead they fill the
# queue, elsewhere they find caches that are full of drafting. Where steps are scheduled ahead, one
# that is timed among drafts follows four others.
FIRST_STEPS, PROBE_AHEAD = 2, 4


@dataclass
class LoadPlanner(Planner):
    """Chooses what raises the expected tokens per second of the whole batch.

    Args:
        costs: measured times.
        max_len: most tokens of a draft.
        draft_increment: tokens of each pass after the first.
        learns: whether the costs follow what passes and steps take.
        agree: what this rank has measured, in ms -> what the first rank has. Called on all ranks in
            the same steps.
        drafts: whether there is a drafter; else all drafts are copied.
        copies: whether sequences may copy: the planner then looks at every step.
        schedules_ahead: whether the engine schedules steps ahead while the planner rests.
        calibration: of the drafter's confidences.
        clock: the time in seconds.
    """

    postpones_commits = True
    refusal = LOAD

    costs: Costs
    max_len: int
    draft_increment: int
    learns: bool = False
    agree: Callable[[list[float]], list[float]] = list
    drafts: bool = True
    copies: bool = False
    schedules_ahead: bool = False
    calibration: Calibration = field(default_factory=Calibration)
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        self.acceptance = AcceptanceByPosition(self.max_len)  # of the first pass
        self.growth = AcceptanceByPosition(self.max_len)  # after it, where a draft went on
        self.copied = CopyAcceptance(self.max_len)
        self._balance = LookBalance()
        if self.copies and self.schedules_ahead and not self.drafts:
            self.ahead = CopiesAhead(self.costs.plain, self.max_len, self.clock)
        self._looked = False  # for copies, in the last step, and took no pass
        self.guard = Guard()
        self._looks = True  # at draft passes, in this step
        self._steps_without = 0  # a verified draft, in a row
        self._timer = StepTimer(self.clock)
        self._rate = 0.0  # tokens per ms that this step can expect
        self._ms = 0.0  # of the best step without passes
        self._running: frozenset[str] = frozenset()
        self._num_drafted = 0  # tokens that the next step verifies
        self._seen_lens: Lengths = np.zeros(0, dtype=np.int64)  # of the step that looks
        self._unlearned: list[Round] = []
        self._steps_to_learn = 0
        self._num_rested = 0  # steps in a row for which nobody has asked for drafts
        self._first_ms: list[float] = []  # of the first of those
        self._rested_ms: list[float] = []  # of the others that only decoded
        self._looks_over = 1.0  # looks that would be over if none had been left out

    def step_began(self, req_ids: Sequence[str], num_tokens: int) -> bool:
        """Returns whether to consider drafting in this step.

        Where it does not, the step is over for the planner.

        Args:
            num_tokens: that the target has just verified.
        """
        self.guard.rested(self._num_rested)
        self._balance.steps_to_rest -= self._num_rested
        sizes, ms = self._timer.lap()
        # a request that is new may have come to an idle engine
        known = self._running.issuperset(req_ids)
        drafted = bool(sizes) or self._num_drafted > 0
        looks = self._looks = self.guard.step_began(len(req_ids), drafted) and self.drafts
        looks_for_copies = self.copies and self._balance.step_began(len(req_ids))
        if self.learns and (sizes or known or self._rested_ms):
            self._learn_times(sizes, ms, len(req_ids), num_tokens, known)
        self._looks_over = max(1.0, self._num_rested / REST_STEPS)
        self._looked, self._num_rested, self._first_ms, self._rested_ms = False, 0, [], []
        if not (looks or looks_for_copies):
            self.step_ended(req_ids, 0)
        return looks or looks_for_copies

    def rested(self, req_ids: Sequence[str], num_tokens: int) -> None:
        """A step for which nobody has asked for drafts, see `Planner`; costs next to nothing."""
        self._num_rested += 1
        ms = self._timer.rested()
        decodes = num_tokens == len(req_ids) and self._running.issuperset(req_ids)
        if decodes:
            (self._rested_ms if self._num_rested > FIRST_STEPS else self._first_ms).append(ms)
        self._running = frozenset(req_ids)

    @property
    def steps_to_look(self) -> int:
        """See `Planner`."""
        rests = [self.guard.steps_to_rest] if self.drafts else []
        if self.copies:
            rests.append(self._balance.steps_to_rest)
        return 1 + max(0, min(rests) - self._num_rested)

    @property
    def fewest_at_rest(self) -> float:
        """See `Planner`."""
        return self.guard.fewest_at_rest

    def _learn_times(
        self,
        sizes: list[tuple[int, int]],
        ms: list[float],
        num_seqs: int,
        num_tokens: int,
        known: bool,
    ) -> None:
        """Learn what the last drafts, the steps of a rest and this step of the target took.

        Args:
            sizes, ms: see `StepTimer.lap`.
            num_tokens: in the target's step.
            known: no request is new; else the step's time says nothing.
        """
        first_ms = sum(self._first_ms)
        drafting_ms, waited_ms, *more_ms = self.agree([*ms, first_ms, *self._rested_ms])
        passes_ms, (first_ms, *rested_ms) = more_ms[: len(sizes)], more_ms[len(sizes) :]
        self.costs.rested(len(self._running), rested_ms)
        if sizes:
            counted = self.costs.learn_drafting(sizes, passes_ms, drafting_ms)
            verify_ms = float(self.costs.verify(self._num_drafted + num_seqs))
            slowness = waited_ms / verify_ms if known else 1.0
            overhead_ms = drafting_ms - sum(passes_ms)
            self.guard.round_took(num_seqs, counted, overhead_ms, verify_ms, slowness)
        elif self._looked and known:
            if self.schedules_ahead and not (self._num_drafted or self._num_rested):
                drafting_ms += max(0.0, waited_ms - float(self.costs.plain(num_seqs)))
            self._balance.took(drafting_ms)
        if known and self._num_drafted:
            self.costs.verify.correct(num_tokens, waited_ms)
        elif known and self.guard.knows_plain:
            if not self.schedules_ahead:
                self.costs.plain.correct(num_tokens, waited_ms)
            rested = self._num_rested >= REST_STEPS and len(self._first_ms) == FIRST_STEPS
            if rested and num_tokens == num_seqs:
                steps_ms = first_ms + waited_ms
                self.costs.looked(num_seqs, drafting_ms, steps_ms, FIRST_STEPS + 1)

    def step_ended(self, req_ids: Sequence[str], num_drafted: int) -> None:
        """The drafts of the step are made, see `Planner`."""
        self._running, self._num_drafted = frozenset(req_ids), num_drafted
        self._timer.drafting_ended()

    def stood_still(self, seconds: float) -> None:
        """For so long nobody has asked the engine for its next step."""
        self._timer.stood_still(seconds)
        if self.ahead is not None:
            self.ahead.stood_still(seconds)

    def pass_took(self, size: tuple[int, int], ms: float) -> None:
        """A draft pass, see `Planner`."""
        self._timer.pass_took(size, ms)

    def observe(self, rounds: Sequence[Round]) -> None:
        """Learn from a step's verified drafts, a few steps later; without any, forget a little."""
        if not any(r.num_first for r in rounds) and self._looks:
            for learned in (self.acceptance, self.growth, self.costs):
                learned.forget(self._looks_over)
        self._steps_without = 0 if rounds else self._steps_without + 1
        if self.copies and self._steps_without > REST_STEPS:  # what made copies stop may be over
            self._steps_without = 0
            self.costs.verify.forget()
            self.copied.forget()
        if not rounds:
            return
        self.guard.accepted(sum(r.num_accepted for r in rounds), len(self._running))
        self._unlearned.extend(rounds)
        self._steps_to_learn -= 1
        if self._steps_to_learn > 0:
            return
        self._steps_to_learn = LEARNING_STEPS
        drafted = [r for r in self._unlearned if r.num_first]
        if drafted:
            learn(drafted, self.calibration, self.acceptance, self.growth)
        self.copied.observe(self._unlearned)
        self._unlearned = []

    def first(self, asked: FirstPass) -> tuple[Lengths, Lengths]:
        """Increments of the first pass and copies, as in `Planner`; all 0 where none pays."""
        nothing = passes = np.zeros_like(asked.wanted)
        if not asked.wanted.any():
            return nothing, nothing
        plain_ms = float(self.costs.plain(len(nothing)))
        copied, gains = self._copies(asked.wanted, asked.match_lens, plain_ms)
        self._looked = self.copies
        if self._looks:
            self._seen_lens = asked.seen_lens
            passes, copied = self._passes(asked, copied, gains, plain_ms)
        if self.learns and (passes.any() or copied.any()) and self._probes():
            return nothing, nothing
        return passes, copied

    def _probes(self) -> bool:
        """Returns whether to do without drafts for now, to time plain decoding."""
        if not self.schedules_ahead:
            return self.guard.probes()
        probes = self.guard.probes(in_a_row=1)
        if probes:
            self.guard.steps_to_rest = self._balance.steps_to_rest = PROBE_AHEAD
        return probes

    def _copies(
        self, wanted: Lengths, match_lens: Lengths, plain_ms: float
    ) -> tuple[Lengths, Floats]:
        """The best step without passes: [num_seqs] lengths of copies, and tokens they bring."""
        num_seqs, ms = len(wanted), plain_ms
        copied, gains = np.zeros_like(wanted), np.zeros(num_seqs)
        if match_lens.any():
            survival = self.copied.survival(match_lens)
            # where no draft was short, only the slope of its time is known
            lift_ms = max(0.0, plain_ms - float(self.costs.verify(num_seqs)))
            lift_ms += self._balance.cost_ms

            def verify(num_tokens: Lengths) -> Floats:
                return self.costs.verify(num_tokens) + lift_ms

            copied = choose_copies(survival, wanted, verify, plain_ms)
            gains = np.where(np.arange(self.max_len) < copied[:, None], survival, 0.0).sum(axis=1)
            ms = float(verify(num_seqs + copied.sum())) if copied.any() else plain_ms
        self._rate, self._ms = (num_seqs + float(gains.sum())) / ms, ms
        if self.copies:
            saved_ms = self._rate * ms * plain_ms / num_seqs - ms
            gain_ms = saved_ms + self._balance.cost_ms * bool(copied.any())
            self._balance.looked(gain_ms, self._looks_over, self.costs.rest_steps(num_seqs))
        return copied, gains

    def _passes(
        self, asked: FirstPass, copied: Lengths, copy_gains: Floats, plain_ms: float
    ) -> tuple[Lengths, Lengths]:
        """Increments of the first pass, [num_seqs], and what is copied by the other sequences."""
        nothing, num_seqs = np.zeros_like(asked.wanted), len(asked.wanted)
        options = self._expected(asked, copied, copy_gains)
        tokens, ms, backlog_ms = options.tokens, options.ms, options.backlog_ms
        ms[0] = self._ms / (1.0 if self.guard.is_drafting or copied.any() else MARGIN)
        rates = options.fair_tokens / ms
        option = 1 + int(rates[1:].argmax())
        if copied.any() and rates[0] >= MARGIN * rates[option]:
            return nothing, copied  # says nothing about steps without copies
        loss_ms = np.inf  # of a try, from which only a planner that learns has something
        if self.learns:
            lost_ms = ms[option] - tokens[option] / num_seqs * plain_ms
            loss_ms = float(TRY_ROUNDS * lost_ms + backlog_ms[option])
        highest, rest_steps = int(rates.argmax()), self.costs.rest_steps(num_seqs)
        best = self.guard.decide(highest, option, loss_ms, num_seqs, self.costs.plain, rest_steps)
        if not best:
            return nothing, copied
        self._rate = float(tokens[best] / ms[best])
        passes = options.lens_of(best)
        return passes, np.where(passes > 0, 0, copied)

    def _expected(self, asked: FirstPass, copied: Lengths, copy_gains: Floats) -> Options:
        """What the first pass brings and takes: each length of it, with and without long commits.

        Of a batch some may have a long prompt to commit that no drafts are worth. So those with
        the least come first, and the pass may end wherever the next has far more.
        """
        order, lasts = least_commits_first(asked.commit_rows)
        wanted, live_rows, commit_rows, seen, _ = (values[order] for values in asked)
        num_seqs = len(wanted)
        longest = np.arange(1, int(wanted.max()) + 1)  # one pass may fill a long draft
        lens = np.minimum(longest[:, None], wanted)  # [options, num_seqs]
        gains = self.acceptance.gains(0, lens)
        by_pass = MARGIN * gains > copy_gains[order]  # the others copy

        def total(values: npt.NDArray[Any], without: float = 0.0) -> Floats:
            """Up to each of the last sequences: [1 + options * num_lasts]."""
            sums = np.where(by_pass, values, 0).cumsum(axis=1)[:, lasts]
            return without + np.concatenate(([0.0], sums.ravel()))

        tokens = total(gains - copy_gains[order], num_seqs + float(copy_gains.sum()))
        verified = total(lens - copied[order], num_seqs + float(copied.sum()))
        # every token that comes out is committed once
        rows = total(lens + live_rows) + tokens
        ends = seen + live_rows + lens
        scores = total(num_scores(seen[:, None], ends[..., None]))
        draft_ms = self.costs.draft_ms(rows, scores)
        ms = draft_ms + self.costs.verify(verified) + self.costs.overhead_ms
        scores = total(num_scores((seen - commit_rows)[:, None], ends[..., None]))
        backlog_ms = self.costs.draft_ms(rows + total(commit_rows), scores) - draft_ms
        ms += backlog_ms / AMORTISED_ROUNDS
        fair_tokens = even_out(tokens, 1.0 + copy_gains[order], lasts)
        lens = np.where(by_pass, lens, 0)
        return Options(tokens, fair_tokens, ms, backlog_ms, lens, order, lasts)

    def following(
        self,
        wanted: Lengths,
        live_rows: Lengths,
        first_lens: Lengths,
        draft_lens: Lengths,
        confidences: npt.NDArray[np.floating],
    ) -> Lengths:
        """Increments of the next pass, as in `Planner`: those whose expected tokens pay."""
        increments = np.minimum(wanted, self.draft_increment)
        going = np.flatnonzero(increments)
        if not going.size:
            return increments
        survival = self.calibration.survival(confidences, draft_lens)[going, draft_lens[going] - 1]
        gains = survival * self.growth.gains((draft_lens - first_lens)[going], increments[going])
        order = np.argsort(-gains, kind="stable")
        seqs = going[order]
        num_tokens = len(wanted) + int(draft_lens.sum())
        rows, seen = (increments + live_rows)[seqs], self._seen_lens[seqs]
        scores = num_scores(seen[:, None], (seen + rows)[:, None])
        more_tokens, more_rows, more_scores, more_gain = (
            np.concatenate(([0], values.cumsum()))
            for values in (increments[seqs], rows, scores, gains[order])
        )
        ms = self.costs.draft_ms(more_rows, more_scores)
        ms += self.costs.verify(num_tokens + more_tokens)
        values = more_gain - self._rate * (ms - ms[0])
        best = int(values.argmax())
        increments[seqs[best:]] = 0
        return increments

    def keep(
        self,
        draft_lens: Lengths,
        num_confidences: Lengths,
        confidences: npt.NDArray[np.floating],
        match_lens: Lengths,
    ) -> Lengths:
        """How much of each draft is worth verifying, as in `Planner`."""
        longest = int(draft_lens.max(initial=0))
        if not longest:
            return draft_lens
        survival = self.calibration.survival(confidences[:, :longest], num_confidences)
        if (draft_lens > num_confidences).any():
            copies = self.copied.survival(match_lens)
            places = np.arange(longest) - num_confidences[:, None]  # in the copy
            survival *= np.where(places < 0, 1.0, np.take_along_axis(copies, places.clip(0), 1))
        seqs, places = np.nonzero(np.arange(longest) < draft_lens[:, None])
        gains = survival[seqs, places]
        order = np.argsort(-gains, kind="stable")  # of equals the earlier: drafts stay whole
        counts = np.arange(len(order) + 1)
        ms = self.costs.verify(len(draft_lens) + counts)
        values = np.concatenate(([0.0], gains[order].cumsum())) - self._rate * (ms - ms[0])
        best = int(values.argmax())
        return np.bincount(seqs[order[:best]], minlength=len(draft_lens))
