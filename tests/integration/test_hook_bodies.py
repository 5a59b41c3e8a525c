"""What vLLM's functions did when our hooks were written: digests that only code changes."""

import json

import pytest
from vllm.v1.engine.input_processor import InputProcessor

import hook_bodies
from failfast_vllm.integration import hooks

BODY = """
    def f(self, n: int = 1) -> str:
        '''What it does.'''
        if n:  # why
            return f"{n!r:>{n}}"
        return ""
"""
DIGEST = "f4c9a5efce6569df"  # of BODY on each Python from 3.10 to 3.13


def test_vllms_functions_are_those_that_the_hooks_were_written_for():
    """Catches a function that does something else now, with the same parameters.

    A hook is new, or what changed has been read and the tests pass:
    `python tests/support/hook_bodies.py`, on each supported vLLM.
    """
    assert hook_bodies.changed(hook_bodies.installed()) == []


def test_a_changed_function_is_seen(monkeypatch):
    original = InputProcessor._validate_params
    hook = hooks.hooks_of("requests")[0]

    def _validate_params(self, params, supported_tasks):
        return original(self, params, ())

    monkeypatch.setattr(InputProcessor, "_validate_params", _validate_params)
    assert hooks.hook_problem(hook) is None
    assert hook_bodies.changed(hook_bodies.installed()) == [hook.name]


def test_a_patch_release_is_compared_with_its_minor_version(tmp_path, monkeypatch):
    monkeypatch.setattr(hook_bodies, "STORE", tmp_path / "bodies.json")
    stored = {"0.32.0": {"a": "of 0.32"}, "0.32.1": {"a": "of 0.32.1"}, "0.33.0": {"a": "of 0.33"}}
    hook_bodies.STORE.write_text(json.dumps(stored))
    monkeypatch.setattr(hooks, "vllm_version", lambda: "0.32.9+cpu")
    for known in ("of 0.32", "of 0.32.1"):
        assert hook_bodies.changed({"a": known}) == []
    assert hook_bodies.changed({"a": "of 0.33"}) == ["a"]
    assert hook_bodies.changed({"a": "of 0.32", "b": "unknown"}) == ["b"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("  # why", ""),
        ("'''What it does.'''", "'''Something else.'''"),
        ("        '''What it does.'''\n", ""),
        ("n: int = 1", "n: int = (\n        1\n    )"),
    ],
)
def test_what_a_body_says_about_itself_does_not_count(before, after):
    changed = BODY.replace(before, after)
    assert changed != BODY
    assert hook_bodies.digest_of(changed) == hook_bodies.digest_of(BODY) == DIGEST


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("if n:", "if not n:"),
        ("n: int = 1", "n: int = 2"),
        ('return ""', "return None"),
        ("return f", "yield f"),
        ('        return ""', '            return ""'),
        ("!r:>", "!s:>"),
        ("    def f(", "    @staticmethod\n    def f("),
    ],
)
def test_what_a_body_does_counts(before, after):
    changed = BODY.replace(before, after)
    assert changed != BODY
    assert hook_bodies.digest_of(changed) != DIGEST


def test_the_installed_version_is_stored_beside_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(hook_bodies, "STORE", tmp_path / "bodies.json")
    hook_bodies.STORE.write_text('{"0.1.0": {"a": "b"}}')
    hook_bodies.store()
    stored = json.loads(hook_bodies.STORE.read_text())
    version = hooks.vllm_version().partition("+")[0]
    assert stored == {"0.1.0": {"a": "b"}, version: hook_bodies.installed()}
    assert set(stored[version]) == {h.name for h in hooks.all_hooks() if hooks.is_due(h)}
