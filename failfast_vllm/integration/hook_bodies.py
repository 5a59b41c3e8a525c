"""The bodies of vLLM's functions that our hooks were written against, as digests by version.

A hook's probe compares parameters; what the function does with them may change. In a checkout

    python -m failfast_vllm.integration.hook_bodies

stores the bodies of the vLLM that is installed, once the tests pass on it.
"""

import ast
import contextlib
import hashlib
import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

from failfast_vllm.integration import hooks

STORE = Path(__file__).with_suffix(".json")
Bodies = dict[str, str]  # digests by hook


def digest_of(source: str) -> str:
    """16 hex digits of a function's code; layout, comments and docstrings do not count.

    The same on Python 3.10 to 3.13: fields that only some of them know are empty, and left out.
    """
    tree = ast.parse(textwrap.dedent(source))
    return hashlib.sha256(_spelt_out(tree).encode()).hexdigest()[:16]


def _spelt_out(node: Any) -> str:
    if isinstance(node, list):
        return f"[{' '.join(_spelt_out(n) for n in node if not _is_idle(n))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.JoinedStr):  # Python 3.12.1 adds empty strings to format specs
        node.values = [v for v in node.values if getattr(v, "value", v) != ""]
    fields = [(key, value) for key, value in ast.iter_fields(node) if value not in (None, [])]
    return f"{type(node).__name__}({' '.join(f'{k}={_spelt_out(v)}' for k, v in fields)})"


def _is_idle(node: Any) -> bool:
    """A statement that is a mere string, as docstrings are."""
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def installed() -> Bodies:
    """Of the vLLM that is installed, without the functions that it lacks or hides."""
    found = {}
    for hook in filter(hooks.is_due, hooks.all_hooks()):
        with contextlib.suppress(ImportError, AttributeError, OSError, TypeError):
            found[hook.name] = digest_of(inspect.getsource(hooks.original_of(hook)))
    return found


def known() -> dict[str, Bodies]:
    """What is stored of the versions that differ from the installed one in their last number."""
    ours = hooks.minor(hooks.vllm_version())
    return {version: of for version, of in _stored().items() if hooks.minor(version) == ours}


def _stored() -> dict[str, Bodies]:
    stored: dict[str, Bodies] = json.loads(STORE.read_text(encoding="utf-8"))
    return stored


def change(hook: hooks.Hook, bodies: Bodies) -> str:
    """How a hook's body in `installed()` differs from what we know, or an empty string."""
    tested = known()
    if not hooks.is_due(hook) or not tested:  # an unsupported version, which is said elsewhere
        return ""
    if bodies.get(hook.name) in {of_version.get(hook.name, "") for of_version in tested.values()}:
        return ""
    return f"its body is not that of vLLM {' or '.join(tested)}, which failfast was tested with"


def store() -> None:
    """Add the installed version to the file, or replace it there."""
    bodies = {**_stored(), hooks.vllm_version().partition("+")[0]: installed()}
    STORE.write_text(json.dumps(bodies, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    store()
