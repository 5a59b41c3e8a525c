"""Results of measurements: where they come from, tables in Markdown, and files."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import failfast_vllm
from failfast_vllm.tools.version import device, installed

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]  # titles, lines


def provenance(**settings: Any) -> dict[str, Any]:
    """Machine, versions and command of a measurement, around its own settings."""
    program = Path(sys.argv[0])  # a script as it was called, or an installed command
    called = ["python", sys.argv[0]] if program.suffix == ".py" else [program.name]
    # on a CPU the allocator decides what every operator takes
    preloaded = os.environ.get("LD_PRELOAD", "").replace(":", " ").split()
    return {
        "command": shlex.join([*called, *sys.argv[1:]]),
        "git": _git_sha(),
        "device": device(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "preloaded": " ".join(map(os.path.basename, preloaded)) or "none",
        **{name: installed(name) for name in ("vllm", "torch")},
        "failfast_vllm": failfast_vllm.__version__,
        **settings,
        "date": time.strftime("%Y-%m-%d"),
    }


def _git_sha() -> str:
    """Of the checkout that this package is in, or "none"."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "none"
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.check_output(command, text=True, cwd=root).strip()


def check_writable(path: Path) -> None:
    """Make the folder and the file; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.open("a").close()


def save(result: dict[str, Any], path: Path) -> None:
    """Write the results as JSON."""
    draft = path.with_name(path.name + ".tmp")  # a run killed here leaves the old file whole
    draft.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Results that `save` has written; raises ValueError or OSError."""
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        report(result)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise ValueError(f"{path} holds no results of `failfast bench`.") from None
    return result


def report(result: dict[str, Any]) -> str:
    """Markdown: provenance, speed-ups by concurrency, and all figures."""
    source = "\n".join(f"- {key}: {value}" for key, value in facts(result))
    tables = (speedups_table(result["rows"]), full_table(result["rows"]))
    return "\n\n".join((source, *(_markdown(*table) for table in tables)))


def facts(result: dict[str, Any]) -> list[list[str]]:
    """Name and value of all that is known about the measurement."""
    return [
        [key, value if isinstance(value, str) else json.dumps(value)]
        for key, value in result["provenance"].items()
    ]


def speedups_table(rows: list[Row]) -> Table:
    """A line per concurrency, a column per method; the first method in tokens per second."""
    found = {(row["concurrency"], row["method"]): row for row in rows}
    first, *others = dict.fromkeys(row["method"] for row in rows)
    lines = []
    for concurrency in dict.fromkeys(row["concurrency"] for row in rows):
        speed = found[concurrency, first]["tokens_per_second"]
        ratios = [_cell(found[concurrency, name]["speedup"], "{:.2f}x") for name in others]
        lines.append([str(concurrency), f"{speed:.0f}", *ratios])
    return ["concurrency", f"{first}, tokens/s", *others], lines


COLUMNS = {  # title -> key, format
    "concurrency": ("concurrency", "{}"),
    "method": ("method", "{}"),
    "tokens/s": ("tokens_per_second", "{:.0f}"),
    "speed-up": ("speedup", "{:.2f}x"),
    "tokens/s per request": ("tokens_per_second_per_request", "{:.1f}"),
    "acceptance length": ("acceptance_length", "{:.2f}"),
    "passes/round": ("passes_per_round", "{:.2f}"),
    "TTFT p50, ms": ("ttft_p50_ms", "{:.1f}"),
    "TTFT p99": ("ttft_p99_ms", "{:.1f}"),
    "TPOT p50, ms": ("tpot_p50_ms", "{:.2f}"),
    "TPOT p99": ("tpot_p99_ms", "{:.2f}"),
    "draft ms": ("draft_ms", "{:.2f}"),
    "of it ours": ("own_ms", "{:.2f}"),
    "verify ms": ("verify_ms", "{:.2f}"),
    "other ms": ("other_ms", "{:.2f}"),
    "equal answers": ("answers_equal_to_none", "{:.1%}"),
}


def full_table(rows: list[Row]) -> Table:
    """A line per concurrency and method; older results lack some figures."""
    lines = [[_cell(row.get(key), form) for key, form in COLUMNS.values()] for row in rows]
    return [*COLUMNS], lines


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def _markdown(titles: list[str], lines: list[list[str]]) -> str:
    parts = [titles, ["---"] * len(titles), *lines]
    return "\n".join("| " + " | ".join(part) + " |" for part in parts)
