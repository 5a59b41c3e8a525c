"""Prompt lookup in Triton against a loop in plain Python, as `test_triton_kernels.py` runs."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import failfast_kernels
from failfast_kernels import copy_match, copy_match_reference
from failfast_kernels.copy_match import continue_matches, match_suffixes
from match_cases import (
    WRITTEN,
    assert_as_brute_force,
    assert_continued,
    assert_written,
    batches,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = float(os.environ.get("FAILFAST_TEST_SHAPES", "1"))


@pytest.fixture
def small_chunks(monkeypatch):
    """Short rows shall take several programs."""
    monkeypatch.setattr(copy_match, "BLOCK_N", 16)


def test_these_kernels_run_where_they_claim():
    kind = type(copy_match._match_kernel).__name__
    assert kind == ("JITFunction" if DEVICE == "cuda" else "InterpretedFunction")


@pytest.mark.parametrize("name", WRITTEN)
def test_written_cases(name):
    assert_written(match_suffixes, name, DEVICE)


@settings(
    max_examples=round(150 * SHAPES),
    derandomize="FAILFAST_TEST_SHAPES" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(batches(max_len=70))
def test_drawn_batches(small_chunks, batch):
    assert_as_brute_force(match_suffixes, batch, DEVICE)
    found = copy_match_reference.match_suffixes(*batch)
    assert_continued(continue_matches, batch, found, DEVICE)


def test_more_chunks_than_one_step_selects_from(small_chunks):
    """Of 130 chunks the best stands in the first and again in the last."""
    token_ids = torch.arange(130 * 16, dtype=torch.int32)[None].repeat(2, 1)
    token_ids[:, 3:6] = token_ids[:, -3:] = torch.tensor([7001, 7002, 7003])
    token_ids[1, -9:-7] = torch.tensor([7002, 7003])
    token_ids[1, 1500:1503] = torch.tensor([7001, 7002, 7003])
    batch = token_ids, torch.arange(2), torch.full((2,), 130 * 16), 2, 8, 130 * 16
    found = match_suffixes(*(x.to(DEVICE) for x in batch[:3]), *batch[3:])
    assert found.starts.tolist() == [6, 1503]


def test_launched_blocks_agree_with_the_reference():
    """Rows of several blocks of the size that is launched; one's match lies across two blocks."""
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(0, 6, (3, 5000), generator=generator, dtype=torch.int32)
    token_ids[:, 3::50] = -1
    token_ids[2, 1018:1030] = token_ids[2, 4988:] = torch.arange(12)
    slots, known_lens = torch.tensor([[2, 0, 1, 1], [5000, 1025, 4096, 1]])
    batch = token_ids, slots, known_lens
    found = match_suffixes(*(x.to(DEVICE) for x in batch), 2, 16, 5000)
    expected = copy_match_reference.match_suffixes(*batch, 2, 16, 5000)
    assert [x.tolist() for x in found] == [x.tolist() for x in expected]
    assert found.starts[0] == 1030
    assert min(found.match_lens.tolist()[:3]) >= 2


def test_offsets_beyond_31_bits():
    """Two GiB that are reserved and never touched but for one row."""
    reserved = torch.empty(2**31 + 64, dtype=torch.int8, device=DEVICE)
    token_ids = reserved.as_strided((3, 64), (2**30, 1))
    token_ids[2] = torch.arange(64, device=DEVICE) % 40
    slots, known_lens = torch.tensor([[2], [64]], device=DEVICE)
    found = match_suffixes(token_ids, slots, known_lens, 2, 8, 64)
    assert [x.tolist() for x in found] == [[8], [24]]
    copied = continue_matches(token_ids, slots, known_lens, found.starts, 18, 64, -1)
    assert copied.tolist() == [[*range(24, 40), 0, 1]]


@pytest.mark.skipif(DEVICE == "cuda", reason="CUDA tensors need no flag")
def test_the_flag_sends_cpu_tensors_to_triton(monkeypatch):
    launches = []
    monkeypatch.setattr(copy_match, "match_suffixes", lambda *a: launches.append(a))
    one = torch.ones(1, dtype=torch.int64)
    batch = one[None], one - 1, one, 1, 2, 1
    monkeypatch.delenv("FAILFAST_TRITON", raising=False)
    assert failfast_kernels.match_suffixes(*batch).starts.tolist() == [1]
    assert launches == []
    monkeypatch.setenv("FAILFAST_TRITON", "1")
    failfast_kernels.match_suffixes(*batch)
    assert launches == [batch]
