"""A session's step and V1's adapter on their own: what is asked, who learns, what is forgotten."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from failfast_vllm.drafting.records import UNKNOWN, Copies, Drafts
from failfast_vllm.integration import runner_hooks, v1
from failfast_vllm.integration.session import Adapter, Session, View
from failfast_vllm.observe.counters import DraftStats
from failfast_vllm.policies.rules import FailFast
from scripted import make_drafter, random_script

EOS = 9
CPU = torch.device("cpu")


class Given(View):
    """A view of requests that each have 70 tokens, 69 of them computed, and a committed block."""

    num_tokens, num_speculative_tokens = 8, 60

    def __init__(self, emitted, room, params=None):
        num_reqs = len(emitted)
        self.emitted, self.room = emitted, np.array(room)
        self.req_ids = [f"r{i}" for i in range(num_reqs)]
        self.num_verified = [max(len(ids) - 1, 0) for ids in emitted]
        self.known_lens = np.full(num_reqs, 70)
        self.computed_lens, self.committed_lens = self.known_lens - 1, self.known_lens * 0 + 32
        self.slots = np.arange(num_reqs)
        self.token_ids = self.block_table = torch.zeros(num_reqs, 100, dtype=torch.int64)
        self.params = params or [SamplingParams()] * num_reqs


class Note:
    """Writes down what it is told, in order with others."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def observe(self, rounds):
        self.log.append((self.name, [r.req_id for r in rounds]))

    def forget(self, req_ids):
        self.log.append((self.name, list(req_ids)))


@pytest.fixture
def session():
    """One whose drafter keeps the steps that it is asked for, and copies a token for each."""
    found = Session(make_drafter(FailFast(0.45), random_script(0)), DraftStats(), frozenset([EOS]))

    def propose(step):
        found.steps.append(step)
        lens = np.ones(len(step.req_ids), dtype=np.int64)
        return Drafts.of_copies(Copies(lens, torch.full((len(lens), 1), 5)), lens)

    found.steps, found.drafter.propose = [], propose
    return found


def test_what_a_step_asks_of_the_drafter(session):
    """Catches drafts and commits of requests that have ended, and of prompts not read yet.

    In turn: goes on, in the middle of its prompt, an end of sequence, at its last token, three
    tokens before it, with a limit of its own, a stop token before the last one of the step.
    """
    params = [SamplingParams()] * 7
    params[5] = SamplingParams(extra_args={"failfast_max_len": 2})
    params[6] = SamplingParams(stop_token_ids=[4])
    emitted = [[1], [], [EOS], [1], [1], [1], [4, 1]]
    session.step(Given(emitted, [90, 90, 90, -1, 3, 90, 90], params))
    (step,) = session.steps
    assert step.max_draft_lens.tolist() == [60, 0, 0, 0, 3, 2, 0]
    assert step.final_lens.tolist() == [64, 64, 32, 32, 64, 64, 32]
    assert step.known_lens.tolist() == [70, 64, 70, 70, 70, 70, 70]
    assert step.committed_lens.tolist() == [32] * 7


