"""What a user may ask for, checked once, before any weight is read. No vLLM, no torch.

Errors are one line: what is wrong, what was got, what to do.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from failfast_vllm import METHOD as METHOD
from failfast_vllm.drafters import families
from failfast_vllm.drafters.errors import MAX_ECHO, echo
from failfast_vllm.observe.trace import is_trace

MODELS_DIR = families.MODELS_DIR
BLOCK_SIZE = families.BLOCK_SIZE
MAX_DRAFT_BUDGET = 65536
MAX_SPECULATIVE_TOKENS = 128  # MAX_SPEC_LEN of vLLM's rejection sampler


# (parameters of the user, key, cap) -> the checked value; raises ValueError
Check = Callable[[Mapping[str, Any], str, int], Any]


def _number_in(default: float, low: float, high: float) -> Check:
    return lambda given, key, cap: _number(given, key, default, low, high)


def _length(default: int, low: int) -> Check:
    """A number of draft tokens, at most the cap."""
    return lambda given, key, cap: _integer(given, key, min(default, cap), low, cap)


def _arms(given: Mapping[str, Any], key: str, cap: int) -> list[str]:
    names = given.get(key, DEFAULT_ARMS)
    known = [name for name in POLICIES if name not in ("tapout", "goodput")]
    is_list = isinstance(names, list | tuple)
    if not is_list or not names or any(n not in known or names.count(n) > 1 for n in names):
        raise ValueError(
            f"failfast: {key!r} must be a list of different policies among {', '.join(known)}; "
            f"got {names!r}."
        )
    return list(names)


def _bandit(given: Mapping[str, Any], key: str, cap: int) -> str:
    name = given.get(key, "ucb1")
    if name not in ("ucb1", "thompson"):
        raise ValueError(f"failfast: {key!r} must be 'ucb1' or 'thompson'; got {name!r}.")
    return str(name)


# Each policy's own parameters; sources of rules and defaults: the classes in `policy` and
# `learned_policy`.
POLICIES: dict[str, dict[str, Check]] = {
    "failfast": {"confidence_threshold": _number_in(0.45, 0, 1)},
    "fixed": {},
    "confidence": {"confidence_threshold": _number_in(0.4, 0, 1)},
    "svip": {
        "entropy_factor": _number_in(0.15, 0, 100),
        "entropy_threshold": _number_in(0.3, 0, 100),
    },
    "adaedl": {
        "entropy_factor": _number_in(0.2, 0, 100),
        "target_acceptance": _number_in(0.9, 0, 1),
        "initial_threshold": _number_in(0.4, 0, 1),
    },
    "specdec++": {
        "rejection_threshold": _number_in(0.3, 0, 1),
        "min_draft_len": _length(2, 1),
    },
    "survival": {"survival_threshold": _number_in(0.01, 0, 1)},
    "goodput": {},
    "tapout": {
        "arms": _arms,
        "bandit": _bandit,
        "reward_weight": _number_in(0.5, 0, 1),
        "seed": lambda given, key, cap: _integer(given, key, 0, 0, 2**32 - 1),
    },
    "diffuspec-adl": {
        "min_draft_len": _length(20, 1),
        "length_step": _length(10, 0),
        "smoothing": _number_in(0.5, 0, 1),
    },
}
DEFAULT_ARMS = ("failfast", "confidence", "svip", "adaedl", "specdec++", "survival")
DEFAULT_CAPS = {"svip": 40, "specdec++": 20, "diffuspec-adl": 30}  # the others: 60
ONE_PASS = ("fixed", "goodput", "diffuspec-adl")  # the length is known beforehand: no second look


def policy_parameters(policy: str, given: Mapping[str, Any], cap: int) -> dict[str, Any]:
    """All parameters of a policy, checked; raises ValueError, also on another policy's."""
    owners = {
        key: [name for name, parameters in POLICIES.items() if key in parameters]
        for parameters in POLICIES.values()
        for key in parameters
    }
    for key in given:
        if key in owners and policy not in owners[key]:
            raise ValueError(
                f"failfast: {key!r} belongs to the policy {' or '.join(map(repr, owners[key]))}; "
                f"got the policy {policy!r}. Remove the key or change 'policy'."
            )
    return {key: check(given, key, cap) for key, check in POLICIES[policy].items()}


