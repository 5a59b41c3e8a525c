"""The kernels' reference against dense float64 attention, one sequence at a time."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from failfast_kernels import block_diffusion_attention, commit_kv, confidence_argmax, plan_padding

FLOAT32_TOLERANCE = 2e-5  # sums of at most a few hundred products of unit normals
BLOCK = 32


def dense_attention(query, keys, values, first_position, block_size):
    """[rows, heads, dim] against all keys of one sequence, float64, mask spelled out."""
    heads, kv_heads = query.shape[1], keys.shape[1]
    output = torch.empty_like(query, dtype=torch.float64)
    for i in range(query.shape[0]):
        visible = [
            k for k in range(keys.shape[0]) if k // block_size <= (first_position + i) // block_size
        ]
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            scores = keys[visible, kv_head].double() @ query[i, head].double()
            weights = torch.softmax(scores * query.shape[2] ** -0.5, dim=0)
            output[i, head] = weights @ values[visible, kv_head].double()
    return output


class Case:
    """A ragged batch with a paged cache whose unused slots hold garbage."""

    def __init__(self, sequences, page_size, kv_heads, group_size, block_size=BLOCK, seed=0):
        # sequences: (committed blocks, rows)
        torch.manual_seed(seed)
        dim = 16
        num_pages = [-(-blocks * block_size // page_size) for blocks, _ in sequences]
        order = (torch.randperm(sum(num_pages)) + 1).tolist()  # page 0 belongs to nobody
        self.block_table = torch.zeros(len(sequences), max([*num_pages, 1]), dtype=torch.int32)
        storage = torch.full((sum(num_pages) + 1, page_size, kv_heads, 2 * dim), torch.nan)
        self.kv_cache = storage.transpose(1, 2)  # strided, as vLLM hands it over
        self.committed = torch.tensor([b * block_size for b, _ in sequences])
        lens = torch.tensor([rows for _, rows in sequences])
        self.query_start_loc = torch.cat([torch.zeros(1, dtype=torch.int64), lens.cumsum(0)])
        total = int(lens.sum())
        self.query = torch.randn(total, kv_heads * group_size, dim)
        self.key, self.value = torch.randn(2, total, kv_heads, dim)
        self.scale, self.block_size = dim**-0.5, block_size
        self.keys, self.values = [], []
        for s, (blocks, rows) in enumerate(sequences):
            for page in range(num_pages[s]):
                self.block_table[s, page] = order.pop()
            prefix = torch.randn(2, blocks * block_size, kv_heads, dim)
            for i in range(blocks * block_size):
                page = self.block_table[s, i // page_size]
                self.kv_cache[page, :, i % page_size] = torch.cat([prefix[0, i], prefix[1, i]], -1)
            own = slice(int(self.query_start_loc[s]), int(self.query_start_loc[s]) + rows)
            self.keys.append(torch.cat([prefix[0], self.key[own]]))
            self.values.append(torch.cat([prefix[1], self.value[own]]))

    def run(self):
        return block_diffusion_attention(
            self.query,
            self.key,
            self.value,
            self.kv_cache,
            self.block_table,
            self.committed,
            self.query_start_loc,
            self.scale,
            self.block_size,
        )

    def expected(self):
        parts = []
        for s, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            own = slice(int(self.query_start_loc[s]), int(self.query_start_loc[s + 1]))
            first = int(self.committed[s])
            parts.append(dense_attention(self.query[own], keys, values, first, self.block_size))
        return torch.cat(parts)


@settings(max_examples=60, deadline=None)
@given(
    sequences=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 70)), min_size=1, max_size=5
    ).filter(lambda s: any(rows for _, rows in s)),
    pages=st.sampled_from([1, 2, 4]),
    kv_heads=st.sampled_from([1, 2]),
    group_size=st.sampled_from([1, 3]),
    block_size=st.sampled_from([4, 8, 32]),
    seed=st.integers(0, 2**16),
)
def test_attention_matches_dense_float64(sequences, pages, kv_heads, group_size, block_size, seed):
    case = Case(sequences, pages * block_size, kv_heads, group_size, block_size, seed)
    torch.testing.assert_close(
        case.run().double(), case.expected(), atol=FLOAT32_TOLERANCE, rtol=FLOAT32_TOLERANCE
    )


@pytest.mark.parametrize(
    "sequences",
    [
        pytest.param([(0, 1)], id="one row, no prefix"),
        pytest.param([(4, 10)], id="page boundary: prefix ends with its page"),
        pytest.param([(3, 33)], id="rows straddle a block end"),
        pytest.param([(0, 200), (2, 11), (1, 140), (0, 0)], id="two groups and an empty sequence"),
        pytest.param([(0, 600), (5, 42)], id="prefill beside a decode"),
    ],
)
def test_attention_regimes(sequences):
    case = Case(sequences, 128, 1, 3)
    torch.testing.assert_close(
        case.run().double(), case.expected(), atol=FLOAT32_TOLERANCE, rtol=FLOAT32_TOLERANCE
    )


def test_long_sequences_do_not_pad_short_ones():
    case = Case([(0, 600), (1, 10), (2, 20)], 128, 1, 1)
    groups = plan_padding(
        case.block_table, case.committed, case.query_start_loc, 128, 1, torch.float32
    )
    assert sorted(tuple(group.rows.shape) for group in groups) == [(1, 600), (2, 20)]


def test_no_rows_no_groups():
    empty = torch.zeros(0, dtype=torch.int64)
    table = torch.zeros(0, 1, dtype=torch.int32)
    assert plan_padding(table, empty, torch.zeros(1, dtype=torch.int64), 32, 1, torch.float32) == []


def test_commit_kv_writes_only_its_slots():
    cache = torch.full((3, 64, 2, 8), torch.nan).transpose(1, 2)
    key, value = torch.randn(2, 5, 2, 4)
    commit_kv(key, value, cache, torch.tensor([70, -1, 0, 127, -1]))
    for row, (page, offset) in {0: (1, 6), 2: (0, 0), 3: (1, 63)}.items():
        assert torch.equal(cache[page, :, offset, :4], key[row])
        assert torch.equal(cache[page, :, offset, 4:], value[row])
    assert int((~cache.isnan()).sum()) == 3 * 2 * 8


@settings(max_examples=100, deadline=None)
@given(
    num_rows=st.integers(1, 9),
    vocab_size=st.integers(1, 400).map(lambda n: n * 53),
    padding=st.integers(0, 40),
    seed=st.integers(0, 2**16),
)
def test_confidence_matches_softmax(num_rows, vocab_size, padding, seed):
    torch.manual_seed(seed)
    logits = torch.randn(num_rows, vocab_size + padding) * 5
    forbidden = () if vocab_size < 3 else (1, vocab_size - 1, vocab_size + padding)
    allowed = logits[:, :vocab_size].double().clone()
    allowed[:, [i for i in forbidden if i < vocab_size]] = -torch.inf
    probabilities, token_ids = allowed.softmax(-1).max(-1)
    before = logits.clone()
    found = confidence_argmax(logits, vocab_size, forbidden)
    assert torch.equal(found.token_ids, token_ids)
    torch.testing.assert_close(found.probabilities.double(), probabilities, rtol=1e-5, atol=1e-7)
    assert torch.equal(logits, before), "the logits are the caller's"


def test_confidence_tie_goes_to_the_lowest_id():
    logits = torch.zeros(2, 20_000)
    logits[1, [9_000, 17_000]] = 3.0
    assert confidence_argmax(logits, 20_000).token_ids.tolist() == [0, 9_000]
