"""What is read from a target's files before an engine serves."""

from types import SimpleNamespace

import pytest

from build_config import build
from failfast_vllm.integration.startup import drafters_config, stop_token_ids


def model_config(generation, whole, text):
    """As vLLM's; the configs of a text model are one."""
    return SimpleNamespace(
        try_get_generation_config=lambda: generation,
        hf_config=SimpleNamespace(**whole),
        hf_text_config=SimpleNamespace(**text),
    )


@pytest.mark.parametrize(
    ("generation", "whole", "text", "expected"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, {"eos_token_id": 7}, [5, 6]),
        ({}, {"eos_token_id": 0}, {"eos_token_id": 0}, [0]),
        ({}, {"eos_token_id": None}, {"eos_token_id": 9}, [9]),
        ({}, {}, {"eos_token_id": [9, 8]}, [9, 8]),
        ({}, {}, {}, []),
    ],
)
def test_stop_tokens(generation, whole, text, expected):
    """Catches a multimodal target whose language model alone says where answers end."""
    assert stop_token_ids(model_config(generation, whole, text)) == expected


@pytest.mark.parametrize("given", ["auto", "pt"])
def test_drafter_weights_are_never_pickles(given):
    """Catches a drafter from the hub that is unpickled because its target is."""
    config = build("failfast", load_format=given)
    assert drafters_config(config, config).load_config.load_format == "safetensors"
    assert config.load_config.load_format == given
