"""Sampling with failfast keeps the target's distribution (chi-square at temperature 1)."""

import math
from collections import Counter

import pytest
import torch

from engine import TARGET, chat_ids, engine, shipped_prompts, watch
from failfast_vllm import cpu_sampling

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
    """An answer cut before its last sentence, whose words are free, and its exact distribution."""
    exact = Exact()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    eos = tokenizer.eos_token_id
    cuts = []
    for prompt in shipped_prompts():
        head, _, last = prompt["answer"].rpartition("\n\n")
        if head and not last.startswith("The answer is"):
            cuts.append(chat_ids(tokenizer, prompt) + tokenizer(head + "\n\n")["input_ids"])
    # up to 8 tokens behind a 32-token page: the prefix cache spares most of the prompt
    cuts = [cut for cut in cuts if 1 < len(cut) % 32 < 8]

    def later_entropy(cut):
        """Uncertainty of the second and third token, which drafts propose."""
        found = exact.triples(cut, eos, SMALLEST_EXPECTED / NUM_DRAWS)
        if sum(found.values()) < 0.7:
            return 0.0
        return -sum(p * math.log(p) for p in found.values()) - exact.entropy(cut)

    prompt = max(cuts[:6], key=later_entropy)
    distribution = exact.triples(prompt, eos, SMALLEST_EXPECTED / NUM_DRAWS)
    assert len(distribution) >= 8
    return prompt, distribution


def draw(llm, prompt):
    from vllm import SamplingParams

    params = SamplingParams(temperature=1.0, max_tokens=5)
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
    return engine("failfast", max_num_seqs=128, enable_prefix_caching=True, block_size=32, seed=20)


def test_parameters_are_spread_over_ragged_drafts():
    expand = cpu_sampling.expanding(None)
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    temperatures = expand(torch.tensor([0.0, 0.5, 0.7]), ends, 5, replace_from=0, replace_to=1)
    assert temperatures.tolist() == pytest.approx([1.0, 1.0, 0.7, 0.7, 0.7])
    top_k = expand(torch.tensor([7, 8, 9], dtype=torch.int32), ends, 5)
    assert top_k.tolist() == [7, 7, 9, 9, 9]
    assert top_k.dtype == torch.int32


@pytest.mark.slow
def test_the_distribution_is_the_targets(question):
    prompt, distribution = question
    with sampling_engine() as llm, watch(llm) as record:
        draws = draw(llm, prompt)
    rounds = [r for r in record.rounds if r.drafted]
    accepted = sum(len(r.emitted) > 1 for r in rounds) / len(rounds)
    # rare acceptance suffices: the next test shows that the check sees a bias at this rate
    assert 0.005 < accepted < 0.98, "a draft that is always or never accepted proves nothing"
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
