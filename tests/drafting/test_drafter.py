"""What the drafter asks of a planner, on a model whose drafts are written down."""

import itertools
from dataclasses import replace

import numpy as np
import torch

from failfast_vllm.drafting.committed_blocks import CommittedBlocks
from failfast_vllm.drafting.interfaces import Planner
from failfast_vllm.policies.rules import FailFast
from scripted import MASK, STOP, Script, make_drafter, make_step


def sure_script(*known_lens):
    shape = (len(known_lens), 60)
    return Script(known_lens, np.full(shape, 5), np.full(shape, 0.9))


class Recording(Planner):
    """Remembers what its passes took."""

    def __init__(self, draft_increment):
        super().__init__(draft_increment)
        self.passes, self.asked, self.seen_lens = [], [], []

    def first(self, asked):
        self.seen_lens.append(asked.seen_lens.tolist())
        return super().first(asked)

    def pass_took(self, size, ms):
        self.passes.append((size, ms))

    def following(self, *per_seq):
        self.asked.append([values.tolist() for values in per_seq[:4]])
        return super().following(*per_seq)


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
    scores = [(50 * 50 + 32 * 32) // 2, (60 * 60 - 32 * 32) // 2, (65 * 65 - 32 * 32) // 2]
    rows = [50 + 32, 8 + 20, 8 + 25]
    sizes = [size for size, _ in drafter.planner.passes]
    assert sizes == list(zip(rows, scores, strict=True))
    assert [ms for _, ms in drafter.planner.passes] == [1e3] * 3
    assert drafts.seq_rows.tolist() == [50 + 28 + 33, 32]

    drafter.propose(replace(step, max_draft_lens=np.zeros(2, dtype=np.int64)))
    assert len(drafter.planner.passes) == 3


def test_commits_wait_only_where_the_planner_postpones_them():
    """Catches blocks that are committed at a load at which nothing is drafted, or never."""
    for postpones, committed in ((False, 64), (True, 0)):
        drafter = make_drafter(FailFast(0.45), sure_script(70))
        drafter.planner = Planner(10)
        drafter.planner.postpones_commits = postpones
        step = make_step(drafter.model, [0])
        step = replace(step, committed_lens=np.zeros(1, dtype=np.int64))
        drafts = drafter.propose(step)
        assert drafts.num_rows == committed
        lens = drafter.blocks.committed_lens(step.block_table, torch.from_numpy(step.known_lens))
        assert lens.tolist() == [committed]


def test_what_a_planner_is_asked_about_drafts_that_go_on():
    """Catches rows of drafted tokens that a pass encodes again and the planner does not count."""
    drafter = make_drafter(FailFast(0.45), sure_script(40, 70))
    drafter.planner = Recording(10)
    drafter.propose(make_step(drafter.model, [25, 12]))
    assert drafter.planner.asked == [  # wanted, live rows, drafted by the first pass, drafted
        [[15, 2], [18, 16], [10, 10], [10, 10]],
        [[5, 0], [28, 18], [10, 10], [20, 12]],
        [[0, 0], [33, 18], [10, 10], [25, 12]],
    ]


def test_a_requests_own_threshold_ends_its_drafts():
    """Catches one that the surest token meets, that others obey, or that loosens the policy."""
    script = sure_script(40, 40, 40)
    script.confidences[:2, 4] = 0.5
    script.confidences[2, 4] = 0.3
    step = make_step(script, [25, 25, 25])
    step = replace(step, min_confidences=np.array([0.0, 0.6, 0.1], dtype=np.float32))
    drafts = make_drafter(FailFast(0.45), script).propose(step)
    assert drafts.lens.tolist() == [25, 10, 10]


def test_a_request_may_ignore_stop_tokens():
    """Catches drafts that end, for good, at a token after which their request goes on."""
    script = sure_script(40, 40)
    script.tokens[:, 3] = STOP
    step = replace(make_step(script, [25, 25]), stops_at_eos=np.array([True, False]))
    drafts = make_drafter(FailFast(0.45), script).propose(step)
    assert drafts.lens.tolist() == [4, 25]
    assert drafts.ends_at_stop.tolist() == [True, False]


def test_a_pass_reads_known_tokens_and_masks():
    """Catches ids of embedded positions, of the target's vocabulary alone, and of no token yet."""
    script, seen = sure_script(6), []
    drafter = make_drafter(FailFast(0.45), script, max_num_rows=64)
    step = make_step(script, [3])
    step = replace(step, token_ids=torch.tensor([[1, -1, MASK, MASK + 1, 2**17, 2, 4]]))
    forward = script.forward
    script.forward = lambda batch: seen.append(batch.input_ids.tolist()) or forward(batch)
    drafter.propose(step)
    assert seen == [[1, MASK, MASK, MASK, MASK, 2, MASK, MASK, MASK]]


def test_where_a_pass_reads_and_writes():
    """Catches KV in another page, in another place of it, or of a block that is not complete."""
    script, seen = sure_script(70, 100), []
    drafter = make_drafter(FailFast(0.45), script)
    drafter.geometry = replace(drafter.geometry, kv_block_size=64)
    drafter.blocks = CommittedBlocks(8, drafter.geometry)
    tokens = torch.arange(2 * 101).view(2, 101) % 90
    step = replace(
        make_step(script, [3, 3]),
        token_ids=tokens,
        block_table=torch.tensor([[0, 5], [1, 2]]),
        committed_lens=np.array([0, 32]),
    )
    forward = script.forward
    script.forward = lambda batch: seen.append(batch) or forward(batch)
    drafter.propose(step)
    (batch,) = seen
    assert batch.query_start_loc.tolist() == [0, 73, 73 + 71]
    assert batch.committed_lens.tolist() == [0, 32]
    assert batch.positions.tolist() == [*range(73), *range(32, 103)]
    ids = [*tokens[0, :70].tolist(), *[MASK] * 3, *tokens[1, 32:100].tolist(), *[MASK] * 3]
    assert batch.input_ids.tolist() == ids
    first = [*range(64), *[-1] * 9]
    second = [*range(64 + 32, 64 + 64), *range(2 * 64, 2 * 64 + 32), *[-1] * 7]
    assert batch.slot_mapping.tolist() == first + second


def test_where_windows_begin():
    """Catches one that begins before the prefix that it is longer than, or inside a page."""
    geometry = make_drafter(FailFast(0.45), sure_script(40)).geometry
    geometry = replace(geometry, kv_block_size=64, window=80)
    lens, starts = np.array([0, 64, 128, 160, 1024]), [0, 0, 0, 64, 896]
    assert geometry.window_starts(lens).tolist() == starts
    assert geometry.window_starts(torch.from_numpy(lens)).tolist() == starts
    assert not replace(geometry, window=None).window_starts(lens).any()


def test_a_window_reads_the_last_pages_only():
    """Catches keys of a page before the window, and positions that count from its beginning.

    And a planner that is told of keys before it.
    """
    script, seen = sure_script(200, 100), []
    drafter = make_drafter(FailFast(0.45), script)
    drafter.geometry = replace(drafter.geometry, kv_block_size=64, window=80)
    drafter.blocks = CommittedBlocks(8, drafter.geometry)
    drafter.planner = Recording(10)
    step = replace(
        make_step(script, [3, 3]),
        block_table=torch.tensor([[6, 0, 3, 7], [1, 2, 0, 0]]),
        committed_lens=np.array([160, 32]),
    )
    forward = script.forward
    script.forward = lambda batch: seen.append(batch) or forward(batch)
    drafter.propose(step)
    (batch,) = seen
    # 192 - 80 = 112 is in the second page, 96 - 80 = 16 in the first
    assert batch.committed_lens.tolist() == [160 - 64, 32]
    assert batch.block_table[:, :3].tolist() == [[0, 3, 7], [1, 2, 0]]
    assert batch.positions.tolist() == [*range(160, 203), *range(32, 103)]
    first, second = [*range(3 * 64 + 32, 4 * 64)], [*range(64 + 32, 128), *range(128, 128 + 32)]
    assert batch.slot_mapping.tolist() == [*first, *[-1] * 11, *second, *[-1] * 7]
    assert drafter.planner.seen_lens == [[192 - 64, 96]]
    pairs = (139 * 139 - 96 * 96) // 2 + (103 * 103 - 32 * 32) // 2  # no key of the first page
    assert drafter.planner.passes[0][0] == (43 + 71, pairs)


def test_blocks_are_committed_in_the_order_of_their_positions():
    """Catches a pass that reads pages which a sequence with the same prefix has yet to fill."""
    script, written = sure_script(100, 100, 100), []
    drafter = make_drafter(FailFast(0.45), script, max_num_rows=64)
    step = replace(make_step(script, [0] * 3), committed_lens=np.zeros(3, dtype=np.int64))
    forward = script.forward
    script.forward = lambda batch: written.append(batch.positions.tolist()) or forward(batch)
    drafter.propose(step)
    block = [[*range(start, start + 32)] for start in (0, 32, 64)]
    assert written == [block[0] * 2, block[1] + block[0], block[1] * 2, block[2] * 2, block[2]]


def test_no_pass_has_more_rows_than_a_step_may():
    """Catches parts of a batch that take in all that follows."""
    script, rows = sure_script(*[40] * 9), []
    drafter = make_drafter(FailFast(0.45), script, max_num_rows=64)
    step = replace(make_step(script, [20] * 9), committed_lens=np.zeros(9, dtype=np.int64))
    forward = script.forward
    script.forward = lambda batch: rows.append(len(batch.input_ids)) or forward(batch)
    assert drafter.propose(step).lens.tolist() == [20] * 9
    assert max(rows) <= 64
