"""Targets that are not plain: quantised weights or KV, and LoRA adapters. Each stays lossless."""

import json
import shutil

import torch
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest

from awq import write_awq
from checkpoints import tiny_config, write_checkpoint
from engine import core, engine, generate, greedy_params, mixed_prompts, watch
from failfast_vllm.config import MODELS_DIR
from failfast_vllm.drafters.families import SDAR

ASKED = {"method": "failfast", "model": str(MODELS_DIR / "drafter")}


def some_prompts(llm):
    return [p for p in mixed_prompts(llm.get_tokenizer(), 30) if len(p) < 500]


def answers(spec, lora=None, **overrides):
    """Greedy answers; with a drafter also the tensor types of KV, {is the drafter's: type}."""
    with engine(spec, **overrides) as llm:
        prompts = some_prompts(llm)
        params = greedy_params(prompts)
        if spec is None:
            return generate(llm, prompts, params, lora)
        with watch(llm) as record:
            found = generate(llm, prompts, params, lora)
        record.assert_not_vacuous()
        layers = core(llm).vllm_config.compilation_config.static_forward_context.items()
        return found, {name.startswith("draft_model."): x.kv_cache.dtype for name, x in layers}


def test_quantised_kv_of_the_target():
    """Catches KV of the drafter in the target's type, which its attention does not read."""
    settings = {"kv_cache_dtype": "fp8_e4m3"}
    found, kv_types = answers(ASKED, **settings)
    assert found == answers(None, **settings)
    assert kv_types == {False: torch.uint8, True: torch.float32}


def test_quantised_weights_of_the_target(tmp_path):
    """Catches a drafter that is loaded with the target's quantisation."""
    write_awq(MODELS_DIR / "target", tmp_path / "target", group_size=64)
    settings = {"model": str(tmp_path / "target"), "dtype": "bfloat16"}
    assert answers(ASKED, **settings)[0] == answers(None, **settings)


def write_lora(path, rank=8):
    """A random adapter on the attention of the shipped target."""
    fields = json.loads((MODELS_DIR / "target" / "config.json").read_text())
    hidden, layers = fields["hidden_size"], fields["num_hidden_layers"]
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for i in range(layers):
        name = f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_"
        tensors[name + "A.weight"] = torch.randn(rank, hidden, generator=generator) / hidden**0.5
        tensors[name + "B.weight"] = torch.randn(hidden, rank, generator=generator) * 0.3
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return LoRARequest("random", 1, str(path))


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
        params = greedy_params(prompts)
        expected = generate(llm, prompts, params)
    with engine(spec, **target) as llm, watch(llm) as record:
        assert generate(llm, prompts, params) == expected
    assert record.num_drafted > 1000


def test_multimodal_target(tmp_path):
    """Catches vLLM looking for an image token that a target lacks; text prompts, random weights."""
    fields = json.loads((MODELS_DIR / "target" / "config.json").read_text())
    audio = {"model_type": "qwen2_audio_encoder", "d_model": 64, "encoder_layers": 1}
    audio |= {"encoder_attention_heads": 4, "encoder_ffn_dim": 64, "num_mel_bins": 80}
    config = {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "audio_token_index": fields["vocab_size"] - 1,
        "text_config": fields,
        "audio_config": audio | {"max_source_positions": 100},
    }
    target = tmp_path / "target"
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(MODELS_DIR / "target", target, ignore=ignored)
    (target / "config.json").write_text(json.dumps(config))
    extractor = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80}
    (target / "preprocessor_config.json").write_text(json.dumps(extractor))
    settings = {"model": str(target), "load_format": "dummy", "limit_mm_per_prompt": {"audio": 0}}
    with engine(None, **settings) as llm:
        prompts = some_prompts(llm)
        params = greedy_params(prompts)
        expected = generate(llm, prompts, params)
    with engine(ASKED, **settings) as llm, watch(llm) as record:
        assert generate(llm, prompts, params) == expected
    assert record.num_drafted > 1000
