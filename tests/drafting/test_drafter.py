"""What the drafter asks of a planner, on a model whose drafts are written down."""

import itertools
from dataclasses import replace

import numpy as np
import torch

from failfast_vllm.drafting.interfaces import Unplanned
from failfast_vllm.policies.rules import FailFast
from scripted import Script, make_drafter, make_step


def sure_script(*known_lens):
    shape = (len(known_lens), 60)
    return Script(known_lens, np.full(shape, 5), np.full(shape, 0.9), np.zeros(shape))


class Recording(Unplanned):
    """Remembers what its passes took."""

    def __init__(self, draft_increment):
        super().__init__(draft_increment)
        self.passes = []

    def pass_took(self, num_rows, ms):
        self.passes.append((num_rows, ms))


def test_a_planner_learns_the_rows_and_times_of_passes():
    """Catches passes that only commit, rows of another pass, and a clock that is not the one given.

    Both sequences commit a block in the first pass; the second may not draft.
    """
    seconds = itertools.count()
    drafter = make_drafter(FailFast(0.45), sure_script(40, 40), clock=lambda: next(seconds))
    drafter.planner = Recording(10)
    step = replace(make_step(drafter.model, [25, 0]), committed_lens=np.zeros(2, dtype=np.int64))
    drafts = drafter.propose(step)
    assert drafts.lens.tolist() == [25, 0]
    assert drafter.planner.passes == [(50 + 32, 1e3), (8 + 20, 1e3), (8 + 25, 1e3)]
    assert drafts.seq_rows.tolist() == [50 + 28 + 33, 32]

    drafter.propose(replace(step, max_draft_lens=np.zeros(2, dtype=np.int64)))
    assert len(drafter.planner.passes) == 3


def test_commits_wait_only_where_the_planner_postpones_them():
    """Catches blocks that are committed at a load at which nothing is drafted, or never."""
    for postpones, committed in ((False, 64), (True, 0)):
        drafter = make_drafter(FailFast(0.45), sure_script(70))
        drafter.planner = Unplanned(10)
        drafter.planner.postpones_commits = postpones
        step = make_step(drafter.model, [0])
        step = replace(step, committed_lens=np.zeros(1, dtype=np.int64))
        drafts = drafter.propose(step)
        assert drafts.num_rows == committed
        lens = drafter.blocks.committed_lens(step.block_table, torch.from_numpy(step.known_lens))
        assert lens.tolist() == [committed]
