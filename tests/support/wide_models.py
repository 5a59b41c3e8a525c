"""Checkpoints that compute what the shipped ones do, in shapes that need several ranks."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from failfast_vllm.config import MODELS_DIR

NUM_EXPERTS = 4
FEW_POSITIONS = 96


def rewrite(name, path, change):
    """Copy a shipped model to `path`; `change(config, weights)` returns its new weights."""
    shutil.copytree(MODELS_DIR / name, path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    weights = change(config, load_file(path / "model.safetensors"))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(path)


def few_positions(config, weights):
    """The drafter of a target that goes on for longer."""
    config.update(max_position_embeddings=FEW_POSITIONS)
    return weights


def four_heads(config, weights):
    """The drafter with a fourth head and 64 more channels, all zero: two ranks can share it."""
    hidden_size = config["hidden_size"]
    wide = 64 * 4
    config.update(num_attention_heads=4, hidden_size=wide)
    # a mean of squares over more channels is smaller, and the norm's weight has to make up for it
    ratio = hidden_size / wide
    config["rms_norm_eps"] *= ratio

    def padded(name, weight):
        weight = weight.float()
        if "norm" in name:
            weight = weight * ratio**0.5
        shape = [wide if size == hidden_size else size for size in weight.shape]
        out = torch.zeros(shape)
        out[tuple(slice(size) for size in weight.shape)] = weight
        return out

    return {name: padded(name, weight) for name, weight in weights.items()}


def equal_experts(config, weights):
    """The target as a mixture of experts that are all alike."""
    config.update(
        architectures=["Qwen2MoeForCausalLM"],
        model_type="qwen2_moe",
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        moe_intermediate_size=config["intermediate_size"],
        shared_expert_intermediate_size=0,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    generator = torch.Generator().manual_seed(0)
    spread = {}
    for name, weight in weights.items():
        layer, found, projection = name.partition(".mlp.")
        if not found:
            spread[name] = weight
            continue
        for i in range(NUM_EXPERTS):
            spread[f"{layer}.mlp.experts.{i}.{projection}"] = weight.clone()
        gate = torch.randn(NUM_EXPERTS, config["hidden_size"], generator=generator)
        spread[f"{layer}.mlp.gate.weight"] = gate.to(weight.dtype)
    return spread
