"""What is launched before serving covers what serving launches: else Triton compiles meanwhile."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

pytest.importorskip("triton")

from failfast_kernels import block_attention, confidence, launch_table

PROPERTY = settings(max_examples=300, deadline=None, derandomize=True, database=None)


class Recorder:
    """In place of a kernel: remembers the compile-time arguments of its launches."""

    def __init__(self):
        self.classes = set()

    def __getitem__(self, grid):
        return lambda *args, **constants: self.classes.add(tuple(sorted(constants.items())))


@pytest.fixture
def recorders(monkeypatch):
    found = {}
    for module in (block_attention, confidence):
        for name in ("_attention_kernel", "_commit_kernel", "_confidence_kernel", "_merge_kernel"):
            if hasattr(module, name):
                found[module.__name__, name] = recorder = Recorder()
                monkeypatch.setattr(module, name, recorder)
    return found


def classes(recorders):
    return {key: set(recorder.classes) for key, recorder in recorders.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"), [(12, 2), (28, 4), (16, 8), (3, 1), (32, 1)]
)
def test_attention_classes(recorders, num_heads, num_kv_heads, dtype):
    cache = torch.zeros(2, num_kv_heads, 64, 256, dtype=dtype)
    block_attention.launch_every_class(num_heads, cache, 32)
    warm = classes(recorders)

    @PROPERTY
    @given(st.integers(1, 300), st.integers(0, 5000), st.sampled_from([1, 8, 64, 2048]))
    def serving_meets_no_other(num_seqs, more_rows, max_pages):
        num_rows = num_seqs + more_rows
        query = torch.empty(num_rows, num_heads, 128, dtype=dtype)
        key = torch.empty(num_rows, num_kv_heads, 128, dtype=dtype)
        table = torch.empty(num_seqs, max_pages, dtype=torch.int32)
        lens = torch.empty(num_seqs + 1, dtype=torch.int64)
        block_attention.commit_kv(key, key, cache, lens)
        block_attention.block_diffusion_attention(
            query, key, key, cache, table, lens[1:], lens, 1.0, 32
        )
        assert classes(recorders) == warm

    serving_meets_no_other()
    assert len(warm[block_attention.__name__, "_attention_kernel"]) >= 3


@pytest.mark.parametrize("num_columns", [1984, 151936])
def test_confidence_classes(recorders, num_columns):
    logits = torch.empty(1, num_columns, dtype=torch.bfloat16)
    confidence.launch_every_class(logits, num_columns, (3,))
    warm = classes(recorders)
    for num_rows in range(1, 700):
        num_tiles = -(-num_columns // launch_table.CONFIDENCE[2].block_n)
        num_splits = launch_table.num_splits(confidence.SPLITS, num_rows, num_tiles)
        confidence.confidence_argmax(logits, num_columns, (3,), num_splits=num_splits)
    assert classes(recorders) == warm
    assert warm[confidence.__name__, "_confidence_kernel"]
