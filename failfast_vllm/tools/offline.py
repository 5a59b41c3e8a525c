"""A vLLM engine in this process, and its answers round by round."""

import contextlib
import gc
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from failfast_vllm.config import MODELS_DIR

if TYPE_CHECKING:
    from failfast_vllm.drafting.records import Round


@contextlib.contextmanager
def engine(speculative_config: dict[str, Any] | None, **engine_args: Any) -> Iterator[Any]:
    """A `vllm.LLM` in this process, on the shipped target unless told otherwise."""
    from vllm import LLM

    settings = {
        "model": str(MODELS_DIR / "target"),
        "max_model_len": 2048,
        "enable_prefix_caching": False,  # the same prompts come again
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        **engine_args,
    }
    llm = LLM(**settings, speculative_config=speculative_config)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def adapter(llm: Any) -> Any:
    """The drafter's adapter in an engine of one rank in this process; None without speculation."""
    from failfast_vllm.integration.session import adapter_of

    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return adapter_of(executor.driver_worker.worker.model_runner)


def encode(tokenizer: Any, prompt: dict[str, Any]) -> dict[str, Any]:
    """{"messages": ...} or {"prompt": text} as vLLM takes it, after the chat template."""
    if "prompt" in prompt:
        return prompt
    text = tokenizer.apply_chat_template(
        prompt["messages"], add_generation_prompt=True, tokenize=False
    )
    return {"prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}


class TracedRound(NamedTuple):
    """One verified draft, in token ids."""

    accepted: list[int]
    rejected: list[int]
    bonus: list[int]  # the target's own token; empty if the answer ended inside the draft
    num_passes: int

    @property
    def num_drafted(self) -> int:
        return len(self.accepted) + len(self.rejected)

    @property
    def num_emitted(self) -> int:
        return len(self.accepted) + len(self.bonus)


def traced(rounds: "list[Round]", num_tokens: int) -> list[TracedRound]:
    """Split what each round emitted; the engine drops what comes after the answer's end."""
    found = []
    for round_ in rounds:
        drafted, kept = round_.drafted, list(round_.emitted[:num_tokens])
        num_tokens -= len(kept)
        pairs = zip(drafted, kept, strict=False)
        num_accepted = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        found.append(
            TracedRound(
                kept[:num_accepted], drafted[num_accepted:], kept[num_accepted:], round_.num_passes
            )
        )
    return found
