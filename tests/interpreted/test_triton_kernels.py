"""The Triton kernels against float64: interpreted on a CPU, compiled where there is a GPU.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted/test_triton_kernels.py

With a GPU say TRITON_INTERPRET=0 (not run yet). FAILFAST_TEST_SHAPES (0.25 unless set) multiplies
the number of drawn shapes and lets --hypothesis-seed choose them.
"""

import os

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import HealthCheck, given, settings

import failfast_kernels
from attention_case import LAYOUTS, Case, on_device
from failfast_kernels import block_attention, confidence, launch_table, reference
from failfast_kernels.launch_table import ConfidenceLaunch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = float(os.environ.get("FAILFAST_TEST_SHAPES", "0.25"))

# Largest error over the largest magnitude of the answer: the products are exact in float32, so
# what remains is summing up to some thousand terms (2^-24 each) and exp2 (2 units in the last
# place). Relative to the largest, since sums near zero have cancelled.
FLOAT32_RELATIVE = 1e-5
# Likewise, but at least of 1, since many keys average to little: the weights of the second product
# are rounded to 8 bits (2^-9 relative each, partly averaged out) and the output once more.
BFLOAT16_RELATIVE = 1e-2
FLOAT16_RELATIVE = 2e-3  # likewise with 11 bits, 2^-12
CONFIDENCE_RELATIVE = 1e-5  # sums of at most 152k positive float32 terms, in tiles

