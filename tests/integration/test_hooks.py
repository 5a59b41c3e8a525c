"""Hooks: what is probed, what is wrapped, and what is said about them."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

from failfast_vllm.integration import hooks
from failfast_vllm.integration.hooks import Hook
from hook_stages import replace_stage
from hook_table import table, why_and_until

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("hook", hooks.all_hooks(), ids=lambda h: f"{h.stage}-{h.path}")
def test_this_vllm_has_every_hook(hook):
    assert hooks.hook_problem(hook) is None


@pytest.mark.parametrize("hook", hooks.all_hooks(), ids=lambda h: f"{h.stage}-{h.path}")
def test_every_hook_says_why_and_until_when(hook):
    assert hook.parameters
    assert all(why_and_until(hook))


def test_the_hooks_in_the_documentation_are_these():
    """To renew it: `python tests/support/hook_table.py`."""
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert text[text.index("| function of vLLM |") :] == table()


def test_the_proposal_to_vllm_covers_every_hook():
    """Catches a hook that docs/upstream.md forgets or has under another name, and its counts."""
    page = (DOCS / "upstream.md").read_text(encoding="utf-8")
    listed = page[page.index("| function of vLLM |") :].partition("\n\n")[0].splitlines()[2:]
    hooked = table().splitlines()[2:]
    assert [row.split(" | ")[:2] for row in listed] == [row.split(" | ")[:2] for row in hooked]
    fates = [row.split(" | ")[2].split()[0].rstrip(":") for row in listed]
    assert set(fates) == {"goes", "stays"}
    assert f"{fates.count('goes')} of the {len(hooked)};" in page
    assert f"this one wraps {len(hooked)} of\nthem." in page


def test_hooks_are_listed_without_vllm():
    """Catches a body that imports a model runner, which `failfast doctor` may not have."""
    code = (
        "import sys; from failfast_vllm.integration import hooks; "
        "assert len(hooks.all_hooks()) == 30; "
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Runner:
    def same(self, tokens):
        return tokens

    def renamed(self, token_ids):
        pass

    def reordered(self, metadata, tokens):
        pass

    def shortened(self):
        pass

    def extended(self, tokens, extra=None):
        return tokens, extra

    @staticmethod
    def static(tokens):
        return tokens

    @classmethod
    def of_class(cls, tokens):
        return tokens


def body(original, self, tokens):
    """Doubles the tokens. Twice is enough.

    Goes when: they are doubled
    elsewhere.
    """
    return original.func(self, tokens * 2, **original.keywords)


def static_body(original, tokens):
    return original.func(tokens * 2)


@pytest.fixture
def hook(monkeypatch):
    """A hook on a module of our own."""
    module = types.ModuleType("vllm_of_tomorrow")
    module.Runner = type("Runner", (), dict(vars(Runner)))
    module.alone = lambda tokens: tokens
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return lambda function, body=body, since=(0, 32): Hook(
        module.__name__, function, "v1", body, since
    )


def test_hook_on_the_expected_signature(hook):
    """A parameter after ours is none of our business: we pass it on."""
    assert hooks.hook_problem(hook("Runner.same")) is None
    assert hooks.hook_problem(hook("Runner.extended")) is None


@pytest.mark.parametrize(
    ("function", "found"),
    [
        ("renamed", "takes (self, token_ids), not (self, tokens)"),
        ("reordered", "takes (self, metadata), not (self, tokens)"),
        ("shortened", "takes (self), not (self, tokens)"),
    ],
)
def test_hook_on_a_changed_signature(hook, function, found):
    """Catches arguments that would arrive under another name, with no error."""
    problem = hooks.hook_problem(hook(f"Runner.{function}"))
    assert problem == f"vllm_of_tomorrow.Runner.{function} {found}"


def test_hook_on_something_that_is_gone(hook, monkeypatch):
    gone = hook("Runner.gone")
    assert hooks.hook_problem(gone) == "vLLM has no vllm_of_tomorrow.Runner.gone"
    assert "vLLM has no" in hooks.hook_problem(hook("Walker.same"))
    elsewhere = hook("Runner.same")._replace(module="vllm.nowhere")
    assert hooks.hook_problem(elsewhere) == "vLLM has no vllm.nowhere.Runner.same"
    replace_stage(monkeypatch, "v1", hook("Runner.same"), gone)
    assert hooks.stage_problem("v1").startswith("vLLM has no vllm_of_tomorrow.Runner.gone; install")


def test_a_stage_with_a_problem_is_not_wrapped(hook, monkeypatch):
    """Catches half an installation."""
    replace_stage(monkeypatch, "v1", hook("Runner.same"), hook("Runner.renamed"))
    with pytest.raises(RuntimeError, match=r"failfast cannot run: vllm_of_tomorrow\.Runner"):
        hooks.install("v1")
    assert sys.modules["vllm_of_tomorrow"].Runner().same(3) == 3


def test_functions_are_wrapped_once(hook, monkeypatch):
    """Catches methods that lose their instance, and two bodies on top of each other."""
    wrapped = [
        hook("Runner.extended"),
        *(hook(path, static_body) for path in ("Runner.static", "Runner.of_class", "alone")),
    ]
    replace_stage(monkeypatch, "v1", *wrapped)
    module = sys.modules["vllm_of_tomorrow"]
    theirs = [hooks.original_of(h) for h in wrapped]
    for _ in range(2):
        hooks.install("v1")
        assert module.Runner().extended(3, extra=1) == (6, 1)
        assert module.Runner.static(3) == module.Runner().static(3) == 6
        assert module.Runner.of_class(3) == module.Runner().of_class(3) == 6
        assert module.alone(tokens=3) == 6
    assert [hooks.original_of(h) for h in wrapped] == theirs
    assert module.Runner.extended.__name__ == "extended"


def test_what_a_docstring_says(hook):
    said = why_and_until(hook("Runner.same"))
    assert said == ("Doubles the tokens", "they are doubled elsewhere")


@pytest.mark.parametrize(
    ("version", "expected", "needed"),
    [("0.32.1", "old", True), ("0.33.0", "new", True), ("dev", "new", True), ("0.31.0", "old", 0)],
)
def test_the_newest_body_that_is_due_counts(hook, monkeypatch, version, expected, needed):
    """Catches a new version's body on an old one, and the other way round."""
    bodies = {name: lambda original: None for name in ("old", "new")}
    of_path = [
        hook("Runner.same", bodies["old"]),
        hook("Runner.same", bodies["new"], since=(0, 33)),
    ]
    replace_stage(monkeypatch, "v1", *of_path)
    monkeypatch.setattr(hooks, "vllm_version", lambda: version)
    (chosen,) = hooks.hooks_of("v1")
    assert chosen.body is bodies[expected]
    assert hooks.is_due(chosen) == needed
