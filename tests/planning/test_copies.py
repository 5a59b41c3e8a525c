"""What copies are worth, and whom the planner lets copy."""

import itertools

import numpy as np
import pytest

from failfast_vllm.drafting.records import FirstPass, Round
from failfast_vllm.planning.copies import CopyAcceptance, LookBalance, choose_copies
from failfast_vllm.planning.costs import Costs, CostTable
from failfast_vllm.planning.guard import REST_STEPS
from failfast_vllm.planning.planner import LoadPlanner

CAP = 6


def copied(match_len, *, drafted=CAP, accepted):
    return Round(
        "r", num_drafted=drafted, num_verified=drafted, num_accepted=accepted, match_len=match_len
    )


def make_planner(*, draft_ms=1.0, ms_per_token=0.01, max_len=CAP, **given):
    draft = CostTable([1, 1000], [draft_ms, draft_ms + 1.0])
    verify = CostTable([1, 1001], [10.0, 10.0 + 1000 * ms_per_token])
    return LoadPlanner(Costs(draft, verify), max_len, 2, copies=True, **given)


def first(planner, match_lens, wanted=CAP):
    match_lens = np.array(match_lens)
    req_ids = [f"r{i}" for i in range(len(match_lens))]
    zeros = np.zeros_like(match_lens)
    assert planner.step_began(req_ids, len(req_ids)), "copies are looked for in every step"
    passes, copies = planner.first(FirstPass(zeros + wanted, zeros + 8, zeros, zeros, match_lens))
    planner.step_ended(req_ids, int(copies.sum()))
    return passes.tolist(), copies.tolist()


def test_copies_maximise_the_rate():
    """Against all ways to cut every copy; taking tokens by their chance misses little."""
    shares = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        acceptance = CopyAcceptance(3)
        match_lens, wanted = rng.integers(0, 10, 3), rng.integers(0, 4, 3)
        verify = CostTable([1, 20], [10.0, 10.0 + 19 * rng.uniform(0.1, 3.0)])
        survival = acceptance.survival(match_lens)

        def rate(cut, survival=survival, verify=verify):
            gains = [1.0 + survival[i, :n].sum() for i, n in enumerate(cut) if n]
            logs = len(gains) * np.log(np.mean(gains)) if gains else 0.0
            return np.exp(logs / 3) / float(verify(3 + sum(cut)))

        best = max(map(rate, itertools.product(*(range(n + 1) for n in wanted))))
        lens = choose_copies(survival, wanted, verify, float(verify(3)))
        assert (lens <= wanted).all()
        shares.append(rate(lens.tolist()) / best)
    assert min(shares) > 0.94
    assert np.mean(shares) > 0.995


@pytest.mark.parametrize(
    ("num_matches", "copies"),
    [
        pytest.param(1, 0, id="seven would wait for one"),
        pytest.param(8, 8, id="all"),
    ],
)
def test_a_few_that_could_copy_hold_nobody_up(num_matches, copies):
    """Catches copies that bring more tokens per ms and make most requests slower.

    Two tokens of one in eight bring 1.2 times as many tokens in 1.17 times the time, which seven
    wait for.
    """
    planner = make_planner(ms_per_token=2.0, drafts=False)
    _, lens = first(planner, [20] * num_matches + [0] * (8 - num_matches))
    assert sum(n > 0 for n in lens) == copies


def test_acceptance_follows_the_length_of_the_match():
    """Catches lengths that share a bin, and tokens after the rejected one counted as judged."""
    acceptance = CopyAcceptance(CAP)
    prior = acceptance.survival(np.array([0, 1, 3, 8]))
    assert (prior[0] == 0).all()
    assert (np.diff(prior[:, 0]) > 0).all()
    for _ in range(100):
        acceptance.observe([copied(2, accepted=0), copied(8, accepted=CAP), copied(5, accepted=2)])
    learned = acceptance.survival(np.array([2, 5, 8]))
    assert learned[0, 0] < 0.1
    assert learned[1, 1] > 0.8
    assert learned[1, 2] < 0.2
    assert learned[2, -1] > 0.6


def test_a_copy_after_a_pass_is_judged_only_if_the_pass_was_right():
    acceptance = CopyAcceptance(CAP)
    confidences = np.full(2, 0.9, np.float32)
    for num_accepted in (0, 1):
        found = copied(6, accepted=num_accepted)
        found.confidences = confidences
        acceptance.observe([found])
    assert not acceptance.calibration.counts.any()
    found = copied(6, accepted=3)
    found.confidences = confidences
    acceptance.observe([found])
    assert acceptance.calibration.counts.sum() == pytest.approx(2)
    assert acceptance.calibration.accepted.sum() == pytest.approx(1)


