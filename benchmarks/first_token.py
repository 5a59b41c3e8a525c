"""Time to first token over HTTP: a server without and one with failfast, side by side.

Both serve the shipped pair's target. Clients stream answers in a closed loop and take turns between
the servers; a repeat gives one median per server, the ratio is the median over the repeats' ratios.
`gap` is the time between two pieces of an answer (with failfast a piece holds several tokens).
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from failfast_vllm.config import MODELS_DIR
from failfast_vllm.tools.offline import read_prompts
from failfast_vllm.tools.report import provenance
from failfast_vllm.tools.shipped import PROMPTS, SHIPPED_PAIR

SERVERS: dict[str, list[str]] = {"none": [], "failfast": ["--speculative-config", "failfast"]}
START_SECONDS = 300
Prompts = Iterator[list[dict[str, str]]]


class Streamed(NamedTuple):
    """One answer; milliseconds from the request."""

    first_ms: float
    gaps_ms: list[float]
    last_ms: float


async def stream(client: httpx.AsyncClient, messages: Any, max_tokens: int) -> Streamed:
    """Ask once and note when pieces of the answer come."""
    body = {
        "model": "tiny",
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "stream": True,
    }
    began, times = time.perf_counter(), []
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get(
                "content"
            ):
                times.append((time.perf_counter() - began) * 1e3)
    gaps = [after - before for before, after in pairwise(times)]
    return Streamed(times[0], gaps, times[-1])


async def closed_loop(
    url: str, prompts: Prompts, concurrency: int, num_requests: int, max_tokens: int
) -> list[Streamed]:
    """`num_requests` answers for each of `concurrency` clients."""
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:

        async def ask() -> list[Streamed]:
            return [await stream(client, next(prompts), max_tokens) for _ in range(num_requests)]

        answers = await asyncio.gather(*(ask() for _ in range(concurrency)))
    return [streamed for answered in answers for streamed in answered]


@contextlib.contextmanager
def serving(flags: list[str]) -> Iterator[str]:
    """A server of the shipped pair's target; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(MODELS_DIR / "target")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", *flags]
    quiet = {**os.environ, "VLLM_LOGGING_LEVEL": "WARNING"}
    process = subprocess.Popen(command, env=quiet, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        ends = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health", trust_env=False).is_success:
                    break
            if process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"the server did not start: {command}")
            time.sleep(0.5)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):  # it did not start
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def median(values: list[float]) -> float:
    return round(statistics.median(values or [math.nan]), 3)


VIEWS: dict[str, Callable[[list[Streamed]], float]] = {
    "first_ms": lambda answers: median([a.first_ms for a in answers]),
    "gap_ms": lambda answers: median([gap for a in answers for gap in a.gaps_ms]),
    "last_ms": lambda answers: median([a.last_ms for a in answers]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, default=6, help="per client and repeat")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, default=Path("first_token.json"))
    args = parser.parse_args()
    prompts = cycle([prompt["messages"] for prompt in read_prompts(PROMPTS)])
    rows = []
    with contextlib.ExitStack() as stack:
        urls = {name: stack.enter_context(serving(flags)) for name, flags in SERVERS.items()}
        for concurrency in args.concurrency:
            found: dict[str, list[list[Streamed]]] = {name: [] for name in urls}
            for _ in range(args.repeats + 1):  # the first warms up
                for name, url in urls.items():
                    loop = closed_loop(url, prompts, concurrency, args.requests, args.max_tokens)
                    found[name].append(asyncio.run(loop))
            row: dict[str, Any] = {"concurrency": concurrency}
            for key, view in VIEWS.items():
                each = {name: [view(answers) for answers in found[name][1:]] for name in urls}
                for name, values in each.items():
                    row[f"{name}_{key}"] = median(values)
                for name in list(urls)[1:]:
                    ratios = [a / b for a, b in zip(each[name], each["none"], strict=True)]
                    row[f"{name}_{key}_ratio"] = median(ratios)
            print(row, flush=True)
            rows.append(row)
    facts = provenance(models=SHIPPED_PAIR, dtype="float32", repeats=args.repeats)
    args.json.write_text(json.dumps({"provenance": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
