"""Parameters of policies: dataclass fields that carry their default, range and meaning.

    threshold: float = number(0.45, 0, 1, "least probability of a token to go on")

Errors are one line: what is wrong, what was got, what to do. No torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple


class Limits(NamedTuple):
    """What the range of a parameter may depend on."""

    cap: int  # num_speculative_tokens
    arms: Sequence[str]  # the policies that a bandit may choose among


# (keys of the user, key, limits) -> the checked value, the default where the key is not given;
# raises ValueError
Check = Callable[[Mapping[str, Any], str, Limits], Any]


@dataclass(frozen=True)
class Parameter:
    """What a user may give for one field of a policy."""

    default: Any
    values: str  # the range, as the documentation states it
    meaning: str
    check: Check


def parameters_of(policy: type) -> dict[str, Parameter]:
    """The parameters that a policy class declares, by field name, in the order of its fields."""
    found = ((field.name, field.metadata.get("parameter")) for field in fields(policy))
    return {name: parameter for name, parameter in found if parameter is not None}


def number(default: float, low: float, high: float, meaning: str) -> Any:
    """Declare a number from `low` to `high`."""

    def check(given: Mapping[str, Any], key: str, limits: Limits) -> float:
        return read_number(given, key, default, low, high)

    return _declare(default, f"{low} to {high}", meaning, check)


def integer(default: int, low: int, high: int, meaning: str) -> Any:
    """Declare an integer from `low` to `high`."""

    def check(given: Mapping[str, Any], key: str, limits: Limits) -> int:
        return read_integer(given, key, default, low, high)

    return _declare(default, f"{low} to {high}", meaning, check)


def length(default: int, low: int, meaning: str) -> Any:
    """Declare a number of draft tokens, at most the cap; so is the default."""

    def check(given: Mapping[str, Any], key: str, limits: Limits) -> int:
        return read_integer(given, key, min(default, limits.cap), low, limits.cap)

    return _declare(default, f"{low} to the cap", meaning, check)


def choice(default: str, options: Sequence[str], meaning: str) -> Any:
    """Declare one of some names."""

    def check(given: Mapping[str, Any], key: str, limits: Limits) -> str:
        name = given.get(key, default)
        if name not in options:
            known = " or ".join(map(repr, options))
            raise ValueError(f"failfast: {key!r} must be {known}; got {name!r}.")
        return str(name)

    return _declare(default, " or ".join(f"`{option}`" for option in options), meaning, check)


def arm_names(default: Sequence[str], meaning: str) -> Any:
    """Declare a list of different policies that a bandit may choose among."""

    def check(given: Mapping[str, Any], key: str, limits: Limits) -> list[str]:
        names = given.get(key, default)
        is_list = isinstance(names, list | tuple)
        if not is_list or not names or any(_is_no_arm(name, names, limits) for name in names):
            raise ValueError(
                f"failfast: {key!r} must be a list of different policies among "
                f"{', '.join(limits.arms)}; got {names!r}."
            )
        return list(names)

    return _declare(tuple(default), "a list of different policies", meaning, check)


def _is_no_arm(name: Any, names: Sequence[Any], limits: Limits) -> bool:
    return name not in limits.arms or names.count(name) > 1


def _declare(default: Any, values: str, meaning: str, check: Check) -> Any:
    parameter = Parameter(default, values, meaning, check)
    return field(default=default, metadata={"parameter": parameter})


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
