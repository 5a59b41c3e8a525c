"""Hooks: functions of vLLM that failfast wraps, stage by stage.

A hook is a body registered with `@hook`. Its signature is the probe: the parameters after
`original` must be the first ones of vLLM's function, and are all that the body gets. Its docstring
says why the hook exists and, after "Goes when:", what makes it superfluous. `original()` is the
call as it was made (`original.func` is vLLM's function): bodies make it unless failfast was asked
for. A function that changes between versions has one body per version, told apart by `since`.

Modules with bodies import vLLM and torch in functions only, so that all hooks can be listed
anywhere; they are imported when their stage is installed or listed.
"""

import functools
import importlib
import importlib.metadata
import inspect
import logging
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from failfast_vllm.config import METHOD

SUPPORTED_VLLM = ((0, 32), (0, 33))
OLDEST = SUPPORTED_VLLM[0]
INSTALL = "install a version of 'vllm>=0.32,<0.34'."

logger = logging.getLogger("vllm.failfast")  # vLLM's handlers and format

Body = Callable[..., Any]

# where the bodies of each stage are
STAGES = {
    "configuration": "configure",  # every process
    "requests": "requests",  # front ends
    "metrics": "engine_hooks",  # front ends and engines
    "engine": "engine_hooks",  # engines and workers
    "worker": "engine_hooks",
    "v1": "runner_hooks",  # workers with the V1 model runner
    "v2": "runner_hooks",
}


class Hook(NamedTuple):
    """A body, and the function of vLLM that it wraps."""

    module: str
    path: str  # "Owner.function", or "function"
    stage: str
    body: Body
    since: tuple[int, int] = OLDEST  # older versions do not need it

    @property
    def name(self) -> str:
        return f"{self.module}.{self.path}"

    @property
    def parameters(self) -> tuple[str, ...]:
        """The first parameters that vLLM's function must have."""
        return tuple(inspect.signature(self.body).parameters)[1:]


_registered: dict[str, list[Hook]] = {stage: [] for stage in STAGES}


def hook(stage: str, target: str, since: tuple[int, int] = OLDEST) -> Callable[[Body], Body]:
    """Register a body `(original, *parameters)` for "module:Owner.function" of vLLM."""
    module, _, path = target.partition(":")

    def register(body: Body) -> Body:
        _registered[stage].append(Hook(module, path, stage, body, since))
        return body

    return register


def asked_for(vllm_config: Any) -> bool:
    """Whether this engine was configured with failfast."""
    return METHOD in (vllm_config.additional_config or {})


def hooks_of(stage: str) -> tuple[Hook, ...]:
    """One hook per function: of several bodies the newest that this vLLM is new enough for."""
    importlib.import_module(f"{__package__}.{STAGES[stage]}")
    chosen: dict[str, Hook] = {}
    for found in _registered[stage]:
        if found.name not in chosen or is_due(found):
            chosen[found.name] = found
    return tuple(chosen.values())


def all_hooks() -> tuple[Hook, ...]:
    return tuple(found for stage in STAGES for found in hooks_of(stage))


def vllm_version() -> str:
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:  # a source tree
        import vllm

        return str(vllm.__version__)


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


def is_due(found: Hook) -> bool:
    """Whether this vLLM is new enough to need the hook."""
    version = minor(vllm_version())
    return version is None or version >= found.since


def original_of(found: Hook) -> Any:
    """vLLM's own function, also where we have wrapped it; ImportError, AttributeError: none."""
    owner, function = _place(found)
    return inspect.unwrap(getattr(owner, function))


def hook_problem(found: Hook) -> str | None:
    """Why one hook cannot be installed, or None."""
    if not is_due(found):
        return None
    try:
        original = original_of(found)
    except (ImportError, AttributeError):
        return f"vLLM has no {found.name}"
    expected = found.parameters
    theirs = tuple(inspect.signature(original).parameters)[: len(expected)]
    if theirs != expected:
        return f"{found.name} takes ({', '.join(theirs)}), not ({', '.join(expected)})"
    return None


def stage_problem(stage: str) -> str | None:
    """What of a stage's functions this vLLM lacks or has changed, or None."""
    problem = next(filter(None, map(hook_problem, hooks_of(stage))), None)
    return f"{problem}; {INSTALL}" if problem else None


def install(stage: str) -> None:
    """Wrap the functions of a stage, once per process; raises RuntimeError on a changed vLLM."""
    if problem := stage_problem(stage):
        raise RuntimeError(f"failfast cannot run: {problem}")
    for found in filter(is_due, hooks_of(stage)):
        wrap(found)


def wrap(found: Hook) -> None:
    """Replace vLLM's function by a hook's body, unless that has been done in this process."""
    owner, function = _place(found)
    original = getattr(owner, function)  # of a class method it is bound already
    if getattr(original, "_failfast", False):
        return
    names = found.parameters

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        named = {name: value for name, value in kwargs.items() if name in names}
        call = functools.partial(original, *args, **kwargs)
        return found.body(call, *args[: len(names)], **named)

    wrapper._failfast = True  # type: ignore[attr-defined]
    is_static = isinstance(inspect.getattr_static(owner, function), staticmethod | classmethod)
    setattr(owner, function, staticmethod(wrapper) if is_static else wrapper)


def _place(found: Hook) -> tuple[Any, str]:
    """(the module or class that has the function, its name)."""
    module = importlib.import_module(found.module)
    owner, _, function = found.path.rpartition(".")
    return (getattr(module, owner) if owner else module), function
