"""Does `vllm serve` with the shipped pair answer many clients, some of whom leave?

    python benchmarks/gpu/serve.py [--json FILE] [--tiny]

Exit status 1: a client got no answer, another one than alone, or the metrics show no drafts.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

sys.path.append(str(Path(__file__).parents[1]))
from gpu import engine as kit

START_SECONDS, TOKENS = 150, 128
LEAVES = 6  # of so many clients one leaves after three parts of its answer


async def ask(client, text, parts=None):
    """The answer, streamed; after `parts` of it the client is gone."""
    body = {"model": "pair", "max_tokens": TOKENS, "temperature": 0, "stream": True}
    body["messages"] = [{"role": "user", "content": text}]
    answer = []
    async with client.stream("POST", "/v1/chat/completions", json=body, timeout=120) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line.removeprefix("data: "))["choices"]
                answer += [choice["delta"].get("content") or "" for choice in choices]
            if len(answer) == parts:
                return None
    return "".join(answer)


async def ask_all(url, texts):
    """What each client got alone, and together with all others."""
    limits = httpx.Limits(max_connections=len(texts))
    async with httpx.AsyncClient(base_url=url, limits=limits) as client:
        alone = [await ask(client, text) for text in texts[:4]]
        leave = [3 if i % LEAVES == LEAVES - 1 else None for i in range(len(texts))]
        together = await asyncio.gather(*map(ask, [client] * len(texts), texts, leave))
        again = [await ask(client, text) for text in texts[:4]]
        metrics = (await client.get("/metrics")).text
    return alone, together, again, metrics


def judge(alone, together, again, metrics):
    """What is reported."""
    counts = {}
    for line in metrics.splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith("failfast:") and "_created" not in name and "{" in name:
            key = name.partition("{")[0]
            counts[key] = counts.get(key, 0) + float(value)
    left = together[LEAVES - 1 :: LEAVES]
    return {
        "clients": len(together),
        "left": left.count(None),
        "without_an_answer": sum(not answer for answer in together) - left.count(None),
        "same_together": sum(a == b for a, b in zip(alone, together, strict=False)),
        "same_again": sum(a == b for a, b in zip(alone, again, strict=True)),
        "asked_alone": len(alone),
        "metrics": counts,
    }


def is_fine(found):
    right = found["same_together"] == found["same_again"] == found["asked_alone"]
    return (
        right
        and not found["without_an_answer"]
        and found["metrics"].get("failfast:draft_passes_total", 0) > 0
    )


@contextlib.contextmanager
def server(models, tiny):
    """A server of the pair; yields its address once it answers, and the seconds until then."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    speculative = {"method": "failfast", "model": str(models / "drafter")}
    memory = ["--gpu-memory-utilization", "0.05", "--kv-cache-memory-bytes", str(2 << 30)]
    few = ["--enforce-eager", "--max-model-len", "1024", "--dtype", "float32"]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(models / "target")]
    command += ["--speculative-config", json.dumps(speculative), "--port", str(port)]
    command += ["--max-num-seqs", "32", "--served-model-name", "pair", *(few if tiny else memory)]
    env = {**kit.ENVIRONMENT, **os.environ}
    process = subprocess.Popen(command, env=env, stdout=sys.stderr, start_new_session=True)
    url, began = f"http://127.0.0.1:{port}", time.monotonic()
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{url}/health").raise_for_status()
                break
            assert process.poll() is None, f"the server ended with status {process.returncode}"
            assert time.monotonic() < began + START_SECONDS, "the server does not answer"
            time.sleep(0.5)
        yield url, round(time.monotonic() - began, 1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main():
    from failfast_vllm.config import MODELS_DIR

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true", help="the script itself, on a CPU")
    args = parser.parse_args()
    lines = (MODELS_DIR / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["messages"][0]["content"] for line in lines[:24]]
    with server(MODELS_DIR, args.tiny) as (url, start_s):
        found = {"start_s": start_s} | judge(*asyncio.run(ask_all(url, texts)))
    print(json.dumps(found), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if is_fine(found) else 1


if __name__ == "__main__":
    sys.exit(main())
