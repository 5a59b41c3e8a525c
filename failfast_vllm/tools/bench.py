"""`failfast bench`: drafting methods side by side, by concurrency, in engines of its own.

A closed loop keeps `concurrency` requests in flight; each that ends is replaced at once. Every
method has an engine in a process of its own (vLLM's ngram imports numba, after which no
second engine starts in a process), and one of them works at a time. Within each repeat they take
turns of a quarter second, so that all see the same machine; a figure is the median over the repeats
or the sum of their counts, a speed-up the median of the ratios within a repeat. The first round of
every point is a warm-up (a CPU compiles its matrix kernels per row count) and is not counted.
Results are written after every point.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import failfast_vllm
from failfast_vllm.config import MODELS_DIR, POLICIES, FailFastConfig, check_local_drafter
from failfast_vllm.tools.load_generator import (
    EngineProcess,
    Prompt,
    Run,
    Tally,
    padded_ar_drafter,
)

PROMPTS = MODELS_DIR / "prompts.jsonl"
SHIPPED_PAIR = "the shipped small pair"  # failfast_vllm/small_pair/README.md
BASELINE = "none"
CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)
DEFAULT_METHODS = (BASELINE, "ngram", "draft_model", "fixed K8", "failfast")
CHANGING = ("command", "date")  # of the provenance, between a run and the one that resumes it

Row = dict[str, Any]
# (concurrency, number of requests) -> the run; None before it, where others take their turns
Contender = Callable[[int, int], Iterator[Run | None]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `failfast bench`."""

    def add(flag: str, text: str, **options: Any) -> None:
        parser.add_argument(flag, help=text, **options)

    add("--methods", "what to compare, besides none: " + ", ".join(methods()), nargs="+")
    many = {"type": int, "nargs": "+", "default": list(CONCURRENCY), "metavar": "N"}
    add("--concurrency", "requests in flight; default: 1 to 64", **many)
    add("--repeats", "counted rounds per point; default: 3", type=int, default=3, metavar="N")
    add("--requests-per-point", "default: 4 x concurrency, at least 32", type=int, metavar="N")
    add("--prompts", 'JSON lines with "messages" or "prompt"; default: held-out', metavar="FILE")
    add("--num-prompts", "prompts in use; default: 64", type=int, default=64, metavar="N")
    add("--max-tokens", "per answer; default: 200", type=int, default=200, metavar="N")
    add("--target", "checkpoint or hub id; default: the shipped one", metavar="MODEL")
    add("--drafter", "of failfast; default: the target's own", metavar="MODEL")
    add("--ar-drafter", "of draft_model; default: the shipped one", metavar="MODEL")
    add("--dtype", "default: float32 on CPUs, else auto")
    add("--max-model-len", "default: 2048", type=int, metavar="N")
    add("--compile", "compile the models, as vLLM does by default", action="store_true")
    add("--json", "write the results here, and a table to the same name with .md", metavar="FILE")
    add("--plots", "write PNGs into this folder (needs matplotlib)", metavar="DIR")
    add("--resume", "keep the points that --json FILE holds already", action="store_true")


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
        "failfast+reuse": {**failfast, "reuse_rejected": True},
        "failfast+path_search": {**failfast, "load_aware": True, "path_search": True},
        "survival+reuse": {**policies["survival"], "reuse_rejected": True},
        "tapout+thompson": {**policies["tapout"], "bandit": "thompson"},
    }


@dataclass(frozen=True)
class Job:
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
    chosen, left_out = _choose_methods(args)
    prompts = spread(read_prompts(Path(args.prompts or PROMPTS)), args.num_prompts)
    random.Random(0).shuffle(prompts)  # a point that asks few meets all kinds, too
    for model in filter(None, (args.target, args.drafter, args.ar_drafter)):
        looks_local = Path(model).exists() or model.startswith((".", "/", "~"))
        if looks_local and not (Path(model) / "config.json").is_file():
            raise ValueError(f"{model} has no config.json. Give a checkpoint or a hub id.")
    if args.drafter:
        check_local_drafter(args.drafter)
    if args.resume and not args.json:
        raise ValueError("--resume continues a file. Add --json FILE.")
    if args.json:
        check_writable(Path(args.json))
    if args.plots:
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plots needs matplotlib. Run `pip install matplotlib`.")
        Path(args.plots).mkdir(parents=True, exist_ok=True)
    return Job(args, chosen, left_out, prompts)


