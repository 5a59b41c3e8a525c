"""Sampling with failfast keeps the target's distribution (chi-square at temperature 1)."""

import math
from collections import Counter

import pytest
import torch

from engine import TARGET, engine, mixed_prompts, watch

NUM_DRAWS = 20_000
SMALLEST_EXPECTED = 8  # draws per bin, the usual bound for the chi-square approximation
P_VALUE = 0.01


def chi_square_p(observed, probabilities, num_draws):
    """Upper tail of Pearson's statistic; `probabilities` sum to 1."""
    statistic = sum(
        (o - num_draws * p) ** 2 / (num_draws * p)
        for o, p in zip(observed, probabilities, strict=True)
    )
    freedom = torch.tensor((len(probabilities) - 1) / 2.0, dtype=torch.float64)
    return torch.special.gammaincc(
        freedom, torch.tensor(statistic / 2.0, dtype=torch.float64)
    ).item()


class Exact:
    """Joint probabilities of the first three tokens after a prompt, from transformers."""

    def __init__(self):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()

    @torch.inference_mode()
    def next(self, sequences):
        logits = self.model(input_ids=torch.tensor(sequences)).logits[:, -1]
        return logits.double().softmax(-1)

    def entropy(self, prompt):
        p = self.next([prompt])[0]
        return float(-(p * p.clamp_min(1e-30).log()).sum())

    def triples(self, prompt, eos, smallest):
        """{tokens: probability} of every continuation that is likely enough; eos ends it early."""
        alive, done = {(): 1.0}, {}
        for _ in range(3):
            rows = self.next([[*prompt, *tokens] for tokens in alive])
            grown = {}
            for (tokens, mass), row in zip(alive.items(), rows, strict=True):
                for i in torch.nonzero(row * mass > smallest).squeeze(1).tolist():
                    where = done if i == eos else grown
                    where[(*tokens, i)] = mass * float(row[i])
            alive = grown
        return {**done, **alive}


@pytest.fixture(scope="module")
def question():
    """A prompt whose continuation is uncertain, and its exact distribution."""
    exact = Exact()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    prompts = [p for p in mixed_prompts(tokenizer, 60) if 20 < len(p) < 70]
    cuts = [p[: len(p) - cut] for p in prompts for cut in (0, 4, 9)]
    cuts = sorted(cuts, key=exact.entropy)[-4:]
    eos = tokenizer.eos_token_id

    def usefulness(prompt):
        """Spread over the likely triples; none if too much lies outside them."""
        found = exact.triples(prompt, eos, SMALLEST_EXPECTED / NUM_DRAWS)
        if sum(found.values()) < 0.7:
            return 0.0
        return -sum(p * math.log(p) for p in found.values())

    prompt = max(cuts, key=usefulness)
    distribution = exact.triples(prompt, eos, SMALLEST_EXPECTED / NUM_DRAWS)
    assert len(distribution) >= 8
    return prompt, distribution


def draw(llm, prompt):
    from vllm import SamplingParams

    params = SamplingParams(temperature=1.0, max_tokens=8, seed=None)
    requests = [{"prompt_token_ids": prompt}] * NUM_DRAWS
    outputs = llm.generate(requests, params, use_tqdm=False)
    return Counter(tuple(output.outputs[0].token_ids[:3]) for output in outputs)


def p_value(draws, distribution):
    known = list(distribution)
    probabilities = [distribution[tokens] for tokens in known]
    observed = [draws.get(tokens, 0) for tokens in known]
    rest = 1.0 - sum(probabilities)
    if rest * NUM_DRAWS >= SMALLEST_EXPECTED:
        probabilities.append(rest)
        observed.append(NUM_DRAWS - sum(observed))
    else:
        total = sum(probabilities)
        probabilities = [p / total for p in probabilities]
    return chi_square_p(observed, probabilities, NUM_DRAWS)


def sampling_engine():
    return engine("failfast", max_num_seqs=128, enable_prefix_caching=True, seed=20)


@pytest.mark.slow
def test_the_distribution_is_the_targets(question):
    prompt, distribution = question
    with sampling_engine() as llm, watch(llm) as record:
        draws = draw(llm, prompt)
    rounds = [r for r in record.rounds if r.drafted]
    accepted = sum(len(r.emitted) > 1 for r in rounds) / len(rounds)
    assert 0.02 < accepted < 0.98, "a draft that is always or never accepted proves nothing"
    assert p_value(draws, distribution) > P_VALUE


@pytest.mark.slow
def test_the_check_catches_a_biased_acceptance(question, monkeypatch):
    """Draft tokens look a little likelier than they are: the check must fail."""
    from vllm.v1.sample import rejection_sampler

    honest = rejection_sampler.rejection_sample

    def biased(draft_token_ids, *args, **kwargs):
        names = ("num", "max_spec_len", "cu", "draft_probs", "target_logits")
        position = names.index("target_logits")
        logits = args[position].clone()
        logits[torch.arange(len(draft_token_ids)), draft_token_ids.long()] += 0.4
        args = (*args[:position], logits, *args[position + 1 :])
        return honest(draft_token_ids, *args, **kwargs)

    monkeypatch.setattr(rejection_sampler, "rejection_sample", biased)
    prompt, distribution = question
    with sampling_engine() as llm:
        draws = draw(llm, prompt)
    assert p_value(draws, distribution) < P_VALUE
