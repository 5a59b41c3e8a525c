"""Deterministic generator of the chat examples behind the embedded small pair.

Speculative decoding is worth measuring on text that alternates between tokens nobody can guess
and long stretches everybody can. The tasks below have both: arithmetic, free phrasing (each
sentence is one of several, equally likely) and remarks are the hard parts; copied rows, quoted
questions and boilerplate code are the easy ones.

Training, development and test prompts are disjoint by construction: `split_of` assigns every
prompt text to one side by its hash, and each side draws until the prompt is its own.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple


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


_REMARK_PARTS = (
    ("Note that", "Keep in mind that", "Remember that", "It helps that", "Of course", "As usual,"),
    ("this", "the whole text", "every line", "the result", "each part", "the answer"),
    ("is", "stays", "looks", "remains", "should be", "will be"),
    ("short", "simple", "clear", "easy to read", "complete", "correct", "easy to check"),
    ("for now.", "in most cases.", "as you asked.", "without more work.", "and small.", "today."),
)


def _remark(rng: random.Random) -> str:
    """A sentence that nothing in the prompt decides."""
    return " ".join(rng.choice(part) for part in _REMARK_PARTS)


def _start(rng: random.Random, name: str, count: int, item: str) -> str:
    return rng.choice(
        (
            f"{name} starts with {count} {item}.",
            f"At first {name} has {count} {item}.",
            f"We know that {name} has {count} {item}.",
            f"The story begins with {count} {item}.",
            f"Before anything happens, {name} owns {count} {item}.",
        )
    )


def _sum(rng: random.Random, a: int, b: int) -> str:
    return rng.choice(
        (
            f"So we add: {a} + {b} = {a + b}.",
            f"Together that makes {a} + {b} = {a + b}.",
            f"Adding both numbers gives {a} + {b} = {a + b}.",
            f"We need the sum, which is {a} + {b} = {a + b}.",
        )
    )


def _difference(rng: random.Random, a: int, b: int) -> str:
    return rng.choice(
        (
            f"So we subtract: {a} - {b} = {a - b}.",
            f"What is left is {a} - {b} = {a - b}.",
            f"Taking them away gives {a} - {b} = {a - b}.",
            f"We need the difference, which is {a} - {b} = {a - b}.",
        )
    )


def _gain(rng: random.Random, name: str, other: str, count: int, item: str) -> str:
    return rng.choice(
        (
            f"Then {other} brings {count} more {item}.",
            f"Next {name} gets {count} more {item} from {other}.",
            f"After that come {count} more {item}.",
            f"Now {count} {item} are added.",
        )
    )


def _loss(rng: random.Random, name: str, other: str, count: int, item: str) -> str:
    return rng.choice(
        (
            f"Then {count} {item} are gone.",
            f"Next {name} is without {count} of the {item}.",
            f"After that {count} {item} are missing.",
            f"Now {count} {item} are with {other}.",
        )
    )


def _one_step(rng: random.Random) -> _Problem:
    name, other = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)
    kind = rng.choice(("receive", "buy", "give", "lend", "group"))
    if kind == "group":
        a, b = rng.randint(2, 4), rng.randint(2, 5)
        grouping = rng.choice(
            (
                f"There are {a} bags and each bag holds {b} {item}.",
                f"Each of the {a} bags holds {b} {item}.",
                f"We count {a} bags with {b} {item} each.",
            )
        )
        return _Problem(
            f"{name} has {a} bags with {b} {item} in each bag. "
            f"How many {item} does {name} have in total?",
            f"{grouping}\nSo we multiply: {a} * {b} = {a * b}.",
            a * b,
        )
    if kind in ("receive", "buy"):
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        event = {
            "receive": f"{other} gives {name} {b} more {item}.",
            "buy": f"{name} buys {b} more {item} from {other}.",
        }[kind]
        step, reasoning = _gain(rng, name, other, b, item), _sum(rng, a, b)
        result = a + b
    else:
        a = rng.randint(5, 12)
        b = rng.randint(2, min(a - 1, 6))
        event = {
            "give": f"{name} gives {b} {item} to {other}.",
            "lend": f"{name} lends {b} {item} to {other}.",
        }[kind]
        step, reasoning = _loss(rng, name, other, b, item), _difference(rng, a, b)
        result = a - b
    return _Problem(
        f"{name} has {a} {item}. {event} How many {item} does {name} have now?",
        f"{_start(rng, name, a, item)}\n{step}\n{reasoning}",
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
        f"{_start(rng, name, a, item)}\n{_gain(rng, name, other, b, item)}\n"
        f"{_sum(rng, a, b)}\n{_loss(rng, name, other, c, item)}\n{_difference(rng, a + b, c)}",
        a + b - c,
    )


def _solution(rng: random.Random, problem: _Problem) -> str:
    opener = rng.choice(
        (
            "Let us work through this step by step.",
            "We can solve this one step at a time.",
            "First we collect what we know.",
            "This is not hard if we go slowly.",
            "Here is one way to think about it.",
            "The question asks for a number.",
        )
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
        f"Here is {title} for {name}:\n\n```{fence}\n{render(fields)}\n```\n\n{_remark(rng)}",
    )


def _columns(rng: random.Random, num_rows: int) -> dict[str, list[str]]:
    """Two or three columns without a repeated value, so that each cell tells which comes next."""
    columns = {
        "name": rng.sample(NAMES, num_rows),
        "city": rng.sample(CITIES, num_rows),
        "item": rng.sample(ITEMS, num_rows),
        "color": rng.sample(COLORS, num_rows),
        "count": [str(n) for n in rng.sample(range(1, 10), num_rows)],
    }
    return {key: columns[key] for key in rng.sample(list(columns), rng.randint(2, 3))}


def _rows_example(rng: random.Random) -> Example:
    columns = _columns(rng, rng.randint(2, 3))
    keys, rows = list(columns), list(zip(*columns.values(), strict=True))
    kind = rng.choice(("json", "csv"))
    if kind == "json":
        asked, title = "a JSON list", "json"
        objects = (
            ", ".join(f'"{key}": "{cell}"' for key, cell in zip(keys, row, strict=True))
            for row in rows
        )
        body = "[\n" + ",\n".join(f"  {{{o}}}" for o in objects) + "\n]"
    else:
        asked, title = "CSV", "csv"
        body = "\n".join(",".join(row) for row in (keys, *rows))
    table = "\n".join(" | ".join(row) for row in (keys, *rows))
    request = rng.choice((f"Write these rows as {asked}.", f"Convert this table to {asked}."))
    lead = rng.choice(("Here are the rows", "This is the same table", "Your rows", "As asked"))
    return Example(
        f"rows_{kind}",
        f"{request}\n\n{table}",
        f"{lead}:\n\n```{title}\n{body}\n```\n\n{_remark(rng)}",
    )


def _repeat_example(rng: random.Random) -> Example:
    pool = [*NAMES, *CITIES, *ITEMS, *COLORS, *ENTITIES, *VARIABLES, *WEEKDAYS, *EVENTS]
    words = ", ".join(rng.sample(pool, rng.randint(4, 12)))
    request = rng.choice(("Repeat this list", "Say these words again"))
    return Example("repeat", f"{request}: {words}.", f"{words}.\n\n{_remark(rng)}")


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
        f"Here is the code with `{old}` renamed to `{new}`:\n\n```python\n{after}\n```\n\n"
        f"{_remark(rng)}",
    )


def _class_code(rng: random.Random, name: str, fields: list[tuple[str, str]]) -> str:
    variable = name.lower()
    keys = [field for field, _ in fields]
    declared = "\n".join(f"    {field}: {kind}" for field, kind in fields)
    to_dict = "".join(f'            "{key}": self.{key},\n' for key in keys)
    from_dict = "".join(f'            {key}=data["{key}"],\n' for key in keys)
    sample = "".join(f"        {field}={SAMPLE_VALUES[kind]},\n" for field, kind in fields)
    checks = "".join(f"    assert copy.{key} == {variable}.{key}\n" for key in keys)
    return (
        f"from dataclasses import dataclass\n\n\n@dataclass\nclass {name}:\n"
        f'    """{_remark(rng)}"""\n\n{declared}\n\n'
        f"    def to_dict(self):\n        return {{\n{to_dict}        }}\n\n"
        f"    @classmethod\n    def from_dict(cls, data):\n        return cls(\n{from_dict}"
        f"        )\n\n\n"
        f"def test_{variable}():\n    # {_remark(rng)}\n    {variable} = {name}(\n{sample}    )\n"
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
    return Example(
        "dataclass",
        prompt,
        f"Here is the dataclass {name} with a test:\n\n```python\n"
        f"{_class_code(rng, name, fields)}```\n\n{_remark(rng)}",
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
        f'    """Return {what}.\n\n    {_remark(rng)}\n    """\n'
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
    opening = rng.choice(
        (
            f"I am writing to invite you to our {event}, which will take place in {city} on {day}.",
            f"On {day} we are planning a {event} in {city}, and you are invited.",
            f"You are welcome at the {event} that we hold in {city} on {day}.",
            f"Our {event} is on {day} in {city}.",
        )
    )
    middle = rng.choice(
        (
            "Please let me know by the end of this week whether you are able to attend.",
            "It would mean a lot to everybody here if you could find the time to join us.",
            "We have kept a seat for you and hope very much that you can be there.",
            "Nothing would please us more than to have you with us.",
            "There will be coffee and cake, and a walk along the river.",
        )
    )
    last = rng.choice(
        (
            f"If you have any questions about the {event}, please do not hesitate to contact me.",
            "Do bring a friend if you like.",
            f"I look forward to seeing you in {city}.",
            "More about the day will follow soon.",
        )
    )
    closing = rng.choice(("Kind regards", "Best wishes", "With warm regards", "Yours"))
    return Example(
        "letter",
        prompt,
        f"Subject: Invitation to the {event} in {city}\n\nDear {reader},\n\n"
        f"{opening} {middle}\n\n{last}\n\n{closing},\n{writer}",
    )


# task -> share of the examples at first, and of those that finish the training and test it
_TASKS: tuple[tuple[Callable[[random.Random], Example], float, float], ...] = (
    (_one_step_example, 0.27, 0.20),
    (_two_step_example, 0.08, 0.08),
    (_quote_example, 0.10, 0.10),
    (_repeat_example, 0.08, 0.08),
    (_rows_example, 0.16, 0.14),
    (_schema_example, 0.08, 0.08),
    (_rename_example, 0.08, 0.08),
    (_class_example, 0.06, 0.14),
    (_function_example, 0.04, 0.05),
    (_letter_example, 0.05, 0.05),
)

COPY_TASKS = (
    "quote", "repeat", "rows_json", "rows_csv", "schema_json", "schema_table", "rename",
)  # fmt: skip


SPLITS = ("test", "dev", "train")


def split_of(prompt: str) -> str:
    """The side that `prompt` belongs to: about 1 in 32 is "test", as many are "dev"."""
    return SPLITS[min(zlib.crc32(prompt.encode()) % 32, 2)]


def examples(seed: int, split: str = "train", *, finishing: bool = True) -> Iterator[Example]:
    """Endless examples of one side of the split, the same for the same `seed`."""
    rng = random.Random(seed)
    makers = [maker for maker, _, _ in _TASKS]
    weights = [last if finishing else first for _, first, last in _TASKS]
    while True:
        example = rng.choices(makers, weights=weights)[0](rng)
        if split_of(example.prompt) == split:
            yield example
