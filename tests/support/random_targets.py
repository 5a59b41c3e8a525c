"""Small targets of other architectures: random weights, the shipped target's tokenizer."""

import json
import shutil

import torch
import transformers
from safetensors.torch import load_file, save_file
from vllm.lora.request import LoRARequest

from failfast_vllm.config import MODELS_DIR
from wide_models import rewrite

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "vocab_size": 2048,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = 48
WINDOWS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
WORDS = slice(100, 108)  # what these models say, mostly: copies are accepted, and rejected


def write_random(path, model_class, config):
    """A checkpoint as transformers publishes it; attention and states matter to the answers."""
    torch.manual_seed(0)
    model = model_class._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight[WORDS] *= 8
    model.save_pretrained(path)
    ignored = shutil.ignore_patterns("config.json", "*.safetensors")
    shutil.copytree(MODELS_DIR / "target", path, ignore=ignored, dirs_exist_ok=True)


def write_llama(path):
    write_random(path, transformers.LlamaForCausalLM, transformers.LlamaConfig(**SMALL))


def write_gemma(path):
    """Windows in some layers, and tied embeddings, as vLLM has it."""
    own = {"head_dim": 64, "query_pre_attn_scalar": 64, "tie_word_embeddings": True}
    config = transformers.Gemma3TextConfig(**{**SMALL, **WINDOWS, **own})
    write_random(path, transformers.Gemma3ForCausalLM, config)


def write_gpt_oss(path):
    """Windows in some layers, attention sinks, experts."""
    config = transformers.GptOssConfig(**SMALL, **WINDOWS, **EXPERTS, head_dim=64)
    write_random(path, transformers.GptOssForCausalLM, config)


def write_multimodal(path):
    """A language model beside an audio tower."""
    audio = {"d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 4, "num_mel_bins": 80}
    config = transformers.Qwen2AudioConfig(
        text_config={"model_type": "qwen2", **SMALL},
        audio_config={**audio, "encoder_ffn_dim": 64, "max_source_positions": 100},
        audio_token_index=SMALL["vocab_size"] - 1,
    )
    write_random(path, transformers.Qwen2AudioForConditionalGeneration, config)
    weights = load_file(path / "model.safetensors")
    published = {name.replace(".model.model.", ".model."): w for name, w in weights.items()}
    save_file(published, path / "model.safetensors", {"format": "pt"})
    extractor = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80}
    (path / "preprocessor_config.json").write_text(json.dumps(extractor))


def write_windowed(path):
    """The shipped target, which then sees `WINDOW` tokens."""

    def add_windows(config, weights):
        layers = {"max_window_layers": 0, "layer_types": ["sliding_attention"] * 6}
        config.update(use_sliding_window=True, sliding_window=WINDOW, **layers)
        return weights

    rewrite("target", path, add_windows)


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
