"""How long the engine asks no worker for drafts: the worker's planner has said that it rests."""

import types

import pytest

from failfast_vllm.integration import startup
from failfast_vllm.integration.engine_hooks import _rests, _warm_up, let_it_rest

STEPS = 5  # which of the coming steps looks


def scheduler(num_running=4):
    return types.SimpleNamespace(failfast_rest=(STEPS, 3.2), running=[None] * num_running)


@pytest.mark.parametrize("num_looking", [0, 1])
def test_a_rest_ends(num_looking):
    """Where steps are scheduled ahead, the one that looks is, too."""
    resting = scheduler()
    found = [_rests(resting, num_looking) for _ in range(STEPS + 2)]
    num_rests = STEPS - num_looking
    assert found == [True] * num_rests + [False] * (STEPS + 2 - num_rests)


def test_a_rest_ends_with_the_load():
    resting = scheduler()
    assert _rests(resting)
    resting.running.pop()
    assert not _rests(resting)
    resting.running.append(None)
    assert not _rests(resting)


def test_a_scheduler_that_heard_of_no_rest_asks():
    assert not _rests(types.SimpleNamespace(running=[None]))


@pytest.mark.parametrize(
    ("given", "asks"),
    [
        pytest.param({}, False, id="at rest"),
        pytest.param({"model_executed": False}, True, id="a step of no request"),
        pytest.param({"asynchronous": True}, True, id="vLLM itself does not ask"),
        pytest.param({"config": {}}, True, id="another engine"),
    ],
)
def test_who_is_left_alone(given, asks):
    """Catches a step that counts as one of a rest though no worker has run it."""
    config = types.SimpleNamespace(additional_config=given.get("config", {"failfast": {}}))
    engine = types.SimpleNamespace(
        vllm_config=config,
        async_scheduling=given.get("asynchronous", False),
        scheduler=scheduler(),
    )
    asked = []
    let_it_rest(lambda: asked.append(1), engine, given.get("model_executed", True))
    assert bool(asked) == asks
    assert engine.scheduler.failfast_rest[0] == (STEPS if asks else STEPS - 1)


def test_everything_is_compiled_before_the_monitor_listens(monkeypatch):
    """Catches a kernel of the copy lane that the first look for a copy compiles."""
    done = []

    def note(name):
        return lambda *_: done.append(name)

    drafter = types.SimpleNamespace(
        model=types.SimpleNamespace(warm_up_kernels=note("passes")),
        copies=types.SimpleNamespace(warm_up=note("copies")),
    )
    runner = types.SimpleNamespace(drafter=types.SimpleNamespace(drafter=drafter))
    worker = types.SimpleNamespace(
        model_runner=runner, _maybe_activate_jit_monitor=note("vLLM listens")
    )
    monkeypatch.setattr(startup, "start_serving", note("serves"))
    _warm_up(worker, lambda: worker._maybe_activate_jit_monitor())
    assert done == ["passes", "copies", "serves", "vLLM listens"]
