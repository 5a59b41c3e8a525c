"""What the planner learns from steps and rounds, on a clock that is set by hand."""

import numpy as np
import pytest

from failfast_vllm.drafting.records import Round
from failfast_vllm.planning.costs import OVERHEAD_RATE, Costs, CostTable
from failfast_vllm.planning.planner import LEARNING_STEPS, LoadPlanner


def costs():
    return Costs(CostTable([1, 64], [1.0, 2.0]), CostTable([1, 64], [10.0, 20.0]))


class Clock:
    """Seconds."""

    now = 0.0

    def __call__(self):
        return self.now


def test_a_request_that_came_to_an_idle_engine_is_not_timed():
    """Catches the time in which nobody asked for anything, learned as that of a step."""
    clock = Clock()
    planner = LoadPlanner(costs(), 8, 8, learns=True, clock=clock)

    def step(req_ids, seconds):
        clock.now += seconds
        planner.step_began(req_ids, 1)
        planner.step_ended(req_ids)
        return float(planner.costs.plain(1))

    before = [step(["a"], 0.010) for _ in range(5)][-1]
    assert step(["b"], 5.0) == before
    assert step(["b"], 0.020) > before


def test_a_round_is_learned_from_once():
    """Catches rounds that stay in the list of those to learn from."""
    planner = LoadPlanner(costs(), 8, 8)
    confidences = np.full(4, 0.9, dtype=np.float32)
    for _ in range(3 * LEARNING_STEPS + 1):
        planner.observe([Round("a", 4, 4, 4, 4, confidences=confidences)])
    num_judged = 4 * (3 * LEARNING_STEPS + 1)
    assert planner.calibration.counts.sum() == pytest.approx(num_judged, rel=0.02)
    assert planner.acceptance.trials[0] == pytest.approx(num_judged / 4, rel=0.1)


def test_a_hiccup_moves_the_overhead_little():
    """Catches a step beside another process after which drafting looks as dear for long."""
    found = costs()
    counted = found.learn_drafting([8, 8], [1.0, 1.5], 500.0)
    assert counted == [1.0, 1.5]
    assert found.overhead_ms == pytest.approx(OVERHEAD_RATE * 2.5)


def test_times_rise_with_the_size_wherever_they_were_measured():
    """Catches a table by which more rows take less: drafts would be made longer to save time."""
    table = CostTable([1, 8, 64], [1.0, 2.0, 3.0])
    assert table(64 + 56) == pytest.approx(4.0), "beyond the last size as between the last two"
    for size, ms in ((8, 7.0), (8, 7.0), (64, 3.0), (1, 1.0)):
        table.correct(size, ms)
    times = table([1, 4, 8, 16, 64, 65, 1000, 10**6])
    assert (np.diff(times) >= 0).all()
