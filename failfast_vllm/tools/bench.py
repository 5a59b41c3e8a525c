"""`failfast bench`: drafting methods side by side, by concurrency.

Every method has an engine in a process of its own, and one of them works at a time. Within each
repeat they take turns of a quarter second, so that all see the same machine; on a GPU the engines
run one after another instead, each with the whole memory. A figure is the median over the repeats
or the sum of their counts, a speed-up the median of the ratios within a repeat. The first round of
every point is a warm-up (a CPU compiles its matrix kernels per row count).
"""

import argparse
import contextlib
import importlib.util
import json
import os
import random
import sys
from collections import defaultdict
from collections.abc import Mapping
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

from failfast_vllm.config import MODELS_DIR, FailFastConfig, parse
from failfast_vllm.errors import echo
from failfast_vllm.policies.table import POLICIES
from failfast_vllm.tools import shipped
from failfast_vllm.tools.load_generator import EngineProcess, Run, Served, Sums
from failfast_vllm.tools.offline import Prompt, engine_environment, positive, read_prompts
from failfast_vllm.tools.report import Row, check_writable, provenance, read, report, save

BASELINE = "none"
DEFAULT_METHODS = ["ngram", "draft_model", "fixed:k=8", "failfast"]
SHORT_KEYS = {  # of the speculative config, in --methods
    "min": "prompt_lookup_min",
    "max": "prompt_lookup_max",
    "k": "num_speculative_tokens",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `failfast bench`."""
    add = parser.add_argument
    count: dict[str, Any] = {"type": positive, "metavar": "N"}
    text = (
        "what to compare, besides none: NAME or NAME:KEY=VALUE,... with keys of the speculative "
        "config (min, max and k are short for those of ngram); names: " + ", ".join(methods())
    )
    add("--methods", help=text, nargs="+")
    loads, text = [1, 2, 4, 8, 16, 32, 64], "requests in flight; default: 1 to 64"
    add("--concurrency", help=text, nargs="+", default=loads, **count)
    add("--repeats", help="counted rounds per point; default: 3", default=3, **count)
    add("--requests-per-point", help="default: 4 x concurrency, at least 32", **count)
    text = "JSON lines with messages or prompt, or of Spec-Bench, GSM8K or HumanEval as published"
    add("--prompts", help=f"{text}; default: held-out", nargs="+", metavar="FILE")
    text = "prompts in use, spread evenly over all lines; default: 64"
    add("--num-prompts", help=text, default=64, **count)
    add("--max-tokens", help="per answer; default: 200", default=200, **count)
    add("--target", help="checkpoint or hub id; default: the shipped one", metavar="MODEL")
    add("--drafter", help="of failfast; default: the target's own", metavar="MODEL")
    add("--dtype", help="default: float32 on CPUs, else auto")
    add("--max-model-len", help="default: 2048", default=2048, **count)
    add("--compile", help="compile the models, as vLLM does by default", action="store_true")
    add("--json", help="write the results here", type=Path, metavar="FILE")
    add("--html", help="write a page with plots (needs matplotlib)", type=Path, metavar="FILE")
    text = "show the results of an earlier --json, and measure nothing"
    add("--from", help=text, type=Path, metavar="FILE", dest="earlier")


def methods(drafter: str | None = None) -> dict[str, dict[str, Any] | None]:
    """Name -> speculative config."""
    ngram = {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4}
    model = str(MODELS_DIR / "ar-drafter")
    ours = {"method": "failfast", "load_aware": False, **({"model": drafter} if drafter else {})}
    policies = {name: {**ours, "policy": name} for name in POLICIES}
    policies["failfast"]["load_aware"] = True  # the default
    return {
        BASELINE: None,
        "ngram": {**ngram, "num_speculative_tokens": 5},
        "draft_model": {"method": "draft_model", "model": model, "num_speculative_tokens": 5},
        "suffix": {"method": "suffix"},
        **policies,
    }


def with_settings(name: str, known: Mapping[str, dict[str, Any] | None]) -> dict[str, Any] | None:
    """The config of a method, NAME or NAME:KEY=VALUE,...; raises ValueError."""
    base, _, settings = name.partition(":")
    if base not in known:
        raise ValueError(f"unknown method {echo(base)}; choose from {', '.join(known)}.")
    config = dict(known[base] or {})
    for setting in filter(None, settings.split(",")):
        key, _, text = setting.partition("=")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):  # a text
            value = text
        config[SHORT_KEYS.get(key, key)] = value
    if (given := parse(config)) is not None:  # of other methods vLLM checks the settings
        FailFastConfig.from_user(given)
    return config or None


def prepare(args: argparse.Namespace) -> list[Prompt]:
    """Check a command; its prompts. Raises ValueError or OSError in one line."""
    if not args.methods:  # the shipped draft_model suits the shipped target
        args.methods = [m for m in DEFAULT_METHODS if not (args.target and m == "draft_model")]
    for name in args.methods:
        with_settings(name, methods())
    prompts = [p for file in args.prompts or [shipped.PROMPTS] for p in read_prompts(Path(file))]
    num_prompts = min(args.num_prompts, len(prompts))
    prompts = [prompts[i * len(prompts) // num_prompts] for i in range(num_prompts)]
    random.Random(0).shuffle(prompts)  # a point that asks few meets all kinds, too
    if args.json:
        check_writable(args.json)
    return prompts


def make_row(
    method: str, concurrency: int, runs: list[Run], baselines: list[Run], tasks: list[str]
) -> Row:
    """One method at one concurrency; `baselines` are those of "none" in the same repeats.

    Request i of each run has task `tasks[i]`.
    """
    pairs, by_task = list[tuple[Served, Served]](), defaultdict[str, list[Any]](list)
    for run, base in zip(runs, baselines, strict=True):
        for task, *pair in zip(tasks, run.served, base.served, strict=True):
            pairs.append((pair[0], pair[1]))
            by_task[task].append(pairs[-1])
    ratios = [
        run.tokens_per_second / base.tokens_per_second
        for run, base in zip(runs, baselines, strict=True)
    ]
    return {
        "method": method,
        "concurrency": concurrency,
        **figures(pairs),
        "tokens_per_second": round(median(run.tokens_per_second for run in runs), 2),
        "speedup": round(median(ratios), 3),
        "speedups": [round(ratio, 3) for ratio in ratios],
        **_means(runs),
        "tasks": {task: figures(found) for task, found in by_task.items()},
    }


def figures(pairs: list[tuple[Served, Served]]) -> Row:
    """Of answered requests, each with its twin without drafts.

    The speed-up is that of a request's tokens per second; the tokens per step are those after an
    answer's first.
    """
    served, twins = zip(*pairs, strict=True)
    equal = [a.token_ids == b.token_ids for a, b in pairs]
    speed, base = (
        1e3 * sum(s.num_tokens for s in side) / sum(s.latency_ms for s in side)
        for side in (served, twins)
    )
    num_steps = sum(len(s.step_ms) - 1 for s in served)
    num_tokens = sum(s.num_tokens - 1 for s in served)
    after_first = [
        (s.latency_ms - s.ttft_ms) / (s.num_tokens - 1) for s in served if s.num_tokens > 1
    ]
    return {
        "requests": len(served),
        "tokens_per_second_per_request": round(speed, 2),
        "speedup": round(speed / base, 3),
        "tokens_per_step": round(num_tokens / num_steps, 3) if num_steps else None,
        "answers_equal_to_none": round(sum(equal) / len(equal), 4),
        **_percentiles("ttft", [s.ttft_ms for s in served]),
        **_percentiles("tpot", after_first),
        **_percentiles("latency", [s.latency_ms for s in served]),
    }


def _percentiles(name: str, values: list[float]) -> dict[str, float | None]:
    import numpy as np

    p50, p99 = np.percentile(values, [50, 99]).round(3).tolist() if values else (None, None)
    return {f"{name}_p50_ms": p50, f"{name}_p99_ms": p99}


def _means(runs: list[Run]) -> dict[str, float | None]:
    """Milliseconds per engine step, means per round, and counts."""
    sums = Sums(float)
    for name, value in (pair for run in runs for pair in run.sums.items()):
        sums[name] += value
    rounds = max(1, sums["drafts"])
    return {
        **{
            name: round(sums[name] / sums["steps"], 3) if name in sums else None
            for name in ("draft_ms", "own_ms", "verify_ms", "other_ms")
        },
        "acceptance_length": round(1 + sums["accepted"] / rounds, 3),
        "passes_per_round": round(sums["passes"] / rounds, 3),
        "drafts": int(sums["drafts"]),
        "drafted_tokens": int(sums["drafted"]),
        "accepted_tokens": int(sums["accepted"]),
        "copied_tokens": int(sums["copied"]),
        "copied_accepted_tokens": int(sums["copied_accepted"]),
    }


def run(args: argparse.Namespace) -> int:
    """Measure, or read what was measured, and print the tables."""
    if args.html:
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--html needs matplotlib. Run `pip install matplotlib`.")
        check_writable(args.html)
    if args.earlier:
        result = read(args.earlier)
    else:
        if not args.target:
            shipped.check_shipped(*shipped.SHIPPED)
            # 5 M parameters: waiting for a second thread costs more than it computes
            os.environ.setdefault("OMP_NUM_THREADS", "1")
        prompts = prepare(args)
        with engine_environment():
            result = measure(args, prompts)
    print(report(result))
    if args.html:
        from failfast_vllm.tools.page import page

        args.html.write_text(page(result), encoding="utf-8")
    return 0


def measure(args: argparse.Namespace, prompts: list[Prompt]) -> dict[str, Any]:
    """Measure, and write every point: {"provenance": ..., "rows": ...}."""
    from tqdm import tqdm  # type: ignore[import-untyped]
    from vllm.platforms import current_platform

    on_cpu = current_platform.device_type == "cpu"
    names, known = list(dict.fromkeys([BASELINE, *args.methods])), methods(args.drafter)
    settings = _engine_settings(args, on_cpu)
    rows = list[Row]()
    result = {"provenance": _facts(args, names, len(prompts), on_cpu), "rows": rows}
    runs: dict[int, dict[str, list[Run]]] = {c: {} for c in sorted(args.concurrency)}
    total = len(names) * (1 + len(runs) * (args.repeats + 1))
    with tqdm(total=total, unit="run", disable=None, file=sys.stderr) as bar:
        for group in [names] if on_cpu else [[name] for name in names]:
            with contextlib.ExitStack() as stack:
                started = dict[str, EngineProcess]()
                for name in group:
                    bar.set_description(f"starting {name}")
                    job = (with_settings(name, known), settings, prompts, args.max_tokens)
                    started[name] = EngineProcess(name, *job)
                    stack.callback(started[name].close)
                    bar.update()
                for concurrency, found in runs.items():
                    num_requests = args.requests_per_point or max(32, 4 * concurrency)
                    found |= measure_point(started, concurrency, args.repeats, num_requests, bar)
                    if len(found) < len(names):
                        continue
                    tasks = list(islice(cycle(p["task"] for p in prompts), num_requests))
                    for name, each in found.items():
                        rows.append(make_row(name, concurrency, each, found[BASELINE], tasks))
                    if args.json:
                        save(result, args.json)
    return result


def _engine_settings(args: argparse.Namespace, on_cpu: bool) -> dict[str, Any]:
    settings = {
        "dtype": args.dtype or ("float32" if on_cpu else "auto"),
        "enforce_eager": not args.compile,
        "max_model_len": args.max_model_len,
        "max_num_seqs": max(args.concurrency),
    }
    if args.target:
        return {"model": args.target, **settings}
    return {"kv_cache_memory_bytes": 2**29, **settings}  # 50,000 tokens: many engines fit in


def _facts(
    args: argparse.Namespace, names: list[str], num_prompts: int, on_cpu: bool
) -> dict[str, Any]:
    """The command has the rest."""
    prompts = " ".join(Path(file).name for file in args.prompts or []) or "held-out"
    return provenance(
        target=args.target or shipped.SHIPPED_PAIR,
        dtype=_engine_settings(args, on_cpu)["dtype"],
        methods=names,
        engines="in turns" if on_cpu else "one after another",
        prompts=f"{prompts}, {num_prompts} of them",
        repeats=args.repeats,
    )


def measure_point(
    started: dict[str, EngineProcess], concurrency: int, repeats: int, num_requests: int, bar: Any
) -> dict[str, list[Run]]:
    """The runs of each engine, which take turns; the first round is a warm-up."""
    runs: dict[str, list[Run]] = {name: [] for name in started}
    bar.set_description(f"concurrency {concurrency}")
    for _ in range(repeats + 1):
        going = {name: ask(concurrency, num_requests) for name, ask in started.items()}
        while going:
            for name, turns in list(going.items()):
                if run := next(turns):
                    runs[name].append(run)
                    del going[name]
                    bar.update()
    return {name: found[1:] for name, found in runs.items()}
