"""Run phases of the GPU kit. A phase is a few commands under a time limit; it leaves one JSON file.

    benchmarks/gpu/run.sh PHASE... [--seconds N] [--out DIR]

DIR/PHASE.json holds what each command found, with provenance, and is written after every command;
DIR/PHASE.log what they printed. A phase that fails says why, and the next one runs all the same.
Exit status: 0 all fine, 1 a phase failed, 2 wrong arguments.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
GPU = ROOT / "benchmarks" / "gpu"
BUILT = ROOT / ".gpu"  # git-ignored: what prepare.sh builds, and all that the phases leave
SITE = BUILT / "site"  # the carried vLLM, once unpacked
OURS = BUILT / "ours"  # this checkout's packages
SECONDS = {  # limit of each phase, without what starting a machine takes
    "unpack": 30,
    "probe": 40,
    "kernels": 170,
    "small": 160,
    "real": 220,
    "tune": 90,
    "bench": 70,
    "rounds": 80,
    "serve": 170,
    "text": 230,
}
MIN_SECONDS = 5  # below it nothing is started
LAST_LINES = 12  # of a command's output, in the JSON file
GRAPH_TESTS = "tests/drafters/test_cuda_graphs.py"
KERNEL_TESTS = "tests/interpreted/test_triton_kernels.py"


class Step(NamedTuple):
    """Commands that run side by side; `{json}` in them becomes a file whose content is kept."""

    name: str
    commands: list[list[str]]
    seconds: float
    env: dict[str, str] | None = None
    needs: str = ""  # a program; without it the step is left out


def steps_of(phase, seconds, tiny=False):
    """The steps of a phase that may take `seconds`."""
    python = sys.executable

    def ours(name, *args):
        return [python, str(ROOT / "benchmarks" / name), *args]

    def one(command, **options):
        return [Step(phase, [command], seconds, **options)]

    if phase == "unpack":
        return one(ours("gpu/unpack.py", str(BUILT), str(SITE)))
    if phase == "probe":
        return one(ours("gpu/probe.py", "--json", "{json}"))
    shrunken = ["--tiny"] if tiny else []
    if phase in ("rounds", "serve"):
        return one(ours(f"gpu/{phase}.py", "--json", "{json}", *shrunken))
    if phase in ("small", "real"):
        # the script ends itself, so that the engines that did run are reported
        args = ["--seconds", f"{max(1, seconds - 8):.0f}", "--json", "{json}"]
        return one(ours("gpu/engine.py", phase, *args, *shrunken))
    if phase == "text":
        files = sorted(map(str, (BUILT / "prompts").glob("*.jsonl")))
        args = ["--seconds", f"{max(1, seconds - 45):.0f}", "--carried", str(BUILT / "smollm2")]
        return one(ours("gpu/text.py", *args, "--json", "{json}", *shrunken, "--prompts", *files))
    if phase == "tune":
        args = ["--quick", "--write", "--seconds", f"{max(1, seconds - 15):.0f}"]
        return one(ours("tune_kernels.py", *args))
    if phase == "bench":
        draft = ours("bench_draft_pass.py", "--no-compile", "--json", "{json}")
        few = ["--batch-sizes", "1", "32", "--prefixes", "2048", "--rows", "10", "42"]
        few += ["--confidence-rows", "10", "320", "--rivals", "torch_sdpa"]  # nothing that compiles
        few += ["vllm_flash_attn", "vllm_unified_attention"]
        kernels = ours("bench_kernels.py", *few, "--json", "{json}")
        return [
            Step("a draft pass", [draft], seconds / 2),
            Step("each kernel", [kernels], seconds),
        ]
    assert phase == "kernels"
    pytest = [python, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    # Nearly every drawn shape compiles a kernel, about a second each: many processes, few shapes.
    workers = min(15, max(1, (os.cpu_count() or 1) - 1))
    drawn = [
        [*pytest, KERNEL_TESTS, "-k", "drawn", f"--hypothesis-seed={i}"] for i in range(workers)
    ]
    regimes = [*pytest, KERNEL_TESTS, "-k", "not drawn"]
    compiled = {"TRITON_INTERPRET": "0", "FAILFAST_TEST_SHAPES": "0.12"}
    # each tensor its own allocation, so that memcheck sees where it ends
    exact = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    launches = ours("gpu/every_kernel.py")
    return [
        Step("a captured graph", [[*pytest, GRAPH_TESTS, "-k", "cuda"]], 30),
        # `launches` here so that the sanitizers find its kernels compiled
        Step("regimes and drawn shapes", [regimes, launches, *drawn], seconds * 0.65, compiled),
        *(
            Step(
                tool,
                [
                    [
                        "compute-sanitizer",
                        *("--tool", tool, "--error-exitcode", "9", "--print-limit", "5"),
                        *launches,
                    ]
                ],
                60,
                exact,
                needs="compute-sanitizer",
            )
            for tool in ("memcheck", "racecheck")
        ),
    ]


def environment():
    """Of every command: this checkout's packages, the carried vLLM if unpacked, own caches."""
    carried = str(SITE) if SITE.is_dir() else ""
    paths = [str(OURS), carried, str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONSAFEPATH": "1",  # nor the folder that a command runs in
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRITON_CACHE_DIR": str(BUILT / "cache" / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(BUILT / "cache" / "inductor"),
        "VLLM_CACHE_ROOT": str(BUILT / "cache" / "vllm"),
        **({"VLLM_USE_FLASHINFER_SAMPLER": "0"} if carried else {}),  # without FlashInfer
    }


