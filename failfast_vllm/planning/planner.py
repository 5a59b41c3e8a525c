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

Everything is deterministic in what it is given, so that the ranks of a tensor-parallel group agree:
they learn the times of the first rank. NumPy only.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from failfast_vllm.drafting.records import LOAD
from failfast_vllm.planning.calibration import Calibration, Verified

logger = logging.getLogger("vllm.failfast")

Lengths = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Committing what was skipped pays over the rounds that follow; answers may end after few.
AMORTISED_ROUNDS = 4
# To take up drafting, it must promise this much more than none: times and acceptance are only
# estimates, and to and fro costs commits. To go on, as much is enough.
MARGIN = 1.1
# Drafting is judged when it ends, after so many rounds, or when it has lost more than some steps
# without drafts take. Where it was slower than none twice in a row, it is not tried again at this
# load before the last loss is so small a share of the time since.
SPELL_ROUNDS, LOST_STEPS = 32, 8
ACCEPTED_LOSS = 0.02
# Where drafting seems not to pay, the tables may be wrong, and nothing but a try can tell: so many
# rounds, the first where they are expected to lose at most what so many steps without drafts take,
# later that share of the time since. Each loss in a row makes the wait longer, up to so many.
TRY_ROUNDS, TRY_STEPS, TRY_LOSS, MAX_LOST = 2, 4, 0.01, 8
# Two steps of plain decoding among many with drafts, to know what the second takes: the first finds
# caches that are full of drafting.
PROBE_STEPS, PLAIN_IN_A_ROW = 96, 2
# Where drafting does not pay, this many steps are not looked at.
REST_STEPS = 16
PRIOR_ACCEPTANCE, PRIOR_TRIALS = 0.85, 8.0
UNTRIED = 0.97  # acceptance of a position that was never tried, of that before it
DECAY = 0.995  # per observed round: a memory of about 200 rounds
FORGETTING = 0.01  # per look without drafts: what was learned long ago gets another try
LEARNING_STEPS = 8  # steps whose drafts are learned from at once
FAR = 1e7  # rows; a table goes on to there
HICCUP = 4.0  # times what was expected: a time that is longer counts as that
COST_MEMORY = 20.0  # measurements near a size that its time is averaged over


class CostTable:
    """Milliseconds by size, linear between measured sizes and beyond the last.

    Args:
        sizes: rising, at least one.
        ms: measured times. What else runs can only add to them, and more rows never cost less than
            fewer: no size takes more than a larger one was seen to take.
    """

    def __init__(self, sizes: list[int], ms: list[float]) -> None:
        assert len(sizes) == len(ms) > 0
        self.sizes = np.array(sizes, dtype=np.float64)
        # 0 rows take nothing, less than measured as much as the least, more than it ever more
        self._knots = np.concatenate(([0.0, 1e-9], self.sizes, [FAR]))
        self._values = np.zeros(len(self._knots))
        self._set(np.minimum.accumulate(np.array(ms, dtype=np.float64)[::-1])[::-1])
        self._start = self._values.copy()
        self._extra = np.zeros(len(sizes))  # found while serving, on top of that
        self._weights = np.zeros(len(sizes))
        self._nearness: dict[int, tuple[Floats, Floats]] = {}  # by size that was measured

    @property
    def ms(self) -> Floats:
        """Time by size: a view, made anew each time, since a pickled one would be a copy."""
        return self._values[2:-1]

    def __call__(self, size: npt.NDArray[Any] | list[int] | float) -> Floats:
        """Time of a pass of `size` rows; 0 for 0 rows."""
        return np.asarray(np.interp(size, self._knots, self._values))

    def _set(self, ms: Floats) -> None:
        self.ms[:] = np.maximum.accumulate(ms)
        self._values[1] = self.ms[0]
        slope = self.ms[-1] / self.sizes[-1]
        if len(ms) > 1:
            slope = (self.ms[-1] - self.ms[-2]) / (self.sizes[-1] - self.sizes[-2])
        self._values[-1] = self.ms[-1] + slope * (FAR - self.sizes[-1])

    def correct(self, size: int, ms: float) -> None:
        """Learn from a measured time: what it takes beyond the start-up time, near `size`.

        An average over the last measurements, weighted by how near they were; sizes that nothing
        was measured at follow the nearest ones, smaller ones in proportion. The time at start-up
        is one of them, unless this one refutes it: nothing takes less than it takes.
        """
        ms = min(ms, HICCUP * float(self(size)))
        start, start_here = self._start[2:-1], float(np.interp(size, self._knots, self._start))
        near = self._nearness.get(size)
        if near is None:
            nearness = np.exp(-3.0 * np.abs(np.log2(self.sizes / size)))  # .05 at half and double
            below = max(int(np.searchsorted(self.sizes, size, "right")) - 1, 0)
            share = np.ones(len(start))
            share[:below] = start[:below] / start_here
            near = self._nearness[size] = nearness, share
        nearness, share = near
        at_start = nearness
        if ms < start_here:  # the machine was busy at the start, for all sizes
            at_start, share = 0.0 * nearness, start / start_here
        more = np.maximum(self._weights, at_start) + nearness
        # many measurements far away weigh less than one here
        self._weights = np.maximum(self._weights, np.minimum(more, COST_MEMORY * nearness))
        extra = (ms - start_here) * share
        self._extra += nearness / self._weights * (extra - self._extra)
        self._set(np.maximum(start + self._extra, 1e-6))

    def forget(self) -> None:
        """A look without drafts: move slowly back to the start-up times."""
        self._weights *= 1.0 - FORGETTING
        self._extra *= 1.0 - FORGETTING
        self._set(self._start[2:-1] + self._extra)


