"""What the planner learns from steps and rounds, and asks for, by figures written by hand."""

import numpy as np
import pytest

from failfast_vllm.drafting.records import FirstPass, Round
from failfast_vllm.planning.acceptance import AcceptanceByPosition, Calibration, learn
from failfast_vllm.planning.costs import OVERHEAD_RATE, Costs, CostTable, StepTimer
from failfast_vllm.planning.guard import PROBE_STEPS, REST_STEPS
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
        planner.step_ended(req_ids, 0)
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
    counted = found.learn_drafting([(8, 0), (8, 0)], [1.0, 1.5], 500.0)
    assert counted == [1.0, 1.5]
    assert found.overhead_ms == pytest.approx(OVERHEAD_RATE * 2.5)


def test_long_prefixes_do_not_make_rows_dear():
    """Catches a long prompt after which drafting looks dear, or cheap, for short ones, too."""
    found = costs()
    found.score_ms = 1e-3
    rows_ms = float(found.draft(8))
    for _ in range(50):
        found.learn_drafting([(8, 20_000)], [rows_ms + 20.0], rows_ms + 21.0)
    assert float(found.draft(8)) == pytest.approx(rows_ms)
    for _ in range(50):  # half of what the slope says
        found.learn_drafting([(8, 20_000)], [rows_ms + 10.0], rows_ms + 11.0)
    assert float(found.draft(8)) == pytest.approx(rows_ms)
    assert found.score_ms == pytest.approx(0.5e-3, rel=0.02)


def test_one_fast_pass_says_little_about_attention():
    """Catches a slope that follows each pass, or falls below that of attention for nothing."""
    found = costs()
    found.score_ms = 1e-3
    found.learn_drafting([(8, 2_000)], [0.5], 1.0)
    assert found.score_ms == pytest.approx((1.0 - OVERHEAD_RATE) * 1e-3)


def test_a_slow_pass_is_not_blamed_on_attention():
    """Catches a hiccup after which long prefixes look dear for long."""
    found = costs()
    found.score_ms = 1e-3
    rows_ms = float(found.draft(8))
    for num_scores in (0, 2_000):
        took_ms = rows_ms + 3.0 + 1e-3 * num_scores
        assert found.learn_drafting([(8, num_scores)], [took_ms], took_ms) == [took_ms]
        assert found.score_ms == 1e-3
    assert float(found.draft(8)) > rows_ms + 1.0


def test_attention_is_a_part_of_the_price():
    """Catches passes, and their commits, that cost the same after any prefix."""
    dear = Costs(CostTable([1, 1000], [1.0, 3.0]), CostTable([1, 64], [10.0, 12.0]), 1e-3)
    for seen, commits, drafts in ((0, 0, True), (4096, 0, False), (400, 400, False)):
        planner = LoadPlanner(dear, 8, 8)
        asked = FirstPass(ZERO + 8, ZERO, ZERO + commits, ZERO + seen, ZERO)
        assert planner.first(asked)[0].any() == drafts
    planner._seen_lens, lens = ZERO + 4096, ZERO + 4
    sure = np.full((len(ZERO), 8), 0.999, dtype=np.float32)
    planner._rate = 0.5
    assert not planner.following(lens, ZERO, lens, lens, sure).any()
    planner._seen_lens = ZERO
    assert planner.following(lens, ZERO, lens, lens, sure).any()


def test_times_rise_with_the_size_wherever_they_were_measured():
    """Catches a table by which more rows take less: drafts would be made longer to save time."""
    table = CostTable([1, 8, 64], [1.0, 2.0, 3.0])
    assert table(64 + 56) == pytest.approx(4.0), "beyond the last size as between the last two"
    for size, ms in ((8, 7.0), (8, 7.0), (64, 3.0), (1, 1.0)):
        table.correct(size, ms)
    times = table([1, 4, 8, 16, 64, 65, 1000, 10**6])
    assert (np.diff(times) >= 0).all()


def test_a_busy_moment_at_the_start_is_not_believed():
    """Catches small passes that look as dear as something else made one of them look."""
    table = CostTable([1, 8, 64], [9.0, 2.0, 3.0])
    assert table([1, 8, 64]).tolist() == [2.0, 2.0, 3.0]


