"""What requests may ask: the rows of docs/features.md that are parameters of a request."""

import math

import pytest
from vllm.config.structured_outputs import StructuredOutputsConfig
from vllm.sampling_params import StructuredOutputsParams

from engine import engine

GREEDY = {"temperature": 0.0, "max_tokens": 100}
SEEDED = {"temperature": 1.5, "max_tokens": 60, "seed": 7}
NAMES = ("Eric", "Leo", "Anna")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": list(NAMES)},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "fresh": {"type": "boolean"},
    },
    "required": ["name", "count", "fresh"],
    "additionalProperties": False,
}
SUM = 'root ::= "The sum is " num " + " num "."\nnum ::= [0-9]{1,3}'
CHOICES = ["At first Eric has 2 candles.", "The answer is 5.", "No."]
RARE = dict.fromkeys(range(300, 310), 30.0)  # a bias that no answer survives


def constrained(**kinds):
    return {**GREEDY, "structured_outputs": StructuredOutputsParams(**kinds)}


def asked_for(**keys):
    return {"extra_args": {f"failfast_{key}": value for key, value in keys.items()}}


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# name -> parameters, from the tokenizer and the tokens of the plain greedy answer
WORKS = {
    "json_schema": lambda tokenizer, answer: constrained(json=SCHEMA),
    "regex": lambda tokenizer, answer: constrained(regex=r"The answer is [0-9]{1,3}\."),
    "grammar": lambda tokenizer, answer: constrained(grammar=SUM),
    "choice": lambda tokenizer, answer: constrained(choice=CHOICES),
    "presence_penalty": lambda tokenizer, answer: {**GREEDY, "presence_penalty": 2.0},
    "frequency_penalty": lambda tokenizer, answer: {**GREEDY, "frequency_penalty": 2.0},
    "repetition_penalty": lambda tokenizer, answer: {**GREEDY, "repetition_penalty": 2.0},
    "bad_words": lambda tokenizer, answer: {**GREEDY, "bad_words": ["answer", "is", "The"]},
    "allowed_token_ids": lambda tokenizer, answer: {
        **GREEDY,
        "allowed_token_ids": list(range(4, 1500)),
    },
    "min_tokens": lambda tokenizer, answer: {**GREEDY, "min_tokens": len(answer) + 10},
    "stop": lambda tokenizer, answer: {**GREEDY, "stop": ["answer", "which"]},
    "stop_token_ids": lambda tokenizer, answer: {
        **GREEDY,
        "stop_token_ids": [answer[len(answer) // 2], *ids_of(tokenizer, "The")],
    },
    "ignore_eos": lambda tokenizer, answer: {**GREEDY, "ignore_eos": True},
    "all at once": lambda tokenizer, answer: {
        **GREEDY,
        "ignore_eos": True,
        "presence_penalty": 1.0,
        "frequency_penalty": 1.0,
        "repetition_penalty": 1.2,
        "bad_words": ["answer", "is"],
        "allowed_token_ids": list(range(4, 1500)),
        "logprobs": 2,
    },
}
FALLS_BACK = {
    "logit_bias": lambda tokenizer, answer: {**GREEDY, "logit_bias": RARE},
    "min_p": lambda tokenizer, answer: {**SEEDED, "min_p": 0.3},
    "logit_bias and min_p": lambda tokenizer, answer: {**SEEDED, "min_p": 0.3, "logit_bias": RARE},
    "failfast_max_len 0": lambda tokenizer, answer: {**SEEDED, **asked_for(max_len=0)},
}
# the answer is the plain one, only reached in another way
SAME_ANSWER = {
    "logprobs": lambda tokenizer, answer: {**GREEDY, "logprobs": 5},
    "prompt_logprobs": lambda tokenizer, answer: {**GREEDY, "prompt_logprobs": 3},
    # one token before EOS: the token behind each draft must know that it may be EOS
    "min_tokens to the end": lambda tokenizer, answer: {
        **GREEDY,
        "min_tokens": len(answer) - 1,
        **asked_for(max_len=1),
    },
    "failfast_max_len": lambda tokenizer, answer: {**GREEDY, **asked_for(max_len=3)},
    "failfast_confidence_threshold": lambda tokenizer, answer: {
        **GREEDY,
        **asked_for(confidence_threshold=1.0),
    },
}
CASES = {**WORKS, **FALLS_BACK, **SAME_ANSWER}


def features_engine(speculative_config=None, **overrides):
    compact = StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True)
    return engine(speculative_config, structured_outputs_config=compact, **overrides)


def are_close(found, expected):
    """Two lists of logprobs, of an answer or a prompt; None where they were not asked for.

    Of tokens that a grammar forbids any may be among the most probable: they do not count.
    """
    if found is None or expected is None:
        return found is expected
    return len(found) == len(expected) and all(map(_is_close, found, expected))


def _is_close(one, other):
    if one is None or other is None:  # the first token of a prompt
        return one is other
    one, other = ({i: x for i, x in some.items() if x.logprob > -math.inf} for some in (one, other))
    return one.keys() == other.keys() and all(
        one[i].rank == x.rank and one[i].logprob == pytest.approx(x.logprob, abs=1e-4)
        for i, x in other.items()
    )
