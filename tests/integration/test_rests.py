"""How long the engine asks no worker for drafts: the worker's planner has said that it rests."""

import types

import pytest

from failfast_vllm.integration import startup
from failfast_vllm.integration.engine_hooks import (
    _rests,
    _warm_up,
    hear_the_worker,
    let_it_rest,
    schedule_ahead,
)
from failfast_vllm.integration.session import report

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


def waiting(name, *, reads=False, drafts=()):
    return types.SimpleNamespace(
        request_id=name, is_prefill_chunk=reads, spec_token_ids=list(drafts)
    )


def test_room_is_made_for_copies_of_requests_that_decode():
    """Catches drafts beside a prompt that is not read, and those of a step before."""
    running = [waiting("a", drafts=[1]), waiting("b", reads=True, drafts=[1]), waiting("new")]
    found = types.SimpleNamespace(running=running, log_stats=False)

    def lens():
        return [request.spec_token_ids for request in running]

    hear_the_worker(lambda: None, found, report([], (1, 0.0), ahead={"a": 3, "b": 4}))
    assert lens() == [[-1] * 3, [], []]
    assert found.failfast_rest == (1, 0.0)
    running[1].is_prefill_chunk = False
    hear_the_worker(lambda: None, found, report([], (1, 0.0), ahead={"a": 0, "b": 2}))
    assert lens() == [[], [-1] * 2, []]
    hear_the_worker(lambda: None, found, report([], None))
    assert lens() == [[], [], []]
    running[0].spec_token_ids = [5]  # a draft that the host knows
    hear_the_worker(lambda: None, found, report([], None))
    assert lens() == [[5], [], []]


def test_lengths_are_asked_for_before_each_step_that_looks():
    """Catches a worker that is asked in its rests, and a step scheduled before it answers."""
    log, answers = [], [report([], (1, 0.0), ahead={"a": 2}), report([], (3, 0.0), ahead={})]
    answers.append(report([], None))
    found = types.SimpleNamespace(running=[waiting("a")], log_stats=False, failfast_ahead=True)
    found.update_draft_token_ids = lambda told: hear_the_worker(lambda: None, found, told)

    def ask():
        log.append("asks")
        return answers.pop(0)

    engine = types.SimpleNamespace(
        vllm_config=types.SimpleNamespace(additional_config={"failfast": {}}),
        model_executor=types.SimpleNamespace(take_draft_token_ids=ask),
        scheduler=found,
        batch_queue=[],
        step=lambda: log.append("waits"),
    )
    for _ in range(5):
        schedule_ahead(lambda: log.append(len(found.running[0].spec_token_ids)), engine)
    assert log == ["asks", 2, "asks", 0, 0, 0, "asks", "waits"]
    assert not engine.async_scheduling


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
