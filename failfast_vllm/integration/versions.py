"""Which versions of vLLM the hooks were written for."""

import importlib.metadata
import re

SUPPORTED_VLLM = ((0, 32), (0, 33))
INSTALL = "install a version of 'vllm>=0.32,<0.34'."


def vllm_version() -> str:
    """Of the vLLM that is installed."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        import vllm

        version: str = vllm.__version__
        return version


def minor(version: str) -> tuple[int, int] | None:
    """`0.33.0+cpu` -> (0, 33); None where there are no such numbers."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else None


def version_problem() -> str | None:
    """Why this vLLM version is not supported, or None."""
    version = vllm_version()
    if minor(version) in SUPPORTED_VLLM:
        return None
    return f"vLLM {version} is not supported; {INSTALL}"