class Costs:
    """Times of this server's parts of a step.

    Args:
        draft: a draft pass, by rows.
        verify: a step of the target with all around it, by tokens.
    """

    def __init__(self, draft: CostTable, verify: CostTable) -> None:
        self.draft = draft
        self.verify = verify
        # a step without drafts takes less: it has its own measurements
        self.plain = CostTable(verify.sizes.astype(int).tolist(), verify.ms.tolist())


@dataclass
class Spell:
    """Rounds with drafts in a row, and what they took.

    What slows the whole machine down would slow steps without drafts down as well.
    """

    rounds: int = 0
    ms: float = 0.0
    plain_steps: float = 0.0  # that as many tokens take without drafts, times the slowness then
    slowness: float = 1.0  # of the last round's step of the target, against what it usually takes
    seqs: int = 0  # summed over the rounds
    is_try: bool = False

    def loss_ms(self, plain: CostTable) -> float:
        """Time lost against none."""
        return self.ms - self.plain_steps * float(plain(self.num_seqs))

    @property
    def num_seqs(self) -> float:
        return self.seqs / self.rounds


class AcceptanceByPosition:
    """P(token j is accepted | those before it were), learned from verification with decay.

    A position that was rarely tried is taken for a little worse than the one before it.
    """

    def __init__(self, max_len: int) -> None:
        self.trials = np.zeros(max_len)
        self.hits = np.zeros(max_len)
        self._sums: tuple[Floats, Floats] | None = None

    def observe(self, places: Lengths, alive: Floats, accepted: Floats) -> None:
        """Learn from tokens of drafts.

        Args:
            places: [n] position of each.
            alive: [n] chance that all before it were accepted: 1 or 0, between where not verified.
            accepted: [n] that it was, too.
        """
        max_len = len(self.trials)
        seen = np.bincount(places, alive, minlength=max_len)
        fading = DECAY**seen
        self.trials = self.trials * fading + seen
        self.hits = self.hits * fading + np.bincount(places, accepted, minlength=max_len)
        self._sums = None

    def forget(self) -> None:
        """A look without drafts: move slowly back to the prior."""
        self.trials *= 1.0 - FORGETTING
        self.hits *= 1.0 - FORGETTING
        self._sums = None

    def gains(self, starts: Lengths | int, lens: Lengths) -> Floats:
        """Tokens expected of positions `start : start + len` if all before are accepted."""
        survival, sums = self._survival()
        stops = np.minimum(starts + lens, len(self.trials))
        if isinstance(starts, int) and starts == 0:
            found: Floats = sums[stops]
            return found
        starts = np.minimum(starts, len(self.trials))
        gains: Floats = (sums[stops] - sums[starts]) / survival[starts]
        return gains

    def _survival(self) -> tuple[Floats, Floats]:
        """[max_len + 1] chance that the first i are all accepted, and its sum over 1 to i."""
        if self._sums is None:
            chance, alive = PRIOR_ACCEPTANCE / UNTRIED, 1.0
            survival = [alive]
            for trials, hits in zip(self.trials.tolist(), self.hits.tolist(), strict=True):
                chance = (hits + PRIOR_TRIALS * UNTRIED * chance) / (trials + PRIOR_TRIALS)
                alive = max(alive * chance, 1e-9)
                survival.append(alive)
            alive_up_to = np.array(survival)
            self._sums = alive_up_to, np.concatenate(([0.0], alive_up_to[1:].cumsum()))
        return self._sums


