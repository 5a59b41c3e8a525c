"""`failfast doctor`: whether failfast can run here, and what to do if not."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator
from typing import NamedTuple

from failfast_vllm.tools.offline import engine_environment
from failfast_vllm.tools.shipped import REINSTALL, contents
from failfast_vllm.tools.version import FROM_VLLM, device, installed

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
    """Print what was found, with a remedy below each problem; returns 1 if something is wrong."""
    with engine_environment():
        checks = [
            *_version_checks(),
            *_engine_checks(),
            _plugin_check(),
            *_hook_checks(),
            *(Check(name, str(path), bad, REINSTALL * bool(bad)) for name, path, bad in contents()),
        ]
    healthy = not any(check.problem for check in checks)
    if args.json:
        listed = [{"ok": not check.problem, **check._asdict()} for check in checks]
        print(json.dumps({"ok": healthy, "checks": listed}, indent=2))
        return 0 if healthy else 1
    width = max(len(check.name) for check in checks) + 2
    for check in checks:
        verdict = "PROBLEM" if check.problem else "ok"
        print(f"{verdict:<9}{check.name:<{width}}{check.problem or check.found}".rstrip())
        if check.remedy:
            print(f"{'':<{9 + width}}-> {check.remedy}")
    return 0 if healthy else 1


def _version_checks() -> Iterator[Check]:
    from failfast_vllm.integration.hooks import version_problem

    yield Check("python", platform.python_version())
    remedies = dict.fromkeys(FROM_VLLM, "It comes with vLLM: reinstall vLLM.")
    remedies |= {"failfast-vllm": INSTALL_FAILFAST, "vllm": INSTALL_VLLM}
    for name, remedy in remedies.items():
        found = installed(name)
        yield Check(name, found) if found else Check(name, "", "not installed", remedy)
    with contextlib.suppress(ImportError):  # no vLLM at all: reported above
        if problem := version_problem():
            what, _, remedy = problem.partition("; ")
            yield Check("vllm version", "", what, remedy)


def _engine_checks() -> Iterator[Check]:
    """The device that vLLM has found."""
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        yield Check("platform", "", f"cannot import vllm ({error})", INSTALL_VLLM)
        return
    if current_platform.device_type:
        yield Check("platform", f"{current_platform.device_type} ({device()})")
    else:
        problem = "vLLM knows no device here"
        yield Check("platform", "", problem, "Install vLLM for this device.")


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


def _hook_checks() -> Iterator[Check]:
    from failfast_vllm.integration import hooks

    for hook in hooks.all_hooks():
        problem = hooks.hook_problem(hook) or ""
        since = ".".join(map(str, hook.since))
        found = hook.module if hooks.is_due(hook) else f"not needed before vLLM {since}"
        yield Check(f"hook {hook.path}", found, problem, INSTALL_VLLM * bool(problem))
