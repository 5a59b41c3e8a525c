"""Sampling with failfast keeps the target's distribution (chi-square at temperature 1)."""

import functools

import pytest
import torch

from copying_cases import copying
from distribution import draw, favour_drafts, free_words, p_value
from engine import engine, watch
from failfast_vllm.integration.runner_hooks import spread_parameters

P_VALUE = 0.01


@pytest.fixture(scope="module", params=[4_000, pytest.param(20_000, marks=pytest.mark.large)])
def question(request):
    """How many answers to draw, a prompt, and the distribution of its first tokens."""
    return request.param, *free_words(request.param)


def sampling_engine(config="failfast"):
    return engine(config, max_num_seqs=128, enable_prefix_caching=True, block_size=32, seed=20)


@pytest.fixture(scope="module")
def drafting():
    with sampling_engine() as llm:
        yield llm


def test_parameters_are_spread_over_ragged_drafts(monkeypatch):
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", False)
    expand = functools.partial(spread_parameters, None)
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    temperatures = expand(torch.tensor([0.0, 0.5, 0.7]), ends, 5, replace_from=0, replace_to=1)
    assert temperatures.tolist() == pytest.approx([1.0, 1.0, 0.7, 0.7, 0.7])
    top_k = expand(torch.tensor([7, 8, 9], dtype=torch.int32), ends, 5)
    assert top_k.tolist() == [7, 7, 9, 9, 9]
    assert top_k.dtype == torch.int32


@pytest.mark.slow
def test_the_distribution_is_the_targets(question, drafting):
    num_draws, prompt, distribution = question
    with watch(drafting) as record:
        draws = draw(drafting, prompt, num_draws)
    rounds = [r for r in record.rounds if r.drafted]
    accepted = sum(len(r.emitted) > 1 for r in rounds) / len(rounds)
    # rare acceptance suffices: the next test shows that the check sees a bias at this rate
    assert 0.005 < accepted < 0.98, "a draft that is always or never accepted proves nothing"
    assert p_value(draws, distribution, num_draws) > P_VALUE


@pytest.mark.slow
def test_the_check_catches_a_biased_acceptance(question, drafting, monkeypatch):
    """Draft tokens look a little likelier than they are: the check must fail."""
    num_draws, prompt, distribution = question
    favour_drafts(monkeypatch, 0.4 if num_draws > 10_000 else 0.6)
    draws = draw(drafting, prompt, num_draws)
    assert p_value(draws, distribution, num_draws) < P_VALUE


@pytest.mark.slow
def test_the_distribution_with_copies(question):
    num_draws = question[0]
    prompt, distribution = free_words(num_draws, hints=96)
    alone = {"method": "failfast", "model": None, "load_aware": True}
    with sampling_engine(alone) as llm, copying(llm, drafts=False, longest=4) as record:
        draws = draw(llm, prompt, num_draws)
    copied = [r for r in record.rounds if r.num_copied]
    assert len(copied) > num_draws / 4
    accepted = sum(r.num_accepted > 0 for r in copied) / len(copied)
    assert 0.005 < accepted < 0.98, "a copy that is always or never accepted proves nothing"
    assert p_value(draws, distribution, num_draws) > P_VALUE
