"""Several ranks: which of them share the drafter, and draft passes that wait for no others.

Data-parallel ranks take different numbers of passes: none may enter a collective of their group.
"""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed import parallel_state
from vllm.forward_context import create_forward_context, override_forward_context


@contextlib.contextmanager
def drafter_group(vllm_config: VllmConfig) -> Iterator[None]:
    """Inside, vLLM's tensor-parallel group is the drafter's: the target's, or this rank alone.

    The data- and the expert-parallel group are this rank alone: vLLM would spread the experts of a
    drafter over the first, and has no second beside a target without experts. Layers are built and
    run inside: compilation and some layers read the groups late.
    """
    alone = parallel_state.get_pp_group()  # its only rank is this one: nothing is pipelined
    assert alone.world_size == 1, "pipeline parallelism is refused at start-up"
    theirs = parallel_state._TP, parallel_state._DP, parallel_state._EP
    parallel_state._DP = parallel_state._EP = alone
    assert vllm_config.speculative_config is not None
    num_ranks = vllm_config.speculative_config.draft_parallel_config.tensor_parallel_size
    if num_ranks < vllm_config.parallel_config.tensor_parallel_size:  # each has the whole of it
        parallel_state._TP = alone
    try:
        assert parallel_state.get_dp_group() is alone, "vLLM keeps its groups elsewhere"
        yield
    finally:
        parallel_state._TP, parallel_state._DP, parallel_state._EP = theirs


def draft_context(attn_metadata: Any, vllm_config: VllmConfig) -> AbstractContextManager[None]:
    """vLLM's forward context for a draft pass.

    `set_forward_context` would ask the other data-parallel ranks, which may take no pass, for their
    numbers of tokens if the target has experts.
    """
    context: AbstractContextManager[None] = override_forward_context(
        create_forward_context(attn_metadata, vllm_config)
    )
    return context


def keep_apart(draft_config: VllmConfig, target_config: VllmConfig) -> VllmConfig:
    """Number the drafter's rank as the target's: compiled code is kept in a folder per rank."""
    ours, theirs = draft_config.parallel_config, target_config.parallel_config
    ours.rank, ours.data_parallel_index = theirs.rank, theirs.data_parallel_index
    return draft_config
