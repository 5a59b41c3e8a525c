"""`vllm serve TARGET --speculative-config failfast`, over HTTP, with clients that come and go.

Every answer is compared with what an engine without speculation says offline. The server is that of
the recipes, too (tests/conftest.py); the last test ends it.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine import TARGET, chat_ids, engine, shipped_prompts
from http_server import FLAGS, NAME, START_SECONDS, free_port, server_environment, started

DOCS = Path(__file__).parents[2] / "docs"
NUM_CLIENTS = 32
SETTLE_SECONDS = 15  # the engine notices a lost client between two steps
LEAVE_SECONDS = 3  # then clients give up; until then a server that ends waits for them
MANY = 300  # tokens: others still stream when the first piece of one arrives
LONG = 1500  # tokens: a client that leaves after two pieces cannot have had them all


class Question(NamedTuple):
    messages: list[dict[str, str]]
    prompt_ids: list[int]  # the same question after the chat template
    max_tokens: int
    answer: str  # greedy, of an engine without speculation
    finish_reason: str


@pytest.fixture(scope="module")
def questions():
    """Questions with different lengths of answers, some cut off and some ended by the model."""
    from vllm import SamplingParams

    asked = shipped_prompts()[:NUM_CLIENTS]
    limits = [24 + i * 37 % 90 for i in range(NUM_CLIENTS)]
    with engine() as llm:
        ids = [chat_ids(llm.get_tokenizer(), prompt) for prompt in asked]
        outputs = llm.generate(
            [{"prompt_token_ids": i} for i in ids],
            [SamplingParams(temperature=0.0, max_tokens=limit) for limit in limits],
            use_tqdm=False,
        )
    answers = [output.outputs[0] for output in outputs]
    return [
        Question(prompt["messages"], prompt_ids, limit, answer.text, answer.finish_reason)
        for prompt, prompt_ids, limit, answer in zip(asked, ids, limits, answers, strict=True)
    ]


def serve_command(speculative_config, port, *more):
    """As a user types it; the shared server is started by the systemd unit's command."""
    vllm = str(Path(sys.executable).with_name("vllm"))
    given = ["--speculative-config", speculative_config] if speculative_config else []
    where = ["--host", "127.0.0.1", "--port", str(port)]
    return [vllm, "serve", TARGET, *given, *where, *FLAGS, *more]


def serving(speculative_config, log, *more):
    """A running server of its own."""
    port = free_port()
    return started(serve_command(speculative_config, port, *more), port, log)


@pytest.fixture(autouse=True)
def server_log_of_the_test(request):
    """Printed after each test; pytest shows it for those that fail."""
    if "server" not in request.fixturenames:
        yield
        return
    log = request.getfixturevalue("server").log
    begin = log.stat().st_size
    yield
    with log.open() as output:
        output.seek(begin)
        print(output.read()[-8000:])


def test_completion(server, questions):
    """Token ids as the prompt; several prompts in one request."""
    asked = questions[:4]
    limit = min(q.max_tokens for q in asked)
    completion = server.client().completions.create(
        model=NAME, prompt=[q.prompt_ids for q in asked], max_tokens=limit, temperature=0
    )
    answers = [choice.text for choice in completion.choices]
    assert len(answers) == len(asked)
    assert all(q.answer.startswith(a) for q, a in zip(asked, answers, strict=True))
    assert sum(map(len, answers)) > 0


def test_chat_completion(server, questions):
    """The chat template, both ends of an answer: the model's and the limit's."""
    by_reason = {q.finish_reason: q for q in questions}
    assert set(by_reason) == {"stop", "length"}
    for reason, question in by_reason.items():
        completion = server.client().chat.completions.create(
            model=NAME,
            messages=question.messages,
            max_completion_tokens=question.max_tokens,
            temperature=0,
        )
        assert completion.choices[0].message.content == question.answer
        assert completion.choices[0].finish_reason == reason
        assert completion.usage.prompt_tokens == len(question.prompt_ids)


def test_streaming_sends_several_pieces(server, questions):
    """Catches a server that holds the text back until the draft machinery is done."""
    question = max(questions, key=lambda q: len(q.answer))
    stream = server.client().completions.create(
        model=NAME,
        prompt=question.prompt_ids,
        max_tokens=question.max_tokens,
        temperature=0,
        stream=True,
    )
    pieces = [chunk.choices[0].text for chunk in stream]
    assert "".join(pieces) == question.answer
    assert len([piece for piece in pieces if piece]) > 1