@dataclass(frozen=True)
class FailFastConfig:
    """The drafting knobs; defaults are the paper's (arXiv 2512.20573, section 5)."""

    num_speculative_tokens: int
    draft_increment: int
    policy: str
    draft_budget: int  # tokens drafted in one step, over all sequences
    reuse_rejected: bool  # lengthen doubtful drafts by what was rejected before
    path_search: bool  # choose among the candidates of a pass by what was said before
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
                f"failfast: 'policy' must be one of {', '.join(POLICIES)}; got {policy!r}."
            )
        cap = DEFAULT_CAPS.get(policy, 60)
        cap = _integer(given, "num_speculative_tokens", cap, 1, MAX_SPECULATIVE_TOKENS)
        increment = cap if policy in ONE_PASS else min(10, cap)
        increment = _integer(given, "draft_increment", increment, 1, cap)
        budget = _integer(given, "draft_budget", 512, 1, MAX_DRAFT_BUDGET)
        reuse = _flag(given, "reuse_rejected", False)
        path_search = _flag(given, "path_search", False)
        load_aware = _flag(given, "load_aware", True)
        if policy == "goodput" and not load_aware:
            raise ValueError(
                "failfast: the policy 'goodput' is made of measured times; got 'load_aware' false. "
                "Remove it or take another policy."
            )
        parameters = policy_parameters(policy, given, cap)
        trace, trace_ids = _trace_file(given), _flag(given, "trace_ids", False)
        return FailFastConfig(
            cap,
            increment,
            policy,
            budget,
            reuse,
            path_search,
            load_aware,
            trace,
            trace_ids,
            parameters,
        )

    def for_block_size(self, size: int, given: Mapping[str, Any]) -> "FailFastConfig":
        """Unless the user set it, an increment is not longer than the drafter's block.

        Beyond it every mask of a pass would depend on blocks that hold only masks, which no
        drafter has seen in training.
        """
        if "draft_increment" in given or self.policy in ONE_PASS:
            return self
        return replace(self, draft_increment=min(self.draft_increment, size))

    def to_dict(self) -> dict[str, Any]:
        """One flat table, as the user writes it."""
        knobs = asdict(self)
        parameters = knobs.pop("parameters")
        return {**knobs, **parameters}


# keys of vLLM's SpeculativeConfig that mean the same for a failfast drafter
PASSED_ON = ("model", "revision", "draft_tensor_parallel_size")
KNOWN_KEYS = (
    "method",
    *PASSED_ON,
    BLOCK_SIZE,
    *(field.name for field in fields(FailFastConfig) if field.name != "parameters"),
    *dict.fromkeys(key for parameters in POLICIES.values() for key in parameters),
)


def is_bare_word(text: str) -> bool:
    """Whether the whole speculative config is the word `failfast`."""
    return text.strip().lower() == METHOD


def parse(speculative_config: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The keys that the user gave, or None when failfast was not asked for.

    Raises:
        ValueError: an unknown key, with the nearest known one.
    """
    if isinstance(speculative_config, str):
        return {} if is_bare_word(speculative_config) else None
    if not isinstance(speculative_config, Mapping):
        return None
    method = speculative_config.get("method")
    if not isinstance(method, str) or not is_bare_word(method):
        return None
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
    for key in ("model", "revision"):
        value = given.get(key)
        if key in given and (not isinstance(value, str) or not value.strip()):
            raise ValueError(f"failfast: {key!r} must be a non-empty string; got {echo(value)}.")
    if "draft_tensor_parallel_size" in given:
        _integer(given, "draft_tensor_parallel_size", 1, 1, 1024)
    if BLOCK_SIZE in given and not families.is_block_size(given[BLOCK_SIZE]):
        raise ValueError(
            f"failfast: {BLOCK_SIZE!r} must be one of {families.BLOCK_SIZE_NAMES}; "
            f"got {given[BLOCK_SIZE]!r}."
        )
    del given["method"]
    return given


def _trace_file(given: Mapping[str, Any]) -> str | None:
    """The absolute path of the trace, or None."""
    if "trace" not in given:
        if given.get("trace_ids"):
            raise ValueError(
                "failfast: 'trace_ids' belongs to a trace; got none. Name a file: 'trace'."
            )
        return None
    value = given["trace"]
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError(f"failfast: 'trace' must be the name of a file; got {echo(value)}.")
    path = Path(value).expanduser().absolute()
    try:
        if not path.parent.is_dir():
            raise OSError("no such folder")
        is_new = not path.exists()
        if not is_new and not is_trace(path):
            raise ValueError(
                f"failfast: 'trace' must be a new file, or a trace to go on with; got {value!r}. "
                "Name another file."
            )
        path.open("ab").close()  # /proc lets nobody write, whatever its permissions say
        if is_new:
            path.unlink()
    except OSError as error:
        raise ValueError(
            "failfast: 'trace' must be a file in an existing, writable folder; "
            f"got {echo(value)} ({error.strerror or error}). Create the folder."
        ) from None
    return str(path)


def _flag(given: Mapping[str, Any], key: str, default: bool) -> bool:
    value = given.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"failfast: {key!r} must be true or false; got {value!r}.")
    return value


def _integer(given: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    value = given.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(
            f"failfast: {key!r} must be an integer from {low} to {high}; got {value!r}."
        )
    return value


def _number(given: Mapping[str, Any], key: str, default: float, low: float, high: float) -> float:
    value = given.get(key, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise ValueError(f"failfast: {key!r} must be a number from {low} to {high}; got {value!r}.")
    return float(value)