@pytest.mark.parametrize(("computed", "committed"), [(511, 448), (130, 96), (69, 32), (31, 0)])
def test_what_no_window_reaches_is_never_committed(session, computed, committed):
    """Catches a long prompt whose blocks are all committed, and a window that skips its own."""
    geometry = session.drafter.geometry
    session.drafter.geometry = replace(geometry, kv_block_size=32, window=32)
    view = Given([[1]], [90])
    view.computed_lens, view.committed_lens = np.array([computed]), np.array([0])
    session.step(view)
    (step,) = session.steps
    assert step.final_lens.tolist() == [computed // 32 * 32]
    assert step.committed_lens.tolist() == [committed]


def test_who_learns_what_and_in_which_order(session):
    """Catches plain rounds that are learned from, and counters that miss what the planner learns.

    A receiver of all rounds is there, so that plain ones are settled.
    """
    told, log = [], []
    session.stats.on_round = told.append
    session.step(Given([[1], [1]], [90, 90]))
    session.stats.observe = Note("stats", log).observe
    session.drafter.planner.observe = Note("planner", log).observe
    session.step(Given([[5, 1], [1]], [90, 90]))
    assert [r.num_verified for r in told] == [0, 0, 1, 0]
    assert log == [("stats", ["r0"]), ("planner", ["r0"])]
    assert told[2].drafted == [5], "the drafts of the step before"


def test_a_rest_does_not_hide_what_became_of_the_drafts_before_it(session):
    """Catches copies whose outcome nobody learns: looks that seem to bring little are rested after.

    A planner without passes would so never hear that they bring more.
    """
    log, told = [], []
    session.step(Given([[1], [1]], [90, 90]))
    session.drafter.planner.step_began = lambda *_: False
    session.drafter.planner.observe = Note("planner", log).observe
    assert session.step(Given([[5, 1], [1]], [90, 90])).draft_token_ids == []
    session.step(Given([[1], [1]], [90, 90]))
    session.stats.on_round = told.append
    session.step(Given([[1], [1]], [90, 90]))
    assert log == [("planner", ["r0"])]
    assert [r.num_verified for r in told] == [0, 0], "who wants plain rounds has them in rests, too"
    assert len(session.steps) == 1


def test_the_end_of_a_request_is_told_to_all_that_remember(session):
    """Catches state by request that outlives it: another may have the same id."""
    log = []
    session.step(Given([[1], [1]], [90, 90]))
    session.stats.trace = SimpleNamespace(forget=Note("trace", log).forget)
    session.forget(["r0"])
    assert log == [("trace", ["r0"])]
    assert list(session.ledger) == ["r1"]


def test_a_step_reports_what_it_drafted_and_counted(session):
    """Catches counts that stay in the worker, and lists that the scheduler goes through in vain."""
    report = session.step(Given([[1], [1]], [90, 90]))
    assert (report.req_ids, report.draft_token_ids) == (["r0", "r1"], [[5], [5]])
    assert sum(report.failfast_counts) > 0
    session.drafter.planner.step_began = lambda *_: False
    assert session.step(Given([[1], [1]], [90, 90])) is None


@pytest.mark.parametrize(
    ("asked", "num_output", "most"),
    [
        ({"max_tokens": 10}, 4, 5),
        ({"max_tokens": None}, 4, 95),
        ({"max_tokens": 10, "min_tokens": 6}, 4, 1),
        ({"max_tokens": 10, "min_tokens": 6}, 6, 3),
        ({"max_tokens": 10, "min_p": 0.1}, 4, 0),
        ({"max_tokens": 10, "logit_bias": {3: 1.0}}, 4, 0),
        ({"max_tokens": 10, "thinking_token_budget": 5}, 4, 0),
    ],
)
def test_how_long_a_draft_may_be_on_v1(asked, num_output, most):
    """Catches drafts that vLLM would sample without a request's logits processors."""
    assert v1._most_drafted(SamplingParams(**asked), num_output, 100) == most


def v1_runner():
    """What `v1._View` reads of vLLM's runner: a request that decodes, one inside its prompt."""
    params = SamplingParams(max_tokens=200)
    return SimpleNamespace(
        requests={
            req_id: SimpleNamespace(sampling_params=params, num_prompt_tokens=num_prompt)
            for req_id, num_prompt in (("a", 40), ("b", 90))
        },
        input_batch=SimpleNamespace(
            req_ids=["a", "b"],
            num_tokens_no_spec=np.array([66, 90], dtype=np.int32),
            num_computed_tokens_cpu=np.array([63, 32], dtype=np.int32),
            token_ids_cpu=np.full((2, 100), 3, dtype=np.int32),
            is_token_ids=np.arange(100) >= np.array([[8], [0]]),
            req_prompt_embeds={0: None},
        ),
    )


def proposer(runner=None):
    """V1's adapter without vLLM's part."""
    found = object.__new__(v1._Proposer)
    found.runner, found.device = runner, CPU
    return found


class Short(v1._Proposer):
    position_limit = 100


def test_what_is_read_of_the_v1_runner():
    """Catches a block committed before its last token has KV, drafts across the end of the context.

    The first request has emitted two tokens: the last of its 66 has no KV yet.
    """
    adapter = proposer(v1_runner())
    adapter.__class__ = Short
    blocks = SimpleNamespace(committed_lens=lambda table, computed: computed // 32 * 32)
    adapter.session = SimpleNamespace(drafter=SimpleNamespace(blocks=blocks))
    step = SimpleNamespace(
        total_num_scheduled_tokens=35,
        scheduled_spec_decode_tokens={"a": [7, 7]},
        num_scheduled_tokens={"a": 3, "b": 32},
        num_spec_tokens_to_schedule=60,
    )
    emitted = [[1, 2], []]
    assert adapter.postpone(
        step, emitted, SimpleNamespace(block_table_tensor=torch.zeros(3, 4))
    ) == [[], []]
    emitted[0].pop()
    view = adapter.postponed
    view.read_outcome()
    view.read_state(np.array([True, False]))
    assert view.emitted == [[1, 2], []], "a scheduler in this process cuts its own list"
    assert list(view.num_verified) == [2, 0]
    assert view.computed_lens.tolist() == [65, 64]
    assert view.committed_lens.tolist() == [32, 32]
    assert view.room.tolist() == [33, 9]
    assert view.token_ids.shape == (2, 90)
    assert (view.token_ids[0] == UNKNOWN).tolist() == [True] * 8 + [False] * 82
    assert not (view.token_ids[1] == UNKNOWN).any()


def test_a_step_begins_on_v1():
    """Catches drafts for a step that is over; rests, ends and new pages that nobody hears of."""
    log, adapter = [], proposer()
    adapter.postponed = "view"
    adapter.session = SimpleNamespace(rested=log.append, forget=log.append)
    adapter.clear_new_pages = lambda step, group, size: log.append((group, size))
    adapter.begin("runner", SimpleNamespace(finished_req_ids={"a"}))
    assert (adapter.runner, adapter.postponed) == ("runner", None)
    assert log == ["view", {"a"}, (0, 1)]


def test_a_step_is_drafted_for_once():
    adapter = object.__new__(Adapter)
    adapter.session = SimpleNamespace(step=lambda view: view)
    adapter.postponed = "view"
    assert [adapter.take_drafts(), adapter.take_drafts()] == ["view", None]


@pytest.mark.parametrize(
    ("drafts", "has_inner_state", "ours", "seen"),
    [
        ({}, False, True, None),
        ({"a": [7]}, False, True, "config"),
        ({}, True, True, "config"),
        ({}, False, False, "config"),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
def test_what_vllm_prepares_a_step_for(drafts, has_inner_state, ours, seen, fails):
    """Catches drafts that are not verified, a recurrent state in the wrong place, other proposers.

    And a configuration that stays away after the step, or after one that failed.
    """
    runner = SimpleNamespace(
        speculative_config="config",
        model_config=SimpleNamespace(has_inner_state=has_inner_state),
        drafter=proposer() if ours else object(),
    )

    def prepare():
        assert runner.speculative_config == seen
        if fails:
            raise MemoryError
        return "prepared"

    step = SimpleNamespace(scheduled_spec_decode_tokens=drafts)
    if fails:
        with pytest.raises(MemoryError):
            runner_hooks.prepare_without_drafts(prepare, runner, step, None)
    else:
        assert runner_hooks.prepare_without_drafts(prepare, runner, step, None) == "prepared"
    assert runner.speculative_config == "config"


def test_thinking_budgets_stay_with_requests_that_have_one():
    """Catches a budget that moves to another request with its row, and one that is dropped."""
    runner = v1_runner()
    runner.requests["b"].sampling_params = SamplingParams(thinking_token_budget=4)
    holder = SimpleNamespace(_state={0: "stale", 1: "own"})
    runner.input_batch.thinking_budget_state_holder = holder
    proposer(runner).drop_stale_budgets()
    assert holder._state == {1: "own"}
