"""Other weights for the shipped target, and how a running engine gets them."""

import shutil

import torch
from safetensors.torch import load_file, save_file

from engine import TARGET


def drifted(scale):
    """[(name, weight)] of the shipped target after a pretended training step."""
    weights = load_file(f"{TARGET}/model.safetensors")
    draw = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if weight.dim() == 2:
            noise = torch.randn(weight.shape, generator=draw) * weight.float().std()
            weights[name] = (weight.float() + scale * noise).to(weight.dtype)
    return list(weights.items())


def other_weights(folder):
    """A checkpoint of the shipped target after a pretended training step."""
    shutil.copytree(TARGET, folder)
    save_file(dict(drifted(0.02)), folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def reload(llm, **source):
    """vLLM's recipe; requests that run are computed anew with the new weights."""
    llm.collective_rpc("reload_weights", kwargs=source)
    assert llm.reset_prefix_cache(reset_running_requests=True)