def link_packages():
    """Make both packages and the plugin's entry point importable from a folder of their own.

    Not from the checkout's root: its folder `kernels` would pass for a package of that name.
    """
    OURS.mkdir(parents=True, exist_ok=True)
    for source in (ROOT / "failfast_vllm", ROOT / "kernels" / "failfast_kernels"):
        link = OURS / source.name
        target = os.path.relpath(source, OURS)
        if not (link.is_symlink() and os.readlink(link) == target):  # another run may be using it
            link.unlink(missing_ok=True)
            link.symlink_to(target, target_is_directory=True)
    # importlib.metadata takes the first distribution of a name: an installed one is not asked
    info = OURS / "failfast_vllm-0+checkout.dist-info"
    info.mkdir(exist_ok=True)
    lines = ["Metadata-Version: 2.1", "Name: failfast-vllm", "Version: 0+checkout", ""]
    (info / "METADATA").write_text("\n".join(lines), encoding="utf-8")
    entry = "[vllm.general_plugins]\nfailfast = failfast_vllm.plugin:register\n"
    (info / "entry_points.txt").write_text(entry, encoding="utf-8")


def run_step(step, left, log):
    """Run a step for at most `left` seconds; returns what becomes of it in the JSON file."""
    found = {"step": step.name, "ok": True}
    if step.needs and not shutil.which(step.needs):
        return found | {"left out": f"there is no {step.needs}"}
    limit = min(step.seconds, left)
    if limit < MIN_SECONDS:
        return found | {"ok": False, "why": "no time left"}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for i, command in enumerate(step.commands):
            paths = Path(folder) / f"{i}.out", Path(folder) / f"{i}.json"
            filled = [word.replace("{json}", str(paths[1])) for word in command]
            runs.append((command, start(filled, step.env, paths[0]), *paths))
        try:
            statuses = [wait(run[1], began + limit) for run in runs]
        finally:
            for run in runs:
                stop(run[1])
        found["seconds"] = round(time.monotonic() - began, 1)
        found["commands"] = []
        for status, (command, _, output_path, json_path) in zip(statuses, runs, strict=True):
            output = output_path.read_text(errors="replace")
            log.write(f"===== {shown(command)}\n{output}\n")
            log.flush()
            lines = [line.rstrip()[-400:] for line in output.splitlines() if line.strip()]
            why = "" if status == 0 else f"exit status {status}"
            if status is None:
                why = f"stopped after {limit:.0f} s"
            entry = {"command": shown(command), "ok": not why, "last": lines[-LAST_LINES:]}
            with contextlib.suppress(FileNotFoundError, ValueError):  # absent, or cut off
                entry["result"] = json.loads(json_path.read_text(encoding="utf-8"))
            if why:
                entry["why"] = " | ".join([why, *lines[-2:]])
                found = found | {"ok": False, "why": found.get("why") or entry["why"]}
            found["commands"].append(entry)
    return found


