"""The online map from confidence and position to acceptance."""

import numpy as np
import pytest

from failfast_vllm.drafting.records import Round
from failfast_vllm.planning.acceptance import (
    CONFIDENCE_EDGES,
    POSITION_EDGES,
    Calibration,
    isotonic,
    position_buckets,
)

MIDPOINTS = np.convolve(np.concatenate(([0.0], CONFIDENCE_EDGES, [1.0])), [0.5, 0.5], "valid")


def outcome(confidences, accepted, verified=None):
    confidences = np.asarray(confidences, dtype=np.float32)
    verified = len(confidences) if verified is None else verified
    return Round("r", len(confidences), len(confidences), verified, accepted, confidences)


def drafter(rng, chance, num_drafts, length=24):
    """Drafts whose token j is accepted with `chance(confidence, j)`, up to the first rejection."""
    outcomes = []
    for _ in range(num_drafts):
        confidences = np.where(
            rng.random(length) < 0.3, rng.random(length), rng.beta(30, 1, length)
        )
        rejected = rng.random(length) >= chance(confidences, np.arange(length))
        accepted = int(rejected.argmax()) if rejected.any() else length
        outcomes.append(outcome(confidences, accepted))
    return outcomes


def overconfident(confidences, positions):
    return confidences**2 * 0.99**positions


def test_the_prior_takes_the_drafter_at_its_word():
    """Catches a server that starts without an opinion."""
    confidences = np.linspace(0, 1, 501)
    for position in (0, 5, 100):
        found = Calibration().probabilities(confidences, np.array(position))
        assert found == pytest.approx(MIDPOINTS[Calibration().bins(confidences)])
        assert np.abs(found - confidences).max() <= 0.05 + 1e-6
        assert (np.diff(found) >= 0).all()


def test_it_learns_a_miscalibrated_drafter():
    """Catches censored positions that count as rejected, and a table that mixes its cells up."""
    rng = np.random.default_rng(0)
    calibration = Calibration(half_life=1e9)
    before = Calibration()
    for _ in range(40):
        calibration.observe(drafter(rng, overconfident, 500))
    errors = {}
    for name, judge in (("learned", calibration), ("prior", before)):
        confidences = rng.beta(8, 1, 20_000)
        positions = rng.integers(0, 12, 20_000)
        found = judge.probabilities(confidences, positions)
        errors[name] = np.abs(found - overconfident(confidences, positions)).mean()
    assert errors["learned"] < 0.03
    assert errors["prior"] > 0.1


def test_only_what_verification_has_judged_counts():
    """Catches tokens behind the rejected one, behind a cut, and without a confidence."""
    calibration = Calibration(half_life=1e9)
    calibration.observe(
        [
            outcome([0.45, 0.55, 0.65, 0.75], accepted=2),  # the last was never judged
            outcome([0.45, 0.55, 0.65, 0.75], accepted=1, verified=1),  # cut by the scheduler
            outcome([0.45], accepted=3, verified=5),  # four tokens were copied, none was drafted
            outcome([0.15, 0.25], accepted=0),
        ]
    )
    counts, accepted = calibration.counts.sum(axis=0), calibration.accepted.sum(axis=0)
    seen = Calibration().bins(np.array([0.15, 0.45, 0.55, 0.65]))
    assert counts.nonzero()[0].tolist() == seen.tolist()
    assert counts[seen] == pytest.approx([1, 3, 1, 1])
    assert accepted[seen] == pytest.approx([0, 3, 1, 0])


def test_positions_are_told_apart():
    """Catches one row for all positions: later tokens are less likely."""
    rng = np.random.default_rng(2)
    calibration = Calibration(half_life=1e9)
    for _ in range(20):
        calibration.observe(drafter(rng, lambda c, j: np.where(j < 4, 0.95, 0.6), 500))
    first, late = calibration.probabilities(np.array([0.97, 0.97]), np.array([0, 5]))
    assert first == pytest.approx(0.95, abs=0.03)
    assert late == pytest.approx(0.6, abs=0.05)


def test_it_forgets():
    """Catches a server that never notices that its texts have changed; and unbounded counts."""
    calibration = Calibration(half_life=500)
    token = [outcome([0.97], accepted=1)]
    for _ in range(5000):
        calibration.observe(token)
    assert calibration.probabilities(np.array([0.97]), np.array([0]))[0] > 0.98
    assert calibration.counts.sum() < 500 / np.log(2) + 1
    for _ in range(2000):
        calibration.observe([outcome([0.97], accepted=0)])
    assert calibration.probabilities(np.array([0.97]), np.array([0]))[0] < 0.15


def test_two_ranks_learn_the_same():
    """Catches anything that is not a function of the outcomes in their order."""
    tables = []
    for _ in range(2):
        rng = np.random.default_rng(3)
        calibration = Calibration()
        for _ in range(10):
            calibration.observe(drafter(rng, overconfident, 20))
        tables.append(calibration.table())
    assert (tables[0] == tables[1]).all()


def pool_adjacent_violators(values, weights):
    """The textbook algorithm, one row."""
    blocks = []
    for value, weight in zip(values, weights, strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (v, w, n), (value, weight, m) = blocks[-2:]
            blocks[-2:] = [[(v * w + value * weight) / (w + weight), w + weight, n + m]]
    return [value for value, _, n in blocks for _ in range(n)]


def test_isotonic_rows_equal_pool_adjacent_violators():
    rng = np.random.default_rng(4)
    for _ in range(50):
        values, weights = rng.random((5, 15)), rng.uniform(0.1, 50, (5, 15))
        for row, expected in enumerate(map(pool_adjacent_violators, values, weights)):
            assert isotonic(values, weights)[row] == pytest.approx(expected)


def test_every_row_of_a_learned_table_rises():
    rng = np.random.default_rng(5)
    calibration = Calibration()
    for _ in range(5):
        calibration.observe(drafter(rng, lambda c, j: 1 - c, 100))
        assert calibration.table().shape == (len(POSITION_EDGES) + 1, len(CONFIDENCE_EDGES) + 1)
        assert (np.diff(calibration.table(), axis=1) >= -1e-12).all()


def test_bins_and_buckets_take_their_lower_edge():
    assert Calibration().bins(np.array([0.0, 0.0999, 0.1, 0.9999, 1.0])).tolist() == [
        0,
        0,
        1,
        14,
        14,
    ]
    assert position_buckets(np.array([0, 1, 2, 3, 4, 31, 32, 99])).tolist() == [
        *(0, 1, 2, 2, 3, 5, 6, 6)
    ]