async def ask(client, question, is_chat, leaves):
    """Stream one answer; a client that leaves does so after the second piece of text."""
    settings = {"model": NAME, "temperature": 0, "stream": True}
    settings["max_tokens"] = LONG if leaves else question.max_tokens
    settings["extra_body"] = {"ignore_eos": leaves}
    if is_chat:
        stream = await client.chat.completions.create(messages=question.messages, **settings)
    else:
        stream = await client.completions.create(prompt=question.prompt_ids, **settings)
    pieces, finish_reason = [], None
    async with stream:
        async for chunk in stream:
            choice = chunk.choices[0]
            piece = choice.delta.content if is_chat else choice.text
            pieces += [piece] if piece else []
            finish_reason = choice.finish_reason
            if leaves and len(pieces) == 2:
                break
    return "".join(pieces), finish_reason


async def ask_all(server, questions, leavers):
    async with server.async_client() as client:
        return await asyncio.gather(
            *(ask(client, q, i % 2 == 0, i in leavers) for i, q in enumerate(questions))
        )


def check_that_a_third_may_leave(server, questions):
    leavers = set(range(0, NUM_CLIENTS, 3))
    answers = asyncio.run(ask_all(server, questions, leavers))
    for i, (question, (text, finish_reason)) in enumerate(zip(questions, answers, strict=True)):
        if i in leavers:
            assert finish_reason is None, f"client {i} left too late"
            shorter = min(len(text), len(question.answer))
            assert text[:shorter] == question.answer[:shorter], f"client {i}"
        else:
            assert (text, finish_reason) == (question.answer, question.finish_reason), f"client {i}"

    deadline = time.monotonic() + SETTLE_SECONDS
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    while any(left := {name: server.metric(name) for name in gauges}.values()):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
    assert server.is_healthy()


def test_a_third_of_32_clients_leave_midway(server, questions):
    """Catches answers mixed between requests, and pages or requests that nobody frees."""
    check_that_a_third_may_leave(server, questions)
    assert server.metric("spec_decode_num_drafts_total") > 0
    assert server.metric("spec_decode_num_accepted_tokens_total") > 0


@pytest.mark.large
def test_the_default_serves_many_and_one(questions, tmp_path):
    """As started by one word: load decides when to draft, and answers do not depend on it.

    In the fast part: `test_chaos.py`, whose server is the default one, too.
    """
    with serving("failfast", tmp_path / "server.log") as server:
        test_completion(server, questions)
        check_that_a_third_may_leave(server, questions)
        test_chat_completion(server, questions)


def test_wrong_request_is_the_clients_fault(server, questions):
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().completions.create(model=NAME, prompt="a", max_tokens=-5)
    assert caught.value.status_code == 400
    assert server.is_healthy()
    test_completion(server, questions)


@pytest.mark.parametrize(
    ("xargs", "message"),
    [
        (
            {"failfast_max_len": 61},
            "failfast: 'failfast_max_len' must be an integer from 0 to 60 on this server; got 61.",
        ),
        ({"failfast_max_len": "3"}, "got '3'."),
        ({"failfast_max_len": [3]}, "got [3]."),
        (
            {"failfast_confidence_threshold": 0.1},
            "failfast: 'failfast_confidence_threshold' must be a probability from 0.45 to 1.0 on "
            "this server; got 0.1.",
        ),
        ({"failfast_maxlen": 3}, "use one of failfast_max_len"),
    ],
)
def test_wrong_keys_of_a_request_are_the_clients_fault(server, questions, xargs, message):
    """Catches a bad value that reaches the engine process, which would die of it."""
    with pytest.raises(openai.BadRequestError) as caught:
        complete(server, questions[0], vllm_xargs=xargs)
    assert caught.value.status_code == 400
    assert message in caught.value.body["message"]
    assert server.is_healthy()


def complete(server, question, echo=False, **extra_body):
    completion = server.client().completions.create(
        model=NAME,
        prompt=question.prompt_ids,
        max_tokens=question.max_tokens,
        temperature=0,
        echo=echo,
        extra_body=extra_body,
    )
    return completion.choices[0].text


def test_requests_limit_their_drafts(server, questions):
    """Catches keys that are lost between the front end and the engine process."""
    drafts, drafted = "spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total"
    for limit in (0, 2):
        before = server.metric(drafts), server.metric(drafted)
        answer = complete(server, questions[0], vllm_xargs={"failfast_max_len": limit})
        assert answer == questions[0].answer
        num_drafts = server.metric(drafts) - before[0]
        num_drafted = server.metric(drafted) - before[1]
        assert num_drafted <= limit * num_drafts
        assert (num_drafted > 0) == (limit > 0)


