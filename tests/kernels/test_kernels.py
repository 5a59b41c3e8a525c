"""The kernels' reference against dense float64 attention, one sequence at a time."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from attention_case import LAYOUTS, Case
from failfast_kernels import block_diffusion_attention, commit_kv, confidence_argmax, plan_padding

FLOAT32_TOLERANCE = 2e-5  # sums of at most a few hundred products of unit normals


@settings(max_examples=60, deadline=None)
@given(
    sequences=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 70)), min_size=1, max_size=5
    ).filter(lambda s: any(rows for _, rows in s)),
    pages=st.sampled_from([1, 2, 4]),
    kv_heads=st.sampled_from([1, 2]),
    group_size=st.sampled_from([1, 3]),
    block_size=st.sampled_from([4, 8, 32]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**16),
)
def test_attention_matches_dense_float64(
    sequences, pages, kv_heads, group_size, block_size, layout, seed
):
    page_size = pages * block_size
    case = Case(sequences, page_size, kv_heads, group_size, block_size, seed, layout=layout)
    torch.testing.assert_close(
        case.run(block_diffusion_attention).double(),
        case.expected(),
        atol=FLOAT32_TOLERANCE,
        rtol=FLOAT32_TOLERANCE,
    )


@pytest.mark.parametrize(
    "sequences",
    [
        pytest.param([(0, 1)], id="one row, no prefix"),
        pytest.param([(4, 10)], id="page boundary: prefix ends with its page"),
        pytest.param([(3, 33)], id="rows straddle a block end"),
        pytest.param([(0, 200), (2, 11), (1, 140), (0, 0)], id="two groups and an empty sequence"),
        pytest.param([(0, 600), (5, 42)], id="prefill beside a decode"),
        pytest.param([(1, 128), (0, 3), (0, 512)], id="the longest sequences of each group"),
        pytest.param([(0, 7), (2, 7), (2, 7)], id="nothing is padding"),
        pytest.param([(0, 140), (2, 10), (1, 140)], id="another group's rows in between"),
    ],
)
def test_attention_regimes(sequences):
    case = Case(sequences, 128, 1, 3, padding=5)
    torch.testing.assert_close(
        case.run(block_diffusion_attention).double(),
        case.expected(),
        atol=FLOAT32_TOLERANCE,
        rtol=FLOAT32_TOLERANCE,
    )


def test_pages_beyond_a_prefix_are_not_read():
    case = Case([(1, 5), (9, 5)], 64, 1, 1)
    case.block_table[0, 1:] = 1_000_000
    torch.testing.assert_close(
        case.run(block_diffusion_attention).double(),
        case.expected(),
        atol=FLOAT32_TOLERANCE,
        rtol=FLOAT32_TOLERANCE,
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


def test_confidence_of_undefined_rows():
    """The lowest allowed id and no confidence: a policy stops, whatever it looks at."""
    logits = torch.randn(5, 20_000)
    logits[0] = -torch.inf
    logits[1, 9_000] = torch.nan
    logits[2, 17_000] = torch.inf
    logits[3, :10_000] = -torch.inf  # defined: a whole tile of -inf is no NaN
    logits[4, [0, 19_999]] = torch.nan  # defined: neither column may win
    found = confidence_argmax(logits, 19_999, (0, 1))
    assert found.token_ids[:3].tolist() == [2, 2, 2]
    assert found.probabilities[:3].tolist() == [0.0, 0.0, 0.0]
    allowed = logits[3:, 2:19_999].double()
    assert torch.equal(found.token_ids[3:], allowed.argmax(-1) + 2)
    torch.testing.assert_close(
        found.probabilities[3:].double(), allowed.softmax(-1).amax(-1), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(
    ("num_valid_tokens", "forbidden", "message"),
    [(0, (), "between 1 and the 5"), (6, (), "got 6"), (2, (0, 1), "all 2 tokens are forbidden")],
)
def test_confidence_needs_an_allowed_token(num_valid_tokens, forbidden, message):
    with pytest.raises(ValueError, match=message):
        confidence_argmax(torch.zeros(1, 5), num_valid_tokens, forbidden)
