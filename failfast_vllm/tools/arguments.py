"""What the commands share: argument types, and errors that are one line."""

import argparse
import contextlib
import math
from collections.abc import Iterator


class UsageError(Exception):
    """One line for the user: what, got what, do what."""


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turns what is refused inside (a pair, a checkpoint, a file) into a `UsageError`."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UsageError(" ".join(str(error).split()).removeprefix("failfast: ")) from error


def at_least_one(text: str) -> float:
    """A finite number from 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 1; got {text!r}")
    return value


def positive(text: str) -> int:
    """An integer from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer; got {text!r}")
    return int(text)


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    """How many held-out prompts are answered, and how long the answers get."""
    parser.add_argument("--num-prompts", type=positive, default=6, metavar="N", help="default: 6")
    parser.add_argument(
        "--max-tokens", type=positive, default=256, metavar="N", help="per answer; default: 256"
    )
