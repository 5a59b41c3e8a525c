"""The load planner in an engine that schedules ahead: plain steps in a row are shorter."""

import numpy as np
import pytest

from failfast_vllm.drafting.records import FirstPass, Round
from failfast_vllm.planning.costs import Costs, CostTable
from failfast_vllm.planning.guard import REST_STEPS
from failfast_vllm.planning.planner import PROBE_AHEAD, LoadPlanner

NUM_SEQS, CAP = 4, 10
REQ_IDS = [str(i) for i in range(NUM_SEQS)]
PLAIN_MS, GAP_MS, DRAFT_MS = 5.0, 2.8, 4.0  # a step, what one waits that is not scheduled ahead


class Engine:
    """Steps of an engine, on a clock of its own; of each draft `accepted` tokens are accepted."""

    def __init__(self, accepted=0, look_ms=0.0, **given):
        self.look_ms = look_ms  # of the host
        self.now, self.accepted, self.num_kept = 0.0, accepted, np.zeros(NUM_SEQS, dtype=int)
        self.looks = self.drafted_steps = self.tokens = 0
        self.rested = []  # steps in a row
        verify = CostTable([1, 1000], [PLAIN_MS, PLAIN_MS])
        costs = Costs(CostTable([1, 1000], [DRAFT_MS, DRAFT_MS]), verify)
        options = {"learns": True, "schedules_ahead": True, **given}
        self.planner = LoadPlanner(costs, CAP, CAP, clock=lambda: self.now / 1e3, **options)

    def run(self, num_tokens=8000):
        """Returns ms per token of a sequence."""
        began, self.tokens = self.now, 0
        while self.tokens < num_tokens * NUM_SEQS:
            self.look()
            steps = self.planner.steps_to_look - 1
            if steps:
                self.rested.append(steps)
            for step in range(steps):
                # the first two are scheduled in a row; then each is when the one before has ended
                self.now += PLAIN_MS if step else 0.2
                self.planner.rested(REQ_IDS, NUM_SEQS)
                self.tokens += NUM_SEQS
            if steps:  # two are in flight: one that was counted, and the one that is looked at
                self.now += 2 * PLAIN_MS - GAP_MS - 0.2
        return (self.now - began) / (self.tokens / NUM_SEQS)

    def look(self):
        self.looks += 1
        self.now += GAP_MS + (0 if self.rested and self.planner._num_rested else PLAIN_MS)
        accepted = np.minimum(self.num_kept, self.accepted)
        self.tokens += NUM_SEQS + int(accepted.sum())
        looks = self.planner.step_began(REQ_IDS, NUM_SEQS + int(self.num_kept.sum()))
        confidences = np.full(CAP, 0.9, dtype=np.float32)
        rounds = [
            Round("r", n, n, n, a, confidences[:n])
            for n, a in zip(self.num_kept.tolist(), accepted.tolist(), strict=True)
            if n
        ]
        if rounds or looks:
            self.planner.observe(rounds)
        self.num_kept = np.zeros(NUM_SEQS, dtype=int)
        if not looks:
            return
        self.now += self.look_ms
        zeros = np.zeros(NUM_SEQS, dtype=int)
        first, _ = self.planner.first(FirstPass(zeros + CAP, zeros + 8, zeros, zeros, zeros))
        if first.any():
            self.drafted_steps += 1
            self.now += DRAFT_MS
            self.planner.pass_took((int(first.sum()) + 8 * NUM_SEQS, 0), DRAFT_MS)
            self.num_kept = first
        self.planner.step_ended(REQ_IDS, int(first.sum()))


def test_a_rest_waits_once():
    engine = Engine(accepted=0)
    engine.run(2000)  # tries are paid for
    assert engine.run() < 1.05 * PLAIN_MS
    assert set(engine.rested[-20:]) == {REST_STEPS}


@pytest.mark.parametrize(("look_ms", "steps"), [(0.0, 16), (2.0, 40), (4.0, 80), (40.0, 128)])
def test_a_rest_is_as_long_as_the_look_after_it_is_dear(look_ms, steps):
    """A look shall take a hundredth of the time; 40 ms take six of a hundred, in longest rests."""
    engine = Engine(accepted=0, look_ms=look_ms)
    engine.run(4000)
    share = max(0.01, look_ms / PLAIN_MS / steps)
    assert engine.run() < (1.01 + share) * PLAIN_MS
    assert np.mean(engine.rested[-20:]) == pytest.approx(steps, abs=2)


