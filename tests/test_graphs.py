"""Draft passes in fixed shapes: the right bucket, and nothing of the padding in the result."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from failfast_kernels import block_diffusion_attention, commit_kv
from failfast_vllm import graphs
from failfast_vllm.drafter import DraftBatch
from failfast_vllm.graphs import Bucket, BucketedPasses, choose_bucket, make_buckets

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
    buckets = make_buckets(max_seqs, max_rows)
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


@given(batches=st.lists(passes(), min_size=1, max_size=4))
@PROPERTY
def test_a_padded_pass_equals_the_pass_itself(batches):
    """One instance for all: nothing of an earlier, larger pass may come back."""
    plain, layer = OneLayer(), OneLayer()
    bucketed = BucketedPasses(layer, make_buckets(8, 384), TABLE, torch.device("cpu"))
    bucketed.capture(lambda run: run)
    for batch in batches:
        expected = plain(batch)
        assert torch.isfinite(expected).all()
        torch.testing.assert_close(bucketed(batch), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.cache, plain.cache, rtol=0, atol=0)
        bucketed.rows.fill_(VOCAB - 1)  # a stale row left in place would read or write here
        bucketed.committed_lens.fill_(BLOCK)
        bucketed.block_table.fill_(NUM_PAGES - 1)


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
    layer = OneLayer()
    bucketed = BucketedPasses(layer, make_buckets(4, 128), TABLE, torch.device("cpu"))
    captured = []

    def second_fails(run):
        captured.append(run)
        if len(captured) == 2:
            raise RuntimeError("out of memory")
        return run

    bucketed.capture(second_fails)
    assert warnings == ["failfast: draft passes run eagerly; capturing failed: out of memory"]
    assert not bucketed.replays
    torch.testing.assert_close(bucketed(some_batch()), layer(some_batch()))


def test_beyond_the_largest_bucket_a_pass_runs_as_it_is():
    shapes = []

    def run(batch):
        shapes.append(batch.input_ids.numel())
        return torch.zeros(batch.input_ids.numel(), 1)

    bucketed = BucketedPasses(run, [Bucket(1, 2)], TABLE, torch.device("cpu"))
    bucketed.capture(lambda run: run)
    assert bucketed(some_batch()).shape == (3, 1)
    assert shapes == [3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_replay():
    from failfast_vllm.graphs import cuda_graph

    source = torch.ones(4, device="cuda")
    replay = cuda_graph(lambda: source * 2)
    source.fill_(3)
    assert replay().tolist() == [6.0] * 4
