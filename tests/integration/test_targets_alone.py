"""Targets that no drafter is known for: drafts are copies, and answers stay the target's."""

import pytest
from vllm import SamplingParams

import random_targets as targets
from copying_cases import check
from engine import (
    chat_ids,
    engine,
    generate,
    greedy_params,
    mixed_prompts,
    proposer,
    shipped_prompts,
)
from failfast_vllm.integration.v1 import CopyProposer
from failfast_vllm.tools.fetch import fetch_smollm2

SPEC = {"method": "failfast", "load_aware": True, "num_speculative_tokens": 8}


def prefix_hits(llm):
    """Tokens found in the prefix cache, over all engines of this process."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    return metrics["vllm:prefix_cache_hits"].value


def assert_lossless(spec, lora=None, **overrides):
    """Greedy answers are those without speculation, where copies are forced and prefixes shared."""
    settings = {"max_num_seqs": 8, "enable_prefix_caching": True, **overrides}
    with engine(None, **settings) as llm:
        prompts = [p for p in mixed_prompts(llm.get_tokenizer(), 28) if len(p) < 500]
        prompts += [p for p in prompts if len(p) > 256]
        params = greedy_params(prompts, 64)
        expected = generate(llm, prompts, params, lora)
    with engine(spec, **settings) as llm:
        assert isinstance(proposer(llm), CopyProposer)
        hits = prefix_hits(llm)
        check(llm, prompts, params, expected, lora=lora, drafts=False)
        assert prefix_hits(llm) > hits


@pytest.mark.parametrize(
    ("write", "overrides"),
    [
        pytest.param(targets.write_windowed, {}, id="Qwen2 with windows"),
        pytest.param(targets.write_llama, {}, id="Llama"),
        pytest.param(targets.write_gemma, {}, id="Gemma 3"),
        pytest.param(targets.write_gpt_oss, {}, id="gpt-oss"),
        pytest.param(
            targets.write_multimodal, {"limit_mm_per_prompt": {"audio": 0}}, id="multimodal"
        ),
    ],
)
def test_no_drafter_is_known(tmp_path, write, overrides):
    """Catches a copy that is accepted unverified, and a start that assumes full attention."""
    write(tmp_path / "target")
    assert_lossless(SPEC, model=str(tmp_path / "target"), **overrides)


def test_lora(tmp_path):
    """Catches costs that are measured before vLLM has been told which adapter each token has."""
    lora = targets.write_lora(tmp_path / "lora")
    assert_lossless({**SPEC, "model": None}, lora, enable_lora=True, max_lora_rank=8)


@pytest.mark.large
def test_a_real_target():
    """Catches copies that change what a trained model answers; also those that it never accepts."""
    pytest.importorskip("gguf")
    try:
        target = str(fetch_smollm2())
    except (OSError, ValueError) as error:
        pytest.skip(str(error))
    params = SamplingParams(temperature=0.0, max_tokens=48)
    with engine(None, model=target) as llm:
        tokenizer = llm.get_tokenizer()
        prompts = [chat_ids(tokenizer, prompt) for prompt in shipped_prompts()[:24]]
        expected = generate(llm, prompts, params)
    with engine(SPEC, model=target) as llm:
        check(llm, prompts, params, expected, drafts=False)
