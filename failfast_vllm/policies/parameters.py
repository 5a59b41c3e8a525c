"""Parameters of policies: dataclass fields that carry their default, range and meaning.

    threshold: float = number(0.45, 0, 1, "least probability of a token to go on")

Errors are one line: what is wrong, what was got, what to do. No torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import field, fields
from typing import Any, NamedTuple

from failfast_vllm.errors import echo

PARAMETER = "parameter"  # key of a field's metadata


class Parameter(NamedTuple):
    """What a user may give for one field of a policy: a number from `low` to `high`."""

    default: float
    low: float
    high: float
    meaning: str

    def read(self, given: Mapping[str, Any], key: str) -> float:
        """The user's number, or the default; raises ValueError."""

        def fits(value: Any) -> bool:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            return is_number and self.low <= value <= self.high

        must = f"a number from {self.low} to {self.high}"
        return float(_read(given, key, self.default, fits, must))


def number(default: float, low: float, high: float, meaning: str) -> Any:
    """Declare a field that holds a number from `low` to `high`."""
    return field(default=default, metadata={PARAMETER: Parameter(default, low, high, meaning)})


def parameters_of(policy: type) -> dict[str, Parameter]:
    """The parameters that a policy class declares, by field name, in the order of its fields."""
    return {f.name: f.metadata[PARAMETER] for f in fields(policy) if PARAMETER in f.metadata}


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
