"""Whether a server's memory stops growing: thousands of requests, without and with failfast.

Each method has a process of its own; they take turns over the same requests, each turn at another
concurrency, with prompts and answers of other lengths. After every turn a process says what memory
it has; drift is what came on top in the second half. The results are written after every turn, so a
run that is stopped leaves what it has reached. At the same load the planner should decide in the
second half as in the first: the share of sequence steps with a draft is compared by concurrency.
`--concurrencies 8` keeps the load constant.
"""

import argparse
import ctypes
import gc
import itertools
import json
import math
import multiprocessing
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from failfast_vllm.tools.load_generator import Watch, closed_loop
from failfast_vllm.tools.offline import ENGINE_ENVIRONMENT, encode, engine, positive, read_prompts
from failfast_vllm.tools.report import provenance
from failfast_vllm.tools.shipped import PROMPTS, SHIPPED_PAIR

METHODS = {"none": None, "failfast": {"method": "failfast"}}
CONCURRENCIES = (1, 32, 8, 64, 2, 16, 48, 4)
MAX_TOKENS = (20, 200, 100)
MAX_PROMPT_LEN = 1000
MIB = 2**20


class Turn(NamedTuple):
    """Requests that are answered before the other engine goes on."""

    concurrency: int
    num_requests: int
    max_tokens: int


class MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`, in bytes."""

    _fields_ = [
        *((f"unused_{i}", ctypes.c_size_t) for i in range(4)),
        ("mapped", ctypes.c_size_t),
        ("unused_5", ctypes.c_size_t),
        ("unused_6", ctypes.c_size_t),
        ("in_use", ctypes.c_size_t),
        ("free", ctypes.c_size_t),
        ("unused_9", ctypes.c_size_t),
    ]


def memory() -> dict[str, float]:
    """Of this process, in MiB; the heap is glibc's, 0 under another allocator."""
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallInfo
    heap = mallinfo()
    _, resident, *_ = Path("/proc/self/statm").read_text().split()
    found = {
        "rss": int(resident) * os.sysconf("SC_PAGE_SIZE"),
        "heap_in_use": heap.in_use + heap.mapped,
        "heap_free": heap.free,
    }
    return {f"{name}_mib": round(size / MIB, 1) for name, size in found.items()}


def turns(num_requests: int, concurrencies: Sequence[int] = CONCURRENCIES) -> Iterator[Turn]:
    """A closed loop of at least 8 requests at each concurrency, again and again."""
    for concurrency, max_tokens in zip(
        itertools.cycle(concurrencies), itertools.cycle(MAX_TOKENS), strict=True
    ):
        if num_requests <= 0:
            return
        size = min(num_requests, max(8, 2 * concurrency))
        yield Turn(concurrency, size, max_tokens)
        num_requests -= size


def mixed_prompts(tokenizer: Any, count: int, max_len: int) -> list[dict[str, Any]]:
    """The held-out prompts, every other one behind others, up to `max_len` tokens; 0: alone."""
    questions = [encode(tokenizer, p)["prompt_token_ids"] for p in read_prompts(PROMPTS)]
    rng = random.Random(0)
    prompts = []
    for i in range(count):
        ids = list(questions[i % len(questions)])
        wanted = rng.randint(min(1, max_len), max_len) if i % 2 else 0
        while len(ids) < wanted:
            ids = rng.choice(questions) + ids
        prompts.append({"prompt_token_ids": ids[-max_len:]})
    return prompts


def serve(
    pipe: Any,
    config: dict[str, Any] | None,
    settings: dict[str, Any],
    count: int,
    max_prompt_len: int,
) -> None:
    """An engine's process: takes turns as it is asked, and answers each with a record."""
    with engine(config, **settings) as llm:
        watch = Watch(llm, config)
        prompts = mixed_prompts(llm.get_tokenizer(), count, max_prompt_len)
        pipe.send(memory())
        done, stopped = 0, time.perf_counter()
        while (turn := pipe.recv()) is not None:
            watch.stood_still(time.perf_counter() - stopped)
            asked = prompts[done : done + turn.num_requests]
            *_, run = closed_loop(
                llm, watch, asked, turn.max_tokens, turn.concurrency, turn.num_requests
            )
            assert run is not None
            done += turn.num_requests
            tokens = sum(served.num_tokens for served in run.served)
            record = {
                "requests": done,
                "concurrency": turn.concurrency,
                "tokens_per_second": round(tokens / run.seconds, 1),
                "tokens": tokens,
                "drafts": int(run.sums["drafts"]),
                "drafted": int(run.sums["drafted"]),
                "accepted": int(run.sums["accepted"]),
                "unanswered": sum(not served.num_tokens for served in run.served),
                **memory(),
            }
            pipe.send((record, [served.token_ids for served in run.served]))
            stopped = time.perf_counter()


def soak(
    num_requests: int,
    settings: dict[str, Any],
    methods: list[str],
    *,
    concurrencies: Sequence[int] = CONCURRENCIES,
    max_prompt_len: int = MAX_PROMPT_LEN,
    num_tokens: float = math.inf,
) -> Iterator[dict[str, Any]]:
    """After every turn the records of each method, and whether the answers were the same.

    Args:
        max_prompt_len: see `mixed_prompts`.
        num_tokens: no turn begins after the engines have generated as many together.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    records: dict[str, list[dict[str, Any]]] = {}
    for name in methods:
        pipes[name], theirs = context.Pipe()
        job = (theirs, METHODS[name], settings, num_requests, max_prompt_len)
        processes.append(context.Process(target=serve, args=job, daemon=True))
        processes[-1].start()
        theirs.close()
        records[name] = [{"requests": 0, **pipes[name].recv()}]
    num_different = generated = 0
    for turn in turns(num_requests, concurrencies):
        answers = []
        for name, pipe in pipes.items():
            pipe.send(turn)
            record, answered = pipe.recv()
            records[name].append(record)
            answers.append(answered)
            generated += record["tokens"]
            print(name, record, flush=True)
        num_different += sum(len(set(map(tuple, each))) > 1 for each in zip(*answers, strict=True))
        yield {
            "generated_tokens": generated,
            "different_answers": num_different,
            "summary": {name: summarize(found) for name, found in records.items()},
            "records": records,
        }
        if generated >= num_tokens:
            break
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join(60)


def drafting(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Accepted tokens of a draft and of those drafted, and the drafting share by concurrency.

    Each sequence of a step emits one token and what was accepted, so `tokens - accepted` are the
    sequence steps.
    """

    def total(key: str, some: list[dict[str, Any]]) -> int:
        return sum(r.get(key, 0) for r in some)

    by_load: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        by_load.setdefault(record["concurrency"], []).append(record)
    drafts, drafted, accepted = (total(k, records) for k in ("drafts", "drafted", "accepted"))
    return {
        "acceptance_length": round(1 + accepted / drafts, 3) if drafts else None,
        "accepted_of_drafted": round(accepted / drafted, 4) if drafted else None,
        "share_of_steps_with_drafts": {
            str(load): round(
                total("drafts", some) / (total("tokens", some) - total("accepted", some)), 4
            )
            for load, some in sorted(by_load.items())
        },
    }


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """At the start, after half of the requests and at the end, and the drift between the latter."""
    turn = next(i for i, r in enumerate(records) if r["requests"] >= records[-1]["requests"] / 2)
    half = records[turn]
    found: dict[str, Any] = {}
    for name in ("rss_mib", "heap_in_use_mib", "heap_free_mib"):
        start, middle, end = (r[name] for r in (records[0], half, records[-1]))
        found[name] = {
            "start": start,
            "half": middle,
            "end": end,
            "drift": round(end - middle, 1),
        }
    return {
        **found,
        "first_half": drafting(records[1 : turn + 1]),
        "second_half": drafting(records[turn + 1 :]),
        "tokens": sum(r.get("tokens", 0) for r in records),
        "drafted": sum(r.get("drafted", 0) for r in records),
        "accepted": sum(r.get("accepted", 0) for r in records),
        "unanswered": sum(r.get("unanswered", 0) for r in records),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--tokens", type=int, help="end after as many, of both engines together")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--concurrencies", type=positive, nargs="+", default=CONCURRENCIES)
    parser.add_argument("--max-prompt-len", type=int, default=MAX_PROMPT_LEN)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    settings = {
        "dtype": args.dtype,
        "enforce_eager": True,
        "max_num_seqs": max(args.concurrencies),
        "kv_cache_memory_bytes": 2**29,
    }
    facts = provenance(
        models=SHIPPED_PAIR,
        requests=args.requests,
        concurrencies=args.concurrencies,
        max_tokens=MAX_TOKENS,
        max_prompt_len=args.max_prompt_len,
        **settings,
    )
    print(json.dumps(facts), flush=True)
    texts = {"concurrencies": args.concurrencies, "max_prompt_len": args.max_prompt_len}
    num_tokens = args.tokens or math.inf
    for found in soak(args.requests, settings, args.methods, num_tokens=num_tokens, **texts):
        if args.json:
            args.json.write_text(json.dumps({"provenance": facts, **found}, indent=1) + "\n")
    print(json.dumps({key: x for key, x in found.items() if key != "records"}, indent=1))


if __name__ == "__main__":
    for name, value in ENGINE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    main()
