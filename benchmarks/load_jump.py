"""A load that jumps from 1 request to 64 and back: how soon drafting is what it should be.

Two engines on the shipped pair, without and with failfast, take turns on the same schedule of a
closed loop; when the load falls, the requests above it are aborted. A phase is cut into its first
two seconds and the rest; figures are tokens per second, medians over the repeats, and the ratio of
the two engines.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from itertools import count, cycle
from pathlib import Path
from typing import Any

from failfast_vllm.tools.offline import ENGINE_ENVIRONMENT, encode, engine, read_prompts
from failfast_vllm.tools.report import provenance
from failfast_vllm.tools.shipped import PROMPTS, SHIPPED_PAIR

PHASES = (1, 64, 1)  # requests in flight
SETTLING_SECONDS = 2.0
METHODS = {"none": None, "failfast": {"method": "failfast"}}


def play(llm: Any, prompts: Iterator[Any], seconds: float) -> list[tuple[float, float]]:
    """Tokens per second of each phase, before and after `SETTLING_SECONDS`."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=200)
    ids, found = count(), []
    lens: dict[str, int] = {}  # request in flight -> tokens so far
    for concurrency in PHASES:
        leaving = list(lens)[concurrency:]
        llm.llm_engine.abort_request(leaving)
        for request in leaving:
            del lens[request]
        began, tokens = time.perf_counter(), [0, 0]
        while (now := time.perf_counter() - began) < seconds:
            while len(lens) < concurrency:
                request = str(next(ids))
                llm.llm_engine.add_request(request, next(prompts), params)
                lens[request] = 0
            for output in llm.llm_engine.step():
                request = output.request_id.split("-")[0]
                if request not in lens:  # has left
                    continue
                num_tokens = len(output.outputs[0].token_ids)
                tokens[now > SETTLING_SECONDS] += num_tokens - lens.pop(request)
                if not output.finished:
                    lens[request] = num_tokens
        found.append((tokens[0] / SETTLING_SECONDS, tokens[1] / (seconds - SETTLING_SECONDS)))
    llm.llm_engine.abort_request(list(lens))
    llm.llm_engine.step()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each phase")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    settings = {"dtype": args.dtype, "enforce_eager": True, "max_num_seqs": max(PHASES)}
    runs: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in METHODS}
    with contextlib.ExitStack() as stack:
        engines = {
            name: stack.enter_context(engine(config, **settings, kv_cache_memory_bytes=2**29))
            for name, config in METHODS.items()
        }
        tokenizer = engines["none"].get_tokenizer()
        prompts = [encode(tokenizer, prompt) for prompt in read_prompts(PROMPTS)]
        for repeat in range(args.repeats + 1):  # the first warms up
            for name, llm in engines.items():
                found = play(llm, cycle(prompts), args.seconds)
                if repeat:
                    runs[name].append(found)
    rows = []
    for phase, concurrency in enumerate(PHASES):
        for part, label in enumerate((f"first {SETTLING_SECONDS:g} s", "afterwards")):
            speeds = {name: [run[phase][part] for run in runs[name]] for name in METHODS}
            ratios = [b / a for a, b in zip(speeds["none"], speeds["failfast"], strict=True)]
            rows.append(
                {
                    "concurrency": concurrency,
                    "part": label,
                    **{name: round(statistics.median(found), 1) for name, found in speeds.items()},
                    "speedup": round(statistics.median(ratios), 3),
                    "speedups": [round(ratio, 3) for ratio in ratios],
                }
            )
            print(rows[-1])
    if args.json:
        facts = provenance(
            models=SHIPPED_PAIR, dtype=args.dtype, seconds=args.seconds, repeats=args.repeats
        )
        args.json.write_text(json.dumps({"provenance": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    import os

    for name, value in ENGINE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    main()
