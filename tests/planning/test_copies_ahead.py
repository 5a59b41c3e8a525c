"""Lengths of copies for steps that are scheduled ahead, on a clock of its own."""

import numpy as np
import pytest

from failfast_vllm.drafting.records import NOT_KNOWN, Round
from failfast_vllm.planning.ahead import (
    MIXED_STEPS,
    PROBE_STEPS,
    PROBED_STEPS,
    REST_STEPS,
    CopiesAhead,
)
from failfast_vllm.planning.costs import CostTable

NUM_SEQS, CAP = 4, 20
REQ_IDS = [str(i) for i in range(NUM_SEQS)]
PLAIN_MS, TOKEN_MS, LOOK_MS = 5.0, 0.05, 0.2
WANTED = np.full(NUM_SEQS, CAP)


class Engine:
    """A pipeline of two steps; a copy of a sequence is right as far as `accepted` says.

    Args:
        accepted: the step's number -> [NUM_SEQS] tokens; the matches are as long, at most 8.
    """

    def __init__(self, accepted, token_ms=TOKEN_MS, seed=0):
        self.accepted, self.token_ms, self.now = accepted, token_ms, 0.0
        self.random = np.random.default_rng(seed)
        table = CostTable([1, 100], [1.2 * PLAIN_MS, 1.2 * (PLAIN_MS + 99 * token_ms)])
        self.planner = CopiesAhead(table, CAP, clock=lambda: self.now / 1e3)
        self.lens, self.chosen_from = np.zeros(NUM_SEQS, dtype=int), np.full(NUM_SEQS, NOT_KNOWN)
        self.known, self.rest, self.step = self.chosen_from, 0, 0
        self.looked, self.verified, self.tokens = [], [], 0

    def run(self, num_steps):
        """Returns ms per token of a sequence."""
        began, before = self.now, self.tokens
        for _ in range(num_steps):
            self.one()
        return (self.now - began) / ((self.tokens - before) / NUM_SEQS)

    def one(self):
        planner, lens, self.step = self.planner, self.lens, self.step + 1
        right = self.accepted(self.step)
        accepted = np.minimum(lens, right)
        looks = self.rest == 0
        self.looked.append(looks)
        self.verified.append(lens)
        self.tokens += NUM_SEQS + int(accepted.sum())
        num_tokens = NUM_SEQS + int(lens.sum())
        self.now += PLAIN_MS + (num_tokens - 1) * self.token_ms + LOOK_MS * looks
        nothing = np.zeros(NUM_SEQS, dtype=int), np.full(NUM_SEQS, NOT_KNOWN)
        if not looks:
            planner.rested(REQ_IDS, num_tokens)
            self.rest -= 1
            (self.lens, self.chosen_from), self.known = nothing, nothing[1]
            return
        rounds = [
            Round("r", n, 0, n, a, match_len=m)
            for n, a, m in zip(lens, accepted, self.chosen_from, strict=True)
            if n
        ]
        planner.observe(rounds)
        planner.step_ended(REQ_IDS, num_tokens, int(lens.sum()))
        self.lens, self.chosen_from = planner.choose(WANTED, self.known), self.known
        self.known = np.minimum(right, 8)
        self.rest = planner.steps_to_rest(NUM_SEQS)
        if self.rest:
            self.lens, self.chosen_from = nothing


def of_each(*tokens):
    return lambda step: np.array(tokens)


def test_who_has_copied_goes_on_and_who_has_not_waits():
    """Catches lengths that do not follow the match of the step before."""
    engine = Engine(of_each(20, 20, 0, 0), token_ms=0.1)
    engine.run(200)
    lens = np.mean(engine.verified[-20:], axis=0)
    assert (lens[:2] == CAP).all()
    assert (lens[2:] < 1).all()


