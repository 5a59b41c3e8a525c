"""What a KV connector sees of an engine with a drafter: the target's layers and no others.

The drafter's KV is written late, or not at all while nothing is drafted, and a producer may have
another drafter or none. So it is left out of all transfers, and made again from the tokens.
"""

from dataclasses import replace
from typing import Any

from vllm.v1.kv_cache_interface import KVCacheConfig, UniformTypeKVCacheSpecs

DRAFTER_PREFIX = "draft_model."  # both runners load the drafter under this name


def is_drafters(layer_name: str) -> bool:
    return layer_name.startswith(DRAFTER_PREFIX)


def targets_only(config: KVCacheConfig) -> KVCacheConfig:
    """The KV cache as it would be laid out in the same memory without the drafter's layers."""
    groups, tensors = [], []
    for group in config.kv_cache_groups:
        names, spec = [n for n in group.layer_names if not is_drafters(n)], group.kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):
            specs = {name: spec.kv_cache_specs[name] for name in names}
            first, *others = specs.values()
            alike = all(other == first for other in others)
            spec = first if alike else replace(spec, kv_cache_specs=specs)
        groups.append(replace(group, layer_names=names, kv_cache_spec=spec))
    for tensor in config.kv_cache_tensors:
        if not any(map(is_drafters, tensor.layers)):
            tensors.append(tensor)
            continue
        for i, name in enumerate(tensor.layers):
            if not is_drafters(name):
                offset = tensor.offset + i * tensor.layer_stride
                tensors.append(replace(tensor, layers=[name], offset=offset))
    return replace(config, kv_cache_groups=groups, kv_cache_tensors=tensors)


def hide_drafter(connector: Any) -> None:
    """Keep the drafter's layers from a worker's connector."""
    register, load = connector.register_kv_caches, connector.start_load_kv

    def targets(layers: dict[str, Any]) -> dict[str, Any]:
        return {name: layer for name, layer in layers.items() if not is_drafters(name)}

    def start_load_kv(forward_context: Any, **kwargs: Any) -> None:
        layers = targets(forward_context.no_compile_layers)
        load(replace(forward_context, no_compile_layers=layers), **kwargs)

    def unless_drafters(function: Any) -> Any:
        return lambda layer_name, *args, **kwargs: (
            None if is_drafters(layer_name) else function(layer_name, *args, **kwargs)
        )

    connector.register_kv_caches = lambda kv_caches: register(targets(kv_caches))
    connector.start_load_kv = start_load_kv
    for name in ("wait_for_layer_load", "save_kv_layer"):
        setattr(connector, name, unless_drafters(getattr(connector, name)))
