"""Sampled tokens are the target's own draws, at every place of an answer."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from distribution import favour_drafts
from failfast_vllm.drafting.records import FirstPass

FILE = Path(__file__).parents[2] / "benchmarks" / "endurance" / "draws.py"
spec = importlib.util.spec_from_file_location("draws", FILE)
draws = importlib.util.module_from_spec(spec)
spec.loader.exec_module(draws)

NUM_TOKENS, P_VALUE = 20_000, 0.001


class Fixed:
    """A model that gives every token after the first the same distribution."""

    shares = torch.tensor([0.5, 0.2, 0.2, 0.1])

    def __call__(self, input_ids, logits_to_keep):
        return type("", (), {"logits": self.shares.log().expand(len(input_ids), logits_to_keep, 4)})


class Sure(Fixed):
    shares = torch.tensor([0.97, 0.01, 0.01, 0.01])


def test_places_are_uniform_only_of_true_draws():
    """Catches a place of the wrong token, and ties that pile up."""
    rng = np.random.default_rng(0)
    for temperature, is_true in ((1.0, True), (0.7, False)):
        shares = Fixed.shares.double() ** (1 / temperature)
        shares = (shares / shares.sum()).numpy()
        answers = [rng.choice(4, size=n, p=shares).tolist() for n in (500, 3000, 1500)]
        found = draws.places(Fixed(), [1, 2], answers, rng)
        assert len(found) == 5000
        counts = np.histogram(found, bins=20, range=(0, 1))[0]
        assert (draws.chi_square_p(counts) > P_VALUE) == is_true
    assert draws.distance(np.array([30, 10])) == 0.25


def test_what_was_not_open_is_not_counted():
    """Catches sure tokens among the places, which hide a bias."""
    found = draws.places(Sure(), [1], [[0] * 10], np.random.default_rng(0))
    assert not len(found)


def test_every_match_is_copied():
    """Catches a planner that no longer plans copies: then no copy is ever judged."""
    nothing = np.zeros(3, dtype=np.int64)
    wanted, match_lens = np.array([9, 9, 2]), np.array([1, 0, 5])
    asked = FirstPass(wanted, nothing, nothing, nothing, match_lens)
    passes, copied = draws.CopiesAlways(draft_increment=1).first(asked)
    assert passes.tolist() == [0, 0, 0]
    assert copied.tolist() == [draws.LONGEST_COPY, 0, 2]


@pytest.mark.large
@pytest.mark.parametrize("method", list(draws.METHODS))
def test_tokens_are_the_targets_draws(method):
    """Catches a bias for drafted tokens, wherever in an answer."""
    *_, found = draws.sample(draws.METHODS[method], NUM_TOKENS, 32)
    assert found["tokens"] >= NUM_TOKENS
    assert found["accepted"] > NUM_TOKENS / 20
    assert found["drafted"] > found["accepted"]
    assert found["chi_square_p"] > P_VALUE


@pytest.mark.large
def test_a_bias_is_seen(monkeypatch):
    """Draft tokens look likelier than they are: the same check must fail."""
    favour_drafts(monkeypatch, 0.8)
    *_, found = draws.sample(draws.METHODS["drafter"], NUM_TOKENS, 32)
    assert found["chi_square_p"] < P_VALUE
