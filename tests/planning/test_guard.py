"""The guard alone: what it allows after rounds that cost more, or less, than plain decoding."""

import pytest

from failfast_vllm.planning.costs import CostTable
from failfast_vllm.planning.guard import (
    ACCEPTED_LOSS,
    PLAIN_IN_A_ROW,
    PROBE_STEPS,
    REST_STEPS,
    SPELL_ROUNDS,
    TRY_ROUNDS,
    TRY_STEPS,
    Guard,
)

PLAIN = CostTable([1, 64], [10.0, 10.0])


def drafts(guard, rounds, ms, num_seqs=4, accepted=0):
    """Rounds that take `ms` each, of which the target's step is as fast as ever."""
    for _ in range(rounds):
        guard.round_took(num_seqs, [ms - 10.0], 0.0, 10.0, 1.0)
        guard.accepted(accepted * num_seqs, num_seqs)


def lose(guard):
    """A spell of drafting that ends after having lost 50 ms."""
    drafts(guard, 5, ms=20.0)
    assert guard.decide(0, 8, float("inf"), 4, PLAIN) == 0


def waits(guard, limit=100_000):
    """Steps until drafting that promises to pay is allowed again."""
    for step in range(limit):
        if guard.step_began(4, drafted=False) and guard.decide(8, 8, 0.0, 4, PLAIN):
            return step
    raise AssertionError("never")


def test_a_rest_ends_early_where_the_load_falls():
    guard = Guard()
    assert guard.step_began(10, drafted=False)
    assert guard.decide(0, 8, float("inf"), 10, PLAIN) == 0
    looks = [guard.step_began(10, drafted=False) for _ in range(REST_STEPS + 1)]
    assert looks == [False] * REST_STEPS + [True]
    guard.decide(0, 8, float("inf"), 10, PLAIN)
    assert not guard.step_began(8, drafted=False)
    assert guard.step_began(7, drafted=False)


def test_one_loss_is_forgiven_and_two_are_paid_off():
    """Catches a guard that gives up after bad luck, and one that never learns from losses."""
    guard = Guard()
    lose(guard)
    assert guard.decide(8, 8, 0.0, 4, PLAIN) == 8
    lose(guard)
    assert guard.decide(8, 8, 0.0, 3, PLAIN) == 8  # at a lower load nothing is owed
    assert waits(guard) * 10.0 == pytest.approx(50.0 / ACCEPTED_LOSS, rel=0.1)


def test_accepted_tokens_are_shared_by_the_batch():
    """Catches drafting that one accepted token in all seems to pay for in every sequence."""
    guard = Guard()
    for _ in range(2):
        for _ in range(5):
            guard.round_took(4, [20.0], 0.0, 10.0, 1.0)
            guard.accepted(4, 4)  # 20 ms without drafts
        assert guard.decide(0, 8, float("inf"), 4, PLAIN) == 0
    assert guard.decide(8, 8, 0.0, 4, PLAIN) == 0, "two losses in a row"


def test_a_spell_that_pays_clears_the_losses():
    guard = Guard()
    lose(guard)
    drafts(guard, SPELL_ROUNDS, ms=20.0, accepted=3)
    assert guard.decide(8, 8, 0.0, 4, PLAIN) == 8
    lose(guard)
    assert guard.decide(8, 8, 0.0, 4, PLAIN) == 8  # only one in a row


def test_a_try_is_made_where_it_is_expected_to_lose_little_and_ends():
    """Catches tables that are believed for ever, and a try that goes on."""
    guard = Guard()
    assert guard.decide(0, 8, 10.0 * TRY_STEPS + 1.0, 4, PLAIN) == 0
    guard = Guard()
    for _ in range(TRY_ROUNDS):
        assert guard.decide(0, 8, 10.0 * TRY_STEPS, 4, PLAIN) == 8
        drafts(guard, 1, ms=20.0)
    assert guard.decide(0, 8, 0.0, 4, PLAIN) == 0


def test_probes_come_in_pairs():
    """Catches plain steps that are timed while caches are full of drafting."""
    guard = Guard()
    probes = [guard.probes() for _ in range(REST_STEPS + 2 * PROBE_STEPS)]
    assert sum(probes) == 3 * PLAIN_IN_A_ROW
    first = probes.index(True)
    assert probes[first : first + PLAIN_IN_A_ROW + 1] == [True] * PLAIN_IN_A_ROW + [False]
