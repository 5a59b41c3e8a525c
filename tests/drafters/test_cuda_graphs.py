"""Draft passes in fixed shapes: the right bucket, and nothing of the padding in the result."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from failfast_kernels import block_diffusion_attention, commit_kv
from failfast_vllm.drafters import cuda_graphs as graphs
from failfast_vllm.drafters.cuda_graphs import (
    Bucket,
    PassGraphs,
    choose_bucket,
    make_buckets,
    rows_per_seq,
)
from failfast_vllm.drafting.records import DraftBatch

ROWS = [10, 21, 32, 42]
BLOCK, PAGE, HEAD_DIM, VOCAB, MASK, TABLE = 32, 32, 16, 50, 3, 4
NUM_PAGES = 64
PROPERTY = settings(max_examples=200, deadline=None, derandomize=True, database=None)


@given(
    max_seqs=st.integers(1, 80),
    max_rows=st.integers(1, 4096),
    num_seqs=st.integers(1, 80),
    num_rows=st.integers(1, 4096),
)
@PROPERTY
def test_the_smallest_bucket_that_fits(max_seqs, max_rows, num_seqs, num_rows):
    buckets = make_buckets(max_seqs, max_rows, ROWS)
    assert buckets == sorted(buckets)
    assert all(b.num_seqs <= max_seqs and b.num_rows <= max_rows for b in buckets)
    fitting = [b for b in buckets if b.num_seqs >= num_seqs and b.num_rows >= num_rows]
    chosen = choose_bucket(buckets, num_seqs, num_rows)
    assert (chosen in fitting) if fitting else (chosen is None)
    assert all(chosen.num_rows <= b.num_rows for b in fitting)


class OneLayer:
    """Embedding, commit and attention, with a cache of its own; rows of nobody become NaN."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.randn(3, VOCAB, 1, HEAD_DIM, generator=generator)
        self.cache = torch.randn(NUM_PAGES, 1, PAGE, 2 * HEAD_DIM, generator=generator)

    def __call__(self, batch):
        query, key, value = self.weights[:, batch.input_ids] + batch.positions[:, None, None] / 100
        if batch.slot_mapping is not None:
            commit_kv(key, value, self.cache, batch.slot_mapping)
        return block_diffusion_attention(
            query,
            key,
            value,
            self.cache,
            batch.block_table,
            batch.committed_lens,
            batch.query_start_loc,
            0.25,
            output=torch.full_like(query, torch.nan),
        )


