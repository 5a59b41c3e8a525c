"""Quantise a checkpoint to 4 bits in AWQ's layout (arXiv 2306.00978), by plain rounding."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of each of the eight nibbles of a word


def pack(values):
    """int4 [rows, columns] -> int32 [rows, columns / 8]."""
    words = torch.zeros(len(values), values.shape[1] // 8, dtype=torch.int64)
    for nibble, column in enumerate(ORDER):
        words |= values[:, column::8].long() << (4 * nibble)
    return words.to(torch.uint32).view(torch.int32)


def write_awq(source, path, group_size):
    """Write the checkpoint `source` to `path` with its linear layers in 4 bits."""
    path.mkdir()
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, path)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "version": "gemm",
        "zero_point": True,
    }
    (path / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        groups = tensor.float().T.unflatten(0, (-1, group_size))  # [in / group, group, out]
        low, high = groups.amin(1), groups.amax(1)
        scales = ((high - low) / 15).clamp(min=1e-6)
        zeros = (-low / scales).round().clamp(0, 15)
        weights = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 15)
        prefix = name.removesuffix("weight")
        tensors[prefix + "qweight"] = pack(weights.flatten(0, 1).int())
        tensors[prefix + "qzeros"] = pack(zeros.int())
        tensors[prefix + "scales"] = scales.half()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
