"""Errors of one line: what must be, what was got, what to do."""

from typing import Any

MAX_ECHO = 100  # characters


def refusal(must: str, got: str, remedy: str) -> ValueError:
    """The error to raise."""
    return ValueError(f"failfast: {must}; got {got}. {remedy}")


def echo(value: Any) -> str:
    """A value of a user or a file, whatever its length."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer with thousands of digits; lists in lists
        return f"{type(value).__name__} that is too long to show"
    return text if len(text) <= MAX_ECHO else f"{text[:MAX_ECHO]}... ({len(text)} characters)"


def reason(error: Exception) -> str:
    """What a library says: the first line, which may quote a file's own text."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 2 * MAX_ECHO else f"{text[: 2 * MAX_ECHO]}..."
