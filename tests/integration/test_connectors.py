"""KV connectors: stores are those of an engine without a drafter."""

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    UniformTypeKVCacheSpecs,
)

from connectors import assert_stores_are_shared, prompts_of_pages
from engine import engine, generate, greedy_params
from failfast_vllm.config import MODELS_DIR
from failfast_vllm.integration import kv_transfer
from independent import IndependentDrafter


def test_stores_are_shared(tmp_path):
    """Catches an engine that ends because nobody has stored its drafter's layers."""
    with engine() as llm:
        prompts = prompts_of_pages(llm.get_tokenizer(), 12)
        params = greedy_params(prompts)
        expected = generate(llm, prompts, params)
    dense = IndependentDrafter(MODELS_DIR / "drafter", num_draftable_tokens=1)
    asked = {"method": "failfast", "load_aware": True}
    assert_stores_are_shared(tmp_path, dense, asked, prompts, params, expected, engine, engine)


def spec(num_heads):
    return FullAttentionSpec(
        block_size=64, num_kv_heads=num_heads, head_size=16, dtype=torch.float32
    )


@pytest.mark.parametrize("heads", [(2, 2), (2, 4)], ids=["alike", "different"])
def test_the_targets_layers_keep_their_places(heads):
    """Catches a connector that finds other layers' bytes: here the drafter's come first."""
    names, sizes = ("draft_model.a", "a", "draft_model.b", "b"), (1, heads[0], 1, heads[1])
    specs = {name: spec(size) for name, size in zip(names, sizes, strict=True)}
    group = UniformTypeKVCacheSpecs(block_size=64, kv_cache_specs=specs)
    tensors = [
        KVCacheTensor(900, list(names), 100, 10, offset=40),
        KVCacheTensor(500, ["c", "d"], 200, 20),
    ]
    config = KVCacheConfig(9, tensors, [KVCacheGroupSpec(list(specs), group)])
    seen = kv_transfer.targets_only(config)
    (found,) = seen.kv_cache_groups
    assert found.layer_names == ["a", "b"]
    alike = heads[0] == heads[1]
    of_group = found.kv_cache_spec
    assert of_group == spec(2) if alike else of_group.kv_cache_specs == {"a": spec(2), "b": spec(4)}
    assert [(t.layers, t.offset, t.size) for t in seen.kv_cache_tensors] == [
        (["a"], 140, 900),
        (["b"], 340, 900),
        (["c", "d"], 0, 500),
    ]
    assert config.kv_cache_groups[0].layer_names == list(specs), "the engine's own is untouched"