class Decision(NamedTuple):
    """One choice of the planner, for the log."""

    choice: str  # first: length of the pass; following: sequences that go on; keep: tokens
    num_seqs: int
    values: list[float]  # expected of each option from 0: tokens per second; later, net tokens
    chosen: int


class Drafted(Verified, Protocol):
    """What the planner learns from; `policy.Round` is one."""

    @property
    def num_first(self) -> int: ...


@dataclass
class LoadPlanner:
    """Chooses what raises the expected tokens per second of the whole batch.

    Args:
        costs: measured times.
        max_len: most tokens of a draft.
        draft_increment: tokens of each pass after the first.
        learns: whether the costs follow what passes and steps take.
        agree: what this rank has measured, in ms -> what the first rank has. Called on all ranks in
            the same steps.
    """

    postpones_commits = True
    refusal = LOAD

    costs: Costs
    max_len: int
    draft_increment: int
    learns: bool = False
    agree: Callable[[list[float]], list[float]] = list
    calibration: Calibration = field(default_factory=Calibration)  # of the drafter's confidences
    _rate: float = field(default=0.0, repr=False)  # tokens per ms that this step can expect
    # rows and measured time of each pass of this step
    _passes: list[tuple[int, float]] = field(default_factory=list, repr=False)
    _overhead_ms: float = field(default=0.0, repr=False)  # of drafting, outside the passes
    _began: float = field(default=0.0, repr=False)
    _steps_to_probe: int = field(default=REST_STEPS, repr=False)
    _num_plain: int = field(default=0, repr=False)  # steps without drafts, in a row
    _steps_to_rest: int = field(default=0, repr=False)
    _rests_from: int = field(default=0, repr=False)  # sequences
    _spell: Spell = field(default_factory=Spell, repr=False)
    _lost: Spell | None = field(default=None, repr=False)  # the last one that was slower than none
    _num_lost: int = field(default=0, repr=False)  # in a row
    _paid_ms: float = field(default=0.0, repr=False)  # time since without drafts
    _waits_since: float = field(default=0.0, repr=False)
    _running: frozenset[str] = field(default=frozenset(), repr=False)
    _num_drafted: int = field(default=0, repr=False)  # tokens that the next step verifies
    _unlearned: list[Drafted] = field(default_factory=list, repr=False)
    _steps_to_learn: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        self.acceptance = AcceptanceByPosition(self.max_len)  # of the first pass
        self.growth = AcceptanceByPosition(self.max_len)  # behind it, where a draft went on

    def step_began(self, req_ids: Sequence[str], num_tokens: int) -> bool:
        """The target has just verified `num_tokens` tokens: whether to look at drafting at all.

        Not in the steps after one in which drafting did not pay, unless the load has fallen.
        """
        now, drafts = time.perf_counter(), bool(self._passes)
        self._steps_to_rest -= 1
        looks = self._steps_to_rest < 0 or len(req_ids) < 0.8 * self._rests_from
        # a request that is new may have come to an idle engine; rests are much alike
        known = self._running.issuperset(req_ids)
        if self._spell.rounds and not 0.8 <= len(req_ids) / self._spell.num_seqs <= 1.25:
            self._spell = Spell()  # another load: what has paid so far says nothing
        self._num_plain = 0 if drafts else self._num_plain + 1
        times_step = known and (looks or self._steps_to_rest % 4 == 0)
        if self.learns and (drafts or times_step):
            self._learn_times(now, len(req_ids), num_tokens if times_step else 0, known)
        self._began, self._num_drafted = now, 0
        self._passes.clear()
        if not looks:
            self.step_ended(req_ids)
        return looks

    def _learn_times(self, now: float, num_seqs: int, num_tokens: int, known: bool) -> None:
        """What the drafts of the last step and this step of the target took.

        Args:
            num_tokens: in the target's step; 0 = its time says nothing.
            known: no request is new.
        """
        measured = [self._waits_since - self._began, now - self._waits_since]
        drafting_ms, waited_ms, *passes_ms = self.agree(
            [seconds * 1e3 for seconds in measured] + [ms for _, ms in self._passes]
        )
        if passes_ms:
            spell, overhead_ms = self._spell, drafting_ms - sum(passes_ms)
            for (num_rows, _), ms in zip(self._passes, passes_ms, strict=True):
                spell.ms += min(ms, HICCUP * float(self.costs.draft(num_rows)))
                self.costs.draft.correct(num_rows, ms)
            verify_ms = float(self.costs.verify(self._num_drafted + num_seqs))
            slowness = waited_ms / verify_ms if known else 1.0
            spell.slowness = min(max(slowness, 1.0 / HICCUP), HICCUP)
            spell.rounds += 1
            spell.ms += overhead_ms + verify_ms * spell.slowness
            spell.plain_steps += spell.slowness
            spell.seqs += num_seqs
            overhead_ms = min(overhead_ms, sum(passes_ms))  # a hiccup moves little
            self._overhead_ms += 0.1 * (overhead_ms - self._overhead_ms)
        if num_tokens and self._num_drafted:
            self.costs.verify.correct(num_tokens, waited_ms)
        elif num_tokens and self._num_plain >= PLAIN_IN_A_ROW:
            self.costs.plain.correct(num_tokens, waited_ms)

    def step_ended(self, req_ids: Sequence[str]) -> None:
        """The drafts of the step are made; the target is next."""
        self._running = frozenset(req_ids)
        self._waits_since = time.perf_counter()

    def stood_still(self, seconds: float) -> None:
        """For so long nobody has asked the engine for its next step."""
        self._began += seconds
        self._waits_since += seconds

    def pass_took(self, num_rows: int, ms: float) -> None:
        """A draft pass, from planning its rows to its tokens."""
        self._passes.append((num_rows, ms))

    def observe(self, outcomes: Sequence[Drafted]) -> None:
        """Learn from a step's verified drafts, a few steps later; without any, forget a little."""
        if not outcomes:
            for learned in (self.acceptance, self.growth, self.costs.draft, self.costs.verify):
                learned.forget()
            return
        if self._spell.rounds:
            accepted = sum(o.num_accepted for o in outcomes)
            self._spell.plain_steps += self._spell.slowness * accepted / len(self._running)
        self._unlearned.extend(outcomes)
        self._steps_to_learn -= 1
        if self._steps_to_learn > 0:
            return
        self._steps_to_learn = LEARNING_STEPS
        outcomes, self._unlearned = self._unlearned, []
        firsts, drafted, verified, accepted = np.array(
            [(o.num_first, len(o.confidences), o.num_verified, o.num_accepted) for o in outcomes]
        ).T[:, :, None]
        places = np.arange(max(int(firsts.max()), int(drafted.max())))
        confidences = np.ones((len(outcomes), len(places)), dtype=np.float32)
        confidences[places < drafted] = np.concatenate([o.confidences for o in outcomes])
        # what was drafted and not verified is taken for as good as its confidence
        chances = self.calibration.probabilities(confidences, places)
        chances[places >= drafted] = 0.0
        chances[places < accepted] = 1.0
        chances[(places == accepted) & (accepted < verified)] = 0.0
        alive = np.pad(chances.cumprod(axis=1), ((0, 0), (1, 0)), constant_values=1.0)
        for table, asked, begin in (
            (self.acceptance, places < firsts, np.zeros_like(firsts)),
            (self.growth, (places >= firsts) & (places < drafted), firsts),
        ):
            where = (places - begin)[asked]
            table.observe(where, alive[:, :-1][asked], alive[:, 1:][asked])
        self.calibration.observe(outcomes)

    def first(self, wanted: Lengths, live_rows: Lengths, commit_rows: Lengths) -> Lengths:
        """Increments of the first pass, [num_seqs]; all 0 where drafting does not pay.

        Args:
            wanted: [num_seqs] most tokens that each may draft.
            live_rows: [num_seqs] known tokens that a pass encodes again.
            commit_rows: [num_seqs] tokens whose blocks a pass would commit.
        """
        drafting = wanted > 0
        if not drafting.any():
            return np.zeros_like(wanted)
        num_seqs = len(wanted)
        wanted_here, live = wanted[drafting], int(live_rows[drafting].sum())
        options = np.arange(int(wanted_here.max()) + 1)  # one pass may fill a long draft
        lens = np.minimum(options[:, None], wanted_here)  # [options, num_drafting]
        tokens = num_seqs + self.acceptance.gains(0, lens).sum(axis=1)
        drafted = lens.sum(axis=1)
        rows = drafted + live + tokens  # every token that comes out is committed once
        draft_ms = self.costs.draft(rows)
        ms = draft_ms + self.costs.verify(num_seqs + drafted) + self._overhead_ms
        backlog_ms = self.costs.draft(rows + int(commit_rows[drafting].sum())) - draft_ms
        ms += backlog_ms / AMORTISED_ROUNDS  # pays over the rounds that follow
        plain_ms = float(self.costs.plain(num_seqs))
        ms[0] = plain_ms / (1.0 if self._spell.rounds else MARGIN)
        rates = tokens / ms
        best = int(rates.argmax())
        option = 1 + int(rates[1:].argmax())
        loss_ms = TRY_ROUNDS * (ms - tokens / num_seqs * plain_ms) + backlog_ms
        tries = best == 0 and self._tries(float(loss_ms[option]), plain_ms)
        if self._judge(ends=best == 0 and not tries):
            tries = False
        if self._owes(num_seqs):
            best = 0
        elif tries:
            best, self._spell.is_try = option, True
        self._rate = float(rates[best])
        if best == 0:
            self._steps_to_rest, self._rests_from = REST_STEPS, num_seqs
            self._paid_ms += (REST_STEPS + 1) * plain_ms
        elif self.learns:
            self._steps_to_probe -= 1
            best = best if self._steps_to_probe >= PLAIN_IN_A_ROW else 0
            self._steps_to_probe = self._steps_to_probe or PROBE_STEPS
        self._decided("first", num_seqs, rates * 1e3, best)
        return np.where(drafting, np.minimum(best, wanted), 0)

    def _tries(self, loss_ms: float, plain_ms: float) -> bool:
        """Whether to draft for a few rounds although it seems not to pay: times may be wrong.

        Args:
            loss_ms: what they are expected to lose against none.
            plain_ms: a step without drafts.
        """
        if self._spell.rounds or not self.learns:
            return self._spell.is_try and self._spell.rounds < TRY_ROUNDS
        accepted_ms = TRY_LOSS * self._paid_ms
        if self._lost is None:
            return loss_ms <= accepted_ms + TRY_STEPS * plain_ms
        loss_ms = max(loss_ms, self._lost.loss_ms(self.costs.plain))
        return loss_ms * min(max(self._num_lost, 1), MAX_LOST) <= accepted_ms

    def _judge(self, ends: bool) -> bool:
        """Remember a spell of drafting that was slower than none: whether one is over.

        Args:
            ends: it is over, however short and cheap it was.
        """
        spell, plain = self._spell, self.costs.plain
        if not spell.rounds:
            return False
        loss_ms = spell.loss_ms(plain)
        # twice as much in the first rounds: what they commit pays later
        lost_steps = LOST_STEPS if spell.rounds >= AMORTISED_ROUNDS else 2 * LOST_STEPS
        too_much = loss_ms > lost_steps * float(plain(spell.num_seqs))
        if not (ends or too_much or spell.rounds >= SPELL_ROUNDS):
            return False
        self._spell = Spell()
        again = self._lost is not None and spell.num_seqs >= 0.8 * self._lost.num_seqs
        if loss_ms > 0:
            self._lost, self._paid_ms = spell, 0.0
            self._num_lost = self._num_lost + 1 if again else 1
        elif again:
            self._num_lost = 0
        return True

    def _owes(self, num_seqs: int) -> bool:
        """Whether what drafting has lost at this load, or a lower one, is not paid off yet."""
        if self._lost is None or self._num_lost < 2 or num_seqs < 0.8 * self._lost.num_seqs:
            return False
        return self._lost.loss_ms(self.costs.plain) > ACCEPTED_LOSS * self._paid_ms

    def following(
        self,
        wanted: Lengths,
        live_rows: Lengths,
        first_lens: Lengths,
        draft_lens: Lengths,
        confidences: npt.NDArray[np.floating],
    ) -> Lengths:
        """Increments of the next pass, [num_seqs]; 0 = that draft is complete.

        Args:
            wanted: [num_seqs] most tokens that each may still draft; 0 where the policy stopped.
            live_rows: [num_seqs] known and drafted tokens that a pass encodes again.
            first_lens: [num_seqs] tokens of the first pass.
            draft_lens: [num_seqs] tokens drafted so far.
            confidences: [num_seqs, longest] of the tokens drafted so far.
        """
        increments = np.minimum(wanted, self.draft_increment)
        going = np.flatnonzero(increments)
        if not going.size:
            return increments
        survival = self._survival(draft_lens, confidences)[going, draft_lens[going] - 1]
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
        self._decided("following", len(going), values, best)
        increments[seqs[best:]] = 0
        return increments

    def keep(
        self, draft_lens: Lengths, num_confidences: Lengths, confidences: npt.NDArray[np.floating]
    ) -> Lengths:
        """How much of each draft is worth verifying, [num_seqs].

        Args:
            draft_lens: [num_seqs] tokens drafted.
            num_confidences: [num_seqs] of them with a confidence; the others count as sure.
            confidences: [num_seqs, at least the longest draft].
        """
        longest = int(draft_lens.max(initial=0))
        if not longest:
            return draft_lens
        survival = self._survival(num_confidences, confidences[:, :longest])
        seqs, places = np.nonzero(np.arange(longest) < draft_lens[:, None])
        gains = survival[seqs, places]
        order = np.argsort(-gains, kind="stable")  # of equals the earlier: drafts stay whole
        counts = np.arange(len(order) + 1)
        ms = self.costs.verify(len(draft_lens) + counts)
        values = np.concatenate(([0.0], gains[order].cumsum())) - self._rate * (ms - ms[0])
        best = int(values.argmax())
        self._decided("keep", len(draft_lens), values, best)
        self._num_drafted = best
        return np.bincount(seqs[order[:best]], minlength=len(draft_lens))

    def _survival(self, lens: Lengths, confidences: npt.NDArray[np.floating]) -> Floats:
        """[num_seqs, longest] chance that each token and all before it are accepted."""
        places = np.arange(confidences.shape[1])
        chances = self.calibration.probabilities(confidences, places)
        survival: Floats = np.where(places < lens[:, None], chances, 1.0).cumprod(axis=1)
        return survival

    def _decided(self, choice: str, num_seqs: int, values: Floats, chosen: int) -> None:
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("failfast: %s", Decision(choice, num_seqs, values.tolist(), chosen))
