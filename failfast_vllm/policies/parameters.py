"""Parameters of policies: dataclass fields that carry their default, range and meaning.

    threshold: float = number(0.45, 0, 1, "least probability of a token to go on")

Errors are one line: what is wrong, what was got, what to do. No torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields
from typing import Any, NamedTuple

PARAMETER = "parameter"  # key of a field's metadata


class Limits(NamedTuple):
    """What the range of a parameter may depend on."""

    cap: int  # num_speculative_tokens
    arms: Sequence[str]  # the policies that a bandit may choose among


# (keys of the user, key, limits) -> the checked value, the default where the key is not given;
# raises ValueError
Check = Callable[[Mapping[str, Any], str, Limits], Any]


class Parameter(NamedTuple):
    """What a user may give for one field of a policy."""

    default: Any
    values: str  # the range, as the documentation states it
    meaning: str
    check: Check


def parameters_of(policy: type) -> dict[str, Parameter]:
    """The parameters that a policy class declares, by field name, in the order of its fields."""
    return {f.name: f.metadata[PARAMETER] for f in fields(policy) if PARAMETER in f.metadata}


def number(default: float, low: float, high: float, meaning: str) -> Any:
    """Declare a number from `low` to `high`."""
    return _declare(
        default,
        f"{low} to {high}",
        meaning,
        lambda given, key, limits: read_number(given, key, default, low, high),
    )


def integer(default: int, low: int, high: int, meaning: str) -> Any:
    """Declare an integer from `low` to `high`."""
    return _declare(
        default,
        f"{low} to {high}",
        meaning,
        lambda given, key, limits: read_integer(given, key, default, low, high),
    )


def length(default: int, low: int, meaning: str) -> Any:
    """Declare a number of draft tokens, at most the cap; so is the default."""
    return _declare(
        default,
        f"{low} to the cap",
        meaning,
        lambda given, key, limits: read_integer(
            given, key, min(default, limits.cap), low, limits.cap
        ),
    )


def choice(default: str, options: Sequence[str], meaning: str) -> Any:
    """Declare one of some names."""
    known = " or ".join(map(repr, options))

    def check(given: Mapping[str, Any], key: str, limits: Limits) -> str:
        name = given.get(key, default)
        if name not in options:
            raise ValueError(f"failfast: {key!r} must be {known}; got {name!r}.")
        return str(name)

    return _declare(default, known, meaning, check)


def arm_names(default: Sequence[str], meaning: str) -> Any:
    """Declare a list of different policies that a bandit may choose among."""

    def check(given: Mapping[str, Any], key: str, limits: Limits) -> list[str]:
        names = given.get(key, default)
        is_list = isinstance(names, list | tuple)
        if not (is_list and names and all(n in limits.arms and names.count(n) == 1 for n in names)):
            raise ValueError(
                f"failfast: {key!r} must be a list of different policies among "
                f"{', '.join(limits.arms)}; got {names!r}."
            )
        return list(names)

    return _declare(default, "a list of different policies", meaning, check)


def _declare(default: Any, values: str, meaning: str, check: Check) -> Any:
    return field(default=default, metadata={PARAMETER: Parameter(default, values, meaning, check)})


def read_flag(given: Mapping[str, Any], key: str, default: bool) -> bool:
    """The user's boolean, or `default`; raises ValueError."""
    value = given.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"failfast: {key!r} must be true or false; got {value!r}.")
    return value


def read_integer(given: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    """The user's integer, or `default`; raises ValueError."""
    value = given.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(
            f"failfast: {key!r} must be an integer from {low} to {high}; got {value!r}."
        )
    return value


def read_number(
    given: Mapping[str, Any], key: str, default: float, low: float, high: float
) -> float:
    """The user's number, or `default`; raises ValueError."""
    value = given.get(key, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise ValueError(f"failfast: {key!r} must be a number from {low} to {high}; got {value!r}.")
    return float(value)
