"""Deterministic generator of the chat examples behind the embedded small pair.

Speculative decoding is worth measuring on text that alternates between tokens nobody can guess
and long stretches everybody can. The tasks below have both: arithmetic and free phrasing are
the hard parts; listed fields, quoted questions and boilerplate code are the easy ones.

Training and held-out prompts are disjoint by construction: `is_held_out` assigns every prompt
text to one side by its hash, and each side draws until the prompt is its own.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

HELD_OUT_MODULUS = 32


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "Alice Ben Clara David Emma Frank Grace Henry Irene Jack Karen Leo Maria Nina Oscar Paul "
    "Rosa Sam Tina Victor Wendy Anna Carl Diana Eric Fiona George Helen Ivan Julia"
)
CITIES = _words(
    "Paris London Berlin Madrid Rome Vienna Oslo Dublin Lisbon Prague Athens Warsaw Milan Tokyo "
    "Delhi Cairo Boston Denver Seattle Toronto"
)
ITEMS = _words(
    "apples books pens coins stamps cards shells marbles pears cups plates boxes bottles candles "
    "oranges stickers"
)
COLORS = _words("red blue green white black brown purple yellow orange pink grey silver")
ENTITIES = _words(
    "Invoice Customer Product Order Employee Vehicle Student Ticket Account Device Project Sensor "
    "Recipe Player Message Report Contract Payment Address Building"
)
FIELDS = (
    ("name", "str"), ("city", "str"), ("age", "int"), ("price", "float"), ("email", "str"),
    ("count", "int"), ("title", "str"), ("weight", "float"), ("status", "str"), ("year", "int"),
    ("color", "str"), ("score", "float"), ("owner", "str"), ("level", "int"), ("size", "int"),
    ("country", "str"), ("rating", "float"), ("label", "str"), ("height", "float"), ("code", "str"),
)  # fmt: skip
SAMPLE_VALUES = {"str": '"example"', "int": "1", "float": "2.5"}
VARIABLES = _words(
    "total count result value items data index output current buffer numbers entries"
)
WEEKDAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
EVENTS = _words("meeting workshop concert dinner conference lecture party seminar")


class Example(NamedTuple):
    """One single-turn chat: the user's prompt and the assistant's answer."""

    task: str
    prompt: str
    answer: str


class _Problem(NamedTuple):
    question: str
    steps: str
    result: int


def _weighted(rng: random.Random, options: tuple[str, ...]) -> str:
    """Pick one option, each about half as likely as the one before: uncertain, with a mode."""
    return rng.choices(options, weights=[0.5**i for i in range(len(options))])[0]


def _one_step(rng: random.Random) -> _Problem:
    name, other = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)
    kind = rng.choice(("receive", "buy", "give", "lose", "group"))
    if kind == "group":
        a, b = rng.randint(2, 4), rng.randint(2, 5)
        return _Problem(
            f"{name} has {a} bags with {b} {item} in each bag. "
            f"How many {item} does {name} have in total?",
            f"There are {a} bags and each bag holds {b} {item}.\nSo we multiply: "
            f"{a} * {b} = {a * b}.",
            a * b,
        )
    if kind in ("receive", "buy"):
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        event, step = {
            "receive": (
                f"{other} gives {name} {b} more {item}.",
                f"Then {other} gives {name} {b} more {item}.",
            ),
            "buy": (
                f"{name} buys {b} more {item} from {other}.",
                f"Then {name} buys {b} more {item} from {other}.",
            ),
        }[kind]
        reasoning, result = f"So we add: {a} + {b} = {a + b}.", a + b
    else:
        a = rng.randint(5, 12)
        b = rng.randint(2, min(a - 1, 6))
        event, step = {
            "give": (
                f"{name} gives {b} {item} to {other}.",
                f"Then {name} gives {b} {item} to {other}.",
            ),
            "lose": (
                f"{name} loses {b} {item} on the way to {other}.",
                f"Then {name} loses {b} {item} on the way to {other}.",
            ),
        }[kind]
        reasoning, result = f"So we subtract: {a} - {b} = {a - b}.", a - b
    return _Problem(
        f"{name} has {a} {item}. {event} How many {item} does {name} have now?",
        f"{name} starts with {a} {item}.\n{step}\n{reasoning}",
        result,
    )


def _two_step(rng: random.Random) -> _Problem:
    name, other = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    c = rng.randint(2, min(a + b - 1, 6))
    return _Problem(
        f"{name} has {a} {item}. {name} buys {b} more {item} and then gives {c} {item} to {other}. "
        f"How many {item} does {name} have now?",
        f"{name} starts with {a} {item}.\n{name} buys {b} more {item}, so we add: "
        f"{a} + {b} = {a + b}.\nThen {name} gives {c} {item} to {other}, so we subtract: "
        f"{a + b} - {c} = {a + b - c}.",
        a + b - c,
    )


def _solution(rng: random.Random, problem: _Problem) -> str:
    opener = _weighted(
        rng,
        (
            "Let us work through this step by step.",
            "We can solve this one step at a time.",
            "First we collect what we know.",
        ),
    )
    return f"{opener}\n\n{problem.steps}\n\nThe answer is {problem.result}."


def _one_step_example(rng: random.Random) -> Example:
    problem = _one_step(rng)
    return Example("one_step", problem.question, _solution(rng, problem))


def _two_step_example(rng: random.Random) -> Example:
    problem = _two_step(rng)
    return Example("two_step", problem.question, _solution(rng, problem))


def _quote_example(rng: random.Random) -> Example:
    problem = _one_step(rng)
    request = rng.choice(
        ("Repeat the question, then answer it.", "Quote this question first and then solve it.")
    )
    return Example(
        "quote",
        f"{request}\n\n{problem.question}",
        f"Question: {problem.question}\n\nAnswer: {_solution(rng, problem)}",
    )


_Fields = list[tuple[str, str]]


def _json_schema(fields: _Fields) -> str:
    lines = ",\n".join(f'  "{field}": {SAMPLE_VALUES[kind]}' for field, kind in fields)
    return f"{{\n{lines}\n}}"


def _table_schema(fields: _Fields) -> str:
    rows = "".join(f"\n| {field} | {kind} |" for field, kind in fields)
    return f"| field | type |\n| --- | --- |{rows}"


_FORMATS: dict[str, tuple[str, str, Callable[[_Fields], str]]] = {
    "json": ("a JSON example", "json", _json_schema),
    "table": ("a Markdown table", "markdown", _table_schema),
}


def _schema_example(rng: random.Random) -> Example:
    name = rng.choice(ENTITIES)
    fields = rng.sample(FIELDS, rng.randint(2, 4))
    kind = rng.choice(("json", "table"))
    title, fence, render = _FORMATS[kind]
    listed = ", ".join(f"{field}: {field_kind}" for field, field_kind in fields)
    prompt = rng.choice(
        (
            f"Write {title} for {name} with the fields {listed}.",
            f"Create {title} for {name} with these fields: {listed}.",
        )
    )
    return Example(
        f"schema_{kind}",
        prompt,
        f"Here is {title} for {name}:\n\n```{fence}\n{render(fields)}\n```\n\n"
        f"It has these fields: {listed}.",
    )


_SNIPPETS = (
    "def {f}(values):\n    {v} = 0\n    for value in values:\n        {v} = {v} + value\n"
    "    print({v})\n    return {v}",
    "def {f}(path):\n    {v} = []\n    for line in open(path):\n        {v}.append(line.strip())\n"
    "    {v}.sort()\n    return {v}",
    "def {f}(rows):\n    {v} = {{}}\n    for key, row in rows:\n        {v}[key] = row\n"
    "    if not {v}:\n        return None\n    return {v}",
    "def {f}(text):\n    {v} = text.split()\n    if len({v}) == 0:\n        return None\n"
    "    return {v}[0]",
)
_VERBS = _words("load make find build read get run check")


def _rename_example(rng: random.Random) -> Example:
    old, new = rng.sample(VARIABLES, 2)
    snippet = rng.choice(_SNIPPETS)
    function = f"{rng.choice(_VERBS)}_{rng.choice(ENTITIES).lower()}"
    before, after = snippet.format(v=old, f=function), snippet.format(v=new, f=function)
    request = rng.choice(
        (
            f"Rename the variable `{old}` to `{new}` in this code.",
            f"In the code below, rename `{old}` to `{new}`.",
        )
    )
    return Example(
        "rename",
        f"{request}\n\n```python\n{before}\n```",
        f"Here is the code with `{old}` renamed to `{new}`:\n\n```python\n{after}\n```",
    )


def _class_code(name: str, fields: list[tuple[str, str]]) -> str:
    variable = name.lower()
    keys = [field for field, _ in fields]
    declared = "\n".join(f"    {field}: {kind}" for field, kind in fields)
    to_dict = "".join(f'            "{key}": self.{key},\n' for key in keys)
    from_dict = "".join(f'            {key}=data["{key}"],\n' for key in keys)
    sample = "".join(f"        {field}={SAMPLE_VALUES[kind]},\n" for field, kind in fields)
    checks = "".join(f"    assert copy.{key} == {variable}.{key}\n" for key in keys)
    return (
        f"from dataclasses import dataclass\n\n\n@dataclass\nclass {name}:\n{declared}\n\n"
        f"    def to_dict(self):\n        return {{\n{to_dict}        }}\n\n"
        f"    @classmethod\n    def from_dict(cls, data):\n        return cls(\n{from_dict}"
        f"        )\n\n\n"
        f"def test_{variable}():\n    {variable} = {name}(\n{sample}    )\n"
        f"    copy = {name}.from_dict({variable}.to_dict())\n{checks}"
    )


def _class_example(rng: random.Random) -> Example:
    name = rng.choice(ENTITIES)
    fields = rng.sample(FIELDS, rng.randint(2, 4))
    listed = ", ".join(f"{field}: {kind}" for field, kind in fields)
    prompt = rng.choice(
        (
            f"Write a Python dataclass {name} with the fields {listed}.",
            f"Create a dataclass named {name} with these fields: {listed}.",
            f"I need a Python class {name} that holds {listed}.",
        )
    )
    closing = _weighted(
        rng,
        (
            "The test checks that a round trip through a dictionary keeps every field.",
            "You can run the test with pytest.",
        ),
    )
    return Example(
        "dataclass",
        prompt,
        f"Here is the dataclass {name} with a test:\n\n```python\n"
        f"{_class_code(name, fields)}```\n\n{closing}",
    )


_REDUCTIONS = {
    "sum": ("sum", "return sum(values)", "6"),
    "largest": ("maximum", "return max(values)", "3"),
    "smallest": ("minimum", "return min(values)", "1"),
    "mean": ("mean", "return sum(values) / len(values)", "2"),
    "number": ("count", "return len(values)", "3"),
}


def _function_example(rng: random.Random) -> Example:
    noun = rng.choice([field for field, kind in FIELDS if kind != "str"])
    entity = rng.choice(ENTITIES).lower()
    word = rng.choice(tuple(_REDUCTIONS))
    prefix, body, expected = _REDUCTIONS[word]
    function = f"{prefix}_{entity}_{noun}"
    what = f"the {word} of the {entity} {noun} values"
    prompt = rng.choice(
        (
            f"Write a Python function {function} that returns {what}.",
            f"Please implement {function}, which computes {what}, in Python.",
        )
    )
    return Example(
        "function",
        prompt,
        f"```python\ndef {function}(values):\n"
        f'    """Return {what}.\n\n    Raises ValueError when there are no values.\n    """\n'
        f'    if not values:\n        raise ValueError("no values given")\n    {body}\n\n\n'
        f"def test_{function}():\n    assert {function}([1, 2, 3]) == {expected}\n```",
    )


def _letter_example(rng: random.Random) -> Example:
    reader, writer = rng.sample(NAMES, 2)
    city, day, event = rng.choice(CITIES), rng.choice(WEEKDAYS), rng.choice(EVENTS)
    prompt = rng.choice(
        (
            f"Write a short email from {writer} to {reader} about the {event} in {city} on {day}.",
            f"Draft an invitation from {writer} to {reader} for a {event} on {day} in {city}.",
        )
    )
    middle = _weighted(
        rng,
        (
            "Please let me know by the end of this week whether you are able to attend.",
            "It would mean a lot to everybody here if you could find the time to join us.",
            "We have kept a seat for you and hope very much that you can be there.",
        ),
    )
    closing = _weighted(rng, ("Kind regards", "Best wishes", "With warm regards"))
    return Example(
        "letter",
        prompt,
        f"Subject: Invitation to the {event} in {city}\n\nDear {reader},\n\n"
        f"I am writing to invite you to our {event}, which will take place in {city} on {day}. "
        f"{middle} If you have any questions about the {event}, please do not hesitate to contact "
        f"me at any time.\n\nI look forward to seeing you in {city}.\n\n{closing},\n{writer}",
    )


_TASKS: tuple[tuple[float, Callable[[random.Random], Example]], ...] = (
    (0.27, _one_step_example),
    (0.08, _two_step_example),
    (0.10, _quote_example),
    (0.22, _schema_example),
    (0.10, _rename_example),
    (0.12, _class_example),
    (0.05, _function_example),
    (0.06, _letter_example),
)

COPY_TASKS = ("schema_json", "schema_table", "rename", "quote")


def is_held_out(prompt: str) -> bool:
    """Whether `prompt` belongs to the held-out side: about 1 in `HELD_OUT_MODULUS` does."""
    return zlib.crc32(prompt.encode()) % HELD_OUT_MODULUS == 0


def examples(seed: int, *, held_out: bool = False) -> Iterator[Example]:
    """Endless examples of one side of the split, the same for the same `seed`."""
    rng = random.Random(seed)
    weights, makers = zip(*_TASKS, strict=True)
    while True:
        example = rng.choices(makers, weights=weights)[0](rng)
        if is_held_out(example.prompt) == held_out:
            yield example