def test_logit_bias_is_answered(server, questions):
    """vLLM refuses it beside other drafters."""
    biased = complete(server, questions[0], logit_bias={"300": 100.0})
    assert len(biased) > 10
    assert biased == biased[: len(biased) // questions[0].max_tokens] * questions[0].max_tokens


def test_echo(server, questions):
    echoed = complete(server, questions[0], echo=True)
    assert echoed.endswith(questions[0].answer)
    assert questions[0].messages[-1]["content"] in echoed


GIVE = {
    "type": "function",
    "function": {
        "name": "give",
        "parameters": {
            "type": "object",
            "properties": {
                "to": {"enum": ["Eric", "Leo"]},
                "count": {"type": "integer", "minimum": 0, "maximum": 99},
            },
            "required": ["to", "count"],
            "additionalProperties": False,
        },
    },
}


async def call_tools(server, questions, num_calls):
    """Forced tool calls, every second one drawn at temperature 1, up to 16 at a time."""
    slots = asyncio.Semaphore(16)
    async with server.async_client() as client:

        async def call(i):
            async with slots:
                return await client.chat.completions.create(
                    model=NAME,
                    messages=questions[i % len(questions)].messages,
                    tools=[GIVE],
                    tool_choice={"type": "function", "function": {"name": "give"}},
                    temperature=i % 2,
                    seed=i,
                    max_tokens=40,
                )

        return await asyncio.gather(*map(call, range(num_calls)))


def test_forced_tool_calls_are_valid(server, questions):
    """Catches a grammar that drafts lead out of step."""
    before = server.metric("spec_decode_num_accepted_tokens_total")
    for completion in asyncio.run(call_tools(server, questions, 96)):
        (call,) = completion.choices[0].message.tool_calls
        assert call.function.name == "give"
        arguments = json.loads(call.function.arguments)
        assert list(arguments) == ["to", "count"]
        assert arguments["to"] in ("Eric", "Leo")
        assert type(arguments["count"]) is int
        assert 0 <= arguments["count"] <= 99
    assert server.metric("spec_decode_num_accepted_tokens_total") > before + 100


CALL = '[{"name": "give", "arguments": {"to": "Leo", "count": 2}}]'


def called(completion):
    """The name and arguments of the only tool call."""
    message = completion.choices[0].message
    (call,) = message.tool_calls
    return call.function.name, call.function.arguments, completion.choices[0].finish_reason


def called_in_pieces(stream):
    """The same from the deltas of a stream; also how many deltas and how many tokens came."""
    name, arguments, reason, num_deltas, num_tokens = "", "", None, 0, 0
    for chunk in stream:
        num_tokens = chunk.usage.completion_tokens if chunk.usage else num_tokens
        for choice in chunk.choices:
            num_deltas += 1
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or ():
                name += call.function.name or ""
                arguments += call.function.arguments or ""
    return (name, arguments, reason), num_deltas, num_tokens


def call_by_text(server, **settings):
    """A call as the model writes it: a regex forces the text, the parser reads it."""
    return server.client().chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": f"Repeat this list: {CALL}"}],
        tools=[GIVE],
        tool_choice="auto",
        temperature=0,
        max_tokens=120,
        extra_body={"structured_outputs": {"regex": re.escape(CALL)}},
        **settings,
    )


