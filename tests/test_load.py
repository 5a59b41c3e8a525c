"""The load planner on artificial costs: what it reaches, and that it never loses."""

import numpy as np
import pytest

from failfast_vllm.calibration import Calibration
from failfast_vllm.load import AcceptanceByPosition, LoadPlanner
from failfast_vllm.simulate import cost_tables

INCREMENT, CAP = 10, 60


class Simulation:
    """Sequences whose text is easy or hard in stretches, drafted for under a cost table."""

    def __init__(self, target, num_seqs, seed=0):
        self.rng = np.random.default_rng(seed)
        self.costs = cost_tables("h200", target)
        self.easy = np.zeros(num_seqs, dtype=bool)

    def run(self, draft, steps=400, warm_up=200):
        """Tokens per ms of `draft(self) -> (draft_lens, draft_ms)` after `warm_up` steps."""
        tokens = time = 0.0
        for step in range(steps):
            flips = self.rng.random(len(self.easy)) < 0.15
            self.easy ^= flips
            lens, draft_ms, observe = draft(self)
            accepted = self.accept(lens)
            observe(lens, accepted)
            if step >= warm_up:
                tokens += len(lens) + accepted.sum()
                time += draft_ms + float(self.costs.verify(len(lens) + lens.sum()))
        return tokens / time

    def accept(self, lens):
        probability = np.where(self.easy, 0.92, 0.4)
        runs = self.rng.geometric(1 - probability) - 1
        return np.minimum(runs, lens)

    def live_rows(self, lens):
        return np.full(len(lens), 16) + lens


def fixed(length):
    def draft(sim):
        lens = np.full(len(sim.easy), length)
        rows = (sim.live_rows(lens)).sum() if length else 0
        return lens, float(sim.costs.draft(rows)), lambda *_: None

    return draft


def planned(costs):
    planner = LoadPlanner(costs, AcceptanceByPosition(CAP), Calibration(), INCREMENT)

    def draft(sim):
        num = len(sim.easy)
        lens, wanted = np.zeros(num, dtype=int), np.full(num, CAP)
        increments = planner.first(wanted, sim.live_rows(lens), np.zeros(num, dtype=int))
        draft_ms = 0.0
        confidences = np.where(sim.easy, 0.92, 0.4)[:, None].repeat(CAP, axis=1)
        while increments.any():
            going = increments > 0
            draft_ms += float(sim.costs.draft((sim.live_rows(lens) + increments)[going].sum()))
            lens = lens + increments
            sure = going & sim.easy & (lens >= INCREMENT)  # as confidences tell
            wanted = np.where(sure, CAP - lens, 0)
            increments = planner.following(wanted, sim.live_rows(lens), lens, confidences)
        return lens, draft_ms, planner.acceptance.observe

    return draft


@pytest.mark.parametrize("num_seqs", [1, 2, 4, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("target", ["7B", "32B"])
def test_never_below_no_drafts_and_near_the_best_fixed_length(target, num_seqs):
    """Catches drafting where it does not pay, and not drafting where it does."""
    none = Simulation(target, num_seqs).run(fixed(0))
    best = max(
        Simulation(target, num_seqs).run(fixed(k)) for k in (0, 1, 2, 3, 4, 6, 8, 10, 16, 32)
    )
    sim = Simulation(target, num_seqs)
    found = sim.run(planned(sim.costs))
    print(f"{target} x {num_seqs}: {found / none:.2f}x none, best fixed {best / none:.2f}x")
    assert found >= 0.97 * none
    assert found >= 0.95 * best
