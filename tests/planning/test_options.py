"""Whose first pass: those left out wait for the others."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from failfast_vllm.drafting.records import FirstPass
from failfast_vllm.planning.costs import Costs, CostTable
from failfast_vllm.planning.options import even_out, least_commits_first
from failfast_vllm.planning.planner import LoadPlanner

counts = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@given(gains=counts, commits=counts, num_lengths=st.integers(1, 3))
def test_the_geometric_mean_of_those_in_a_pass_and_those_left_out(gains, commits, num_lengths):
    """Catches groups that swap places, and options that are mixed up."""
    size = min(len(gains), len(commits))
    order, lasts = least_commits_first(np.array(commits[:size]))
    gained = np.array(gains[:size], dtype=float)[order]
    without = 1.0 + gained / 7
    options = [(length, last) for length in range(1, num_lengths + 1) for last in lasts]
    emitted = [
        np.where(np.arange(size) <= last, without + length * gained, without)
        for length, last in options
    ]
    tokens = np.array([without.sum(), *(each.sum() for each in emitted)])
    found = even_out(tokens, without, lasts)
    assert found[0] == tokens[0]
    for each, (_, last), value, total in zip(emitted, options, found[1:], tokens[1:], strict=True):
        groups = [group for group in (each[: last + 1], each[last + 1 :]) if len(group)]
        logs = sum(len(group) * np.log(group.mean()) for group in groups)
        assert value == pytest.approx(size * np.exp(logs / size))
        assert value <= total * (1 + 1e-9)
        if len(groups) == 1:
            assert value == pytest.approx(total)


@pytest.mark.parametrize(
    ("num_ready", "drafts"),
    [
        pytest.param(8, 0, id="a quarter: the others would wait three times as long"),
        pytest.param(30, 30, id="nearly all"),
        pytest.param(32, 32, id="all"),
    ],
)
def test_a_few_that_could_draft_hold_nobody_up(num_ready, drafts):
    """Catches more tokens per ms for the batch at the price of most of its sequences.

    Times of an H200 at the shapes of 7B + 1.5B: 8 of 32 that draft bring 1.3 times the
    tokens per ms, while each of the other 24 waits three times as long for its next one.
    """
    draft = CostTable([1, 352], [2.4, 4.4])
    verify = CostTable([1, 32, 128, 352], [6.5, 6.7, 8.0, 12.0])
    costs = Costs(draft, verify)
    costs.plain, costs.overhead_ms = CostTable([1, 32], [4.55, 5.05]), 3.0
    planner = LoadPlanner(costs, 60, 10)
    planner.acceptance.gains = lambda start, lens: 19.0 * (1.0 - 0.95**lens)  # .95 of each
    everyone = np.ones(32, dtype=int)
    commits = np.where(np.arange(32) < num_ready, 0, 100_000)
    asked = FirstPass(60 * everyone, 16 * everyone, commits, 544 * everyone, 0 * everyone)
    passes, _ = planner.first(asked)
    assert (passes > 0).sum() == drafts
    assert not passes[commits > 0].any()