@st.composite
def passes(draw):
    num_seqs = draw(st.integers(1, 6))
    rows = [draw(st.integers(1, 60)) for _ in range(num_seqs)]
    committed = [BLOCK * draw(st.integers(0, 2)) for _ in range(num_seqs)]
    pages = draw(st.permutations(range(NUM_PAGES)))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    positions = torch.cat([c + torch.arange(r) for r, c in zip(rows, committed, strict=True)])
    table = torch.tensor(pages[: num_seqs * TABLE], dtype=torch.int32).view(num_seqs, TABLE)
    owners = torch.repeat_interleave(torch.tensor(rows))
    slots = table[owners, positions // PAGE].long() * PAGE + positions % PAGE
    ends = torch.tensor(committed)[owners] + BLOCK * draw(st.integers(0, 1))
    commits = draw(st.booleans())
    return DraftBatch(
        input_ids=torch.randint(4, VOCAB, (len(positions),), generator=generator),
        positions=positions,
        query_start_loc=torch.tensor([0, *rows]).cumsum(0),
        committed_lens=torch.tensor(committed),
        slot_mapping=torch.where(positions < ends, slots, -1) if commits else None,
        block_table=table,
    )


@pytest.mark.parametrize(
    ("group_size", "block_size", "increment", "rows"),
    [
        pytest.param(6, 32, 10, [10, 21, 32, 42], id="Fast-dLLM v2 1.5B"),
        pytest.param(7, 32, 10, [18, 27, 36, 45], id="Fast-dLLM v2 7B"),
        pytest.param(2, 32, 10, [32, 64], id="SDAR 1.7B, blocks of 32"),
        pytest.param(2, 4, 4, [8], id="SDAR 1.7B, blocks of 4"),
        pytest.param(1, 32, 60, [64, 128], id="one pass of 60 masks"),
        pytest.param(64, 32, 10, [42], id="tiles hold fewer rows than a pass"),
    ],
)
def test_buckets_fill_the_tiles_of_the_attention(group_size, block_size, increment, rows):
    assert rows_per_seq(group_size, block_size, increment) == rows


def eager(run):
    """In place of a graph: runs the pass again."""
    run()
    return run


@given(batches=st.lists(passes(), min_size=1, max_size=4))
@PROPERTY
def test_a_padded_pass_equals_the_pass_itself(batches):
    """One instance for all: nothing of an earlier, larger pass may come back."""
    plain, layer = OneLayer(), OneLayer()
    graphs = PassGraphs(make_buckets(8, 384, ROWS), TABLE, torch.device("cpu"))
    graphs.capture(eager, layer)
    for batch in batches:
        expected = plain(batch)
        assert torch.isfinite(expected).all()
        torch.testing.assert_close(graphs.replay(batch), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.cache, plain.cache, rtol=0, atol=0)
        graphs.rows.fill_(VOCAB - 1)  # a stale row left in place would read or write here
        graphs.committed_lens.fill_(BLOCK)
        graphs.block_table.fill_(NUM_PAGES - 1)


def test_passes_that_commit_nothing_have_graphs_of_their_own():
    commits = []

    def run(batch):
        commits.append(batch.slot_mapping is not None)
        return torch.zeros(batch.input_ids.numel(), 1)

    graphs = PassGraphs([Bucket(1, 4)], TABLE, torch.device("cpu"))
    graphs.capture(eager, run)
    assert commits == [True, False]  # the buckets with commits come first
    commits.clear()
    graphs.replay(some_batch())
    graphs.replay(some_batch()._replace(slot_mapping=torch.full((3,), -1)))
    assert commits == [False, True]


def some_batch():
    return DraftBatch(
        input_ids=torch.tensor([5, 6, MASK]),
        positions=torch.arange(3),
        query_start_loc=torch.tensor([0, 3]),
        committed_lens=torch.tensor([0]),
        slot_mapping=None,
        block_table=torch.zeros(1, TABLE, dtype=torch.int32),
    )


def test_a_failed_capture_costs_the_graphs_alone(monkeypatch):
    warnings = []
    monkeypatch.setattr(graphs.logger, "warning", lambda *args: warnings.append(args[0] % args[1:]))
    found = PassGraphs(make_buckets(4, 128, ROWS), TABLE, torch.device("cpu"))
    captured = []

    def second_fails(run):
        captured.append(run)
        if len(captured) == 2:
            raise RuntimeError("out of memory")
        run()
        return run

    found.capture(second_fails, OneLayer())
    assert warnings == ["failfast: draft passes run eagerly; capturing failed: out of memory"]
    assert found.replay(some_batch()) is None


def test_beyond_the_largest_bucket_there_is_no_graph():
    found = PassGraphs([Bucket(1, 2)], TABLE, torch.device("cpu"))
    found.capture(eager, OneLayer())
    assert found.replay(some_batch()) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_replay():
    source, target = torch.ones(4, device="cuda"), torch.empty(4, device="cuda")
    pool = torch.cuda.graph_pool_handle()
    with torch.cuda.stream(torch.cuda.Stream()):
        replay = graphs.cuda_graph(
            lambda: target.copy_(source * 2), lambda: contextlib.nullcontext(pool)
        )
    torch.cuda.synchronize()
    source.fill_(3)
    replay()
    assert target.tolist() == [6.0] * 4
