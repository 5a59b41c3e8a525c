"""The requests of `chaos.py`: a seeded sequence of what clients send, right and wrong.

Request i of a seed is the same however many are made.
"""

import json
import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

LIMIT = 1024  # tokens of prompt and answer: the server's --max-model-len
NAME, ADAPTER = "tiny", "adapter"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
REFUSED = range(400, 500)
Body = dict[str, Any]

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Eric", "Leo", "Anna"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "fresh": {"type": "boolean"},
    },
    "required": ["name", "count", "fresh"],
    "additionalProperties": False,
}
REGEX = r"The answer is [0-9]{1,3}\."
SUM = 'root ::= "The sum is " num " + " num "."\nnum ::= [0-9]{1,3}'
CHOICES = ["At first Eric has 2 candles.", "The answer is 5.", "No."]
WORDS = ["answer", "which"]
RARE = {str(i): 30.0 for i in range(300, 310)}
KNOWN = list(range(4, 1500))
GIVEN = '{"name": "Leo", "count": 2, "fresh": true}'
CALL = f'<tool_call>\n{{"name": "give", "arguments": {GIVEN}}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "give", "strict": True, "parameters": SCHEMA}}
FORCED = {"type": "function", "function": {"name": "give"}}


class Ask(NamedTuple):
    """One request, and what may come of it."""

    number: int
    row: str  # what it asks for, or what is wrong with it
    path: str
    body: Body | bytes
    statuses: range | tuple[int, ...] = (200,)
    compared: bool = False  # the answer is that of a server without speculation
    leaves: float | None = None  # the client goes: after pieces of a stream, or after seconds
    alone: bool = False  # the next request waits for it


class Row(NamedTuple):
    """A row of docs/features.md as a client asks for it."""

    weight: int
    params: Callable[[random.Random, int], Body]  # from the most tokens of the answer
    compared: bool = True
    streams: bool = True


def always(**params: Any) -> Callable[[random.Random, int], Body]:
    return lambda rng, most: dict(params)


def constrained(**kind: Any) -> Callable[[random.Random, int], Body]:
    return always(structured_outputs=kind)


def sampled(rng: random.Random, most: int) -> Body:
    some = rng.choice([{"top_p": 0.9}, {"top_k": 20}, {"top_p": 0.5, "top_k": 5}, {}])
    return {"temperature": rng.choice([0.3, 0.7, 1.0, 1.5]), "seed": rng.randrange(99), **some}


def own_limits(rng: random.Random, most: int) -> Body:
    return {
        "vllm_xargs": {
            "failfast_max_len": rng.choice([1, 2, 3, 10, 25, 60]),
            "failfast_confidence_threshold": rng.choice([0.45, 0.6, 0.9, 1.0]),
        }
    }


UNDRAFTED = {"vllm_xargs": {"failfast_max_len": 0}}
DRAWN = {"temperature": 1.5, "seed": 7}
ROWS = {
    "plain": Row(30, always()),
    "long": Row(1, lambda rng, most: {"ignore_eos": True}),
    "json_schema": Row(2, constrained(json=SCHEMA)),
    "regex": Row(2, constrained(regex=REGEX)),
    "grammar": Row(2, constrained(grammar=SUM)),
    "choice": Row(2, constrained(choice=CHOICES)),
    "presence_penalty": Row(2, always(presence_penalty=2.0)),
    "frequency_penalty": Row(2, always(frequency_penalty=2.0)),
    "repetition_penalty": Row(2, always(repetition_penalty=2.0)),
    "bad_words": Row(2, always(bad_words=["answer", "is", "The"])),
    "allowed_token_ids": Row(2, always(allowed_token_ids=KNOWN)),
    "stop": Row(2, always(stop=WORDS)),
    "stop_token_ids": Row(2, lambda rng, most: {"stop_token_ids": rng.sample(KNOWN, 20)}),
    "ignore_eos": Row(2, always(ignore_eos=True)),
    "min_tokens": Row(2, lambda rng, most: {"min_tokens": rng.randint(1, most)}),
    "several at once": Row(
        2,
        always(
            ignore_eos=True,
            presence_penalty=1.0,
            repetition_penalty=1.2,
            bad_words=["answer", "is"],
            allowed_token_ids=KNOWN,
            logprobs=2,
        ),
    ),
    "logprobs": Row(2, always(logprobs=5)),
    "prompt_logprobs": Row(1, always(prompt_logprobs=3), streams=False),
    "echo": Row(1, always(echo=True)),
    "one token": Row(2, always(max_tokens=1)),
    "sampled": Row(8, sampled, compared=False),
    "n": Row(2, lambda rng, most: {**sampled(rng, most), "n": rng.randint(2, 4)}, compared=False),
    "beam search": Row(1, always(use_beam_search=True, n=2, max_tokens=8), streams=False),
    "logit_bias": Row(2, always(logit_bias=RARE)),
    "min_p": Row(2, always(min_p=0.3, **DRAWN)),
    "logit_bias and min_p": Row(1, always(min_p=0.3, logit_bias=RARE, **DRAWN)),
    "failfast_max_len 0": Row(2, always(**UNDRAFTED)),
    "failfast_max_len 0, sampled": Row(1, always(**UNDRAFTED, **DRAWN)),
    "own limits": Row(6, own_limits),
}


