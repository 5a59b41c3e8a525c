"""Throughput by load on the shipped pair: nothing drafted, fixed lengths, and load-aware failfast.

A closed loop keeps `concurrency` requests in flight; each that ends is replaced. All engines live
in one process and take turns, point by point; a figure is the median over the repeats, a ratio the
median of the ratios within a repeat. The first round of every point is a warm-up (a CPU compiles
its matrix kernels per row count) and is not counted.

    python benchmarks/bench_load.py --json benchmarks/results/load_cpu_float32.json
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections import defaultdict
from itertools import cycle, islice
from pathlib import Path

from bench_offline import engine, held_out_prompts, provenance

CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
FIXED = (2, 4, 8, 16)


def methods():
    """Name -> speculative config, "none" first."""
    fixed = {"method": "failfast", "policy": "fixed"}
    return {
        "none": None,
        **{f"fixed K{k}": {**fixed, "num_speculative_tokens": k} for k in FIXED},
        "load-aware": {"method": "failfast", "load_aware": True},
    }


def closed_loop(llm, prompts, concurrency, num_requests, max_tokens):
    """Answer `num_requests` prompts, `concurrency` at a time: (tokens per second, answers)."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    waiting = enumerate(islice(cycle(prompts), num_requests))
    answers, in_flight = {}, 0
    began = time.perf_counter()
    while len(answers) < num_requests:
        for i, prompt in islice(waiting, concurrency - in_flight):
            llm.llm_engine.add_request(str(i), prompt, params)
            in_flight += 1
        for output in llm.llm_engine.step():
            if output.finished:
                answers[output.request_id] = list(output.outputs[0].token_ids)
                in_flight -= 1
    seconds = time.perf_counter() - began
    answers = [answers[key] for key in sorted(answers, key=lambda key: int(key.split("-")[0]))]
    return sum(map(len, answers)) / seconds, answers


def drafted(llm):
    """Draft passes so far."""
    core = llm.llm_engine.engine_core.engine_core
    drafter = getattr(core.model_executor.driver_worker.worker.model_runner, "drafter", None)
    return drafter.stats.num_forwards if drafter else 0


def measure(args, prompts):
    """One row per concurrency and method."""
    from tqdm import tqdm

    chosen = methods()
    runs, passes, equal = defaultdict(list), defaultdict(int), {}
    with contextlib.ExitStack() as stack:
        llms = {
            name: stack.enter_context(engine(config, args, max(args.concurrencies)))
            for name, config in chosen.items()
        }
        jobs = [(c, r) for c in args.concurrencies for r in range(args.repeats + 1)]
        for concurrency, repeat in tqdm(jobs, file=sys.stderr):
            num_requests = max(10, 3 * concurrency)
            for name, llm in llms.items():
                before = drafted(llm)
                speed, answers = closed_loop(
                    llm, prompts, concurrency, num_requests, args.max_tokens
                )
                if name == "none":
                    expected = answers
                equal[concurrency, name] = sum(map(list.__eq__, answers, expected)) / num_requests
                if repeat:
                    runs[concurrency, name].append(speed)
                    passes[concurrency, name] += drafted(llm) - before
    rows = []
    for (concurrency, name), speeds in runs.items():
        ratios = [a / b for a, b in zip(speeds, runs[concurrency, "none"], strict=True)]
        rows.append(
            {
                "method": name,
                "concurrency": concurrency,
                "tokens_per_second": round(statistics.median(speeds), 1),
                "speedup": round(statistics.median(ratios), 3),
                "speedups": [round(ratio, 3) for ratio in ratios],
                "draft_passes": passes[concurrency, name],
                "answers_equal_to_none": equal[concurrency, name],
            }
        )
    return rows


def table(rows):
    """Markdown: a line per concurrency, a column per method."""
    found = {(row["concurrency"], row["method"]): row for row in rows}
    names = list(dict.fromkeys(row["method"] for row in rows))
    lines = ["| concurrency | none, tokens/s | " + " | ".join(names[1:]) + " |"]
    lines.append("|" + "---|" * (len(names) + 1))
    for concurrency in dict.fromkeys(row["concurrency"] for row in rows):
        ratios = [f"{found[concurrency, name]['speedup']:.2f}x" for name in names[1:]]
        plain = f"{found[concurrency, 'none']['tokens_per_second']:.0f}"
        lines.append("| " + " | ".join([str(concurrency), plain, *ratios]) + " |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrencies", type=int, nargs="+", default=list(CONCURRENCIES))
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile, vLLM's default")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)

    facts = provenance(args)
    print("\n".join(f"{key}: {value}" for key, value in facts.items()), flush=True)
    rows = measure(args, held_out_prompts(args.num_prompts))
    print(table(rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"provenance": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
