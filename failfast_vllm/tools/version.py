"""`failfast version`: what a report of a problem needs to say about this machine."""

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path

import failfast_vllm
from failfast_vllm.integration.hooks import vllm_version
from failfast_vllm.tools.offline import engine_environment

FROM_VLLM = ("torch", "triton", "transformers")  # they come with it


def run(args: argparse.Namespace) -> int:
    """Print the versions and the device, also where there is no vLLM."""
    with engine_environment():
        facts = {
            "failfast-vllm": failfast_vllm.__version__,
            **{name: installed(name) or "not installed" for name in ("vllm", *FROM_VLLM)},
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": device(),
        }
    lines = (f"{name:<15}{value}" for name, value in facts.items())
    print(json.dumps(facts, indent=2) if args.json else "\n".join(lines))
    return 0


def installed(name: str) -> str:
    """The version of a package, or an empty string."""
    try:
        return vllm_version() if name == "vllm" else importlib.metadata.version(name)
    except ImportError:
        return ""


def device() -> str:
    """The GPU's name, or the CPU's and its cores."""
    try:
        from vllm.platforms import current_platform
    except ImportError:
        return "not known without vLLM"
    if current_platform.device_type not in ("", "cpu"):
        return str(current_platform.get_device_name())
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
