"""Thousands of mixed requests against real servers, without and with failfast.

Both serve the shipped pair's target in float32, with few KV pages. A turn of requests goes to the
server without speculation and then, the same ones, to the one with failfast; after each turn
nothing may be left of them. Greedy answers are compared. At most `--requests` requests are made,
for at most `--seconds`; the results are written after every turn.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parents[1] / "tests" / "support")]

from chaos_requests import ADAPTER, CHOICES, KNOWN, LIMIT, NAME, REGEX, ROWS, Ask, Questions  # noqa: E402

from failfast_vllm.config import MODELS_DIR  # noqa: E402
from failfast_vllm.tools.report import provenance  # noqa: E402
from failfast_vllm.tools.shipped import SHIPPED_PAIR  # noqa: E402

METHODS: dict[str, list[str]] = {
    "none": [],
    "failfast": [
        *("--speculative-config", "failfast"),
        *("--per-request-spec-decode-metrics", "detailed"),
    ],
}
IN_FLIGHT = (1, 64, 8, 32, 2, 64, 16, 48, 4)  # at most, for `STRETCH` requests each
STRETCH = 32
TURN = 288  # requests: all of these once
NUM_PAGES, PAGE_SIZE = 160, 32  # of KV, in tokens: 64 requests want twice as many
# On a CPU vLLM 0.32 gives rows without an adapter that of the last slot where others have one. Each
# load takes a slot, and the last must stay empty.
NUM_ADAPTERS = 16
START_SECONDS, REQUEST_SECONDS, SETTLE_SECONDS = 300, 120, 20
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
COUNTERS = ("num_preemptions_total", "prompt_tokens_total", "generation_tokens_total")
DRAFTS = ("spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total")


@dataclass
class Answer:
    """What came of a request."""

    status: int = 0  # of HTTP; of an error in mid-stream its code; 0: none came
    error: str = ""
    token_ids: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))  # by choice
    reasons: dict[int, str] = field(default_factory=dict)
    text: str = ""  # of the first choice
    drafted: list[int] = field(default_factory=list)  # per step, where the server says so
    left: bool = False  # the client went
    ms: float = 0.0

    def read(self, found: dict[str, Any]) -> None:
        """A body, or a piece of one."""
        if "error" in found:
            self.status, self.error = int(found["error"]["code"]), found["error"]["message"][:300]
        for choice in found.get("choices", ()):
            said = choice.get("message") or choice.get("delta") or choice
            index = choice["index"]
            self.token_ids[index] += choice.get("token_ids") or []
            if choice.get("finish_reason"):
                self.reasons[index] = choice["finish_reason"]
            if index == 0:
                self.text += said.get("content") or said.get("text") or ""
                for call in said.get("tool_calls") or ():
                    self.text += call["function"].get("arguments") or ""
        speculation = (found.get("metrics") or {}).get("speculative_decoding") or {}
        self.drafted += speculation.get("per_step_drafted") or []


@contextlib.contextmanager
def serving(flags: list[str], log: Path) -> Iterator[str]:
    """A server of the shipped pair's target that a client may disturb; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    grammar = {"backend": "xgrammar", "disable_any_whitespace": True}
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(MODELS_DIR / "target")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(LIMIT)]
    command += ["--max-num-seqs", "64", "--max-num-batched-tokens", "4096"]
    command += ["--block-size", str(PAGE_SIZE), "--num-gpu-blocks-override", str(NUM_PAGES)]
    command += ["--enable-lora", "--max-lora-rank", "8", "--max-loras", str(NUM_ADAPTERS)]
    command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    command += ["--structured-outputs-config", json.dumps(grammar)]
    command += ["--worker-extension-cls", "worker_state.WorkerState", *flags]
    own = {
        "PYTHONPATH": str(HERE),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env={**environment, **own},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        ends = time.monotonic() + START_SECONDS
        while not is_healthy(url):
            if process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def is_healthy(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", trust_env=False, timeout=30).status_code == 200
    return False


def metrics(url: str, names: tuple[str, ...]) -> dict[str, float]:
    """Of vLLM's, each summed over its labels; 0 where there is none."""
    text = httpx.get(f"{url}/metrics", trust_env=False, timeout=30).text
    values = {n: re.findall(rf"^vllm:{n}(?:{{.*}})? (\S+)$", text, re.MULTILINE) for n in names}
    return {name: sum(map(float, found)) for name, found in values.items()}


def remembered(url: str) -> dict[str, int]:
    """See `worker_state.py`."""
    body = {"method": "requests_remembered"}
    response = httpx.post(f"{url}/collective_rpc", json=body, trust_env=False, timeout=30)
    found: dict[str, int] = response.json()["results"][0]
    return found


async def send(session: aiohttp.ClientSession, url: str, ask: Ask) -> Answer:
    """Ask and read the answer; the client goes when it is to."""
    answer, began = Answer(), time.perf_counter()
    streams = isinstance(ask.body, dict) and ask.body.get("stream")
    seconds = REQUEST_SECONDS if ask.leaves is None or streams else ask.leaves
    try:
        await asyncio.wait_for(_read(session, url, ask, answer), seconds)
    except asyncio.TimeoutError:
        answer.left = ask.leaves is not None and not streams
        answer.error = "" if answer.left else f"no end within {REQUEST_SECONDS} s"
    except (aiohttp.ClientError, ValueError, LookupError) as error:
        answer.error = f"{type(error).__name__}: {error}"[:300]
    answer.ms = 1e3 * (time.perf_counter() - began)
    return answer


async def _read(session: aiohttp.ClientSession, url: str, ask: Ask, answer: Answer) -> None:
    data = ask.body if isinstance(ask.body, bytes) else json.dumps(ask.body).encode()
    headers = {"Content-Type": "application/json"}
    async with session.post(url + ask.path, data=data, headers=headers) as response:
        answer.status, num_pieces = response.status, 0
        if response.content_type != "text/event-stream":
            text = await response.text()
            if response.content_type == "application/json":
                found = json.loads(text)
                answer.read(found if isinstance(found, dict) else {})
            return
        async for line in response.content:
            if line.startswith(b"data: {"):
                answer.read(json.loads(line[6:]))
                num_pieces += 1
            if ask.leaves is not None and num_pieces >= ask.leaves:
                answer.left = True
                return


async def drive(url: str, asks: list[Ask]) -> list[Answer]:
    """All of them, never more in flight than `IN_FLIGHT` says for the next one."""
    answers: dict[int, asyncio.Task[Answer]] = {}
    running: set[asyncio.Task[Answer]] = set()
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # none is closed while idle
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=None), read_bufsize=2**22
    ) as session:
        for ask in asks:
            most = IN_FLIGHT[ask.number // STRETCH % len(IN_FLIGHT)]
            while len(running) >= most:
                _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            task = asyncio.create_task(send(session, url, ask))
            answers[ask.number] = task
            if ask.alone:
                await task
            else:
                running.add(task)
        return list(await asyncio.gather(*answers.values()))


def problems(ask: Ask, answer: Answer) -> Iterator[str]:
    """What is wrong with an answer by itself."""
    if answer.error.startswith("no end"):
        yield "hangs"
    elif not answer.left and answer.status not in ask.statuses:
        yield f"status {answer.status}: {answer.error}"
    if answer.left or answer.status != 200 or isinstance(ask.body, bytes):
        return
    body, complete = ask.body, not answer.error
    if "return_token_ids" not in body:
        return
    if len(answer.reasons) < body.get("n", 1) or not complete:
        yield f"has no end: {answer.error}"
    most, least = body["max_tokens"], body.get("min_tokens", 0)
    for index, ids in answer.token_ids.items():
        # beam search leaves the stop token out; its tokens may be counted before
        if len(ids) > most or (len(ids) < least and answer.reasons.get(index) == "stop"):
            yield f"{len(ids)} tokens of {least} to {most}"
        if answer.reasons.get(index) == "length" and len(ids) != most:
            yield f"{len(ids)} tokens, cut at {most}"
        if "allowed_token_ids" in body and not set(ids) <= set(KNOWN):
            yield "tokens that are not allowed"
    yield from _shape(body, answer)
    longest = body.get("vllm_xargs", {}).get("failfast_max_len")
    if longest is not None and max(answer.drafted, default=0) > longest:
        yield f"drafts of {max(answer.drafted)} tokens"


def _shape(body: dict[str, Any], answer: Answer) -> Iterator[str]:
    """Grammars and stop texts."""
    # a prompt that ends within a character: vLLM puts a mark for it before the answer
    asked, text = body.get("structured_outputs", {}), answer.text.lstrip("\ufffd")
    if answer.reasons.get(0) != "length":
        if "tool_choice" in body or "json" in asked:
            with contextlib.suppress(ValueError, TypeError):
                if list(json.loads(text)) == ["name", "count", "fresh"]:
                    return
            yield f"not of the schema: {text[:200]}"
        if "choice" in asked and text not in CHOICES:
            yield f"no choice: {text[:200]}"
        if asked.get("regex") == REGEX and not re.fullmatch(REGEX, text):
            yield f"does not match: {text[:200]}"
    if any(word in text for word in body.get("stop") or ()):
        yield "goes on beyond a stop text"


def difference(ask: Ask, expected: Answer, found: Answer) -> dict[str, Any] | None:
    """Where an answer is not that of the server without speculation; None: nowhere."""
    if expected.status != 200 or found.status != 200:
        return None
    cut = expected.left or found.left
    for index in sorted({*expected.token_ids, *found.token_ids}):
        a, b = expected.token_ids[index], found.token_ids[index]
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if same is None and not cut and (len(a) != len(b) or expected.reasons != found.reasons):
            same = min(len(a), len(b))
        if same is not None:
            facts = {"number": ask.number, "row": ask.row, "choice": index, "at": same}
            return {**facts, "expected": a[same : same + 4], "found": b[same : same + 4]}
    return None


def settled(url: str) -> dict[str, Any]:
    """What the server still has of requests, once that is nothing or after `SETTLE_SECONDS`."""
    ends = time.monotonic() + SETTLE_SECONDS
    while True:
        found = {**metrics(url, GAUGES), **remembered(url)}
        if not any(found.values()) or time.monotonic() > ends:
            return found
        time.sleep(0.2)


def percentiles(values: list[float]) -> dict[str, float]:
    values = sorted(values)
    return {f"p{p}": round(values[len(values) * p // 100], 2) for p in (50, 90, 99) if values}


@dataclass
class Tally:
    """What came of all requests so far."""

    asks: list[Ask] = field(default_factory=list)
    answers: dict[str, list[Answer]] = field(default_factory=lambda: defaultdict(list))
    left_over: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    seconds: Counter[str] = field(default_factory=Counter)
    counts: dict[str, dict[str, float]] = field(default_factory=dict)
    healthy: dict[str, bool] = field(default_factory=dict)

    def turn(self, name: str, url: str, asks: list[Ask]) -> None:
        began = time.perf_counter()
        self.answers[name] += asyncio.run(drive(url, asks))
        self.seconds[name] += time.perf_counter() - began
        self.healthy[name] = is_healthy(url)
        if self.healthy[name]:
            self.left_over[name].append(settled(url))
            self.counts[name] = metrics(url, (*COUNTERS, *DRAFTS))

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = {"requests": len(self.asks)}
        found["rows"] = dict(sorted(Counter(ask.row for ask in self.asks).items()))
        found["rows_not_asked_for"] = sorted(ROWS.keys() - found["rows"].keys())
        found["methods"] = {name: self._method(name) for name in self.answers}
        if len(self.answers) == len(METHODS):
            found |= self._comparison()
        return found

    def _method(self, name: str) -> dict[str, Any]:
        answers = self.answers[name]
        wrong = [
            {"number": ask.number, "row": ask.row, "problem": text}
            for ask, answer in zip(self.asks, answers, strict=True)
            for text in problems(ask, answer)
        ]
        return {
            "seconds": round(self.seconds[name], 1),
            "statuses": dict(sorted(Counter(str(a.status) for a in answers if not a.left).items())),
            "drafts_told": sum(bool(a.drafted) for a in answers),
            "clients_gone": sum(a.left for a in answers),
            "hangs": sum(w["problem"] == "hangs" for w in wrong),
            "healthy": self.healthy[name],
            "left_over": [some for some in self.left_over[name] if any(some.values())],
            "turns_settled": len(self.left_over[name]),
            "counts": self.counts.get(name, {}),
            "problems": len(wrong),
            "first_problems": wrong[:40],
        }

    def _comparison(self) -> dict[str, Any]:
        pairs = list(zip(self.asks, self.answers["none"], self.answers["failfast"], strict=True))
        compared = [p for p in pairs if p[0].compared and p[1].status == p[2].status == 200]
        differences = [d for pair in compared if (d := difference(*pair))]
        statuses = [
            {"row": ask.row, "none": a.status, "failfast": b.status}
            for ask, a, b in pairs
            if not (a.left or b.left) and a.status != b.status
        ]
        both = [
            (a, b)
            for ask, a, b in compared
            if not (a.left or b.left) and "return_token_ids" in ask.body
        ]
        found: dict[str, Any] = {
            "compared": len(compared),
            "of_them_whole": len(both),
            "different": len(differences),
            "first_different": differences[:40],
            "statuses_that_differ": Counter(json.dumps(s) for s in statuses),
        }
        for key, view in (("latency_ms", _latency), ("ms_per_token", _per_token)):
            rows = {n: percentiles([view(p[i]) for p in both]) for i, n in enumerate(METHODS)}
            ratio = {p: round(rows["failfast"][p] / x, 3) for p, x in rows["none"].items()}
            found[key] = {**rows, "ratio": ratio}
        return found


def _latency(answer: Answer) -> float:
    return answer.ms


def _per_token(answer: Answer) -> float:
    return answer.ms / max(1, sum(map(len, answer.token_ids.values())))


def questions(seed: int, lora: Path) -> Questions:
    """The held-out prompts, and an adapter with random weights."""
    from transformers import AutoTokenizer

    from failfast_vllm.tools.offline import encode, read_prompts
    from failfast_vllm.tools.shipped import PROMPTS
    from random_targets import write_lora

    tokenizer = AutoTokenizer.from_pretrained(MODELS_DIR / "target")
    prompts = read_prompts(PROMPTS)
    write_lora(lora)
    ids = [encode(tokenizer, prompt)["prompt_token_ids"] for prompt in prompts]
    return Questions(seed, ids, [prompt["messages"] for prompt in prompts], str(lora))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=3600, help="no turn begins after them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, help="folder for what the servers print")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *unused: sys.exit("terminated"))  # ends the servers, too
    facts = provenance(
        models=SHIPPED_PAIR,
        seed=args.seed,
        in_flight=IN_FLIGHT,
        max_model_len=LIMIT,
        kv_pages=NUM_PAGES,
        page_tokens=PAGE_SIZE,
        dtype="float32",
    )
    tally, began = Tally(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        logs = args.logs or Path(folder)
        asked = questions(args.seed, Path(folder) / ADAPTER)
        urls = {
            name: stack.enter_context(serving(flags, logs / f"{name}.log"))
            for name, flags in METHODS.items()
        }
        began = time.monotonic()
        for first in range(0, args.requests, TURN):
            if time.monotonic() - began > args.seconds:
                break
            asks = [asked.ask(i) for i in range(first, min(first + TURN, args.requests))]
            tally.asks += asks
            for name, url in urls.items():
                tally.turn(name, url, asks)
            found = {"provenance": facts, **tally.report()}
            if args.json:
                args.json.write_text(json.dumps(found, indent=1) + "\n")
            short = {key: found[key] for key in ("requests", "compared", "different")}
            print(short, round(time.monotonic() - began), flush=True)
            if not all(tally.healthy.values()):
                break
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
