"""Another set of weights for the shipped target, and how a running engine gets them."""

import shutil

import torch
from safetensors.torch import load_file, save_file

from engine import TARGET


def other_weights(folder):
    """The shipped target after a pretended training step."""
    shutil.copytree(TARGET, folder)
    weights = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if weight.dim() == 2:
            noise = torch.randn(weight.shape, generator=draw) * weight.float().std()
            weights[name] = (weight.float() + 0.02 * noise).to(weight.dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def reload(llm, path):
    llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
    llm.reset_prefix_cache()