def _choose_methods(args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    known = methods()
    for name in args.methods or ():
        if name not in known:
            raise ValueError(f"unknown method {name!r}; choose from {', '.join(known)}.")
    chosen = list(dict.fromkeys([BASELINE, *(args.methods or DEFAULT_METHODS)]))
    left_out = {}
    if "suffix" in chosen and importlib.util.find_spec("arctic_inference") is None:
        left_out["suffix"] = "arctic_inference is not installed"
    if "draft_model" in chosen and args.target and not args.ar_drafter:
        left_out["draft_model"] = "no --ar-drafter for this target"
    return [name for name in chosen if name not in left_out], left_out


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file of JSON lines; raises ValueError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts of {path} ({error}).") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}).") from None
        entry = entry if isinstance(entry, dict) else {}
        if isinstance(entry.get("prompt"), str):
            prompts.append({"prompt": entry["prompt"]})
        elif _are_messages(entry.get("messages")):
            prompts.append({"messages": entry["messages"]})
        else:
            raise ValueError(
                f'{path}, line {number} must hold "messages" (a list of objects with "role" and '
                f'"content") or "prompt" (a text); got {line[:60]}'
            )
    if not prompts:
        raise ValueError(f"{path} holds no prompts.")
    return prompts


def _are_messages(found: Any) -> bool:
    return (
        isinstance(found, list)
        and bool(found)
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in found)
    )


def spread(prompts: list[Prompt], count: int) -> list[Prompt]:
    """`count` of them, evenly from the whole list."""
    return prompts[:: max(1, len(prompts) // count)][:count]


def check_writable(path: Path) -> None:
    """Make the folder and try the file; raises ValueError."""
    if path.suffix == ".md":
        raise ValueError(f"{path} is where the table goes. Choose another ending.")
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror}). Choose another file.") from None
    if not existed:
        path.unlink()


def make_row(method: str, concurrency: int, runs: list[Run], baselines: list[Run] | None) -> Row:
    """One method at one concurrency; `baselines` are those of "none" in the same repeats."""
    tally = Tally()
    for run in runs:
        tally.update(run.tally)
    served = [s for run in runs for s in run.served]
    ratios, equal = [], []
    for run, base in zip(runs, baselines or [], strict=bool(baselines)):
        ratios.append(run.tokens_per_second / base.tokens_per_second)
        equal += [a == b for a, b in zip(run.answers, base.answers, strict=True)]
    seconds_per_request = sum(s.latency_ms for s in served) / 1e3
    return {
        "method": method,
        "concurrency": concurrency,
        "tokens_per_second": round(statistics.median(run.tokens_per_second for run in runs), 2),
        "speedup": round(statistics.median(ratios), 3) if ratios else None,
        "speedups": [round(ratio, 3) for ratio in ratios],
        "tokens_per_second_per_request": round(
            sum(s.num_tokens for s in served) / seconds_per_request, 2
        ),
        "requests": len(served),
        **_percentiles("ttft", [s.ttft_ms for s in served]),
        **_percentiles("tpot", [s.tpot_ms for s in served if s.num_tokens > 1]),
        **_percentiles("latency", [s.latency_ms for s in served]),
        "answers_equal_to_none": round(sum(equal) / len(equal), 4) if equal else None,
        **tally.to_dict(),
        "trajectory": [
            {"accepted": len(r.accepted), "rejected": len(r.rejected), "bonus": len(r.bonus)}
            for r in runs[-1].trajectory
        ],
    }


def _percentiles(name: str, values: list[float]) -> dict[str, float | None]:
    import numpy as np

    p50, p99 = np.percentile(values, [50, 99]).round(3).tolist() if values else (None, None)
    return {f"{name}_p50_ms": p50, f"{name}_p99_ms": p99}


