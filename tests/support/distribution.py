"""Exact distributions of the target's next tokens, and a test of draws against them."""

import math
from collections import Counter

import torch

from engine import TARGET, chat_ids, shipped_prompts

SMALLEST_EXPECTED = 8  # draws per bin, the usual bound for the chi-square approximation


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


def free_words(num_draws, *, hints=0):
    """An answer cut before its last sentence, whose words are free, and its exact distribution.

    In front of it stand as many tokens (a multiple of 32) of what is likely to follow: to copy.
    """
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
        found = exact.triples(cut, eos, SMALLEST_EXPECTED / num_draws)
        if sum(found.values()) < 0.7:
            return 0.0
        return -sum(p * math.log(p) for p in found.values()) - exact.entropy(cut)

    prompt = max(cuts[:6], key=later_entropy)
    if hints:
        likely = exact.triples(prompt, eos, SMALLEST_EXPECTED / num_draws)
        likely = sorted(likely, key=likely.get)[-hints:]
        prompt = [*(token for tokens in likely for token in tokens)][-hints:] + prompt
    distribution = exact.triples(prompt, eos, SMALLEST_EXPECTED / num_draws)
    assert len(distribution) >= 8
    return prompt, distribution


def draw(llm, prompt, num_draws):
    """The first three tokens of `num_draws` answers at temperature 1."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=1.0, max_tokens=5)
    requests = [{"prompt_token_ids": prompt}] * num_draws
    outputs = llm.generate(requests, params, use_tqdm=False)
    return Counter(tuple(output.outputs[0].token_ids[:3]) for output in outputs)


def p_value(draws, distribution, num_draws):
    known = list(distribution)
    probabilities = [distribution[tokens] for tokens in known]
    observed = [draws.get(tokens, 0) for tokens in known]
    rest = 1.0 - sum(probabilities)
    if rest * num_draws >= SMALLEST_EXPECTED:
        probabilities.append(rest)
        observed.append(num_draws - sum(observed))
    else:
        total = sum(probabilities)
        probabilities = [p / total for p in probabilities]
    return chi_square_p(observed, probabilities, num_draws)


def favour_drafts(monkeypatch, logits):
    """Draft tokens look likelier to vLLM's rejection sampler than they are, by so many logits."""
    from vllm.v1.sample import rejection_sampler

    honest = rejection_sampler.rejection_sample

    def biased(draft_token_ids, *args, **kwargs):
        names = ("num", "max_spec_len", "cu", "draft_probs", "target_logits")
        position = names.index("target_logits")
        target_logits = args[position].clone()
        target_logits[torch.arange(len(draft_token_ids)), draft_token_ids.long()] += logits
        args = (*args[:position], target_logits, *args[position + 1 :])
        return honest(draft_token_ids, *args, **kwargs)

    monkeypatch.setattr(rejection_sampler, "rejection_sample", biased)
