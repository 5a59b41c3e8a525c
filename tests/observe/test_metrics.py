"""Counts of a worker, and what a stat logger makes of them. The server's: `test_http`."""

import types

import numpy as np
import pytest
from prometheus_client import REGISTRY

from failfast_vllm.config import METHOD
from failfast_vllm.drafting.records import (
    BUDGET,
    CAP,
    DOUBT,
    EOS,
    LOAD,
    REQUEST,
    STOP_REASONS,
    Round,
)
from failfast_vllm.integration import hooks
from failfast_vllm.integration.engine_hooks import hear_the_worker, install_metrics, send_counts
from failfast_vllm.integration.metrics import FailFastStatLogger
from failfast_vllm.observe.counters import NUM_COUNTS, DraftStats
from failfast_vllm.policies.rules import FailFast
from scripted import STOP, Script, make_drafter, make_step


def fake_config(asked=True):
    return types.SimpleNamespace(
        additional_config={METHOD: {}} if asked else {},
        model_config=types.SimpleNamespace(served_model_name="m"),
    )


def stats(drafts, num_positions, counts=()):
    """What the scheduler reports of some (drafted, accepted) lengths."""
    from vllm.v1.spec_decode.metrics import SpecDecodingStats

    found = SpecDecodingStats.new(num_positions)
    for drafted, accepted in drafts:
        found.observe_draft(drafted, accepted)
    found.num_draft_tokens_per_pos.extend(counts)
    return types.SimpleNamespace(spec_decoding_stats=found)


def sample(name, **labels):
    return REGISTRY.get_sample_value(f"failfast:{name}", {"model_name": "m", **labels})


def test_counts_arrive_by_engine():
    """Catches fields that are read in another order than written, and engines that are mixed."""
    logger = FailFastStatLogger(fake_config(), [0, 1])
    counts = DraftStats()
    lens, reasons = np.array([10, 4, 0, 5]), np.array([DOUBT, EOS, CAP, EOS])
    counts.step_ended(
        types.SimpleNamespace(num_forwards=3, num_rows=70, lens=lens, stop_reasons=reasons)
    )
    counts.total_ms, counts.verify_ms = 12.5, 8.0
    confidences = np.array([0.95, 0.31, 0.5], dtype=np.float32)
    counts.observe([Round("r", 3, num_verified=3, num_accepted=1, confidences=confidences)])
    sent = counts.take()
    assert len(sent) == NUM_COUNTS
    assert counts.take() == []
    logger.record(stats([(10, 4), (3, 3), (10, 0)], 12, sent + sent), None, engine_idx=1)
    assert sample("draft_passes_total", engine="1") == 6
    assert sample("draft_rows_total", engine="1") == 140
    assert sample("draft_seconds_total", engine="1") == pytest.approx(0.025)
    assert sample("verify_seconds_total", engine="1") == pytest.approx(0.016)
    assert sample("draft_stops_total", engine="1", reason="eos") == 4
    assert sample("draft_stops_total", engine="1", reason="cap") == 0
    assert sample("confidence_tokens_total", engine="1", bin="0.95") == 2
    assert sample("confidence_accepted_tokens_total", engine="1", bin="0.95") == 2
    assert sample("confidence_tokens_total", engine="1", bin="0.35") == 2
    assert sample("confidence_accepted_tokens_total", engine="1", bin="0.35") == 0
    assert sample("confidence_sum_total", engine="1", bin="0.35") == pytest.approx(0.62)
    assert sample("confidence_tokens_total", engine="1", bin="0.55") == 0, "it was never judged"
    error = (0.05 + 0.31) / 2
    assert sample("calibration_error", engine="1") == pytest.approx(error, abs=1e-3)
    assert sample("draft_length_count", engine="1") == 3
    assert sample("draft_length_sum", engine="1") == 23
    assert sample("draft_length_bucket", engine="1", le="4.0") == 1
    assert sample("accepted_length_sum", engine="1") == 7
    assert sample("accepted_length_bucket", engine="1", le="0.0") == 1
    assert not sample("draft_passes_total", engine="0")
    counts.observe([Round("r", 1, num_verified=1, confidences=confidences[2:])])
    logger.record(stats([], 12, counts.take()), None, engine_idx=0)
    assert sample("calibration_error", engine="0") == pytest.approx(0.5)
    assert sample("calibration_error", engine="1") == pytest.approx(error, abs=1e-3)
    logger.record(None, None)
    logger.record(types.SimpleNamespace(spec_decoding_stats=None), None)
    again = FailFastStatLogger(fake_config(), [0])  # a second engine in one process
    again.record(stats([(2, 1)], 12), None)
    assert sample("draft_length_sum", engine="0") == 2


@pytest.mark.parametrize(
    ("asked", "log_stats", "added"), [(True, True, 1), (True, False, 0), (False, True, 0)]
)
def test_only_a_server_that_asked_has_the_logger(monkeypatch, asked, log_stats, added):
    """Catches a plugin that switches statistics on in other people's servers."""
    from vllm.v1.engine.async_llm import AsyncLLM

    seen = []

    def init(self, vllm_config, executor_class, log_stats, *args, **more):
        seen.append(more.get("stat_loggers"))

    monkeypatch.setattr(AsyncLLM, "__init__", init)
    # what installing sets is undone, too
    from vllm.v1.core.sched.scheduler import Scheduler

    monkeypatch.setattr(Scheduler, "make_stats", Scheduler.make_stats)
    monkeypatch.setattr(hooks, "hook_problem", lambda hook: None)
    install_metrics()
    AsyncLLM(fake_config(asked), None, log_stats)
    assert (seen[0] or []) == [FailFastStatLogger] * added