def test_a_look_costs_what_it_adds_to_plain_steps():
    """The steps around it wait, too; a hiccup counts as four looks."""
    costs = Engine().planner.costs
    costs.looked(NUM_SEQS, 1.0, 3 * PLAIN_MS + 3.0, 3)
    assert costs.look_ms == 4.0
    assert costs.rest_steps(NUM_SEQS) == 4.0 / (0.01 * PLAIN_MS)
    costs.looked(NUM_SEQS, 100.0, 2 * PLAIN_MS, 3)
    assert costs.look_ms == pytest.approx(0.9 * 4.0 + 0.1 * 16.0)


def test_longer_rests_forget_no_less():
    """Catches a planner that believes in one bad measurement for eight times as long."""
    planner = Engine().planner
    planner.acceptance.trials[:] = 100.0
    for num_rested in (0, REST_STEPS, 6 * REST_STEPS):
        planner._num_rested, planner.guard.steps_to_rest = num_rested, num_rested
        assert planner.step_began(REQ_IDS, NUM_SEQS)
        planner.observe([])
    assert planner.acceptance.trials[0] == pytest.approx(100 * 0.99 ** (1 + 1 + 6))


def test_plain_steps_are_known_from_those_in_a_row():
    """Catches a planner that compares drafts with steps that waited, and drafts at a loss.

    A round takes 5.0 + 2.8 + 4.0 ms for 2 tokens: less than 2 steps that wait, more than in a row.
    """
    engine = Engine(accepted=1)
    engine.run(2000)
    assert engine.run() < 1.05 * PLAIN_MS
    assert float(engine.planner.costs.plain(NUM_SEQS)) == pytest.approx(PLAIN_MS, rel=0.05)


def test_drafts_that_pay_are_made():
    """And plain steps are probed in a row, too."""
    engine = Engine(accepted=8)
    engine.run(2000)
    engine.rested.clear()
    assert engine.run() < 1.1 * (PLAIN_MS + GAP_MS + DRAFT_MS) / 9
    assert set(engine.rested) == {PROBE_AHEAD}
    assert float(engine.planner.costs.plain(NUM_SEQS)) == pytest.approx(PLAIN_MS, rel=0.05)


def test_looks_for_copies_that_bring_less_than_the_wait_become_seldom():
    engine = Engine(drafts=False, copies=True)
    engine.run(2000)
    assert engine.run() < 1.05 * PLAIN_MS


def test_steps_of_a_rest_say_what_plain_decoding_takes():
    """The first two do not, nor those that read a prompt or begin a request."""
    engine = Engine(schedules_ahead=False)
    planner = engine.planner

    def take(steps):
        for ms, ids, num_tokens in steps:
            engine.now += ms
            planner.rested(ids, num_tokens)
        planner.step_began(["newer"], 1)

    planner.step_ended(REQ_IDS, 0)
    others = [*REQ_IDS[:3], "new"]
    take([(90, REQ_IDS, 4), (90, REQ_IDS, 4), (70, REQ_IDS, 99), (70, others, 4), (70, others, 9)])
    assert float(planner.costs.plain(NUM_SEQS)) == PLAIN_MS
    planner.step_ended(REQ_IDS, 0)
    take([(9, REQ_IDS, 4)] * 2 + [(9, REQ_IDS, 4)] * 40)
    assert float(planner.costs.plain(NUM_SEQS)) == pytest.approx(9.0, rel=0.15)


def test_a_rest_is_announced():
    planner = Engine().planner
    planner.guard.decide(0, 10, np.inf, NUM_SEQS, planner.costs.plain)
    assert planner.steps_to_look == 1 + REST_STEPS
    planner.rested(REQ_IDS, NUM_SEQS)
    assert not planner.step_began(REQ_IDS, NUM_SEQS)
    assert planner.steps_to_look == REST_STEPS - 1
    # 0.8 of the sequences that it was decided for
    assert planner.fewest_at_rest == pytest.approx(0.8 * NUM_SEQS)
    assert planner.step_began(REQ_IDS[:3], 3)
