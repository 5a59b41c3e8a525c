"""What vLLM's functions did when our hooks were written: digests that only code changes."""

import json

import pytest
from vllm.v1.engine.input_processor import InputProcessor

from failfast_vllm.integration import hook_bodies, hooks
from failfast_vllm.tools import cli, doctor

BODY = """
    def f(self, n: int = 1) -> str:
        '''What it does.'''
        if n:  # why
            return f"{n!r:>{n}}"
        return ""
"""
DIGEST = "f4c9a5efce6569df"  # of BODY on each Python from 3.10 to 3.13


def test_doctor_warns_of_a_changed_body(capsys, monkeypatch):
    """Catches a function that does something else now, with the same parameters."""
    original = InputProcessor._validate_params
    hook = hooks.hooks_of("requests")[0]

    def _validate_params(self, params, supported_tasks):
        return original(self, params, ())

    monkeypatch.setattr(InputProcessor, "_validate_params", _validate_params)
    assert hooks.hook_problem(hook) is None
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (where,) = [i for i, line in enumerate(lines) if line.startswith("warning")]
    tested = " or ".join(hook_bodies.known())
    assert lines[where].split()[1:3] == ["hook", "InputProcessor._validate_params"]
    assert f"its body is not that of vLLM {tested}, which failfast was tested with" in lines[where]
    assert lines[where + 1].strip() == f"-> {doctor.RUN_TESTS}"


def test_a_patch_release_is_compared_with_its_minor_version(monkeypatch):
    hook = hooks.hooks_of("configuration")[0]
    bodies = {hook.name: "of 0.32"}
    stored = {"0.32.0": bodies, "0.32.1": {hook.name: "of 0.32.1"}, "0.33.0": {}}
    monkeypatch.setattr(hook_bodies, "_stored", lambda: stored)
    monkeypatch.setattr(hooks, "vllm_version", lambda: "0.32.9+cpu")
    assert list(hook_bodies.known()) == ["0.32.0", "0.32.1"]
    assert hook_bodies.change(hook, bodies) == ""
    for changed in ({hook.name: "another"}, {}):  # the latter: a function without a source
        assert "not that of vLLM 0.32.0 or 0.32.1," in hook_bodies.change(hook, changed)
    late = hook._replace(since=(0, 33))
    assert hook_bodies.change(late, {}) == ""
    monkeypatch.setattr(hooks, "vllm_version", lambda: "0.99.1")  # refused by another check
    assert hook_bodies.change(hook, bodies) == ""


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
