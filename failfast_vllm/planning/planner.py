"""How much to draft at this load: what the next tokens are expected to bring, and what they cost.

Throughput is (tokens emitted) / (draft time + verification time). Three choices per step, each over
the whole batch:

- `LoadPlanner.first`: the length of the first pass that maximises it; 0 where no draft is best.
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

import numpy as np
import numpy.typing as npt

from failfast_vllm.drafting.interfaces import Planner
from failfast_vllm.drafting.records import LOAD, Lengths, Round
from failfast_vllm.planning.acceptance import AcceptanceByPosition, Calibration, learn
from failfast_vllm.planning.costs import Costs, Floats, StepTimer
from failfast_vllm.planning.guard import AMORTISED_ROUNDS, TRY_ROUNDS, Guard

# Hysteresis: start drafting only for a gain of a tenth, since times and acceptance are estimates
# and a start costs commits; continue while at least break-even.
MARGIN = 1.1
LEARNING_STEPS = 8  # steps whose drafts are learned from at once


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
    calibration: Calibration = field(default_factory=Calibration)
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        self.acceptance = AcceptanceByPosition(self.max_len)  # of the first pass
        self.growth = AcceptanceByPosition(self.max_len)  # after it, where a draft went on
        self.guard = Guard()
        self._timer = StepTimer(self.clock)
        self._rate = 0.0  # tokens per ms that this step can expect
        self._running: frozenset[str] = frozenset()
        self._num_drafted = 0  # tokens that the next step verifies
        self._unlearned: list[Round] = []
        self._steps_to_learn = 0

    def step_began(self, req_ids: Sequence[str], num_tokens: int) -> bool:
        """Returns whether to consider drafting in this step.

        Where it does not, the step is over for the planner.

        Args:
            num_tokens: that the target has just verified.
        """
        rows, ms = self._timer.lap()
        # a request that is new may have come to an idle engine
        known = self._running.issuperset(req_ids)
        looks = self.guard.step_began(len(req_ids), drafted=bool(rows))
        times_step = known and self.guard.times_step(looks)
        if self.learns and (rows or times_step):
            self._learn_times(rows, ms, len(req_ids), num_tokens if times_step else 0, known)
        self._num_drafted = 0
        if not looks:
            self.step_ended(req_ids)
        return looks

    def _learn_times(
        self, rows: list[int], ms: list[float], num_seqs: int, num_tokens: int, known: bool
    ) -> None:
        """Learn what the drafts of the last step and this step of the target took.

        Args:
            rows, ms: see `StepTimer.lap`.
            num_tokens: in the target's step; 0 = its time says nothing.
            known: no request is new.
        """
        drafting_ms, waited_ms, *passes_ms = self.agree(ms)
        if rows:
            counted = self.costs.learn_drafting(rows, passes_ms, drafting_ms)
            verify_ms = float(self.costs.verify(self._num_drafted + num_seqs))
            slowness = waited_ms / verify_ms if known else 1.0
            overhead_ms = drafting_ms - sum(passes_ms)
            self.guard.round_took(num_seqs, counted, overhead_ms, verify_ms, slowness)
        if num_tokens and self._num_drafted:
            self.costs.verify.correct(num_tokens, waited_ms)
        elif num_tokens and self.guard.knows_plain:
            self.costs.plain.correct(num_tokens, waited_ms)

    def step_ended(self, req_ids: Sequence[str]) -> None:
        """The drafts of the step are made; the target is next."""
        self._running = frozenset(req_ids)
        self._timer.drafting_ended()

    def stood_still(self, seconds: float) -> None:
        """For so long nobody has asked the engine for its next step."""
        self._timer.stood_still(seconds)

    def pass_took(self, num_rows: int, ms: float) -> None:
        """A draft pass, from planning its rows to its tokens."""
        self._timer.pass_took(num_rows, ms)

    def observe(self, rounds: Sequence[Round]) -> None:
        """Learn from a step's verified drafts, a few steps later; without any, forget a little."""
        if not rounds:
            for learned in (self.acceptance, self.growth, self.costs):
                learned.forget()
            return
        self.guard.accepted(sum(r.num_accepted for r in rounds), len(self._running))
        self._unlearned.extend(rounds)
        self._steps_to_learn -= 1
        if self._steps_to_learn > 0:
            return
        self._steps_to_learn = LEARNING_STEPS
        learn(self._unlearned, self.calibration, self.acceptance, self.growth)
        self._unlearned = []

    def first(self, wanted: Lengths, live_rows: Lengths, commit_rows: Lengths) -> Lengths:
        """Increments of the first pass, as in `Planner`; all 0 where drafting does not pay."""
        drafting = wanted > 0
        if not drafting.any():
            return np.zeros_like(wanted)
        num_seqs = len(wanted)
        tokens, ms, backlog_ms = self._expected(
            num_seqs,
            wanted[drafting],
            int(live_rows[drafting].sum()),
            int(commit_rows[drafting].sum()),
        )
        plain_ms = float(self.costs.plain(num_seqs))
        ms[0] = plain_ms / (1.0 if self.guard.is_drafting else MARGIN)
        rates = tokens / ms
        option = 1 + int(rates[1:].argmax())
        loss_ms = np.inf  # of a try, from which only a planner that learns has something
        if self.learns:
            lost_ms = ms[option] - tokens[option] / num_seqs * plain_ms
            loss_ms = float(TRY_ROUNDS * lost_ms + backlog_ms[option])
        best = self.guard.decide(int(rates.argmax()), option, loss_ms, num_seqs, self.costs.plain)
        self._rate = float(rates[best])
        if best and self.learns and self.guard.probes():
            best = 0
        return np.where(drafting, np.minimum(best, wanted), 0)

    def _expected(
        self, num_seqs: int, wanted: Lengths, live_rows: int, commit_rows: int
    ) -> tuple[Floats, Floats, Floats]:
        """By length of the first pass, from 0: [longest + 1] each.

        Args:
            wanted: of the sequences that may draft; the others emit a token each.
            live_rows, commit_rows: summed over these sequences.

        Returns:
            Tokens that the step emits, its ms, and the ms of committing what was skipped, of which
            the step's ms include a share.
        """
        options = np.arange(int(wanted.max()) + 1)  # one pass may fill a long draft
        lens = np.minimum(options[:, None], wanted)  # [options, num_drafting]
        tokens = num_seqs + self.acceptance.gains(0, lens).sum(axis=1)
        drafted = lens.sum(axis=1)
        rows = drafted + live_rows + tokens  # every token that comes out is committed once
        draft_ms = self.costs.draft(rows)
        ms = draft_ms + self.costs.verify(num_seqs + drafted) + self.costs.overhead_ms
        backlog_ms = self.costs.draft(rows + commit_rows) - draft_ms
        ms += backlog_ms / AMORTISED_ROUNDS
        return tokens, ms, backlog_ms

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
        more_tokens, more_rows, more_gain = (
            np.concatenate(([0], values.cumsum()))
            for values in (increments[seqs], (increments + live_rows)[seqs], gains[order])
        )
        ms = self.costs.draft(more_rows) + self.costs.verify(num_tokens + more_tokens)
        values = more_gain - self._rate * (ms - ms[0])
        best = int(values.argmax())
        increments[seqs[best:]] = 0
        return increments

    def keep(
        self, draft_lens: Lengths, num_confidences: Lengths, confidences: npt.NDArray[np.floating]
    ) -> Lengths:
        """How much of each draft is worth verifying, as in `Planner`."""
        longest = int(draft_lens.max(initial=0))
        if not longest:
            return draft_lens
        survival = self.calibration.survival(confidences[:, :longest], num_confidences)
        seqs, places = np.nonzero(np.arange(longest) < draft_lens[:, None])
        gains = survival[seqs, places]
        order = np.argsort(-gains, kind="stable")  # of equals the earlier: drafts stay whole
        counts = np.arange(len(order) + 1)
        ms = self.costs.verify(len(draft_lens) + counts)
        values = np.concatenate(([0.0], gains[order].cumsum())) - self._rate * (ms - ms[0])
        best = int(values.argmax())
        self._num_drafted = best
        return np.bincount(seqs[order[:best]], minlength=len(draft_lens))
