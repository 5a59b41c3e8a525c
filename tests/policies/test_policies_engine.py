"""Every length policy in an engine: greedy answers, sampled tokens, and what drafts look like.

One engine serves all of them; the policy of its drafter is exchanged in between.
"""

import pytest
import torch

from distribution import draw, free_words, p_value
from engine import chat_ids, engine, generate, policy, shipped_prompts, watch
from failfast_vllm.policies.table import POLICIES

NUM_PROMPTS = 12
NUM_DRAWS = 2000
P_VALUE = 0.001  # four tests: an honest run fails in one of 250
# parameters that cut the few tokens of a draw, too
STRICT = {
    "failfast": {"draft_increment": 1, "confidence_threshold": 0.9},
}


@pytest.fixture(scope="module")
def greedy():
    """Prompts, parameters, and what vLLM alone answers."""
    from vllm import SamplingParams

    with engine() as llm:
        tokenizer = llm.get_tokenizer()
        prompts = [chat_ids(tokenizer, prompt) for prompt in shipped_prompts()[:NUM_PROMPTS]]
        params = SamplingParams(temperature=0.0, max_tokens=120)
        return prompts, params, generate(llm, prompts, params)


@pytest.fixture(scope="module")
def llm(greedy):  # after the other engine: a process has room for one
    with engine(
        "failfast", max_num_seqs=128, enable_prefix_caching=True, block_size=32, seed=20
    ) as llm:
        yield llm


@pytest.fixture(scope="module")
def question():
    return free_words(NUM_DRAWS)


@pytest.mark.parametrize("name", POLICIES)
def test_greedy_answers(llm, greedy, name):
    """Alone and in a batch; twice, so that what was learned decides, too."""
    prompts, params, expected = greedy
    with policy(llm, name), watch(llm) as record:
        for _ in range(2):
            assert generate(llm, prompts, params) == expected
        alone = [generate(llm, [prompt], params)[0] for prompt in prompts[:4]]
        assert alone == expected[:4]
    assert record.num_accepted > 0
    full = [p for p in record.proposals if p.max_draft == 60]
    if name != "fixed":
        assert len({len(p.draft) for p in full}) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_the_distribution_is_the_targets(llm, question, name):
    prompt, distribution = question
    given = STRICT.get(name, {})
    with policy(llm, name, **given), watch(llm) as record:
        draws = draw(llm, prompt, NUM_DRAWS)
    rounds = [r for r in record.rounds if r.drafted]
    accepted = sum(len(r.emitted) > 1 for r in rounds) / len(rounds)
    assert 0.005 < accepted < 0.98, "a draft that is always or never accepted proves nothing"
    cut = [p for p in record.proposals if len(p.draft) < p.max_draft]
    assert bool(cut) == (name != "fixed")
    assert p_value(draws, distribution, NUM_DRAWS) > P_VALUE


@pytest.mark.slow
def test_the_check_catches_a_biased_acceptance(llm, question, monkeypatch):
    """Draft tokens look likelier than they are: with so few draws the check must still fail."""
    from vllm.v1.sample import rejection_sampler

    honest = rejection_sampler.rejection_sample

    def biased(draft_token_ids, *args, **kwargs):
        names = ("num", "max_spec_len", "cu", "draft_probs", "target_logits")
        position = names.index("target_logits")
        logits = args[position].clone()
        logits[torch.arange(len(draft_token_ids)), draft_token_ids.long()] += 0.5
        args = (*args[:position], logits, *args[position + 1 :])
        return honest(draft_token_ids, *args, **kwargs)

    monkeypatch.setattr(rejection_sampler, "rejection_sample", biased)
    prompt, distribution = question
    with policy(llm, "failfast"):
        draws = draw(llm, prompt, NUM_DRAWS)
    assert p_value(draws, distribution, NUM_DRAWS) < P_VALUE