def right(path: str = COMPLETIONS, **changed: Any) -> Body:
    """A request that is right but for what is changed."""
    said = {"prompt": "Count to five."}
    if path == CHAT:
        said = {"messages": [{"role": "user", "content": "Count to five."}]}  # type: ignore[dict-item]
    return {"model": NAME, **said, "max_tokens": 8, "temperature": 0, **changed}


def xargs(**keys: Any) -> Body:
    return right(vllm_xargs={f"failfast_{key}": value for key, value in keys.items()})


WHOLE = json.dumps(right()).encode()
WRONG: dict[str, Body | bytes] = {  # must be refused
    "no JSON": b"hello",
    "empty body": b"",
    "half a body": WHOLE[:20],
    "a body too long": WHOLE + b"}",
    "invalid UTF-8": WHOLE.replace(b"Count", b"\xff\xfe\x80"),
    "a list": b"[1, 2]",
    "nested": b"[" * 5000,
    "max_tokens a text": right(max_tokens="many"),
    "max_tokens a list": right(max_tokens=[1]),
    "max_tokens negative": right(max_tokens=-5),
    "max_tokens beyond int64": right(max_tokens=2**70),
    "temperature a text": right(temperature="hot"),
    "temperature negative": right(temperature=-1),
    "top_p above 1": right(top_p=1.5),
    "n negative": right(n=-1),
    "n 0": right(n=0),
    "prompt a number": right(prompt=5),
    "prompt an object": right(prompt={"a": 1}),
    "prompt too long": right(prompt=[5] * (LIMIT + 1)),
    "a token beyond the vocabulary": right(prompt=[99999]),
    "a token below 0": right(prompt=[-3]),
    "no token": right(prompt=[]),
    "logprobs too many": right(logprobs=10**6),
    "min_tokens above max_tokens": right(min_tokens=9),
    "stop a number": right(stop=5),
    "allowed_token_ids beyond the vocabulary": right(allowed_token_ids=[10**6]),
    "no allowed_token_ids": right(allowed_token_ids=[]),
    "logit_bias beyond the vocabulary": right(logit_bias={"1000000": 1.0}),
    "a regex that does not close": right(structured_outputs={"regex": "([a-z"}),
    "a grammar that does not parse": right(structured_outputs={"grammar": "root ::= ("}),
    "a schema of no type": right(structured_outputs={"json": {"type": "nothing"}}),
    "messages a text": right(CHAT, messages="hello"),
    "a role that is none": right(CHAT, messages=[{"role": 5, "content": "hello"}]),
    "an unknown model": right(model="nobody"),
}
OURS_WRONG: dict[str, Body] = {  # must be refused by failfast; other servers ignore it
    "failfast_max_len 61": xargs(max_len=61),
    "failfast_max_len -1": xargs(max_len=-1),
    "failfast_max_len beyond int64": xargs(max_len=2**70),
    "failfast_max_len a text": xargs(max_len="3"),
    "failfast_max_len a list": xargs(max_len=[3]),
    "failfast_max_len 3.5": xargs(max_len=3.5),
    "failfast_confidence_threshold 0.1": xargs(confidence_threshold=0.1),
    "failfast_confidence_threshold 2": xargs(confidence_threshold=2),
    "failfast_maxlen": xargs(maxlen=3),
}
HARMLESS: dict[str, Body | bytes] = {  # refused or not, as without failfast
    "an unknown field": right(unknown_field={"a": [1, 2]}),
    "max_tokens too many": right(max_tokens=10**9),
    "max_tokens 0": right(max_tokens=0),
    "temperature NaN": WHOLE.replace(b'"temperature": 0', b'"temperature": NaN'),
    "stop_token_ids beyond the vocabulary": right(stop_token_ids=[10**6]),
    "vllm_xargs of others": right(vllm_xargs={"somebody_elses": "failfast"}),
    "several prompts": right(prompt=["One", "Two", "Three"]),
    "an empty prompt": right(prompt=""),
    "no messages": right(CHAT, messages=[]),
    "no max_tokens": right(CHAT, max_tokens=None, stop=["."]),
}


