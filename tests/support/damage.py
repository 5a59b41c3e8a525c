"""Odd values, and damaged files, drawn by Hypothesis; and what an answer to them must be."""

import json

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings

MAX_LENGTH = 1000  # characters of an error
ODD_NUMBERS = (-1, 0, 1, 2**31, 2**63, -(2**63), 10**400, -(10**400), 0.0, -0.0, 1e308, -1.5)
ODD_TEXTS = (
    "",
    " ",
    "a\nb",
    "a\0b",
    "\x1b[31m",
    "\ud800",
    "é" * 3,
    "x" * 20_000,
    "NaN",
    "~no-such-user/x",
)


def nested():
    """A list in a list in a list: of all depths around the one that Python cannot read or show."""
    inside = None
    for depth in range(1000):
        inside = [inside]
        if depth % 25 == 0:
            yield inside


def floats():
    return st.floats() | st.sampled_from((float("nan"), float("inf"), -float("inf")))


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-10, 200)
    | st.sampled_from(ODD_NUMBERS)
    | floats()
    | st.text(max_size=8)
    | st.sampled_from(ODD_TEXTS)
)
values = st.recursive(
    scalars,
    lambda inside: (
        st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside, max_size=3)
    ),
    max_leaves=4,
)


def cases(count):
    """So many examples, the same in every run."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def changed(fields):
    """A JSON object with one to three of its fields replaced, removed or added."""
    keys = st.sampled_from(sorted(fields)) | st.text(max_size=6)
    removed = st.just(...)
    return st.dictionaries(keys, values | removed, min_size=1, max_size=3).map(
        lambda changes: {k: v for k, v in {**fields, **changes}.items() if v is not ...}
    )


def as_json(value):
    """Its text as Python writes it, NaN and lone surrogates included."""
    return json.dumps(value).encode()


@st.composite
def damaged(draw, content):
    """Bytes with a part cut out, overwritten, doubled, or brackets in its place."""
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, min(len(content), start + 40)))
    part = draw(
        st.binary(max_size=12)
        | st.sampled_from((b"", b"\xff", b"\0" * 8, b"[" * 100_000, b'{"a":' * 5000, b"9" * 5000))
        | st.just(content[start:end] * 2)
    )
    keep = draw(st.sampled_from((len(content), 0)))  # or cut off behind it
    return content[:start] + part + content[end : max(end, keep)]


def objection(call, *args, prefix="failfast: "):
    """The one line of a ValueError, or None where nothing is wrong; all else is raised."""
    try:
        call(*args)
    except ValueError as error:
        text = str(error)
        assert text.startswith(prefix), text[:200]
        assert "\n" not in text, text[:200]
        assert text.isprintable(), ascii(text[:200])
        assert len(text) < MAX_LENGTH, text[:200]
        return text
    return None
