"""What commands share: an engine in this process, and its prompts."""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from failfast_vllm.config import MODELS_DIR

Prompt = dict[str, Any]  # "messages": [...] or "prompt": text; "task"; what else its line holds

ENGINE_ENVIRONMENT = {  # one process, a small cache, no hub; what the user has set stays
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "HF_HUB_OFFLINE": "1",
}


def positive(text: str) -> int:
    """An integer from 1, of a command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer; got {text!r}")
    return int(text)


@contextlib.contextmanager
def engine_environment() -> Iterator[None]:
    """Defaults for an engine in this process; inside, all that writes to stdout gets stderr.

    Done to the file descriptor: vLLM's C++ libraries (gloo, oneDNN) print past `sys.stdout`.
    """
    for key, value in ENGINE_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        ctypes.CDLL(None).fflush(None)  # what C has buffered belongs to stderr too
        os.dup2(stdout, 1)
        os.close(stdout)


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
    """The drafter's adapter, on either model runner of one rank; None without speculation."""
    from failfast_vllm.integration.session import adapter_of

    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return adapter_of(executor.driver_worker.worker.model_runner)


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file of JSON lines; raises ValueError naming the line.

    Reads the files of Spec-Bench, GSM8K and HumanEval as they are published: each line is the
    user's message of a chat, of Spec-Bench its first turn.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts of {path} ({error}).") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompts.append({"task": path.stem, **_as_prompt(json.loads(line))})
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ValueError(
                f'{path}, line {number} must hold "messages" (a list of objects with "role" and '
                f'"content"), "prompt" or "question" (a text), or "turns" (a list of texts); got '
                f"{line[:60]!r}"
            ) from None
    if not prompts:
        raise ValueError(f"{path} holds no prompts.")
    return prompts


def _as_prompt(entry: dict[str, Any]) -> Prompt:
    """A line's prompt; of a published file's line, as a chat with its task's name."""
    if "messages" in entry:
        if not entry["messages"] or not all(
            {"role", "content"} <= m.keys() for m in entry["messages"]
        ):
            raise ValueError
        return entry
    if "turns" in entry:
        text, task = entry["turns"][0], str(entry.get("category", "turns"))
    elif "question" in entry:
        text, task = entry["question"], "GSM8K"
    else:
        text, task = entry["prompt"], entry.get("task_id", "").split("/")[0]  # HumanEval
    if not isinstance(text, str):
        raise ValueError
    return {"task": task, "messages": [{"role": "user", "content": text}]} if task else entry


def encode(tokenizer: Any, prompt: Prompt) -> dict[str, Any]:
    """A prompt as vLLM takes it, after the chat template.

    A target without one, a base model, gets a lone message's text.
    """
    if isinstance(prompt.get("prompt"), str):
        return {"prompt": prompt["prompt"]}
    if len(prompt["messages"]) == 1 and getattr(tokenizer, "chat_template", "") is None:
        return {"prompt": prompt["messages"][0]["content"]}
    text = tokenizer.apply_chat_template(
        prompt["messages"], add_generation_prompt=True, tokenize=False
    )
    return {"prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}