class Questions:
    """Makes request i of a seed from prompts in token ids and as chats."""

    def __init__(self, seed: int, ids: list[list[int]], chats: list[list[Body]], lora: str) -> None:
        self.seed, self.ids, self.chats, self.lora = seed, ids, chats, lora

    def ask(self, number: int) -> Ask:
        rng = random.Random(f"{self.seed} {number}")
        if number % 50 == 49:
            return self._operation(number)
        if rng.random() < 0.08:
            return wrong(rng, number)
        if rng.random() < 0.05:
            return self._tool(rng, number)
        name = rng.choices([*ROWS], [row.weight for row in ROWS.values()])[0]
        row, body, path = ROWS[name], *self._prompt(rng, name)
        body.update(row.params(rng, body["max_tokens"]))
        if path == CHAT and "logprobs" in body:
            body.update(logprobs=True, top_logprobs=body["logprobs"])
        body["stream"] = row.streams and rng.random() < 0.5
        statuses: tuple[int, ...] = (200,)
        if rng.random() < 0.06:
            name, body["model"], statuses = f"{name}, LoRA", ADAPTER, (200, 404)
        leaves: float | None = None
        if body["stream"]:
            leaves = rng.randint(1, 12) if rng.random() < 0.15 else None
        elif rng.random() < 0.08:
            leaves = rng.choice([0.005, 0.05, 0.3, 1.0])
        return Ask(number, name, path, body, statuses, row.compared, leaves)

    def _prompt(self, rng: random.Random, row: str) -> tuple[Body, str]:
        """A prompt of 1 token to almost the limit, and how long its answer may be."""
        settings = {"model": NAME, "temperature": 0, "return_token_ids": True}
        few, some, many = rng.randint(1, 8), rng.randint(8, 40), rng.randint(40, 160)
        most = rng.choices([few, some, many], [20, 65, 15])[0]
        chat_can = row not in ("echo", "beam search", "prompt_logprobs")
        if chat_can and rng.random() < 0.25:
            messages = rng.choice(self.chats)
            return {**settings, "messages": messages, "max_tokens": most}, CHAT
        ids = list(rng.choice(self.ids))
        shape = rng.random()
        if shape < 0.06:
            ids = [rng.choice(KNOWN)]
        elif shape > 0.85:
            wanted = rng.randint(1, 400) if shape < 0.97 else rng.randint(400, LIMIT - 1)
            while len(ids) < wanted:
                ids = rng.choice(self.ids) + ids
            ids = ids[-wanted:]
        room = LIMIT - len(ids)
        if row == "long":
            most = rng.randint(room // 2, room)
        return {**settings, "prompt": ids, "max_tokens": min(most, room)}, COMPLETIONS

    def _tool(self, rng: random.Random, number: int) -> Ask:
        """A call that is forced, or that the model writes by itself (a regex forces the text)."""
        forced = rng.random() < 0.5
        own = (
            {"tool_choice": FORCED}
            if forced
            else {"structured_outputs": {"regex": re.escape(CALL)}}
        )
        body = right(CHAT, messages=rng.choice(self.chats), tools=[TOOL], max_tokens=80, **own)
        body.update(stream=rng.random() < 0.5, return_token_ids=True)
        return Ask(number, "forced tool call" if forced else "tool call", CHAT, body, compared=True)

    def _operation(self, number: int) -> Ask:
        """What an operator does meanwhile; adapters come and go."""
        adapter = {"lora_name": ADAPTER}
        resets = (
            ("reset prefix cache", "/reset_prefix_cache", {}),
            ("reset, preempting all", "/reset_prefix_cache?reset_running_requests=true", {}),
        )
        place = number // 50 % 16  # 13 adapters in 10,000 requests: see `NUM_ADAPTERS`
        row, path, body = resets[place % 2]
        if place == 0:
            row, path = "load LoRA", "/v1/load_lora_adapter"
            body = {**adapter, "lora_path": self.lora}
        elif place == 10:
            row, path, body = "unload LoRA", "/v1/unload_lora_adapter", adapter
        return Ask(number, row, path, body, alone=True)


def wrong(rng: random.Random, number: int) -> Ask:
    cases: dict[str, Body | bytes] = {**WRONG, **OURS_WRONG, **HARMLESS}
    name = rng.choice([*cases])
    body = cases[name]
    path = CHAT if isinstance(body, dict) and "messages" in body else COMPLETIONS
    statuses = (200, *REFUSED) if name in HARMLESS or name in OURS_WRONG else REFUSED
    return Ask(number, name, path, body, statuses)