def shown(command):
    """A command without the paths of this machine."""
    words = ["python" if word == sys.executable else word for word in command]
    return shlex.join(words).replace(f"{ROOT}/", "")


def start(command, env, output):
    """Start a command in a session of its own, so that what it starts ends with it."""
    with output.open("w") as file:
        try:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment() | (env or {}),
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            file.write(f"{error}\n")
            return None


def wait(process, until):
    """The exit status, None if it did not end in time."""
    if process is None:
        return 127
    try:
        return process.wait(max(0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def stop(process):
    if process is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask_provenance(command):
    """Of a process of its own: whoever asks torch for the card holds memory on it."""
    code = "import cuda_timing, json, sys; print(json.dumps(cuda_timing.provenance(sys.argv[1])))"
    result = subprocess.run(
        [sys.executable, "-c", code, command], env=environment(), capture_output=True, text=True
    )
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1:] or [f"exit status {result.returncode}"]
        return {"command": command, "problem": last[0]}
    return json.loads(result.stdout.splitlines()[-1])


def run_phase(phase, seconds, out, command, tiny=False):
    """Run one phase into `out`; returns whether all of it went well."""
    until = time.monotonic() + seconds
    report = {"phase": phase, "ok": False, "limit_s": seconds, "provenance": {}, "steps": []}
    path = out / f"{phase}.json"

    def save():
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    say(phase, f"at most {seconds:.0f} s, into {path}")
    report["provenance"] = facts = ask_provenance(command)
    if phase != "unpack" and not tiny and not facts.get("device"):
        report["why"] = facts.get("problem") or "torch sees no CUDA device; nothing was run"
    save()
    if "why" not in report:
        with (out / f"{phase}.log").open("w", encoding="utf-8") as log:
            for step in steps_of(phase, seconds, tiny):
                found = run_step(step, until - time.monotonic(), log)
                report["steps"].append(found)
                save()
                verdict = "fine" if found["ok"] else "FAILED"
                say(phase, f"{step.name}: {found.get('left out') or verdict}")
        if phase == "tune":  # the copy that comes back where the checkout does not
            shutil.copy(ROOT / "kernels" / "failfast_kernels" / "launch_table.py", out)
        whys = [f"{s['step']}: {s['why']}" for s in report["steps"] if not s["ok"]]
        report["ok"] = not whys
        if whys:
            report["why"] = "; ".join(whys)
    save()
    say(phase, "fine" if report["ok"] else f"FAILED: {report['why']}")
    return report["ok"]


def say(phase, text):
    print(f"{time.strftime('%H:%M:%S')} {phase}: {text}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phases", nargs="+", choices=list(SECONDS), metavar="PHASE")
    parser.add_argument("--seconds", type=positive, help="of each phase; default: its own")
    parser.add_argument(
        "--out", type=Path, help="results; default: $OUT, else .gpu/results in the checkout"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="engines shrunken: the scripts themselves, on a CPU"
    )
    args = parser.parse_args(argv)
    out = (args.out or Path(os.environ.get("OUT") or BUILT / "results")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    link_packages()
    command = shlex.join(["benchmarks/gpu/run.sh", *(sys.argv[1:] if argv is None else argv)])
    failed = [
        phase
        for phase in args.phases
        if not run_phase(phase, args.seconds or SECONDS[phase], out, command, args.tiny)
    ]
    return 1 if failed else 0


def positive(text):
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number; got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
