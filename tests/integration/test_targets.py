"""Targets that are not plain: quantised weights or KV, and LoRA adapters. Each stays lossless."""

import pytest
import torch

from awq import write_awq
from checkpoints import tiny_config, write_checkpoint
from engine import core, engine, generate, greedy_params, mixed_prompts, watch
from failfast_vllm.config import MODELS_DIR
from failfast_vllm.drafters.families import SDAR
from random_targets import write_lora, write_multimodal

needs_avx512 = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM has this on CPUs with AVX-512 only"
)

ASKED = {"method": "failfast", "model": str(MODELS_DIR / "drafter")}


def some_prompts(llm):
    return [p for p in mixed_prompts(llm.get_tokenizer(), 24) if len(p) < 500]


def answers(spec, lora=None, **overrides):
    """Greedy answers; with a drafter also the tensor types of KV, {is the drafter's: type}."""
    with engine(spec, **overrides) as llm:
        prompts = some_prompts(llm)
        params = greedy_params(prompts, 64)
        if spec is None:
            return generate(llm, prompts, params, lora)
        with watch(llm) as record:
            found = generate(llm, prompts, params, lora)
        record.assert_not_vacuous()
        layers = core(llm).vllm_config.compilation_config.static_forward_context.items()
        return found, {name.startswith("draft_model."): x.kv_cache.dtype for name, x in layers}


@needs_avx512
def test_quantised_kv_of_the_target():
    """Catches KV of the drafter in the target's type, which its attention does not read."""
    settings = {"kv_cache_dtype": "fp8_e4m3"}
    found, kv_types = answers(ASKED, **settings)
    assert found == answers(None, **settings)
    assert kv_types == {False: torch.uint8, True: torch.float32}


@needs_avx512
def test_quantised_weights_of_the_target(tmp_path):
    """Catches a drafter that is loaded with the target's quantisation."""
    write_awq(MODELS_DIR / "target", tmp_path / "target", group_size=64)
    settings = {"model": str(tmp_path / "target"), "dtype": "bfloat16"}
    assert answers(ASKED, **settings)[0] == answers(None, **settings)


def test_lora_on_the_target(tmp_path):
    """The drafter has no adapter: acceptance falls, outputs stay the adapted target's."""
    lora = write_lora(tmp_path / "lora")
    settings = {"lora": lora, "enable_lora": True, "max_lora_rank": 8}
    adapted = answers(None, **settings)
    assert answers(ASKED, **settings)[0] == adapted
    assert answers(None) != adapted


def test_sdar_drafts_for_a_qwen3_target(tmp_path):
    """Random weights: hardly a draft is accepted, and every answer is the target's."""
    fields = tiny_config(SDAR, block_size=None, mask_token_id=None, tie_word_embeddings=False)
    fields.update(architectures=["Qwen3ForCausalLM"], model_type="qwen3")
    write_checkpoint(tmp_path / "target", SDAR, fields, seed=1)
    config = tiny_config(SDAR, tie_word_embeddings=False)
    write_checkpoint(tmp_path / "drafter", SDAR, config, seed=2)
    target = {"model": str(tmp_path / "target")}
    spec = {"method": "failfast", "model": str(tmp_path / "drafter")}
    with engine(None, **target) as llm:
        prompts = some_prompts(llm)
        params = greedy_params(prompts, 64)
        expected = generate(llm, prompts, params)
    with engine(spec, **target) as llm, watch(llm) as record:
        assert generate(llm, prompts, params) == expected
    assert record.num_drafted > 500


def test_multimodal_target(tmp_path):
    """Catches vLLM looking for an image token that a target lacks; text prompts, random weights."""
    write_multimodal(tmp_path / "target")
    settings = {"model": str(tmp_path / "target"), "limit_mm_per_prompt": {"audio": 0}}
    with engine(None, **settings) as llm:
        prompts = some_prompts(llm)
        params = greedy_params(prompts, 64)
        expected = generate(llm, prompts, params)
    with engine(ASKED, **settings) as llm, watch(llm) as record:
        assert generate(llm, prompts, params) == expected
    assert record.num_drafted > 500
