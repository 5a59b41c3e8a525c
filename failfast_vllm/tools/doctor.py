"""`failfast doctor`: whether failfast can run here, and what to do if not."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
from typing import Any, NamedTuple

from failfast_vllm.config import FailFastConfig
from failfast_vllm.drafters.families import FAMILIES
from failfast_vllm.tools.offline import engine_environment
from failfast_vllm.tools.shipped import REINSTALL, contents
from failfast_vllm.tools.version import FROM_VLLM, installed

PLUGIN_GROUP = "vllm.general_plugins"
INSTALL_FAILFAST = "Run `pip install .` in a checkout."
INSTALL_VLLM = "Install a version of 'vllm>=0.32,<0.34'."


class Check(NamedTuple):
    """One line of `failfast doctor`."""

    name: str
    found: str
    problem: str = ""
    remedy: str = ""


def run(args: argparse.Namespace) -> int:
    """Print what was found; returns 1 if something is wrong."""
    with engine_environment():
        checks = [
            *_version_checks(),
            *_engine_checks(),
            _plugin_check(),
            *_hook_checks(),
            Check("drafters", _drafters()),
            *(Check(name, str(path), bad, REINSTALL * bool(bad)) for name, path, bad in contents()),
        ]
    healthy = not any(check.problem for check in checks)
    config = FailFastConfig.from_user({}).to_dict()
    if args.json:
        report = {
            "ok": healthy,
            "checks": [{"ok": not check.problem, **check._asdict()} for check in checks],
            "default_config": config,
        }
        print(json.dumps(report, indent=2))
    else:
        print(render(checks, config))
    return 0 if healthy else 1


def render(checks: list[Check], config: dict[str, Any]) -> str:
    """A line per check, its remedy below it; the default configuration last."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        verdict = "PROBLEM" if check.problem else "ok"
        what = check.problem or check.found
        lines.append(f"{verdict:<9}{check.name:<{width + 2}}{what}".rstrip())
        if check.remedy:
            lines.append(f"{'':<9}{'':<{width + 2}}-> {check.remedy}")
    settings = ", ".join(f"{key} {value}" for key, value in config.items())
    return "\n".join([*lines, f"{'':<9}{'default config':<{width + 2}}{settings}"])


def _version_checks() -> list[Check]:
    from failfast_vllm.integration.hooks import version_problem

    remedies = {
        "failfast-vllm": INSTALL_FAILFAST,
        "vllm": INSTALL_VLLM,
        **dict.fromkeys(FROM_VLLM, "It comes with vLLM: reinstall vLLM."),
    }
    checks = [Check("python", platform.python_version())]
    for name, remedy in remedies.items():
        found = installed(name)
        missing = () if found else ("not installed", remedy)
        checks.append(Check(name, found, *missing))
    with contextlib.suppress(ImportError):  # no vLLM at all: reported above
        if problem := version_problem():
            what, _, remedy = problem.partition("; ")
            checks.append(Check("vllm version", "", what, remedy))
    return checks


def _engine_checks() -> list[Check]:
    """The device, the model runner that vLLM will choose, and how drafts run on it."""
    try:
        from vllm.platforms import current_platform
        from vllm.triton_utils import HAS_TRITON
    except ImportError as error:
        return [Check("platform", "", f"cannot import vllm ({error})", INSTALL_VLLM)]
    device, forced = current_platform.device_type, os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "")
    checks = [Check("platform", f"CPU ({platform.machine()})")]
    if not device:
        problem = "vLLM knows no device here"
        checks = [Check("platform", "", problem, "Install vLLM for this device.")]
    elif device != "cpu":
        checks = [Check("platform", f"GPU ({device}, {current_platform.get_device_name()})")]
    if HAS_TRITON and forced != "0":
        graphs = "draft passes as CUDA graphs unless enforce_eager (unmeasured)"
        return [*checks, Check("model runner", f"V2, synchronous scheduling, {graphs}")]
    runner = Check("model runner", "V1, synchronous scheduling, eager draft passes")
    if not HAS_TRITON and forced not in ("", "0"):
        problem = f"VLLM_USE_V2_MODEL_RUNNER={forced} forbids V1, and vLLM finds no Triton for V2"
        remedy = "Unset it: without Triton vLLM has the V1 runner only."
        runner = runner._replace(problem=problem, remedy=remedy)
    return [*checks, runner]


def _plugin_check() -> Check:
    points = importlib.metadata.entry_points(group=PLUGIN_GROUP, name="failfast")
    allowed = os.environ.get("VLLM_PLUGINS")
    if not points:
        problem = f"no entry point 'failfast' in the group {PLUGIN_GROUP}"
        return Check("plugin", "", problem, INSTALL_FAILFAST)
    if allowed is not None and "failfast" not in allowed.split(","):
        problem = f"VLLM_PLUGINS={allowed!r} leaves failfast out"
        return Check("plugin", "", problem, "Add failfast to VLLM_PLUGINS, or unset it.")
    return Check("plugin", f"{PLUGIN_GROUP}: failfast = {next(iter(points)).value}")


def _drafters() -> str:
    """Which targets have a drafter; `failfast plan TARGET` says it of one."""
    known = (f"{f.drafter} for {' and '.join(f.targets)}" for f in FAMILIES if f.targets)
    return f"{', '.join(known)}; other targets: copies of each request's own text"


def _hook_checks() -> list[Check]:
    from failfast_vllm.integration import hooks

    checks = []
    for hook in hooks.all_hooks():
        problem = hooks.hook_problem(hook) or ""
        since = ".".join(map(str, hook.since))
        found = hook.module if hooks.is_due(hook) else f"not needed before vLLM {since}"
        checks.append(Check(f"hook {hook.path}", found, problem, INSTALL_VLLM * bool(problem)))
    return checks
