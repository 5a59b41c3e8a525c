"""Engines on the V2 runner, and the same on V1."""

import contextlib

import pytest

import triton_on_cpu  # noqa: F401 - also in a process that is spawned
from engine import engine, generate, greedy_params, mixed_prompts, proposer

NUM_PROMPTS, FEW = 34, 16
ANSWER_LEN = 48  # tokens of the longest answer: a step of interpreted kernels takes long

# Triton's interpreter runs neither vLLM's kernel for top-k and top-p nor that for grammars
MIXED = (
    {},
    {"thinking_token_budget": 9},
    {"presence_penalty": 2.0, "bad_words": ["answer"]},
    {"temperature": 1.0, "min_p": 1.0, "logprobs": 2},  # leaves one token to draw
    {"temperature": 1.0, "min_p": 1.0, "min_tokens": 25},
    {"logit_bias": dict.fromkeys(range(300, 310), 30.0)},
    {"allowed_token_ids": list(range(4, 1000)), "repetition_penalty": 1.5},
)


@contextlib.contextmanager
def v2_engine(speculative_config="failfast", **overrides):
    """An engine on the V2 runner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        with engine(speculative_config, **{"max_num_seqs": 8, **overrides}) as llm:
            assert type(proposer(llm)).__name__ in ("FailFastSpeculator", "CopySpeculator")
            yield llm


@contextlib.contextmanager
def v1_engine(speculative_config=None, **overrides):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        with engine(speculative_config, **{"max_num_seqs": 8, **overrides}) as llm:
            yield llm


def answered(count, most):
    """Prompts, their sampling parameters, and what vLLM alone answers."""
    with v1_engine() as llm:
        prompts = mixed_prompts(llm.get_tokenizer(), count)
        params = greedy_params(prompts, most)
        return prompts, params, generate(llm, prompts, params)


@pytest.fixture(scope="module")
def plain():
    return answered(NUM_PROMPTS, ANSWER_LEN)


@pytest.fixture(scope="module")
def few_plain():
    return answered(FEW, 44)  # the fifth goes on for long


def start_batch_invariant():
    """Start and end an engine that answers alike in every batch; to be run in its own process."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_BATCH_INVARIANT", "1")
        supported = classmethod(lambda cls: True)  # a CPU's own backend is not
        patch.setattr(CPUAttentionBackend, "supports_batch_invariance", supported)
        with v2_engine(max_num_seqs=1) as llm:
            assert proposer(llm).drafter is not None
