"""`failfast bench`: drafting methods side by side, by concurrency.

Every method has an engine in a process of its own, and one of them works at a time. Within each
repeat they take turns of a quarter second, so that all see the same machine; on a GPU, the engines
of a `--target` run one after another instead, each with the whole memory. A figure is the median
over the repeats or the sum of their counts, a speed-up the median of the ratios within a repeat.
The first round of every point is a warm-up (a CPU compiles its matrix kernels per row count).
"""

import argparse
import contextlib
import importlib.util
import json
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from failfast_vllm.config import MODELS_DIR, FailFastConfig, parse
from failfast_vllm.drafters.checks import check_local_drafter
from failfast_vllm.errors import echo
from failfast_vllm.policies.table import POLICIES
from failfast_vllm.tools import shipped
from failfast_vllm.tools.load_generator import EngineProcess, Run, Sums
from failfast_vllm.tools.offline import Prompt, engine_environment, read_prompts
from failfast_vllm.tools.report import Row, by_task, check_writable, provenance, read, report, save

BASELINE = "none"
DEFAULT_METHODS = ["ngram", "draft_model", "fixed K8", "failfast"]
ONE_AFTER_ANOTHER = (
    "failfast bench: each engine of --target gets the whole GPU, so the methods run one after "
    "another; speed-ups include whatever changed on the machine in between."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `failfast bench`."""

    def add(flag: str, text: str, **options: Any) -> None:
        parser.add_argument(flag, help=text, **options)

    text = (
        "what to compare, besides none: NAME or NAME:KEY=VALUE,... with keys of the speculative "
        "config (of ngram: min, max, k); names: " + ", ".join(methods())
    )
    add("--methods", text, nargs="+", default=DEFAULT_METHODS)
    many = {"type": int, "nargs": "+", "default": [1, 2, 4, 8, 16, 32, 64], "metavar": "N"}
    add("--concurrency", "requests in flight; default: 1 to 64", **many)
    add("--repeats", "counted rounds per point; default: 3", type=int, default=3, metavar="N")
    add("--requests-per-point", "default: 4 x concurrency, at least 32", type=int, metavar="N")
    text = (
        'JSON lines with "messages" or "prompt", or of Spec-Bench, GSM8K or HumanEval as published'
    )
    add("--prompts", f"{text}; default: held-out", nargs="+", metavar="FILE")
    text = "prompts in use, spread evenly over all lines; default: 64"
    add("--num-prompts", text, type=int, default=64, metavar="N")
    add("--max-tokens", "per answer; default: 200", type=int, default=200, metavar="N")
    add("--target", "checkpoint or hub id; default: the shipped one", metavar="MODEL")
    add("--drafter", "of failfast; default: the target's own", metavar="MODEL")
    add("--ar-drafter", "of draft_model; default: the shipped one", metavar="MODEL")
    add("--dtype", "default: float32 on CPUs, else auto")
    add("--max-model-len", "default: 2048", type=int, default=2048, metavar="N")
    add("--compile", "compile the models, as vLLM does by default", action="store_true")
    add("--json", "write the results here, and a table to the same name with .md", metavar="FILE")
    add("--html", "write a page with plots here (needs matplotlib)", metavar="FILE")
    text = "show the results of an earlier --json, and measure nothing"
    add("--from", text, metavar="FILE", dest="earlier")


def methods(drafter: str | None = None, ar_drafter: str = "") -> dict[str, dict[str, Any] | None]:
    """Name -> speculative config."""
    ngram = {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4}
    ours = {"method": "failfast", "load_aware": False, **({"model": drafter} if drafter else {})}
    policies = {name: {**ours, "policy": name} for name in POLICIES}
    failfast, fixed = policies["failfast"], policies["fixed"]
    return {
        BASELINE: None,
        "ngram": {**ngram, "num_speculative_tokens": 5},
        "draft_model": {"method": "draft_model", "model": ar_drafter, "num_speculative_tokens": 5},
        "suffix": {"method": "suffix"},
        **{f"fixed K{k}": {**fixed, "num_speculative_tokens": k} for k in (2, 4, 8, 16)},
        **policies,
        "goodput": {**policies["goodput"], "load_aware": True},  # the planner is all of it
        "failfast": {**failfast, "load_aware": FailFastConfig.from_user({}).load_aware},
        "failfast+load_aware": {**failfast, "load_aware": True},
        "failfast-load_aware": failfast,
        "failfast+copies": {**failfast, "load_aware": True, "copies": True},
        "tapout+thompson": {**policies["tapout"], "bandit": "thompson"},
    }


SHORT_KEYS = {  # of the speculative config, in --methods
    "min": "prompt_lookup_min",
    "max": "prompt_lookup_max",
    "k": "num_speculative_tokens",
}


def with_settings(name: str, known: Mapping[str, dict[str, Any] | None]) -> dict[str, Any] | None:
    """The config of a method, NAME or NAME:KEY=VALUE,...; raises ValueError."""
    base, colon, settings = name.partition(":")
    if base not in known:
        raise ValueError(f"unknown method {echo(base)}; choose from {', '.join(known)}.")
    config = dict(known[base] or {})
    is_ours = config.get("method") == "failfast"
    short_keys = [short for short, key in SHORT_KEYS.items() if key in config]
    for setting in settings.split(",") if colon else ():
        short, _, text = setting.partition("=")
        is_count = re.fullmatch("[1-9][0-9]{0,8}", text)
        if not is_ours and not (is_count and short in short_keys):
            takes = ", ".join(f"{each}=N" for each in short_keys) or "no settings"
            got = f"{echo(setting)} in {echo(name)}"
            raise ValueError(f"{base} takes {takes} with N from 1; got {got}.")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):  # a text
            value = text
        config[SHORT_KEYS.get(short, short)] = value
    if is_ours:
        given = parse(config)
        if given is None:
            must = f"the 'method' of {base} must stay 'failfast'"
            raise ValueError(f"{must}; got {echo(config['method'])}. Remove it.")
        FailFastConfig.from_user(given)
    return config or None


class Job(NamedTuple):
    """A checked command."""

    args: argparse.Namespace
    methods: list[str]  # "none" first
    left_out: dict[str, str]  # method -> why
    prompts: list[Prompt]


def prepare(args: argparse.Namespace) -> Job:
    """Check a command; raises ValueError or OSError in one line."""
    for name in ("concurrency", "repeats", "requests_per_point", "num_prompts", "max_tokens"):
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < 1:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be at least 1; got {value}.")
    known, left_out = methods(), dict[str, str]()
    for name in args.methods:
        method = (with_settings(name, known) or {}).get("method")
        if method == "suffix" and importlib.util.find_spec("arctic_inference") is None:
            left_out[name] = "arctic_inference is not installed"
        if method == "draft_model" and args.target and not args.ar_drafter:
            left_out[name] = "no --ar-drafter for this target"
    prompts = [p for file in args.prompts or [shipped.PROMPTS] for p in read_prompts(Path(file))]
    num_prompts = min(args.num_prompts, len(prompts))
    prompts = [prompts[i * len(prompts) // num_prompts] for i in range(num_prompts)]
    random.Random(0).shuffle(prompts)  # a point that asks few meets all kinds, too
    for model in filter(None, (args.target, args.drafter, args.ar_drafter)):
        looks_local = Path(model).exists() or model.startswith((".", "/", "~"))
        if looks_local and not (Path(model) / "config.json").is_file():
            raise ValueError(f"{model} has no config.json. Give a checkpoint or a hub id.")
    if args.drafter:
        check_local_drafter(args.drafter)
    if args.json:
        check_writable(Path(args.json))
    chosen = dict.fromkeys([BASELINE, *args.methods])
    return Job(args, [name for name in chosen if name not in left_out], left_out, prompts)


def make_row(method: str, concurrency: int, runs: list[Run], baselines: list[Run] | None) -> Row:
    """One method at one concurrency; `baselines` are those of "none" in the same repeats."""
    served = [s for run in runs for s in run.served]
    pairs = list(zip(runs, baselines, strict=True)) if baselines else []
    ratios = [run.tokens_per_second / base.tokens_per_second for run, base in pairs]
    equal = [
        a.token_ids == b.token_ids
        for run, base in pairs
        for a, b in zip(run.served, base.served, strict=True)
    ]
    rate = sum(s.num_tokens for s in served) / sum(s.latency_ms for s in served) * 1e3
    after_first = [
        (s.latency_ms - s.ttft_ms) / (s.num_tokens - 1) for s in served if s.num_tokens > 1
    ]
    return {
        "method": method,
        "concurrency": concurrency,
        "tokens_per_second": round(median(run.tokens_per_second for run in runs), 2),
        "speedup": round(median(ratios), 3) if ratios else None,
        "speedups": [round(ratio, 3) for ratio in ratios],
        "tokens_per_second_per_request": round(rate, 2),
        "requests": len(served),
        **_percentiles("ttft", [s.ttft_ms for s in served]),
        **_percentiles("tpot", after_first),
        **_percentiles("latency", [s.latency_ms for s in served]),
        "answers_equal_to_none": round(sum(equal) / len(equal), 4) if equal else None,
        **_means(runs),
        "trajectory": [
            {
                "accepted": len(r.accepted),
                "rejected": len(r.rejected),
                "bonus": len(r.bonus),
                "copied": r.num_copied,
            }
            for r in runs[-1].served[0].rounds
        ],
    }


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


def _percentiles(name: str, values: list[float]) -> dict[str, float | None]:
    import numpy as np

    p50, p99 = np.percentile(values, [50, 99]).round(3).tolist() if values else (None, None)
    return {f"{name}_p50_ms": p50, f"{name}_p99_ms": p99}


def run(args: argparse.Namespace) -> int:
    """Measure, or read what was measured, and print the tables."""
    if args.html:
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--html needs matplotlib. Run `pip install matplotlib`.")
        check_writable(Path(args.html))
    if args.earlier:
        result = read(Path(args.earlier))
    else:
        if not args.target:
            shipped.check_shipped(*shipped.SHIPPED)
            # 5 M parameters: waiting for a second thread costs more than it computes
            os.environ.setdefault("OMP_NUM_THREADS", "1")
        job = prepare(args)
        with engine_environment():
            result = measure(job)
    print(report(result))
    if args.html:
        from failfast_vllm.tools.page import page

        Path(args.html).write_text(page(result), encoding="utf-8")
    return 0


def measure(job: Job) -> dict[str, Any]:
    """Measure, and write every point: {"provenance": ..., "rows": ...}."""
    from tqdm import tqdm  # type: ignore[import-untyped]
    from vllm.platforms import current_platform

    args = job.args
    for name, reason in job.left_out.items():
        print(f"failfast bench: {name} is left out: {reason}.", file=sys.stderr)
    on_cpu = current_platform.device_type == "cpu"
    take_turns = on_cpu or not args.target
    if not take_turns:
        print(ONE_AFTER_ANOTHER, file=sys.stderr)
    engine_args = engine_settings(job, on_cpu, take_turns)
    rows = list[Row]()
    result = {"provenance": _facts(job, engine_args, take_turns), "rows": rows}
    runs: dict[int, dict[str, list[Run]]] = {c: {} for c in sorted(args.concurrency)}
    groups = [job.methods] if take_turns else [[name] for name in job.methods]
    total = len(job.methods) * (1 + len(runs) * (args.repeats + 1))
    with tqdm(total=total, unit="run", disable=None, file=sys.stderr) as bar:
        for group in groups:
            with engines(group, job, engine_args, bar) as started:
                for concurrency, found in runs.items():
                    num_requests = args.requests_per_point or max(32, 4 * concurrency)
                    found |= measure_point(started, concurrency, args.repeats, num_requests, bar)
                    if len(found) < len(job.methods):
                        continue
                    tasks = list(islice(cycle(p["task"] for p in job.prompts), num_requests))
                    for name, each in found.items():
                        row = make_row(name, concurrency, each, found[BASELINE])
                        rows.append({**row, "tasks": by_task(each, found[BASELINE], tasks)})
                    if args.json:
                        save(result, args.json)
    return result


def engine_settings(job: Job, on_cpu: bool, take_turns: bool) -> dict[str, Any]:
    """The arguments of every engine; those that take turns share a GPU's memory."""
    args = job.args
    settings = {
        "model": args.target or str(MODELS_DIR / "target"),
        "dtype": args.dtype or ("float32" if on_cpu else "auto"),
        "enforce_eager": not args.compile,
        "max_model_len": args.max_model_len,
        "max_num_seqs": max(args.concurrency),
    }
    if not args.target:  # 50,000 tokens, so that many engines fit into one machine
        settings["kv_cache_memory_bytes"] = 2**29
    if take_turns and not on_cpu:
        settings["gpu_memory_utilization"] = round(0.9 / len(job.methods), 3)
    return settings


def _facts(job: Job, engine_args: dict[str, Any], take_turns: bool) -> dict[str, Any]:
    args = job.args
    shown = methods(args.drafter, args.ar_drafter or "shipped")  # without a temporary folder
    prompts = " ".join(Path(file).name for file in args.prompts or []) or "held-out"
    return provenance(
        target=args.target or shipped.SHIPPED_PAIR,
        drafter=args.drafter or ("the target's own" if args.target else shipped.SHIPPED_PAIR),
        compiled=args.compile,
        **{name: engine_args[name] for name in ("dtype", "max_model_len", "max_num_seqs")},
        methods={name: with_settings(name, shown) for name in job.methods},
        engines="in turns" if take_turns else "one after another",
        prompts=f"{prompts}, {len(job.prompts)} of them",
        max_tokens=args.max_tokens,
        requests_per_point=args.requests_per_point or "4 x concurrency, at least 32",
        repeats=args.repeats,
        left_out=job.left_out,
    )


@contextlib.contextmanager
def engines(
    names: list[str], job: Job, engine_args: dict[str, Any], bar: Any
) -> Iterator[dict[str, EngineProcess]]:
    """Methods with an engine each, which end together."""
    args, started = job.args, dict[str, EngineProcess]()
    with contextlib.ExitStack() as stack:
        ar_drafter = args.ar_drafter or ""
        if not ar_drafter and any(name.startswith("draft_model") for name in names):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            ar_drafter = str(shipped.padded_ar_drafter(Path(folder)))
        stack.callback(EngineProcess.close, started.values())
        configs = methods(args.drafter, ar_drafter)
        for name in names:
            bar.set_description(f"starting {name}")
            settings = (with_settings(name, configs), engine_args, job.prompts, args.max_tokens)
            started[name] = EngineProcess(name, *settings)
            bar.update()
        yield started


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