def provenance(**settings: Any) -> dict[str, Any]:
    """Machine, versions and command of a measurement, around its own settings."""
    program = Path(sys.argv[0])  # a script as it was called, or an installed command
    called = ["python", sys.argv[0]] if program.suffix == ".py" else [program.name]
    return {
        "command": shlex.join([*called, *sys.argv[1:]]),
        "git": _git_sha(),
        "device": _device(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "preloaded": " ".join(map(os.path.basename, _preloaded())) or "none",
        **{
            package.replace("-", "_"): importlib.metadata.version(package)
            for package in ("vllm", "torch")
        },
        "failfast_vllm": failfast_vllm.__version__,
        **settings,
        "date": time.strftime("%Y-%m-%d"),
    }


def _preloaded() -> list[str]:
    """Libraries; on a CPU the allocator decides what every operator takes."""
    return os.environ.get("LD_PRELOAD", "").replace(":", " ").split()


def _git_sha() -> str:
    """Of the checkout that this package is in, or "none"."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():
        return "none"

    def git(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *command], capture_output=True, text=True, cwd=root)

    # of the code alone: the results that are being written may be tracked as well
    is_clean = not git("diff", "--quiet", "HEAD", "--", "failfast_vllm", "kernels").returncode
    return git("describe", "--always").stdout.strip() + ("" if is_clean else "-dirty")


def _device() -> str:
    from vllm.platforms import current_platform

    if current_platform.device_type != "cpu":
        return str(current_platform.get_device_name())
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def run(job: Job) -> dict[str, Any]:
    """Measure what is missing and write it after every point: {"provenance": ..., "rows": ...}."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    args = job.args
    for name, reason in job.left_out.items():
        print(f"failfast bench: {name} is left out: {reason}.", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        chosen, settings = _offline_methods(job, stack)
        facts = provenance(
            **settings,
            prompts=f"{Path(args.prompts).name if args.prompts else 'held-out'}, "
            f"{len(job.prompts)} of them",
            max_tokens=args.max_tokens,
            requests_per_point=args.requests_per_point or "4 x concurrency, at least 32",
            repeats=args.repeats,
            left_out=job.left_out,
        )
        rows = earlier_rows(Path(args.json), facts) if args.resume else []
        missing = [
            c for c in dict.fromkeys(args.concurrency) if c not in {r["concurrency"] for r in rows}
        ]
        result = {"provenance": facts, "rows": rows}
        total = bool(missing) * len(chosen) + len(missing) * len(chosen) * (args.repeats + 1)
        bar = stack.enter_context(tqdm(total=total, unit="run", disable=None, file=sys.stderr))
        contenders: dict[str, Contender] = {}
        for name, make in chosen.items() if missing else ():
            bar.set_description(f"starting {name}")
            contenders[name] = make()
            bar.update()
        for concurrency in missing:
            num_requests = args.requests_per_point or max(32, 4 * concurrency)
            rows += measure_point(contenders, concurrency, args.repeats, num_requests, bar)
            rows.sort(key=lambda row: row["concurrency"])
            _save(result, args.json)
    _save(result, args.json)
    if args.plots:
        from failfast_vllm.tools import plots

        plots.draw(result, Path(args.plots))
    return result


def measure_point(
    contenders: dict[str, Contender],
    concurrency: int,
    repeats: int,
    num_requests: int,
    bar: Any,
) -> list[Row]:
    """One row per contender, which take turns; the first round is a warm-up."""
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    bar.set_description(f"concurrency {concurrency}")
    for repeat in range(repeats + 1):
        going = {name: ask(concurrency, num_requests) for name, ask in contenders.items()}
        while going:
            for name, turns in list(going.items()):
                run = next(turns)
                if run is None:
                    continue
                del going[name]
                if repeat:
                    runs[name].append(run)
                bar.update()
    return [make_row(name, concurrency, runs[name], runs.get(BASELINE)) for name in runs]


Makers = dict[str, Callable[[], Contender]]


def _offline_methods(job: Job, stack: contextlib.ExitStack) -> tuple[Makers, dict[str, Any]]:
    """Method -> a call that starts its engine; and the settings that they share."""
    from vllm.platforms import current_platform

    args, on_cpu = job.args, current_platform.device_type == "cpu"
    engine_args = {
        "model": args.target or str(MODELS_DIR / "target"),
        "dtype": args.dtype or ("float32" if on_cpu else "auto"),
        "enforce_eager": not args.compile,
        "max_model_len": args.max_model_len or 2048,
        "max_num_seqs": max(args.concurrency),
    }
    if not args.target:  # 50,000 tokens, so that many engines fit into one machine
        engine_args["kv_cache_memory_bytes"] = 2**29
    if not on_cpu:
        engine_args["gpu_memory_utilization"] = round(0.9 / len(job.methods), 3)
    ar_drafter = args.ar_drafter or ""
    if "draft_model" in job.methods and not ar_drafter:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        ar_drafter = str(padded_ar_drafter(Path(folder)))
    configs = methods(args.drafter, ar_drafter)

    started: list[EngineProcess] = []
    stack.callback(EngineProcess.close, started)

    def maker(name: str) -> Callable[[], EngineProcess]:
        def make() -> EngineProcess:
            settings = (configs[name], engine_args, job.prompts, args.max_tokens)
            started.append(EngineProcess(name, *settings))
            return started[-1]

        return make

    shown = methods(args.drafter, args.ar_drafter or "shipped")  # without a temporary folder
    settings = {
        "target": args.target or SHIPPED_PAIR,
        "drafter": args.drafter or ("the target's own" if args.target else SHIPPED_PAIR),
        "dtype": engine_args["dtype"],
        "compiled": args.compile,
        "max_model_len": engine_args["max_model_len"],
        "max_num_seqs": engine_args["max_num_seqs"],
        "methods": {name: shown[name] for name in job.methods},
    }
    return {name: maker(name) for name in job.methods}, settings


def earlier_rows(path: Path, facts: dict[str, Any]) -> list[Row]:
    """The rows of an earlier run; raises ValueError if it was not the same measurement."""
    if not path.exists():
        return []
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        before, rows = dict(earlier["provenance"]), list(earlier["rows"])
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{path} holds no results of `failfast bench`. Remove it.") from None
    for key in (before | facts).keys() - CHANGING:
        if before.get(key) != facts.get(key):
            raise ValueError(
                f"--resume: {path} was measured with {key} {before.get(key)!r}; "
                f"got {facts.get(key)!r}. Use the same settings or another file."
            )
    return rows


def _save(result: dict[str, Any], path: str | None) -> None:
    if not path:
        return
    for file, text in (
        (Path(path), json.dumps(result, indent=1)),
        (Path(path).with_suffix(".md"), report(result)),
    ):
        draft = file.with_name(file.name + ".tmp")  # a run killed here leaves the old file whole
        draft.write_text(text + "\n", encoding="utf-8")
        draft.replace(file)


def report(result: dict[str, Any]) -> str:
    """Markdown: provenance, speed-ups by concurrency, and all figures."""
    facts = [
        f"- {key}: {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in result["provenance"].items()
    ]
    tables = [speedups_table(result["rows"]), "", full_table(result["rows"])]
    return "\n".join([*facts, "", *tables])


def speedups_table(rows: list[Row]) -> str:
    """A line per concurrency, a column per method; the first method in tokens per second."""
    found = {(row["concurrency"], row["method"]): row for row in rows}
    first, *others = dict.fromkeys(row["method"] for row in rows)
    lines = []
    for concurrency in dict.fromkeys(row["concurrency"] for row in rows):
        speed = found[concurrency, first]["tokens_per_second"]
        ratios = [_cell(found[concurrency, name]["speedup"], "{:.2f}x") for name in others]
        lines.append([str(concurrency), f"{speed:.0f}", *ratios])
    return _markdown(["concurrency", f"{first}, tokens/s", *others], lines)


COLUMNS = (  # title, key, format
    ("concurrency", "concurrency", "{}"),
    ("method", "method", "{}"),
    ("tokens/s", "tokens_per_second", "{:.0f}"),
    ("speed-up", "speedup", "{:.2f}x"),
    ("tokens/s per request", "tokens_per_second_per_request", "{:.1f}"),
    ("acceptance length", "acceptance_length", "{:.2f}"),
    ("passes/round", "passes_per_round", "{:.2f}"),
    ("TTFT p50, ms", "ttft_p50_ms", "{:.1f}"),
    ("TTFT p99", "ttft_p99_ms", "{:.1f}"),
    ("TPOT p50, ms", "tpot_p50_ms", "{:.2f}"),
    ("TPOT p99", "tpot_p99_ms", "{:.2f}"),
    ("equal answers", "answers_equal_to_none", "{:.1%}"),
)


def full_table(rows: list[Row]) -> str:
    """A line per concurrency and method."""
    lines = [[_cell(row[key], form) for _, key, form in COLUMNS] for row in rows]
    return _markdown([title for title, _, _ in COLUMNS], lines)


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def _markdown(titles: list[str], lines: list[list[str]]) -> str:
    parts = [titles, ["---"] * len(titles), *lines]
    return "\n".join("| " + " | ".join(part) + " |" for part in parts)
