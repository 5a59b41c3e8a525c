"""Engine arguments that do not go with failfast: refused before any weight is read."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from failfast_vllm.drafters.families import MAX_DIFFUSION_BLOCK_SIZE


class Asked(NamedTuple):
    """What the user has asked of an engine with failfast."""

    args: Any  # vLLM's EngineArgs
    target: Any  # vLLM's ModelConfig of the target
    num_speculative_tokens: int
    given: Mapping[str, Any]  # the keys of the speculative config

    @property
    def fewest_batched_tokens(self) -> int:
        return MAX_DIFFUSION_BLOCK_SIZE + self.num_speculative_tokens


class Rule(NamedTuple):
    """One thing that cannot work."""

    refused: Callable[[Asked], Any]  # the offending value, or None
    what: str  # formatted with `asked`
    remedy: str


def _given_twice(flag: str) -> Rule:
    return Rule(
        lambda asked: getattr(asked.args, flag, None),
        f"--{flag.replace('_', '-')} does not go with --speculative-config",
        "Put the key into the JSON of --speculative-config.",
    )


def _unsupported_parallelism(kind: str) -> Rule:
    def refused(asked: Asked) -> int | None:
        num_ranks: int = getattr(asked.args, f"{kind}_parallel_size")
        return num_ranks if num_ranks > 1 else None

    what = f"{kind.replace('_', '-')} parallelism is not supported"
    return Rule(refused, what, "Use --tensor-parallel-size instead.")


def _other_ranks(asked: Asked) -> Any:
    num_ranks = asked.given.get("draft_tensor_parallel_size", 1)
    return None if num_ranks in (1, asked.args.tensor_parallel_size) else num_ranks


def _broken_page(asked: Asked) -> Any:
    page = asked.args.block_size
    return page if page and page % MAX_DIFFUSION_BLOCK_SIZE else None


def _small_batch(asked: Asked) -> Any:
    budget = asked.args.max_num_batched_tokens
    return None if budget is None or budget >= asked.fewest_batched_tokens else budget


def _other_task(asked: Asked) -> Any:
    return None if asked.target.runner_type == "generate" else asked.target.runner_type


def _without_pages(asked: Asked) -> Any:
    target = asked.target
    return target.architecture if target.is_hybrid or target.use_mla else None


def _window(asked: Asked) -> Any:
    return asked.target.get_sliding_window() or asked.target.attention_chunk_size or None


RULES = (  # the first that applies is the user's error
    *map(_given_twice, ("spec_method", "spec_model", "spec_tokens")),
    Rule(
        _other_ranks,
        "'draft_tensor_parallel_size' must be 1 or the target's tensor_parallel_size "
        "({asked.args.tensor_parallel_size})",
        "Leave it out.",
    ),
    *map(_unsupported_parallelism, ("pipeline", "decode_context", "prefill_context")),
    Rule(
        _broken_page,
        f"the KV page must be a multiple of {MAX_DIFFUSION_BLOCK_SIZE} tokens",
        f"Leave --block-size out or use a multiple of {MAX_DIFFUSION_BLOCK_SIZE}.",
    ),
    Rule(
        lambda asked: asked.args.async_scheduling or None,
        "asynchronous scheduling assumes one draft length for all sequences",
        "Leave --async-scheduling out.",
    ),
    Rule(
        _small_batch,
        "max_num_batched_tokens must be at least {asked.fewest_batched_tokens} "
        f"({MAX_DIFFUSION_BLOCK_SIZE} + num_speculative_tokens)",
        "Raise it or lower 'num_speculative_tokens'.",
    ),
    Rule(
        _other_task,
        "only text generation can be drafted for",
        "Leave the speculative config out.",
    ),
    Rule(
        lambda asked: asked.target.architecture if asked.target.is_encoder_decoder else None,
        "encoder-decoder targets are not supported: the drafter sees text only",
        "Use a decoder-only target, or leave the speculative config out.",
    ),
    Rule(
        _without_pages,
        "hybrid (Mamba, linear attention) and MLA targets have no KV page that is shared with the "
        "drafter",
        "Use a target with full attention.",
    ),
    Rule(
        _window,
        "targets with sliding-window or chunked attention have no KV page that is shared with the "
        "drafter",
        "Use a target with full attention, or --disable-sliding-window.",
    ),
)


def check_engine_args(asked: Asked) -> None:
    """Refuse what cannot work; raises ValueError."""
    for rule in RULES:
        value = rule.refused(asked)
        if value is not None:
            what = rule.what.format(asked=asked)
            raise ValueError(f"failfast: {what}; got {value!r}. {rule.remedy}")
