"""What a user may ask for, checked once, before any weight is read. No vLLM, no torch."""

import difflib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from failfast_vllm import METHOD as METHOD
from failfast_vllm.drafters import families
from failfast_vllm.drafting.records import MAX_SPECULATIVE_TOKENS
from failfast_vllm.errors import MAX_ECHO, echo, refusal
from failfast_vllm.observe.trace import is_trace
from failfast_vllm.policies.parameters import read_flag, read_integer
from failfast_vllm.policies.table import PARAMETERS, POLICIES, policy_parameters

MODELS_DIR = families.MODELS_DIR
BLOCK_SIZE = families.BLOCK_SIZE


@dataclass(frozen=True)
class FailFastConfig:
    """The drafting knobs; defaults are the paper's (arXiv 2512.20573, section 5)."""

    num_speculative_tokens: int
    draft_increment: int
    policy: str
    draft_budget: int  # tokens drafted in one step, over all sequences
    copies: bool  # draft copies of a sequence's own text where they are expected to pay
    drafter_window: int | None  # committed tokens that the drafter attends to; None: all
    load_aware: bool  # draft only where it is expected to raise throughput
    trace: str | None  # the file that rounds are written to
    trace_ids: bool  # with token ids
    parameters: Mapping[str, Any]  # of the policy

    @staticmethod
    def from_user(given: Mapping[str, Any]) -> "FailFastConfig":
        """Validate the drafting keys of `--speculative-config`; raises ValueError."""
        policy = given.get("policy", METHOD)
        if not isinstance(policy, str) or policy not in POLICIES:
            raise ValueError(
                f"failfast: 'policy' must be one of {', '.join(POLICIES)}; got {echo(policy)}."
            )
        rule, most = POLICIES[policy], MAX_SPECULATIVE_TOKENS
        cap = read_integer(given, "num_speculative_tokens", 60, 1, most)
        increment = cap if rule.one_pass else min(10, cap)
        load_aware = read_flag(given, "load_aware", True)
        copies = read_flag(given, "copies", False)
        if copies and not load_aware:
            must = "what to copy is decided by measured times"
            raise refusal(must, "'load_aware' false", "Remove one of the two keys.")
        return FailFastConfig(
            num_speculative_tokens=cap,
            draft_increment=read_integer(given, "draft_increment", increment, 1, cap),
            policy=policy,
            draft_budget=read_integer(given, "draft_budget", 512, 1, 65536),
            copies=copies,
            drafter_window=_window(given),
            load_aware=load_aware,
            parameters=policy_parameters(policy, given),
            trace=_trace_file(given),
            trace_ids=read_flag(given, "trace_ids", False),
        )

    def for_block_size(self, size: int, given: Mapping[str, Any]) -> "FailFastConfig":
        """Unless the user set it, an increment is not longer than the drafter's block.

        Beyond it every mask of a pass would depend on blocks that hold only masks, which no
        drafter has seen in training.
        """
        if "draft_increment" in given or POLICIES[self.policy].one_pass:
            return self
        return replace(self, draft_increment=min(self.draft_increment, size))

    def to_dict(self) -> dict[str, Any]:
        """One flat table, as the user writes it."""
        knobs = asdict(self)
        parameters = knobs.pop("parameters")
        return {**knobs, **parameters}


# keys of vLLM's SpeculativeConfig that mean the same for a failfast drafter
PASSED_ON = ("model", "revision")
KNOWN_KEYS = (
    "method",
    *PASSED_ON,
    BLOCK_SIZE,
    *(field.name for field in fields(FailFastConfig) if field.name != "parameters"),
    *dict.fromkeys(key for parameters in PARAMETERS.values() for key in parameters),
)


def is_bare_word(text: str) -> bool:
    """Whether the whole speculative config is the word `failfast`."""
    return text.strip().lower() == METHOD


def parse(speculative_config: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The keys that the user gave, or None when failfast was not asked for; raises ValueError."""
    if isinstance(speculative_config, str):
        speculative_config = {"method": speculative_config}
    if not isinstance(speculative_config, Mapping):
        return None
    if not is_bare_word(str(speculative_config.get("method"))):
        return None
    given = _known_keys(speculative_config)
    for key in ("model", "revision"):
        value = given.get(key)
        if key == "model" and value is None:
            continue  # no drafter: all drafts are copies
        if key in given and (not isinstance(value, str) or not value.strip()):
            raise ValueError(f"failfast: {key!r} must be a non-empty string; got {echo(value)}.")
    if BLOCK_SIZE in given and not families.is_block_size(given[BLOCK_SIZE]):
        sizes, got = families.BLOCK_SIZE_NAMES, given[BLOCK_SIZE]
        raise ValueError(f"failfast: {BLOCK_SIZE!r} must be one of {sizes}; got {echo(got)}.")
    del given["method"]
    return given


def _known_keys(speculative_config: Mapping[str, Any]) -> dict[str, Any]:
    """The same with '_' for '-' in its keys; raises ValueError on an unknown or repeated one."""
    given: dict[str, Any] = {}
    for spelt, value in speculative_config.items():
        key = str(spelt).replace("-", "_")
        if key not in KNOWN_KEYS:
            near = difflib.get_close_matches(key[:MAX_ECHO], KNOWN_KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(KNOWN_KEYS)}."
            raise ValueError(f"failfast: unknown key {echo(key)} in the speculative config; {hint}")
        if key in given:
            raise ValueError(
                f"failfast: {key!r} must be given once; got it with '-' and with '_'. Remove one."
            )
        given[key] = value
    return given


def _window(given: Mapping[str, Any]) -> int | None:
    if given.get("drafter_window") is None:
        return None
    return read_integer(given, "drafter_window", 0, 32, 2**20)


def _trace_file(given: Mapping[str, Any]) -> str | None:
    """The absolute path of the trace, or None."""
    if "trace" not in given:
        if given.get("trace_ids"):
            raise refusal("'trace_ids' belongs to a trace", "none", "Name a file: 'trace'.")
        return None
    value = given["trace"]
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError(f"failfast: 'trace' must be the name of a file; got {echo(value)}.")
    path = Path(os.path.expanduser(value)).absolute()  # "~nobody" stays
    try:
        is_new = not path.exists()
        if not is_new and not is_trace(path):
            must = "'trace' must be a new file, or a trace to go on with"
            raise refusal(must, echo(value), "Name another file.")
        path.open("ab").close()  # /proc lets nobody write, whatever its permissions say
        if is_new:
            path.unlink()
    except OSError as error:
        must = "'trace' must be a file in an existing, writable folder"
        got = f"{echo(value)} ({error.strerror or error})"
        raise refusal(must, got, "Create the folder.") from None
    return str(path)