def stop_reasons(**given):
    """Of four drafts: sure to the end, doubtful, with a stop token, and asked for five tokens."""
    tokens = np.full((4, 60), 5)
    tokens[2, 3] = STOP
    confidences = np.full((4, 60), 0.9, dtype=np.float32)
    confidences[1, 4] = 0.1
    script = Script([20, 40, 33, 8], tokens, confidences)
    drafter = make_drafter(FailFast(0.45), script)
    drafts = drafter.propose(make_step(script, np.array([60, 60, 60, 5]), **given))
    return [STOP_REASONS[i] for i in drafts.stop_reasons], drafts


def test_without_metrics_nothing_else_is_missing():
    """Catches an engine that starts, and never hears from its worker how long it rests."""
    assert [found.path for found in hooks.hooks_of("metrics")] == [
        "Scheduler.make_stats",
        "AsyncLLM.__init__",
    ]


def test_counts_wait_in_the_scheduler_and_are_sent_once():
    """Catches counts of steps without statistics that are lost, and counts that come twice."""
    scheduler, own = types.SimpleNamespace(log_stats=True), object()
    for counts in ([1, 2], [], [3, 4]):
        drafts = types.SimpleNamespace(failfast_counts=counts)
        assert hear_the_worker(lambda: own, scheduler, drafts) is own
    sent = [types.SimpleNamespace(num_draft_tokens_per_pos=[9]) for _ in range(2)]
    for found in (None, *sent):
        assert send_counts(lambda: own, scheduler, found) is own
    assert [found.num_draft_tokens_per_pos for found in sent] == [[9, 4, 6], [9]]
    unheard = types.SimpleNamespace(log_stats=False)
    hear_the_worker(lambda: own, unheard, types.SimpleNamespace(failfast_counts=[1]))
    assert not hasattr(unheard, "failfast_counts")


def test_only_steps_that_verify_are_timed_as_verification():
    """Catches time after a step without drafts, and a sure token without a bin."""
    counts = DraftStats()
    none = types.SimpleNamespace(
        num_forwards=0, num_rows=0, lens=np.zeros(2, int), stop_reasons=np.zeros(2, int)
    )
    some = types.SimpleNamespace(**{**vars(none), "lens": np.array([0, 4])})
    counts.step_ended(none)
    counts.step_began()
    assert counts.verify_ms == 0.0
    counts.step_ended(some)
    counts.step_began()
    assert counts.verify_ms > 0.0
    counts.observe([Round("r", 1, 1, 1, 1, confidences=np.ones(1, dtype=np.float32))])
    assert counts.bins[:, -1].tolist() == [1, 1, 1000]


def test_a_trace_beside_it_gives_a_receiver_of_drafts_no_plain_rounds():
    """Catches plain rounds among the drafts that `failfast bench` reports of a traced engine."""
    counts, told, traced = DraftStats(), [], []
    counts.on_round, counts.drafts_only = told.append, True
    counts.trace = types.SimpleNamespace(observe=traced.extend)
    assert counts.wants_plain
    rounds = [Round("plain"), Round("drafted", 3, num_verified=3)]
    counts.tell(rounds)
    assert traced == rounds
    assert told == rounds[1:]


def test_copied_tokens_are_counted_apart():
    """Catches tokens of passes among the copied ones, and copies behind a rejected pass."""
    counts = DraftStats()
    judged = np.array([0.9, 0.8], dtype=np.float32)
    for verified, accepted in ((5, 4), (2, 2), (5, 1)):
        counts.observe([Round("r", 5, 2, verified, accepted, confidences=judged)])
    assert (counts.num_copied, counts.num_copied_accepted) == (3 + 0 + 3, 2 + 0 + 0)


def test_stop_reasons():
    """Catches reasons that are judged by the last pass only."""
    reasons, drafts = stop_reasons()
    assert reasons == [STOP_REASONS[i] for i in (CAP, DOUBT, EOS, REQUEST)]
    assert drafts.lens.tolist() == [60, 10, 4, 5]
    reasons, drafts = stop_reasons(budget=40)
    assert reasons[0] == STOP_REASONS[BUDGET]
    assert drafts.lens[0] < 60


def test_a_planner_that_refuses_is_the_load():
    """Catches drafts that the planner cut and that count as doubtful."""
    tokens = np.full((1, 60), 5)
    ends = ((0.9, 10, LOAD), (0.9, 3, LOAD), (0.1, 10, DOUBT), (0.1, 3, LOAD))
    for confidence, kept, reason in ends:
        script = Script([20], tokens, np.full((1, 60), confidence))
        drafter = make_drafter(FailFast(0.45), script)
        drafter.planner = types.SimpleNamespace(
            postpones_commits=True,
            refusal=LOAD,
            first=lambda asked: (np.minimum(asked.wanted, 10), 0 * asked.wanted),
            following=lambda wanted, *_: 0 * wanted,
            keep=lambda lens, *_, kept=kept: np.minimum(lens, kept),
            pass_took=lambda *_: None,
        )
        drafts = drafter.propose(make_step(script, np.array([60])))
        assert drafts.lens.tolist() == [kept]
        assert drafts.stop_reasons.tolist() == [reason]


def test_a_spent_budget_is_not_the_load():
    """Catches a planner that is blamed for what `draft_budget` has ended."""
    script = Script([20], np.full((1, 60), 5), np.full((1, 60), 0.9))
    drafter = make_drafter(FailFast(0.45), script)
    drafter.planner.refusal = LOAD
    drafts = drafter.propose(make_step(script, np.array([60]), budget=15))
    assert (drafts.lens.tolist(), drafts.stop_reasons.tolist()) == ([15], [BUDGET])
