"""Stages of hooks with other hooks than ours."""

from failfast_vllm.integration import hooks


def replace_stage(monkeypatch, stage, *others):
    """Until the test ends, a stage consists of `others`."""
    hooks.all_hooks()  # a body that is imported later would join them
    monkeypatch.setitem(hooks._registered, stage, list(others))