def test_a_shorter_time_refutes_those_of_the_start():
    """Catches times of a busy start that are averaged in, and a longer time that replaces them."""
    table = CostTable([1, 64], [10.0, 20.0])
    table.correct(64, 10.0)
    assert table([1, 64]) == pytest.approx([5.0, 10.0])
    table = CostTable([1, 64], [10.0, 20.0])
    table.correct(64, 30.0)
    assert table([1, 64]) == pytest.approx([12.5, 25.0])


def test_parts_of_a_step_are_timed_apart():
    """Catches drafting taken for verification, and passes that the next step counts again."""
    clock = Clock()
    timer = StepTimer(clock)
    timer.lap()
    for rows in ([8, 4], []):
        for num_rows in rows:
            timer.pass_took((num_rows, 0), 0.5 * num_rows)
        clock.now += 0.003
        timer.drafting_ended()
        clock.now += 0.010
        found, ms = timer.lap()
        assert found == [(num_rows, 0) for num_rows in rows]
        assert ms == pytest.approx([3.0, 10.0, *(0.5 * num_rows for num_rows in rows)])


def test_what_was_not_verified_counts_as_its_confidence_says():
    """Catches a cut by the scheduler taken for a rejection, and growth counted from the start.

    Both drafts have two tokens of the first pass and two of growth, of which one was verified: one
    was rejected at its second token, the other accepted as far as it was verified.
    """
    confidences = np.full(4, 0.97, dtype=np.float32)
    chance = Calibration().probabilities(confidences[:1], np.array([3]))[0]
    first, growth = AcceptanceByPosition(8), AcceptanceByPosition(8)
    rounds = [Round("a", 4, 2, 3, accepted, confidences=confidences) for accepted in (1, 3)]
    learn(rounds, Calibration(), first, growth)
    assert first.trials[:3].tolist() == [2, 2, 0]
    assert first.hits[:3].tolist() == [2, 1, 0]
    assert growth.trials[:3].tolist() == [1, 1, 0]
    assert growth.hits[:3] == pytest.approx([1, chance, 0])


ZERO = np.zeros(2, dtype=np.int64)


def planner_of(pass_ms, **options):
    """For passes of any size in `pass_ms`, up to 64 rows."""
    found = Costs(CostTable([1, 64], [pass_ms, pass_ms]), CostTable([1, 64], [10.0, 12.0]))
    return LoadPlanner(found, 8, 8, **options)


def dearest_pass(is_drafting):
    """Time of a pass from which nothing is drafted."""
    for pass_ms in np.arange(1.0, 100.0, 0.5).tolist():
        planner = planner_of(pass_ms)
        if is_drafting:
            planner.guard.round_took(2, [0.0], 0.0, 10.0, 1.0)
        if not planner.first(FirstPass(ZERO + 8, ZERO, ZERO, ZERO, ZERO))[0].any():
            return pass_ms
    raise AssertionError("there is none")


def test_a_start_needs_more_gain_than_going_on():
    """Catches a server that starts and stops drafting with each estimate."""
    start, stop = dearest_pass(False), dearest_pass(True)
    assert start + 1.0 < stop


def test_nobody_drafts_more_than_asked_for():
    passes, _ = planner_of(1.0).first(FirstPass(np.array([8, 3]), ZERO, ZERO, ZERO, ZERO))
    assert passes.tolist() == [8, 3]


def test_commits_that_wait_are_a_part_of_the_price():
    """Catches a pass that seems cheap because the blocks that it has to commit are left out."""
    costs = Costs(CostTable([1, 1000], [1.0, 400.0]), CostTable([1, 64], [10.0, 12.0]))
    for backlog, drafts in ((0, True), (1000, False)):
        planner = LoadPlanner(costs, 8, 8)
        passes, _ = planner.first(FirstPass(ZERO + 8, ZERO, ZERO + backlog, ZERO, ZERO))
        assert passes.any() == drafts


def test_plain_decoding_is_timed_now_and_then():
    """Catches a planner that never learns what a step without drafts takes by now."""
    for learns, num_probes in ((True, 4), (False, 0)):
        planner = planner_of(1.0, learns=learns)
        found = [
            planner.first(FirstPass(ZERO + 8, ZERO, ZERO, ZERO, ZERO))[0].any()
            for _ in range(REST_STEPS + PROBE_STEPS)
        ]
        assert found.count(False) == num_probes
