"""FULL CUDA graphs for the target's steps with drafts of any lengths (V2 runner).

vLLM captures decode graphs for 1 + K tokens of every request, which ragged drafts almost never
have: each of our steps, and each without drafts, would run in pieces. Its adaptive verification
has graphs for any mix of 1 to 1 + K tokens per request; we ask for the same, and for graphs of one
token per request besides, for steps without drafts. **No GPU has captured them.**
"""

from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.attn_utils import get_varlen_cudagraph_unsupported_backend
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from failfast_vllm.integration.hooks import logger


def widen(runner: Any) -> None:
    """Plan the graphs of a runner whose KV cache is laid out and that has captured none yet."""
    graphs = runner.cudagraph_manager
    mode = graphs.cudagraph_mode
    if not mode.separate_routine() or mode.decode_mode() != CUDAGraphMode.FULL:
        return  # no graphs, graphs of pieces, or graphs that fit any batch
    groups = runner.kv_cache_config.kv_cache_groups
    target_layers = {name for group in groups for name in group.layer_names}
    target_layers -= runner.speculator.draft_attn_layer_names
    refusing = get_varlen_cudagraph_unsupported_backend(
        runner.attn_groups, runner.vllm_config, runner.decode_query_len, target_layers
    )
    if refusing is None:
        graphs.varlen_decode = True
        graphs._candidates, graphs._capture_descs = {}, {}
        graphs._init_candidates()
    else:
        logger.warning(
            "failfast: steps with drafts run without full CUDA graphs, which %s does not replay "
            "for drafts of different lengths; choose another --attention-backend, "
            "FLASH_ATTN on Hopper or TRITON_ATTN.",
            refusing[0],
        )
    _add_plain_graphs(graphs)


def _add_plain_graphs(graphs: Any) -> None:
    """Graphs of one token per request; steps without drafts prefer them to wider ones."""
    sizes = graphs.compilation_config.cudagraph_capture_sizes or []
    sizes = sorted(size for size in sizes if size <= graphs.max_num_reqs)
    for loras in graphs.lora_capture_cases:
        smaller = 0
        for size in sizes:
            plain = BatchExecutionDescriptor(
                cg_mode=CUDAGraphMode.FULL,
                num_tokens=size,
                num_reqs=size,
                uniform_token_count=1,
                num_active_loras=loras,
            )
            graphs._capture_descs.setdefault(CUDAGraphMode.FULL, []).append(plain)
            for num_tokens in range(smaller, size + 1):
                graphs._candidates.setdefault((num_tokens, loras), []).insert(0, plain)
            smaller = size + 1
    graphs._capture_descs.get(CUDAGraphMode.FULL, []).sort(key=lambda desc: -desc.num_tokens)
