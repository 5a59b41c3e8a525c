"""Write small random checkpoints of the drafter families, as they are published.

The layout is spelt out here a second time, so that `drafters.checkpoint` is not its own judge.
"""

import json
import math
import shutil

import torch
from safetensors.torch import save_file

from failfast_vllm.config import MODELS_DIR

SHIPPED = MODELS_DIR / "drafter"  # its tokenizer pairs with the shipped target; MASK is 3 there
TINY = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "vocab_size": 1984,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
    "pad_token_id": 0,
    "mask_token_id": 3,
}


TINY_EXPERTS = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "num_experts": 8,
    "num_experts_per_tok": 3,
}


def tiny_config(family, **changes):
    """A `config.json` of `family`: 2 layers, KV pages of the shipped target's shape.

    A change to None removes the key. SDAR's heads are wider than `hidden_size` / heads, as in its
    published checkpoints of other sizes.
    """
    own = {"head_dim": 64} if family.qk_norm else {"hidden_size": 256}
    own |= TINY_EXPERTS if family.has_experts else {}
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_types[0],
        **TINY,
        **own,
        family.block_size_key: family.default_block_size,
        **changes,
    }
    return {key: value for key, value in config.items() if value is not None}


def published_shapes(family, config):
    """{name: [out, in] or [size]} of every tensor."""
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    widths = {
        "q": config["num_attention_heads"] * head_dim,
        "k": config["num_key_value_heads"] * head_dim,
        "v": config["num_key_value_heads"] * head_dim,
    }
    has_bias = family.qkv_bias or config.get("attention_bias", False)
    shapes = {"model.embed_tokens.weight": [config["vocab_size"], hidden]}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, width in widths.items():
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = [width, hidden]
            if has_bias:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = [width]
        shapes[f"{layer}.self_attn.o_proj.weight"] = [hidden, widths["q"]]
        if family.qk_norm:
            shapes[f"{layer}.self_attn.q_norm.weight"] = [head_dim]
            shapes[f"{layer}.self_attn.k_norm.weight"] = [head_dim]
        if config.get("num_experts"):
            shapes[f"{layer}.mlp.gate.weight"] = [config["num_experts"], hidden]
            width = config["moe_intermediate_size"]
            experts = [f"{layer}.mlp.experts.{e}" for e in range(config["num_experts"])]
        else:
            width, experts = mlp, [f"{layer}.mlp"]
        for name in experts:
            shapes[f"{name}.gate_proj.weight"] = [width, hidden]
            shapes[f"{name}.up_proj.weight"] = [width, hidden]
            shapes[f"{name}.down_proj.weight"] = [hidden, width]
        shapes[f"{layer}.input_layernorm.weight"] = [hidden]
        shapes[f"{layer}.post_attention_layernorm.weight"] = [hidden]
    shapes["model.norm.weight"] = [hidden]
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = [config["vocab_size"], hidden]
    return shapes


def random_tensors(family, config, dtype=torch.float32, seed=0):
    """Every published tensor of `config`, {name: tensor}; activations stay of order one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in published_shapes(family, config).items():
        noise = torch.randn(*shape, generator=generator)
        if len(shape) == 2:
            tensor = noise / shape[1] ** 0.5
        else:
            tensor = 0.1 * noise + (0.0 if name.endswith("bias") else 1.0)
        tensors[name] = tensor.to(dtype)
    return tensors


def fuse_experts(tensors):
    """The experts of a layer in one tensor, as transformers 5 keeps them."""
    fused, experts = {}, {}
    for name, tensor in tensors.items():
        block, found, rest = name.partition(".mlp.experts.")
        if found:
            number, projection, _ = rest.split(".")
            experts.setdefault((block, projection), {})[int(number)] = tensor
        else:
            fused[name] = tensor
    for (block, projection), parts in experts.items():
        parts = [parts[i] for i in range(len(parts))]
        if projection == "up_proj":
            gates = experts[block, "gate_proj"]
            parts = [torch.cat((gates[i], part)) for i, part in enumerate(parts)]
            fused[f"{block}.mlp.experts.gate_up_proj"] = torch.stack(parts)
        elif projection == "down_proj":
            fused[f"{block}.mlp.experts.down_proj"] = torch.stack(parts)
    return fused


def write_checkpoint(path, family, config, shards=1, dtype=torch.float32, seed=0):
    """A complete checkpoint directory at `path`; returns its tensors, {name: tensor}.

    Writes config.json, the shipped drafter's tokenizer, and `model.safetensors` or, with
    `shards` > 1, that many shards with their index.
    """
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for file in SHIPPED.glob("*"):
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, path)
    tensors = random_tensors(family, config, dtype, seed)
    write_weights(path, tensors, shards)
    return tensors


def write_headers(path, family):
    """`model.safetensors` as config.json asks for it, of any size: a header and a sparse hole."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    write_header(path / "model.safetensors", published_shapes(family, config))


def write_header(file, shapes, **changes):
    """A safetensors file of bfloat16 zeros; `changes` replace or add whole entries."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps({**header, **changes}).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def write_weights(path, tensors, shards=1):
    """`tensors` as `model.safetensors`, or as `shards` files and an index."""
    if shards == 1:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::shards]}
        save_file(part, path / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
