"""The bodies of vLLM's functions that our hooks were written against, as digests by version.

A hook's probe compares parameters; what the function does with them may change.
`python tests/support/hook_bodies.py` stores the bodies of the vLLM that is installed, once the
tests pass on it.
"""

import ast
import hashlib
import inspect
import json
import textwrap
from pathlib import Path

from failfast_vllm.integration import hooks

STORE = Path(__file__).with_suffix(".json")


def digest_of(source):
    """16 hex digits of a function's code; layout, comments and docstrings do not count.

    The same on Python 3.10 to 3.13: fields that only some of them know are empty, and left out.
    """
    tree = ast.parse(textwrap.dedent(source))
    return hashlib.sha256(_spelt_out(tree).encode()).hexdigest()[:16]


def _spelt_out(node):
    if isinstance(node, list):
        return f"[{' '.join(_spelt_out(n) for n in node if not _is_idle(n))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.JoinedStr):  # Python 3.12.1 adds empty strings to format specs
        node.values = [v for v in node.values if getattr(v, "value", v) != ""]
    fields = [(key, value) for key, value in ast.iter_fields(node) if value not in (None, [])]
    return f"{type(node).__name__}({' '.join(f'{k}={_spelt_out(v)}' for k, v in fields)})"


def _is_idle(node):
    """A statement that is a mere string, as docstrings are."""
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def installed():
    """Digests by hook, of the vLLM that is installed."""
    due = filter(hooks.is_due, hooks.all_hooks())
    return {hook.name: digest_of(inspect.getsource(hooks.original_of(hook))) for hook in due}


def changed(bodies):
    """Which of `bodies` are none of those stored for versions with the installed major and minor.

    Patch releases are not told apart.
    """
    ours = hooks.minor(hooks.vllm_version())
    stored = json.loads(STORE.read_text(encoding="utf-8"))
    tested = [of for version, of in stored.items() if hooks.minor(version) == ours]
    return [name for name, digest in bodies.items() if digest not in {t.get(name) for t in tested}]


def store():
    """Add the installed version to the file, or replace it there."""
    stored = json.loads(STORE.read_text(encoding="utf-8"))
    stored[hooks.vllm_version().partition("+")[0]] = installed()
    STORE.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    store()
