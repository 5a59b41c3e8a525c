"""Copies that are found on the device, in steps that vLLM schedules ahead."""

import contextlib

import pytest
from vllm.v1.worker.gpu import structured_outputs

from copying_cases import literal_copy
from engine import core, count_preemptions, generate, proposer
from in_flight import ALONE, MaskWithoutTriton, come_and_go, grammars, rows, taking_turns  # noqa: F401
from runners import few_plain, v1_engine, v2_engine  # noqa: F401 - a fixture
from turns import CopyingAhead
from waits import counted


@contextlib.contextmanager
def told(llm):
    """The rounds that the engine reports, by the place of the prompt."""
    stats, rounds, first = proposer(llm).stats, [], llm.request_counter.counter

    def tell(found):
        rounds.append((int(found.req_id.partition("-")[0]) - first, found))

    stats.on_round, stats.drafts_only = tell, True
    try:
        yield rounds
    finally:
        stats.on_round, stats.drafts_only = None, False


def assert_copies_in_flight(watch, least=10):
    """Steps with drafts were scheduled while another ran."""
    assert sum(all(step) for step in watch.steps) >= least
    watch.steps.clear()


@pytest.fixture(scope="module")
def ahead(few_plain, rows, grammars):
    """Prefix hits, and prompts in several parts."""
    overrides = {"enable_prefix_caching": True, "max_num_batched_tokens": 256}
    with taking_turns(ALONE, CopyingAhead, **overrides) as found:
        yield found


def test_answers_stay(few_plain, ahead):
    """And each draft is what its own text goes on with, as far as the reported rounds tell."""
    prompts, params, expected = few_plain
    llm, watch = ahead
    with told(llm) as rounds:
        assert generate(llm, prompts, params) == expected
    assert generate(llm, prompts, params) == expected  # with prefix hits
    assert_copies_in_flight(watch, least=20)
    copied = 0
    for place, r in rounds:
        text, known = list(prompts[place]) + expected[place], r.known_len
        emitted = text[known : known + len(r.emitted)]
        assert list(r.emitted[: len(emitted)]) == emitted
        assert r.num_accepted == len(r.emitted) - 1
        found, copy = literal_copy(text[:known], r.num_verified)
        assert r.drafted == (copy if found else [0] * r.num_verified)
        copied += r.num_accepted
    assert copied >= 10
    assert {r.num_verified for _, r in rounds} >= {1, 3, 12}


def test_rows_in_mixed_batches(rows, ahead):
    """Catches what a request needs that is lost between a step in flight and the next."""
    prompts, params, expected = rows
    llm, watch = ahead
    with told(llm) as rounds:
        assert generate(llm, prompts, params) == expected
    for place, r in rounds:
        asked = params[place].extra_args or {}
        assert r.num_verified <= asked.get("failfast_max_len", 12)
    assert {r.num_verified for _, r in rounds} >= {1, 3, 12}
    assert_copies_in_flight(watch)


def test_requests_come_and_go_in_flight(few_plain, ahead):
    """Others arrive and are aborted at each point; the answers of the rest stay."""
    llm, watch = ahead
    come_and_go(llm, *few_plain)
    assert_copies_in_flight(watch)
    assert watch.planner.ahead.num_rested > 0
    in_flight = proposer(llm).in_flight
    generate(llm, few_plain[0][:1], few_plain[1][:1])  # the end of the others is seen in its steps
    assert max(len(in_flight.known), len(in_flight.limits)) <= 1


def test_a_grammar_ends_it_for_its_time(grammars, few_plain, ahead, monkeypatch):
    """Drafts of a grammar are checked on the host: such batches wait for each step."""
    monkeypatch.setattr(structured_outputs, "_apply_grammar_bitmask_kernel", MaskWithoutTriton())
    prompts, params, expected = grammars
    llm, watch = ahead
    left = proposer(llm).session.leave_ahead
    ends = []
    monkeypatch.setattr(proposer(llm).session, "leave_ahead", lambda: ends.append(left()))
    for _ in range(2):
        generate(llm, few_plain[0][:2], few_plain[1][:2])  # goes ahead
        assert generate(llm, prompts, params) == expected
    assert ends
    assert sum(drafted > 0 and not in_flight for in_flight, drafted in watch.steps) >= 3
    assert_copies_in_flight(watch, least=3)


def test_preemption_and_the_end_of_the_context(few_plain):
    """Catches drafts beyond the last position, and those of before a preemption."""
    from vllm import SamplingParams

    prompts = few_plain[0][:8]
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    with v1_engine(max_model_len=64) as llm:
        expected = generate(llm, prompts, params)
    overrides = {"num_gpu_blocks_override": 9, "block_size": 32, "max_model_len": 64}
    with taking_turns(ALONE, CopyingAhead, **overrides) as (llm, watch):
        preempted = count_preemptions(llm)
        assert generate(llm, prompts, params) == expected
    assert preempted
    assert {len(p) + len(a) for p, a in zip(prompts, expected, strict=True)} == {64}
    assert_copies_in_flight(watch)


def test_the_default_planner_goes_ahead_and_nothing_waits(few_plain):
    """Catches a launch that the host waits for: copies of a step in flight would gain nothing."""
    prompts, params, expected = few_plain
    waits = []
    with v2_engine(ALONE) as llm:
        adapter, scheduler = proposer(llm), core(llm).scheduler
        propose, lane = adapter.propose, adapter.drafter.copies
        find = lane.find_ahead

        def counting(*args, **kwargs):
            with counted() as found:

                def unseen(*texts):  # a reference looks at lengths, on a GPU kernels do
                    found.paused = True
                    try:
                        return find(*texts)
                    finally:
                        found.paused = False

                lane.find_ahead = unseen
                drafts = propose(*args, **kwargs)
            waits.append((adapter.in_flight is not None, list(found)))
            return drafts

        adapter.propose = counting
        assert generate(llm, prompts, params) == expected
        assert scheduler.failfast_ahead
        assert adapter.drafter.planner.ahead.acceptance.calibration.counts.sum() > 20
        assert adapter.stats.num_copied > adapter.stats.num_copied_accepted > 0
    assert sum(ahead for ahead, _ in waits) > 30
    assert {tuple(found) for ahead, found in waits if ahead} == {()}


def test_who_waits(few_plain):
    """A trace wants all rounds; a worker in another process answers only after its step."""
    prompts, params, expected = few_plain
    with taking_turns(ALONE, CopyingAhead) as (llm, watch):
        stats, rounds = proposer(llm).stats, []
        stats.on_round = rounds.append
        assert generate(llm, prompts[:4], params[:4]) == expected[:4]
        assert not core(llm).scheduler.failfast_ahead
        assert not any(all(step) for step in watch.steps)
        assert any(r.num_verified for r in rounds)
        stats.on_round = None
        proposer(llm).schedules_ahead = False
        assert generate(llm, prompts[:4], params[:4]) == expected[:4]
        assert not any(all(step) for step in watch.steps)
