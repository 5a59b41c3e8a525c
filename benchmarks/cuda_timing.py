"""What the GPU benchmarks share: the device, provenance, and medians of interleaved runs."""

import hashlib
import importlib.metadata
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
L2_MULTIPLE = 3  # inputs rotate through this many times the L2 cache, as the layers of a model do


def require_cuda():
    """Exit with one line where there is nothing to measure."""
    if not torch.cuda.is_available():
        sys.exit("this benchmark measures a CUDA device, and torch sees none; nothing was run")


def provenance(command=None):
    """What a figure depends on; without a GPU its entries are None."""
    from failfast_kernels import launch_table

    has_gpu = torch.cuda.is_available()
    return {
        "command": command or shlex.join(["python", *sys.argv]),
        "git": revision(),
        "sources": sources_digest(),
        "device": torch.cuda.get_device_name() if has_gpu else None,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "vllm": installed_version("vllm"),
        "python": platform.python_version(),
        "launch_table": launch_table.PROVENANCE,
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
    }


def output_of(*command):
    """What a program prints, None where it is missing or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip() or None


def driver_version():
    found = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found and found.splitlines()[0]


def installed_version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def revision():
    """Of the checkout; where it was copied without its history, of the one that it came from."""
    found = output_of("git", "describe", "--always", "--dirty", "--abbrev=12")
    noted = ROOT / ".gpu" / "revision"  # by benchmarks/gpu/prepare.sh
    if found is None and noted.exists():
        return noted.read_text(encoding="utf-8").strip() + " when prepared"
    return found


def sources_digest():
    """12 digits that change with any of our source files, also where there is no git."""
    digest = hashlib.sha256()
    for folder in ("failfast_vllm", "kernels", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def num_copies(num_bytes):
    """How many copies of an input of `num_bytes` overflow the L2 cache."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(64, -(-L2_MULTIPLE * l2 // num_bytes)))


def captured(call, copies):
    """A graph that calls `call(i)` once per copy, or None where it cannot be captured."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(copies):
            call(i)  # compiles, and fills caches that a capture may not touch
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for i in range(copies):
                call(i)
    except RuntimeError:
        torch.cuda.synchronize()
        print("  a candidate could not be captured: its launches are timed too")
        return None
    return graph


def interleaved_us(calls, copies, repeats=50, graphs=True):
    """{name: microseconds per call}: the median over `repeats`, in which all take turns.

    Args:
        calls: {name: callable of a copy's index}.
        graphs: capture each with one call per copy; those that cannot be captured, and all
            without `graphs`, are launched one by one.
    """
    replays = {name: captured(call, copies) if graphs else None for name, call in calls.items()}
    times = {name: [] for name in calls}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(repeats):
        for name, call in calls.items():
            begin.record()
            if replays[name] is None:
                for i in range(copies):
                    call(i)
            else:
                replays[name].replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3 / copies)
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bytes_per_second():
    """Measured: reading and writing 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    us = interleaved_us({"copy": lambda i: target.copy_(source)}, 1)["copy"]
    return 2 * source.numel() / us * 1e6


def matmul_flops_per_second():
    """Measured: a bfloat16 product of 8192 x 8192 matrices."""
    a, b = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device="cuda")
    us = interleaved_us({"matmul": lambda i: a @ b}, 1, repeats=20)["matmul"]
    return 2 * 8192**3 / us * 1e6


def table(rows):
    """Rows of one kind as a Markdown table."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        cells = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
