"""The reference of prompt lookup against a loop in plain Python."""

import pytest
import torch
from hypothesis import given, settings

from failfast_kernels import continue_matches, match_suffixes
from match_cases import (
    WRITTEN,
    assert_as_brute_force,
    assert_continued,
    assert_written,
    batches,
    brute_force,
)


@pytest.mark.parametrize("name", WRITTEN)
def test_written_cases(name):
    assert_written(match_suffixes, name)


@pytest.mark.parametrize("name", WRITTEN)
def test_the_loop_knows_the_written_cases(name):
    tokens, min_match, max_match, length, start = WRITTEN[name]
    assert brute_force(tokens, min_match, max_match) == (length, start)


@settings(max_examples=300, deadline=None)
@given(batches())
def test_drawn_batches(batch):
    assert_as_brute_force(match_suffixes, batch)
    assert_continued(continue_matches, batch, match_suffixes(*batch))


def test_the_table_stays_as_it_is():
    token_ids = torch.randint(-1, 3, (4, 50))
    before = token_ids.clone()
    slots, known_lens = torch.tensor([[3, 0], [50, 20]])
    match_suffixes(token_ids, slots, known_lens, 1, 8, 50)
    assert torch.equal(token_ids, before)


@pytest.mark.parametrize(("min_match", "max_match"), [(0, 4), (3, 2)])
def test_lengths_in_disorder(min_match, max_match):
    one = torch.ones(1, dtype=torch.int64)
    with pytest.raises(AssertionError):
        match_suffixes(one[None], one - 1, one, min_match, max_match, 1)
