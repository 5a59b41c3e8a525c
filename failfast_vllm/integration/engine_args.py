"""Engine arguments that do not go with failfast: refused before any weight is read."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from failfast_vllm.drafters.families import MAX_DIFFUSION_BLOCK_SIZE

Problem = tuple[str, Any, str]  # what is wrong, the offending value, the remedy


def check_engine_args(
    args: Any, target: Any, given: Mapping[str, Any], num_speculative_tokens: int
) -> None:
    """Refuse what cannot work; raises ValueError, of the first problem.

    Args:
        args: vLLM's EngineArgs.
        target: vLLM's ModelConfig of the target.
        given: the keys of the speculative config.
    """
    problems = itertools.chain(
        _parallelism(args, given), _scheduling(args, num_speculative_tokens), _target(target)
    )
    for what, got, remedy in problems:
        raise ValueError(f"failfast: {what}; got {got!r}. {remedy}")


def _parallelism(args: Any, given: Mapping[str, Any]) -> Iterator[Problem]:
    for flag in ("spec_method", "spec_model", "spec_tokens"):
        if (value := getattr(args, flag, None)) is not None:
            what = f"--{flag.replace('_', '-')} does not go with --speculative-config"
            yield what, value, "Put the key into the JSON of --speculative-config."
    num_ranks = given.get("draft_tensor_parallel_size", 1)
    if num_ranks not in (1, args.tensor_parallel_size):
        what = "'draft_tensor_parallel_size' must be 1 or the target's tensor_parallel_size"
        yield f"{what} ({args.tensor_parallel_size})", num_ranks, "Leave it out."
    for kind in ("pipeline", "decode_context", "prefill_context"):
        if (num_ranks := getattr(args, f"{kind}_parallel_size")) > 1:
            what = f"{kind.replace('_', '-')} parallelism is not supported"
            yield what, num_ranks, "Use --tensor-parallel-size instead."


def _scheduling(args: Any, num_speculative_tokens: int) -> Iterator[Problem]:
    multiple = f"a multiple of {MAX_DIFFUSION_BLOCK_SIZE}"
    if args.block_size and args.block_size % MAX_DIFFUSION_BLOCK_SIZE:
        remedy = f"Leave --block-size out or use {multiple}."
        yield f"the KV page must be {multiple} tokens", args.block_size, remedy
    if args.async_scheduling:
        what = "asynchronous scheduling assumes one draft length for all sequences"
        yield what, True, "Leave --async-scheduling out."
    fewest, budget = MAX_DIFFUSION_BLOCK_SIZE + num_speculative_tokens, args.max_num_batched_tokens
    if budget is not None and budget < fewest:
        sum_of = f"{MAX_DIFFUSION_BLOCK_SIZE} + num_speculative_tokens"
        what = f"max_num_batched_tokens must be at least {fewest} ({sum_of})"
        yield what, budget, "Raise it or lower 'num_speculative_tokens'."


def _target(target: Any) -> Iterator[Problem]:
    if target.runner_type != "generate":
        what = "only text generation can be drafted for"
        yield what, target.runner_type, "Leave the speculative config out."
    if target.is_encoder_decoder:
        what = "encoder-decoder targets are not supported: the drafter sees text only"
        remedy = "Use a decoder-only target, or leave the speculative config out."
        yield what, target.architecture, remedy
    no_page = "have no KV page that is shared with the drafter"
    if target.is_hybrid or target.use_mla:
        what = f"hybrid (Mamba, linear attention) and MLA targets {no_page}"
        yield what, target.architecture, "Use a target with full attention."
    if window := target.get_sliding_window() or target.attention_chunk_size:
        what = f"targets with sliding-window or chunked attention {no_page}"
        yield what, window, "Use a target with full attention, or --disable-sliding-window."