drawn = settings(
    derandomize="FAILFAST_TEST_SHAPES" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Short prefixes and few columns shall take the paths of long ones."""
    monkeypatch.setattr(launch_table, "MIN_SPLIT_KEYS", 16)
    monkeypatch.setattr(
        launch_table, "CONFIDENCE", {size: ConfidenceLaunch(128, 4) for size in (2, 4)}
    )


@pytest.fixture(scope="module", autouse=True)
def _bfloat16_products():
    """The interpreter multiplies the bit patterns of bfloat16 (triton-lang/triton#11584)."""
    if DEVICE == "cuda":
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    with pytest.MonkeyPatch.context() as patch:
        dot = InterpreterBuilder.create_dot

        def dot_of_values(self, a, b, *args):
            def value(operand):
                if operand.dtype.scalar != tl.bfloat16:
                    return operand
                bits = operand.data.astype(np.uint32) << 16
                return TensorHandle(bits.view(np.float32), tl.float32)

            return dot(self, value(a), value(b), *args)

        patch.setattr(InterpreterBuilder, "create_dot", dot_of_values)
        yield


def assert_matches(case, **overrides):
    found = case.run(block_attention.block_diffusion_attention, DEVICE, **overrides)
    expected = case.expected()
    assert not found.isnan().any(), "a row was not written, or garbage leaked"
    if found.numel() == 0:
        return
    error, largest = float((found.double() - expected).abs().max()), float(expected.abs().max())
    if case.query.dtype == torch.float32:
        assert error <= FLOAT32_RELATIVE * largest
    elif case.query.dtype == torch.bfloat16:
        assert error <= BFLOAT16_RELATIVE * max(1.0, largest)
    else:
        assert error <= FLOAT16_RELATIVE * max(1.0, largest)


def test_these_kernels_run_where_they_claim():
    kind = type(block_attention._attention_kernel).__name__
    assert kind == ("JITFunction" if DEVICE == "cuda" else "InterpretedFunction")


@settings(drawn, max_examples=round(240 * SHAPES))
@given(
    sequences=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 12)), min_size=1, max_size=4),
    block_size=st.sampled_from([4, 8, 16, 32]),
    blocks_per_page=st.sampled_from([1, 2, 3, 4]),
    kv_heads=st.sampled_from([1, 2]),
    group_size=st.integers(1, 8),
    head_dim=st.sampled_from([16, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(LAYOUTS),
    num_splits=st.sampled_from([1, 1, 4, None]),
    padding=st.sampled_from([0, 0, 1, 13, 40]),
    seed=st.integers(0, 2**16),
)
def test_drawn_shapes_of_drafting(
    sequences,
    block_size,
    blocks_per_page,
    kv_heads,
    group_size,
    head_dim,
    dtype,
    layout,
    num_splits,
    padding,
    seed,
):
    page_size = blocks_per_page * block_size
    case = Case(
        sequences,
        page_size,
        kv_heads,
        group_size,
        block_size,
        seed,
        head_dim,
        dtype,
        layout,
        padding,
    )
    assert_matches(case, num_splits=num_splits)


@settings(drawn, max_examples=round(80 * SHAPES))
@given(
    sequences=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 64)), min_size=1, max_size=3),
    block_size=st.sampled_from([4, 32]),
    group_size=st.sampled_from([1, 3, 6]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_drawn_shapes_with_many_rows(sequences, block_size, group_size, dtype, seed):
    """Several tiles of rows per sequence, blocks that are committed beside rows that are not."""
    case = Case(sequences, 2 * block_size, 1, group_size, block_size, seed, 64, dtype)
    assert_matches(case)


@pytest.mark.parametrize("num_splits", [1, 4, 16])
@pytest.mark.parametrize(
    ("sequences", "page_size"),
    [
        pytest.param([(0, 1)], 32, id="one row, no prefix: an empty loop over the cache"),
        pytest.param([(1, 10)], 32, id="one block of prefix: splits without keys"),
        pytest.param([(31, 10)], 128, id="31 blocks: the last page is partly filled"),
        pytest.param([(32, 10)], 128, id="32 blocks: the prefix ends with its page"),
        pytest.param([(33, 10)], 128, id="33 blocks: one block on a page of its own"),
        pytest.param([(5, 33)], 96, id="rows straddle a block's end; a tile crosses pages"),
        pytest.param([(2, 64)], 64, id="rows end with their block"),
        pytest.param([(2, 10), (0, 0), (1, 1), (0, 0)], 32, id="sequences without rows"),
        pytest.param([(0, 0), (3, 0)], 32, id="no rows at all"),
        pytest.param([(9, 42), (0, 5), (1, 33)], 64, id="commit and denoise in one launch"),
    ],
)
def test_regimes(sequences, page_size, num_splits):
    assert_matches(Case(sequences, page_size, 1, 3, head_dim=64), num_splits=num_splits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [4, 8, 16, 32])
def test_a_tile_of_rows_holds_several_blocks(block_size, dtype):
    """Rows of one tile see different ends: the mask, not the end of the loop, must decide."""
    case = Case([(3, 70), (0, 9)], 96, 1, 1, block_size, head_dim=64, dtype=dtype)
    assert_matches(case)


@pytest.mark.parametrize(
    ("page_size", "block_size", "dtype"),
    [(4, 4, torch.float32), (48, 16, torch.float32), (32, 32, torch.bfloat16)],
)
def test_a_tile_of_keys_crosses_pages(page_size, block_size, dtype):
    """Each key has its own page; pages are in no order."""
    case = Case([(9, 5), (6, 2)], page_size, 1, 2, block_size, head_dim=64, dtype=dtype)
    assert_matches(case, num_splits=1)


@pytest.mark.parametrize("num_splits", [1, 16])
def test_4096_tokens_of_prefix(num_splits):
    """4,095 tokens, rounded to blocks: sums of thousands of terms, the table's last page."""
    assert_matches(Case([(128, 10)], 128, 1, 6, head_dim=64), num_splits=num_splits)


def test_a_sequence_after_many_others():
    """The search for a tile's sequence ends on the right one, with gaps between them."""
    sequences = [(i % 3, (0, 1, 7, 0)[i % 4]) for i in range(37)]
    assert_matches(Case(sequences, 32, 1, 3))


def test_no_sequences():
    case = Case([], 32, 1, 2)
    assert case.run(block_attention.block_diffusion_attention, DEVICE).shape == (0, 2, 16)


def test_reads_only_the_committed_part_of_the_table():
    """Table entries behind the prefix may hold anything, also ids of no page."""
    case = Case([(1, 3), (5, 3)], 32, 1, 2)
    case.block_table[0, 1:] = 2**30
    assert_matches(case, num_splits=4)


def test_attention_refuses_what_it_was_not_written_for():
    attention = block_attention.block_diffusion_attention
    with pytest.raises(ValueError, match="head_dim must be one of"):
        Case([(1, 3)], 32, 1, 2, head_dim=48).run(attention, DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_commit_kv_equals_the_reference(layout, dtype):
    case = Case([(3, 9)], 64, 2, 3, head_dim=64, dtype=dtype, layout=layout)
    slots = torch.tensor([70, -1, 0, 127, -1, 1, 63, 64, -1])
    expected = case.kv_cache.clone()
    reference.commit_kv(case.key, case.value, expected, slots)
    cache = on_device(case.kv_cache, DEVICE)
    key, value = on_device(case.key, DEVICE), on_device(case.value, DEVICE)
    block_attention.commit_kv(key, value, cache, slots.to(DEVICE))
    torch.testing.assert_close(cache.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert int((~expected.isnan()).sum()) > 0


def assert_same_confidence(logits, num_valid_tokens, forbidden, num_splits):
    """The kernel's answer equals the reference's, which `test_kernels.py` checks in float64."""
    expected = reference.confidence_argmax(logits, num_valid_tokens, forbidden)
    found = confidence.confidence_argmax(
        on_device(logits, DEVICE),
        num_valid_tokens,
        forbidden,
        num_splits=num_splits,
    )
    assert torch.equal(found.token_ids.cpu(), expected.token_ids)
    torch.testing.assert_close(
        found.probabilities.cpu(),
        expected.probabilities,
        rtol=CONFIDENCE_RELATIVE,
        atol=CONFIDENCE_RELATIVE,
    )


@settings(drawn, max_examples=round(220 * SHAPES))
@given(
    num_rows=st.integers(0, 6),
    num_valid_tokens=st.integers(3, 1500),
    padding=st.integers(0, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    spread=st.sampled_from([0.0, 1.0, 8.0]),
    num_splits=st.sampled_from([1, 4, 16, None]),
    contiguous=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_drawn_confidences(
    num_rows, num_valid_tokens, padding, dtype, spread, num_splits, contiguous, seed
):
    """Coarse values make ties; garbage stands in every column that may not count."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, num_valid_tokens + padding)
    logits = (torch.randn(shape, generator=generator) * spread).mul(4).round().div(4).to(dtype)
    forbidden = (1, num_valid_tokens - 1, num_valid_tokens + padding)
    logits[:, [1, num_valid_tokens - 1]] = torch.nan
    logits[:, num_valid_tokens:] = torch.nan
    if not contiguous:
        logits = logits.t().contiguous().t()
    assert_same_confidence(logits, num_valid_tokens, forbidden, num_splits)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_confidence_of_odd_rows(num_splits):
    """-inf, NaN, +inf, ties across tiles and splits, the least float."""
    torch.manual_seed(0)
    logits = torch.randn(10, 700) * 4
    logits[0] = -torch.inf
    logits[1, 5] = torch.nan
    logits[2] = 1.0
    logits[3, :300] = -torch.inf
    logits[4, 9] = torch.inf
    logits[5, 690] = torch.nan  # not valid
    logits[6, 3] = torch.nan  # forbidden
    logits[7] = torch.finfo(torch.float32).min
    logits[8, [100, 400]] = 50.0
    logits[9] = -torch.inf
    logits[9, 77] = 0.0
    assert_same_confidence(logits, 680, (3, 0), num_splits)


def test_confidence_over_a_whole_vocabulary(monkeypatch):
    """Qwen2.5's columns with the committed launch: the last tile is not full, offsets are large."""
    monkeypatch.undo()
    torch.manual_seed(0)
    logits = torch.randn(2, 151_936, dtype=torch.bfloat16) * 3
    logits[:, 151_664] = 20.0
    logits[1, 151_665] = 30.0  # MASK
    assert_same_confidence(logits, 151_665, (151_665,), None)


@pytest.mark.skipif(DEVICE == "cuda", reason="CUDA tensors need no flag")
def test_the_flag_sends_cpu_tensors_to_triton(monkeypatch):
    case = Case([(1, 3)], 32, 1, 2)
    launches = []
    for home in (block_attention, confidence):
        for name in ("block_diffusion_attention", "commit_kv", "confidence_argmax"):
            if hasattr(home, name):
                monkeypatch.setattr(home, name, lambda *a, name=name, **k: launches.append(name))

    def call_all():
        failfast_kernels.block_diffusion_attention(
            case.query,
            case.key,
            case.value,
            case.kv_cache,
            case.block_table,
            case.committed,
            case.query_start_loc,
            case.scale,
        )
        slots = torch.full((3,), -1)
        failfast_kernels.commit_kv(case.key, case.value, case.kv_cache, slots)
        failfast_kernels.confidence_argmax(torch.zeros(1, 5), 5)

    monkeypatch.delenv("FAILFAST_TRITON", raising=False)
    call_all()
    assert launches == []
    monkeypatch.setenv("FAILFAST_TRITON", "1")
    call_all()
    assert launches == ["block_diffusion_attention", "commit_kv", "confidence_argmax"]
