"""The `failfast` command: what is shipped, whether it can run here, and what it is worth.

Nothing heavy is imported before a command needs it. Results go to stdout, all else to stderr.
Exit codes: 0 fine, 1 a check failed, 2 cannot run (bad arguments, missing models), 130 interrupted.
"""

import argparse
import contextlib
import ctypes
import errno
import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import failfast_vllm
from failfast_vllm.config import MODELS_DIR, FailFastConfig
from failfast_vllm.tools import bench

SHIPPED = ("target", "drafter", "ar-drafter")
SHIPPED_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
PROMPTS = "prompts.jsonl"
PLUGIN_GROUP = "vllm.general_plugins"
REINSTALL = "Reinstall failfast-vllm, or run `make models` in a checkout."
INSTALL_VLLM = "Install a version of 'vllm>=0.32,<0.34'."
RUN_TESTS = "Install a version that it was tested with, or run its tests on this one."
ENGINE_ENVIRONMENT = {  # one process, a small cache, no hub; what the user has set stays
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "HF_HUB_OFFLINE": "1",
}


class UsageError(Exception):
    """One line for the user: what, got what, do what."""


class Check(NamedTuple):
    """One line of `failfast doctor`."""

    name: str
    found: str
    problem: str = ""
    remedy: str = ""
    warning: str = ""  # worth knowing, and no reason to fail

    def to_dict(self) -> dict[str, Any]:
        return {"ok": not self.problem, **self._asdict()}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except UsageError as error:
        print(f"failfast {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"failfast {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough
        _drop_output()
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        reason = f"cannot write the output ({error.strerror})"
        print(f"failfast {args.command}: {reason}", file=sys.stderr)
        _drop_output()
        return 1
    return code


def _drop_output() -> None:
    """What is still buffered would raise again while the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="failfast", description="FailFast speculative decoding for vLLM."
    )
    parser.add_argument("--version", action="version", version=failfast_vllm.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.set_defaults(run=run)
        return command

    add("models", _models, "Print the paths of the shipped models.")
    add("doctor", _doctor, "Check that failfast can run here, and say what to do if not.")
    demo = add("demo", _demo, "Compare greedy decoding without and with failfast at batch size 1.")
    demo.add_argument("--num-prompts", type=_positive, default=6, metavar="N", help="default: 6")
    demo.add_argument(
        "--max-tokens", type=_positive, default=256, metavar="N", help="per answer; default: 256"
    )
    demo.add_argument("--target", type=Path, metavar="PATH", help="default: the shipped target")
    demo.add_argument("--drafter", type=Path, metavar="PATH", help="default: the target's own")
    text = "Compare drafting methods by concurrency."
    measure = commands.add_parser("bench", help=text, description=text)
    measure.set_defaults(run=_bench)
    bench.add_arguments(measure)
    plan = add("plan", _plan, "Count a pair's memory and model (not measure) what it gains.")
    plan.add_argument("target", metavar="TARGET", help="checkpoint directory, config.json or name")
    plan.add_argument("--drafter", metavar="PATH_OR_ID", help="default: the family's own")
    plan.add_argument(
        "--diffusion-block-size", type=_positive, metavar="N", help="as in the speculative config"
    )
    plan.add_argument("--gpu", default="H200", metavar="NAME", help="default: H200")
    plan.add_argument(
        "--concurrency", type=_positive, metavar="N", help="one batch size; default: 1 to 64"
    )
    plan.add_argument(
        "--context-length", type=_positive, default=1024, metavar="N", help="default: 1024"
    )
    plan.add_argument(
        "--tensor-parallel-size", type=_positive, default=1, metavar="N", help="default: 1"
    )
    plan.add_argument(
        "--acceptance-length",
        type=_at_least_one,
        metavar="X",
        help="tokens per round with the bonus; default: 6.6, as published",
    )
    plan.add_argument(
        "--passes-per-round",
        type=_at_least_one,
        metavar="X",
        help="draft passes; default: as many as drafts of 13.9 tokens need",
    )
    trace = add("trace", _trace, "Summarise rounds that a server has recorded, or record some.")
    trace.add_argument("file", metavar="FILE.jsonl", type=Path)
    trace.add_argument("--request", type=int, metavar="I", help="its rounds, one line each")
    trace.add_argument(
        "--record", action="store_true", help="answer held-out prompts into FILE.jsonl first"
    )
    trace.add_argument("--ids", action="store_true", help="record token ids, too")
    trace.add_argument("--num-prompts", type=_positive, default=6, metavar="N", help="default: 6")
    trace.add_argument(
        "--max-tokens", type=_positive, default=256, metavar="N", help="per answer; default: 256"
    )
    return parser


def _at_least_one(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 1; got {text!r}")
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer; got {text!r}")
    return int(text)


def shipped_problem(path: Path) -> str:
    """What a shipped model lacks, or an empty string."""
    missing = [name for name in SHIPPED_FILES if not (path / name).is_file()]
    if missing:
        return f"{path} has no {', '.join(missing)}"
    weights = path / "model.safetensors"
    data = weights.read_bytes()  # 8 bytes of header length, the header, the tensors
    header_len = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + header_len])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name[0] != "_"]
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{weights} is not a safetensors file"
    expected = 8 + header_len + max(ends, default=0)
    return "" if len(data) == expected else f"{weights} has {len(data)} bytes, not {expected}"


def _models(args: argparse.Namespace) -> int:
    paths = {name: str(MODELS_DIR / name) for name in SHIPPED}
    problems = [problem for path in paths.values() if (problem := shipped_problem(Path(path)))]
    if problems:
        raise UsageError(f"{'; '.join(problems)}. {REINSTALL}")
    if args.json:
        print(json.dumps(paths, indent=2))
    else:
        for name, path in paths.items():
            print(f"{name:<12}{path}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    with _engine_environment():
        checks = [
            *_version_checks(),
            _platform_check(),
            _runner_check(),
            _plugin_check(),
            *_hook_checks(),
            *_model_checks(),
        ]
    healthy = not any(check.problem for check in checks)
    config = FailFastConfig.from_user({}).to_dict()
    if args.json:
        report = {
            "ok": healthy,
            "checks": [check.to_dict() for check in checks],
            "default_config": config,
        }
        print(json.dumps(report, indent=2))
        return 0 if healthy else 1
    width = max(len(check.name) for check in checks)
    for check in checks:
        verdict = "PROBLEM" if check.problem else "warning" if check.warning else "ok"
        what = check.problem or check.warning or check.found
        print(f"{verdict:<9}{check.name:<{width + 2}}{what}".rstrip())
        if check.remedy:
            print(f"{'':<9}{'':<{width + 2}}-> {check.remedy}")
    settings = ", ".join(f"{key} {value}" for key, value in config.items())
    print(f"{'':<9}{'default config':<{width + 2}}{settings}")
    return 0 if healthy else 1


def _version_checks() -> list[Check]:
    remedies = {
        "failfast-vllm": "Run `pip install .` in a checkout.",
        "vllm": INSTALL_VLLM,
        "torch": "It comes with vLLM: reinstall vLLM.",
        "triton": "It comes with vLLM: reinstall vLLM.",
        "transformers": "It comes with vLLM: reinstall vLLM.",
    }
    checks = [Check("python", platform.python_version())]
    for name, remedy in remedies.items():
        try:
            checks.append(Check(name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(name, "", "not installed", remedy))
    from failfast_vllm.plugin import version_problem

    with contextlib.suppress(ImportError):  # no vLLM at all: reported above
        problem = version_problem()
        if problem:
            what, _, remedy = problem.partition("; ")
            checks.append(Check("vllm version", "", what, remedy))
    return checks


def _platform_check() -> Check:
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        return Check("platform", "", f"cannot import vllm ({error})", INSTALL_VLLM)
    device = current_platform.device_type
    if not device:
        return Check("platform", "", "vLLM knows no device here", "Install vLLM for this device.")
    if device == "cpu":
        return Check("platform", f"CPU ({platform.machine()})")
    return Check("platform", f"GPU ({device}, {current_platform.get_device_name()})")


def _runner_check() -> Check:
    """The model runner that vLLM will choose, and how drafts are scheduled and run on it."""
    from vllm.triton_utils import HAS_TRITON

    how = "synchronous scheduling, eager draft passes"
    forced = os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "")
    if HAS_TRITON and forced != "0":
        graphs = "draft passes as CUDA graphs unless enforce_eager (unmeasured)"
        return Check("model runner", f"V2, synchronous scheduling, {graphs}")
    if HAS_TRITON:
        return Check("model runner", f"V1, {how}")
    if forced not in ("", "0"):
        remedy = "Unset it: without Triton vLLM has the V1 runner only."
        problem = f"VLLM_USE_V2_MODEL_RUNNER={forced} forbids V1, and vLLM finds no Triton for V2"
        return Check("model runner", f"V1, {how}", problem, remedy)
    return Check("model runner", f"V1, {how}")


def _plugin_check() -> Check:
    points = importlib.metadata.entry_points(group=PLUGIN_GROUP, name="failfast")
    allowed = os.environ.get("VLLM_PLUGINS")
    if not points:
        problem = f"no entry point 'failfast' in the group {PLUGIN_GROUP}"
        return Check("plugin", "", problem, "Run `pip install .` in a checkout.")
    if allowed is not None and "failfast" not in allowed.split(","):
        problem = f"VLLM_PLUGINS={allowed!r} leaves failfast out"
        return Check("plugin", "", problem, "Add failfast to VLLM_PLUGINS, or unset it.")
    return Check("plugin", f"{PLUGIN_GROUP}: failfast = {next(iter(points)).value}")


def _hook_checks() -> list[Check]:
    from failfast_vllm import plugin
    from failfast_vllm.integration import hook_bodies

    checks, bodies = [], hook_bodies.installed()
    for hook in plugin.ALL_HOOKS:
        problem = plugin.hook_problem(hook) or ""
        warning = "" if problem else hook_bodies.change(hook, bodies)
        remedy = INSTALL_VLLM if problem else RUN_TESTS if warning else ""
        name = "hook " + ".".join(filter(None, (hook.owner, hook.function)))
        since = ".".join(map(str, hook.since))
        found = hook.module if plugin.is_due(hook) else f"not needed before vLLM {since}"
        checks.append(Check(name, found, problem, remedy, warning))
    return checks


def _model_checks() -> list[Check]:
    checks = []
    for name in SHIPPED:
        problem = shipped_problem(MODELS_DIR / name)
        checks.append(
            Check(f"model {name}", str(MODELS_DIR / name), problem, REINSTALL if problem else "")
        )
    prompts = MODELS_DIR / PROMPTS
    problem = "" if prompts.is_file() else f"{prompts} is missing"
    return [*checks, Check("prompts", str(prompts), problem, REINSTALL if problem else "")]


def _shipped_prompts(needed: list[str]) -> Path:
    """The held-out prompts, once the shipped models that are needed are known to be there."""
    prompts = MODELS_DIR / PROMPTS
    problems = [problem for name in needed if (problem := shipped_problem(MODELS_DIR / name))]
    if not prompts.is_file():
        problems.append(f"{prompts} is missing")
    if problems:
        raise UsageError(f"{'; '.join(problems)}. {REINSTALL}")
    return prompts


def _demo(args: argparse.Namespace) -> int:
    needed = [] if args.target else ["target"] if args.drafter else ["target", "drafter"]
    prompts = _shipped_prompts(needed)
    for path in filter(None, (args.target, args.drafter)):
        if not (path / "config.json").is_file():
            raise UsageError(f"{path} has no config.json. Give a checkpoint directory.")

    from failfast_vllm.tools import demo

    target, drafter = args.target or MODELS_DIR / "target", args.drafter
    if not args.target:  # 5 M parameters: waiting for a second thread costs more than it computes
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    with _engine_environment():
        try:
            chosen = demo.choose_prompts(prompts, args.num_prompts)
            result = demo.compare(str(target), drafter and str(drafter), chosen, args.max_tokens)
        except (ValueError, OSError) as error:  # of vLLM: a refused pair, an unreadable checkpoint
            raise UsageError(" ".join(str(error).split())) from error
    print(json.dumps(result.to_dict()) if args.json else demo.render(result, sys.stdout))
    return 0 if result.outputs_identical else 1


def _bench(args: argparse.Namespace) -> int:
    is_shipped = not args.target
    problems = [shipped_problem(MODELS_DIR / name) for name in SHIPPED if is_shipped]
    if any(problems):
        raise UsageError(f"{'; '.join(filter(None, problems))}. {REINSTALL}")
    if is_shipped:  # as for the demo
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        job = bench.prepare(args)
        with _engine_environment():
            result = bench.run(job)
    except (ValueError, OSError) as error:
        raise UsageError(" ".join(str(error).split()).removeprefix("failfast: ")) from error
    print(bench.report(result))
    return 0


def _plan(args: argparse.Namespace) -> int:
    from failfast_vllm.tools import sizing as plan

    try:
        result = plan.make_plan(
            args.target,
            args.drafter,
            diffusion_block_size=args.diffusion_block_size,
            gpu=args.gpu,
            concurrency=args.concurrency,
            context_len=args.context_length,
            tensor_parallel_size=args.tensor_parallel_size,
            acceptance_length=args.acceptance_length,
            passes_per_round=args.passes_per_round,
        )
    except ValueError as error:
        raise UsageError(str(error).removeprefix("failfast: ")) from error
    print(json.dumps(result.to_dict(), indent=2) if args.json else plan.render(result))
    return 0


def _trace(args: argparse.Namespace) -> int:
    from failfast_vllm.observe import trace

    if args.record:
        _record(args)
    try:
        found = trace.read(args.file)
        rounds = None if args.request is None else found.of_request(args.request)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if rounds is None:
        summary = trace.Summary(found)
        print(json.dumps(summary.to_dict(), indent=2) if args.json else trace.render(summary))
    elif args.json:
        print(json.dumps({"rounds": [r._asdict() for r in rounds]}))
    else:
        print(trace.trajectory(rounds))
    return 0


def _record(args: argparse.Namespace) -> None:
    from failfast_vllm.tools import demo

    prompts = _shipped_prompts(["target", "drafter"])
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as for the demo
    with _engine_environment():
        try:
            chosen = demo.choose_prompts(prompts, args.num_prompts)
            target = str(MODELS_DIR / "target")
            demo.record(target, None, chosen, args.max_tokens, args.file, args.ids)
        except (ValueError, OSError) as error:
            raise UsageError(" ".join(str(error).split()).removeprefix("failfast: ")) from error


@contextlib.contextmanager
def _engine_environment() -> Iterator[None]:
    """Defaults for an engine in this process; inside, all that writes to stdout gets stderr.

    Done to the file descriptor: vLLM's C++ libraries (gloo, oneDNN) print past `sys.stdout`.
    """
    for key, value in ENGINE_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        ctypes.CDLL(None).fflush(None)  # what C has buffered belongs to stderr too
        os.dup2(stdout, 1)
        os.close(stdout)