def test_tokens_that_cost_nothing_are_verified_wherever_they_may_be_right():
    """One in five steps copies three tokens: they are worth their place in the others."""
    draws = np.random.default_rng(3).random((2000, NUM_SEQS)) < 0.2
    dear, cheap = (
        Engine(lambda step: np.where(draws[step], 3, 0), token_ms=ms) for ms in (1.0, 0.001)
    )
    for engine in (dear, cheap):
        engine.run(400)
    assert np.mean(cheap.verified[-100:]) > 1.5
    assert np.mean(dear.verified[-100:]) < 0.2
    assert cheap.run(400) < 0.85 * (PLAIN_MS + LOOK_MS)


def test_copies_that_never_come_true_cost_next_to_nothing():
    engine = Engine(of_each(0, 0, 0, 0))
    engine.run(400)
    assert engine.run(4000) < 1.01 * (PLAIN_MS + 3 * TOKEN_MS)
    assert np.mean(engine.looked[-4000:]) < 0.1
    rests = np.diff(np.flatnonzero(engine.looked[-4000:]))
    assert rests.max() == REST_STEPS + 1


def test_text_that_copies_again_is_found_again():
    """Catches a verdict that a look after each rest takes dozens of rests to change."""
    draws = np.random.default_rng(3).random((9000, NUM_SEQS)) < 0.3
    engine = Engine(lambda step: draws[step] * (step > 2000), token_ms=0.02)
    engine.run(2000)
    assert not all(engine.looked[-REST_STEPS:])
    engine.run(2 * REST_STEPS)
    assert engine.run(REST_STEPS) < 0.85 * PLAIN_MS


def test_times_are_learned_from_steps_in_a_row():
    """Plain ones in rests, what looking adds in between; the table was a fifth too high."""
    engine = Engine(of_each(8, 8, 8, 8))
    engine.run(PROBE_STEPS + PROBED_STEPS + 200)
    planner = engine.planner
    assert sum(not looked for looked in engine.looked) == PROBED_STEPS
    plain_ms = PLAIN_MS + 3 * TOKEN_MS
    assert float(planner.plain(NUM_SEQS)) == pytest.approx(plain_ms, rel=0.02)
    assert planner.extra_ms == pytest.approx(LOOK_MS, abs=0.05)


@pytest.mark.parametrize(
    "changed",
    [
        {"req_ids": [*REQ_IDS[:3], "new"]},
        {"num_tokens": NUM_SEQS + 30},  # of a prompt
        {"req_ids": [], "num_tokens": 0},  # where looking ahead has begun or ended
        {"looked": True},
    ],
)
def test_other_steps_say_nothing_of_plain_decoding(changed):
    """Catches prompts, first steps of a request and mixed steps in the times of plain ones.

    And plain ones that are never timed, because other steps come in between: a busy server.
    """
    now = [0.0]
    planner = CopiesAhead(CostTable([1, 100], [5.0, 5.0]), CAP, clock=lambda: now[0])
    for step in range(200):
        since = step % (MIXED_STEPS + 2)
        given = {"req_ids": REQ_IDS, "num_tokens": NUM_SEQS, **(changed if not since else {})}
        now[0] += 0.009 if since < MIXED_STEPS else 0.004
        if given.pop("looked", False):
            planner.step_ended(*given.values(), 0)
        else:
            planner.rested(*given.values())
    assert float(planner.plain(NUM_SEQS)) == pytest.approx(4.0, abs=0.01)


def test_nobody_copies_more_than_it_may_or_without_a_known_step():
    planner = CopiesAhead(CostTable([1, 100], [5.0, 5.0]), CAP)
    wanted = np.array([CAP, 3, 0, CAP])
    lens = planner.choose(wanted, np.array([8, 8, 8, NOT_KNOWN]))
    assert lens[0] > 10
    assert lens.tolist()[1:] == [3, 0, 0]


def test_time_in_which_nobody_asks_is_left_out():
    now = [0.0]
    planner = CopiesAhead(CostTable([1, 100], [5.0, 5.0]), CAP, clock=lambda: now[0])
    for _ in range(100):
        now[0] += 1.005
        planner.stood_still(1.0)
        planner.rested(REQ_IDS, NUM_SEQS)
    assert float(planner.plain(NUM_SEQS)) == pytest.approx(5.0)