async def terminate_under_load(server, questions):
    """Send SIGTERM to the API server while all its clients stream."""
    loaded = asyncio.Event()

    async def ask_for_long(client, question):
        stream = await client.completions.create(
            model=NAME,
            prompt=question.prompt_ids,
            max_tokens=MANY,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async for _ in stream:
            loaded.set()

    async with server.async_client() as client:
        asked = [asyncio.create_task(ask_for_long(client, q)) for q in questions]
        await loaded.wait()
        server.process.send_signal(signal.SIGTERM)
        await asyncio.wait(asked, timeout=LEAVE_SECONDS)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


def remaining(group):
    """Whether any process of a group is left, zombies included."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.large
@pytest.mark.parametrize(
    "command",
    [
        "chat --url {url}/v1 --quick Hello",
        "complete --url {url}/v1 --max-tokens 20 --quick Hello",
    ],
)
def test_vllms_clients_run_to_their_end(server, command):
    """In the fast part: `vllm bench serve`, in `tests/examples/test_examples_served.py`."""
    vllm = str(Path(sys.executable).with_name("vllm"))
    found = subprocess.run(
        [vllm, *command.format(url=server.url).split()],
        env=server_environment(),
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert re.search(r"\w", found.stdout)
    assert server.is_healthy()


def scraped(server):
    """Samples of /metrics: (name, reason or bin) -> value, summed over other labels."""
    found = defaultdict(float)
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            if "le" not in sample.labels:
                label = sample.labels.get("reason") or sample.labels.get("bin") or ""
                found[sample.name, label] += sample.value
    return found


def test_metrics_agree_with_each_other(server, questions):
    """Catches counts that are lost or doubled between worker, scheduler and front end."""

    def ask(question):
        return server.client().chat.completions.create(
            model=NAME,
            messages=question.messages,
            max_completion_tokens=question.max_tokens,
            temperature=0,
        )

    ask(questions[8])  # brings the counts that wait since the test before
    before = scraped(server)
    answers = [ask(question) for question in questions[:8]]
    after = scraped(server)
    grown = {key: value - before[key] for key, value in after.items()}

    def total(name):
        return sum(value for key, value in grown.items() if key[0] == name)

    drafts = total("vllm:spec_decode_num_drafts_total")
    drafted = total("vllm:spec_decode_num_draft_tokens_total")
    accepted = total("vllm:spec_decode_num_accepted_tokens_total")
    assert drafted > accepted > drafts > 8
    assert total("failfast:drafted_tokens_total") == drafted
    assert total("failfast:accepted_tokens_total") == accepted
    for name, tokens in (("draft_length", drafted), ("accepted_length", accepted)):
        assert total(f"failfast:{name}_count") == drafts
        assert total(f"failfast:{name}_sum") == tokens
    # of each answer, drafts of its last step may not have been verified, nor its counts sent
    assert abs(total("failfast:draft_stops_total") - drafts) <= 8 + 2
    assert total("failfast:draft_passes_total") >= drafts - 1
    assert total("failfast:draft_rows_total") > drafted
    assert 0 < total("failfast:draft_seconds_total") < 60
    assert 0 < total("failfast:verify_seconds_total") < 60
    # the first rejected token of a draft is judged, too
    judged = total("failfast:confidence_tokens_total")
    assert 0.9 * accepted <= judged <= accepted + drafts
    assert 0.9 * accepted <= total("failfast:confidence_accepted_tokens_total") <= accepted
    assert 0 < total("failfast:confidence_sum_total") <= judged
    errors = [value for key, value in after.items() if key[0] == "failfast:calibration_error"]
    assert 0 < errors[0] < 1
    of_requests = [answer.metrics["speculative_decoding"] for answer in answers]
    assert sum(sum(m["per_step_drafted"]) for m in of_requests) == drafted
    assert sum(sum(m["per_step_accepted"]) for m in of_requests) == accepted


def test_the_dashboard_shows_what_there_is(server, questions):
    """Catches a series that is renamed in one place only."""
    names = {key[0] for key in scraped(server)} | {"failfast:draft_length_bucket"}
    names |= {"failfast:accepted_length_bucket"}
    dashboard = json.loads((DOCS / "grafana-dashboard.json").read_text())
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    shown = set(re.findall(r"\b(?:failfast|vllm):\w+", " ".join(expressions)))
    assert shown <= names
    ours = {name for name in names if name.startswith("failfast:")}
    ours = {n for n in ours if not n.endswith(("_created", "_count", "_sum", "_le"))}
    assert ours <= shown | {"failfast:confidence_sum_total"}
    described = set(re.findall(r"`(failfast:\w+)`", (DOCS / "metrics.md").read_text()))
    assert {re.sub("_bucket$", "", name) for name in ours} == described


@pytest.mark.parametrize(
    ("speculative_config", "message"),
    [
        pytest.param("fialfast", "Value fialfast cannot be converted", marks=pytest.mark.large),
        (
            json.dumps({"method": "failfast", "confidence_treshold": 0.3}),
            "failfast: unknown key 'confidence_treshold' in the speculative config; "
            "did you mean 'confidence_threshold'?",
        ),
    ],
)
def test_server_refuses_to_start(speculative_config, message):
    """Catches an error that only the engine process sees: its parent says 'see above'."""
    process = subprocess.run(
        serve_command(speculative_config, free_port()),
        env=server_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    assert process.returncode != 0
    assert message in process.stdout.strip().splitlines()[-1]
    assert "Starting to load model" not in process.stdout


def check_tool_calls_and_the_end(server, questions, drafts):
    seen = called(call_by_text(server))
    assert seen == ("give", '{"to": "Leo", "count": 2}', "tool_calls")
    stream = call_by_text(server, stream=True, stream_options={"include_usage": True})
    streamed, num_deltas, num_tokens = called_in_pieces(stream)
    assert streamed == seen
    if drafts:
        assert num_deltas < num_tokens, "no delta had two tokens"
    asyncio.run(terminate_under_load(server, questions[:16]))
    assert server.process.wait(timeout=SETTLE_SECONDS) == 0
    deadline = time.monotonic() + SETTLE_SECONDS
    while remaining(server.process.pid):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.2)


@pytest.mark.large
@pytest.mark.parametrize("method", [None, "failfast"])
def test_the_end_without_stats(questions, tmp_path, method):
    """Catches a server that needs its statistics, or another end with failfast than without."""
    with serving(method, tmp_path / "server.log", "--disable-log-stats") as server:
        test_completion(server, questions)
        check_tool_calls_and_the_end(server, questions, drafts=False)


def test_tool_calls_by_text_and_the_end(server, questions):
    """Catches deltas of many tokens that the parser reads otherwise than the whole text, and

    a server that does not end on SIGTERM under load. The last test of this server.
    """
    check_tool_calls_and_the_end(server, questions, drafts=True)
