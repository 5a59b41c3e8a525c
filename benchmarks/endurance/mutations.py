"""Whether the tests notice faults: small ones, chosen by hand, one at a time (`mutations.toml`).

The tracked files are copied to a directory of their own. For each fault, a process there runs the
tests that should fail, on the code with the fault; afterwards it says which did. Each starts as a
copy of this process, which has imported the libraries and nothing of failfast. Results are written
after every fault, and a later run leaves those of other faults as they are. Faults of what only
runs with Triton are tried where TRITON_INTERPRET=1 is set.
"""

import argparse
import ast
import contextlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tomllib

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_suffix(".toml")
SECONDS = 300  # of one fault's tests; what takes longer hangs
# in a process of its own: this one must not import the package
FACTS = (
    "import json; from failfast_vllm.tools import report; print(json.dumps(report.provenance()))"
)
COMMAND = "python benchmarks/endurance/mutations.py --json FILE"  # in one run or in several
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


class Fault(NamedTuple):
    what: str
    path: str  # of the file, from the root
    old: str  # stands there once
    new: str
    tests: tuple[str, ...]  # files or pytest ids
    reason: str  # why it may survive; empty for all that tests must notice


def read_faults(path: Path = LIST) -> list[Fault]:
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    groups, reasons = tables.pop("groups"), tables.pop("survives", {})

    def ids(asked: str | list[str]) -> tuple[str, ...]:
        names = [asked] if isinstance(asked, str) else asked
        return tuple(test for name in names for test in groups.get(name, [name]))

    return [
        Fault(
            what,
            path,
            old,
            new,
            ids(tests[0] if tests else table["tests"]),
            reasons.get(what, ""),
        )
        for path, table in tables.items()
        for what, old, new, *tests in table["faults"]
    ]


def with_fault(fault: Fault, root: Path = ROOT) -> str:
    """The file's text; raises ValueError where the fault has not one place, or no effect."""
    text = (root / fault.path).read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.path}: {text.count(fault.old)} places of {fault.old!r}")
    changed = text.replace(fault.old, fault.new)
    if ast.dump(ast.parse(text)) == ast.dump(ast.parse(changed)):
        raise ValueError(f"{fault.path}: the code stays the same with {fault.new!r}")
    return changed


class Watch:
    """A pytest plugin: the first test that failed."""

    failed: str | None = None

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid

    pytest_collectreport = pytest_runtest_logreport


def run_tests(tree: Path, fault: Fault, tests: tuple[str, ...], pipe: Any) -> None:
    """In a process of its own: run tests on the package of `tree` until one fails."""
    import pytest

    os.setsid()
    os.chdir(tree)
    os.environ["PYTHONPATH"] = f"{tree}:{tree}/kernels"
    sys.path[:0] = [str(tree), str(tree / "kernels")]
    sys.dont_write_bytecode = True  # a cached file may be as old, and as long, as a changed one
    watch = Watch()
    with (tree / "log.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[watch]))
    name = fault.path.removeprefix("kernels/").removesuffix(".py").removesuffix("/__init__")
    module = sys.modules.get(name.replace("/", "."))
    pipe.send((code, watch.failed, module and module.__file__))
    pipe.close()
    os._exit(0)


def outcome(tree: Path, fault: Fault, tests: tuple[str, ...]) -> dict[str, Any]:
    """What the tests say, and how long it took."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run_tests, args=(tree, fault, tests, theirs))
    began = time.perf_counter()
    process.start()
    theirs.close()
    verdict = "hangs"
    failed = None
    if ours.poll(SECONDS):
        try:
            code, failed, imported = ours.recv()
        except EOFError:
            verdict = "caught"
            failed = "the process ended"
        else:
            # None: the fault is one that importing the file meets
            expected = {str(tree / fault.path), None if failed else ""}
            verdict = "caught" if failed else "survived"
            if imported not in expected or code not in (0, 1, 2):  # wrong tests
                verdict, failed = "error", f"pytest ended with {code}, with {imported}"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)  # what the tests have started, too
    process.join()
    return {"verdict": verdict, "test": failed, "seconds": round(time.perf_counter() - began, 1)}


def preload() -> None:
    """Import what most tests import; children share it."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import hypothesis
    import pytest
    import torch

    assert all((hypothesis, pytest, torch))
    if "TRITON_INTERPRET" not in os.environ:  # else the tests have to replace a backend first
        import vllm.entrypoints.llm
        import vllm.v1.worker.cpu_worker

        assert vllm
    assert not any(name.startswith("failfast") for name in sys.modules)


def table(records: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    counts = Counter(record["verdict"] for record in records)
    lines = [
        "# Faults that the tests notice",
        "",
        f"{len(records)} faults: {', '.join(f'{n} {name}' for name, n in counts.items())}. "
        "Made by `benchmarks/endurance/mutations.py`.",
        "",
        "| file | what goes wrong | verdict | first test that fails, or why none does | s |",
        "|---|---|---|---|---|",
    ]
    for record in records:
        test = f"`{record['test']}`" if record["test"] else record["reason"]
        file = record["path"].rpartition("/")[2]
        cells = file, record["what"], record["verdict"], test.replace("|", "\\|"), record["seconds"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def write(file: Path, facts: dict[str, Any], found: dict[str, dict[str, Any]]) -> None:
    records = [found[fault.what] for fault in read_faults() if fault.what in found]
    file.write_text(json.dumps({"provenance": facts, "faults": records}, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(records))


def copy_tree(tree: Path) -> None:
    """Copy what is tracked, and what is new."""
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listing.stdout.splitlines():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)


def try_faults(tree: Path, faults: list[Fault], seconds: float) -> Iterator[dict[str, Any]]:
    """Results of as many faults as can begin in time; tests must pass without the fault."""
    ends = time.perf_counter() + seconds
    sound: set[str] = set()
    for fault in faults:
        if time.perf_counter() > ends:
            return
        if wanted := tuple(test for test in fault.tests if test not in sound):
            plain = outcome(tree, fault, wanted)
            if plain["verdict"] != "survived":
                print("tests that fail without a fault:", plain, flush=True)
                continue
            sound |= set(wanted)
        text = (tree / fault.path).read_text(encoding="utf-8")
        (tree / fault.path).write_text(with_fault(fault, tree), encoding="utf-8")
        result = outcome(tree, fault, fault.tests)
        (tree / fault.path).write_text(text, encoding="utf-8")
        yield {"what": fault.what, "path": fault.path, **result, "reason": fault.reason}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose text or path contains this")
    parser.add_argument("--survivors", action="store_true", help="those that the last run missed")
    parser.add_argument("--new", action="store_true", help="those without a result")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no fault after these")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    told = subprocess.run(
        [sys.executable, "-c", FACTS], cwd=ROOT, check=True, capture_output=True, text=True
    )
    found = {}
    if args.json.exists():
        found = {r["what"]: r for r in json.loads(args.json.read_text())["faults"]}
    interpreted = "TRITON_INTERPRET" in os.environ  # chosen for a whole process
    faults = [
        fault
        for fault in read_faults()
        if args.only in fault.what + fault.path
        and ("tests/interpreted" in fault.tests[0]) == interpreted
        and not (args.new and fault.what in found)
        and not (args.survivors and found.get(fault.what, {}).get("verdict") != "survived")
    ]
    preload()
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory).resolve()
        copy_tree(tree)
        for record in try_faults(tree, faults, args.seconds):
            found[record["what"]] = record
            write(args.json, {**json.loads(told.stdout), "command": COMMAND}, found)
            print(*record.values(), sep=" | ", flush=True)


if __name__ == "__main__":
    main()
