"""Parameters of policies: dataclass fields that carry their default, range and meaning.

    threshold: float = number(0.45, 0, 1, "least probability of a token to go on")

Errors are one line: what is wrong, what was got, what to do. No torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields
from typing import Any, NamedTuple

from failfast_vllm.errors import echo

PARAMETER = "parameter"  # key of a field's metadata
# (keys of the user, key, the cap, what a bandit may choose among) -> the checked value
Check = Callable[[Mapping[str, Any], str, int, Sequence[str]], Any]


class Parameter(NamedTuple):
    """What a user may give for one field of a policy."""

    default: Any
    values: str  # the range, as the documentation states it
    meaning: str
    check: Check  # raises ValueError


def parameters_of(policy: type) -> dict[str, Parameter]:
    """The parameters that a policy class declares, by field name, in the order of its fields."""
    return {f.name: f.metadata[PARAMETER] for f in fields(policy) if PARAMETER in f.metadata}


def number(default: float, low: float, high: float, meaning: str) -> Any:
    """Declare a number from `low` to `high`."""

    def fits(value: Any) -> bool:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        )

    def check(given: Mapping[str, Any], key: str, cap: int, arms: Sequence[str]) -> float:
        return float(_read(given, key, default, fits, f"a number from {low} to {high}"))

    return _declare(default, f"{low} to {high}", meaning, check)


def integer(default: int, low: int, high: int | None, meaning: str) -> Any:
    """Declare an integer; no `high`: draft tokens, at most the cap, and so is the default."""

    def check(given: Mapping[str, Any], key: str, cap: int, arms: Sequence[str]) -> int:
        most = cap if high is None else high
        return read_integer(given, key, min(default, most), low, most)

    return _declare(default, f"{low} to {'the cap' if high is None else high}", meaning, check)


def choice(default: str, options: Sequence[str], meaning: str) -> Any:
    """Declare one of some names."""
    known = " or ".join(map(repr, options))

    def check(given: Mapping[str, Any], key: str, cap: int, arms: Sequence[str]) -> str:
        return str(_read(given, key, default, lambda name: name in options, known))

    return _declare(default, known, meaning, check)


def arm_names(default: Sequence[str], meaning: str) -> Any:
    """Declare a list of different policies that a bandit may choose among."""
    known = "a list of different policies"

    def check(given: Mapping[str, Any], key: str, cap: int, arms: Sequence[str]) -> list[str]:
        def fits(names: Any) -> bool:
            listed = names if isinstance(names, list | tuple) else ()
            return bool(listed) and all(n in arms and listed.count(n) == 1 for n in listed)

        return list(_read(given, key, default, fits, f"{known} among {', '.join(arms)}"))

    return _declare(default, known, meaning, check)


def _declare(default: Any, values: str, meaning: str, check: Check) -> Any:
    return field(default=default, metadata={PARAMETER: Parameter(default, values, meaning, check)})


def read_flag(given: Mapping[str, Any], key: str, default: bool) -> bool:
    """The user's boolean, or `default`; raises ValueError."""
    return bool(_read(given, key, default, lambda value: isinstance(value, bool), "true or false"))


def read_integer(given: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    """The user's integer, or `default`; raises ValueError."""

    def fits(value: Any) -> bool:
        return type(value) is int and low <= value <= high

    return int(_read(given, key, default, fits, f"an integer from {low} to {high}"))


def _read(
    given: Mapping[str, Any], key: str, default: Any, fits: Callable[[Any], bool], what: str
) -> Any:
    value = given.get(key, default)
    if not fits(value):
        raise ValueError(f"failfast: {key!r} must be {what}; got {echo(value)}.")
    return value