def test_each_sequence_takes_what_pays():
    """Catches a pass where a copy is better, a copy where a pass is, and a pass for both."""
    planner = make_planner()
    passes, copies = first(planner, [8, 1, 0])
    assert copies[0] > 2
    assert copies[1:] == [0, 0]
    assert passes[0] == 0
    assert min(passes[1:]) > 0


def test_copies_go_on_where_passes_cost_too_much():
    planner = make_planner(draft_ms=1000.0)
    for _ in range(40):  # also while the planner rests
        passes, copies = first(planner, [8, 0])
        assert passes == [0, 0]
        assert copies[0] > 2


def test_nothing_is_copied_where_verification_costs_too_much():
    planner = make_planner(draft_ms=1000.0, ms_per_token=20.0)
    assert first(planner, [8, 8]) == ([0, 0], [0, 0])


def test_copies_that_are_rejected_end():
    """Catches a planner that does not learn from copies alone."""
    planner = make_planner(draft_ms=1000.0, ms_per_token=0.5)
    assert first(planner, [8])[1] != [0]
    for _ in range(300):
        planner.observe([copied(length, accepted=0) for length in range(1, 9)])
    assert first(planner, [8])[1] == [0]


def test_a_planner_without_a_drafter_plans_no_pass():
    planner = make_planner(drafts=False)
    for _ in range(40):
        assert first(planner, [0, 0]) == ([0, 0], [0, 0])
        assert first(planner, [0, 8])[0] == [0, 0]


def test_steps_with_copies_are_timed_as_verification():
    """Catches copies that cost more than was measured at start-up."""
    now = [0.0]
    planner = make_planner(drafts=False, learns=True, clock=lambda: now[0])
    drafted = 0
    for _ in range(400):
        _, copies = first(planner, [8])
        drafted += copies[0] > 0
        if copies[0]:
            planner.observe([copied(8, drafted=copies[0], accepted=1)])
        now[0] += 0.030 if copies[0] else 0.010
    assert float(planner.costs.plain(1)) == pytest.approx(10.0, rel=0.05)
    assert drafted < 100, "two tokens in the time of three"


def test_copies_are_tried_again():
    """Catches text or times of long ago that switch the lane off for good."""
    planner = make_planner(drafts=False, ms_per_token=0.5)
    for _ in range(300):
        planner.observe([copied(length, accepted=0) for length in range(1, 9)])
    planner.costs.verify.correct(7, 100.0)
    assert first(planner, [8])[1] == [0]
    for _ in range(20_000):
        planner.observe([])
        if first(planner, [8])[1] != [0]:
            break
    else:
        pytest.fail("nothing was copied any more")


@pytest.mark.parametrize(("match_len", "seldom"), [(0, True), (8, False)])
def test_looks_that_bring_nothing_become_seldom(match_len, seldom):
    """Catches host time in each step of a busy server whose text repeats nothing."""
    now, looks = [0.0], 0
    planner = make_planner(drafts=False, learns=True, clock=lambda: now[0])
    zero = np.zeros(4, dtype=int)
    for step in range(600):
        if planner.step_began(list("abcd"), 4):
            looks += step >= 100
            _, copies = planner.first(FirstPass(zero + CAP, zero, zero, zero, zero + match_len))
            now[0] += 0.001
            planner.step_ended(list("abcd"), int(copies.sum()))
            num = int(copies[0])
            planner.observe([copied(8, drafted=num, accepted=num)] * 4 if num else [])
        now[0] += 0.010
    assert looks < 500 / REST_STEPS if seldom else looks == 500
    assert planner.step_began(["a"], 1), "another load is looked at"


def test_the_cost_of_looks_is_learned_whenever_it_is_first_measured():
    """Catches a cap on hiccups that keeps the cost at nothing, since the first look had no time."""
    balance = LookBalance()
    for _ in range(3):
        balance.looked(0.0)
    balance.took(2.0)
    assert balance.cost_ms > 0.0


def test_a_look_after_a_long_rest_counts_for_those_left_out():
    """Catches text that repeats itself again, and a planner that takes a minute to notice."""
    often, seldom = LookBalance(), LookBalance()
    for balance in (often, seldom):
        for _ in range(60):
            balance.looked(0.0)
    for _ in range(8):
        often.looked(3.0)
    seldom.looked(3.0, looks=8.0)
    assert seldom._gain_ms == pytest.approx(often._gain_ms)
    assert seldom._gain_ms > 0.4
