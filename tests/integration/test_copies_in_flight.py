"""Copies that are scheduled ahead, on tables written by hand: what is found, who is told."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from failfast_vllm.drafting.copying import OwnText
from failfast_vllm.drafting.records import NOT_KNOWN
from failfast_vllm.integration.ahead import CopiesInFlight
from failfast_vllm.integration.session import Session
from failfast_vllm.integration.v2 import CopySpeculator, StepView
from failfast_vllm.observe.counters import DraftStats

CPU = torch.device("cpu")
SLOTS = {"a": 3, "b": 1}
CAP = 6
TEXTS = {"a": [5, 6, 7, 8, 9, 5, 6], "b": [1, 2, 3, 4]}  # a goes on with 7, 8, 9, 5, 6, 7


class Lengths:
    """In place of the planner: writes down what it is told."""

    def __init__(self):
        self.asked, self.rounds, self.steps, self.rest = [], [], [], 0

    def choose(self, wanted, match_lens):
        self.asked.append((wanted.tolist(), match_lens.tolist()))
        return wanted

    def steps_to_rest(self, num_seqs):
        rest, self.rest = self.rest, 0
        return rest

    def observe(self, rounds):
        self.rounds.append(rounds)

    def step_ended(self, req_ids, num_tokens, num_drafted):
        self.steps.append((list(req_ids), num_tokens, num_drafted))


class Worker:
    """A worker with two requests, whose texts the test writes."""

    def __init__(self):
        self.left, self.texts = [], {name: list(text) for name, text in TEXTS.items()}
        self.ids = torch.full((4, 40), 99, dtype=torch.int32)
        states = SimpleNamespace(
            all_token_ids=SimpleNamespace(gpu=self.ids),
            total_len=SimpleNamespace(gpu=torch.zeros(4, dtype=torch.int32)),
            max_seq_len=np.array([0, 30, 0, 40]),
            draft_tokens=torch.full((4, CAP), 77),
        )
        params = {"a": SamplingParams(), "b": SamplingParams(extra_args={"failfast_max_len": 2})}
        drafter = SimpleNamespace(copies=OwnText(100, CPU), draft_budget=lambda num_seqs: 100)
        self.adapter = SimpleNamespace(
            req_states=states,
            num_speculative_steps=CAP,
            device=CPU,
            stats=DraftStats(),
            drafter=drafter,
            session=SimpleNamespace(leave_ahead=lambda: self.left.append(True)),
            params=[None, params["b"], None, params["a"]],
            schedules_ahead=True,
            embedded={},
        )
        self.planner = Lengths()
        self.in_flight = CopiesInFlight(self.adapter, self.planner)

    def step(self, sampled, verified=(0, 0), structured=False, names=("a", "b")):
        """A step of the target that emits `sampled` tokens of each request; returns its copies."""
        for name, ids in sampled.items():
            self.texts[name] += ids
        for name, text in self.texts.items():
            self.ids[SLOTS[name], : len(text)] = torch.tensor(text, dtype=torch.int32)
            self.adapter.req_states.total_len.gpu[SLOTS[name]] = len(text)
        slots = np.array([SLOTS[name] for name in names])
        lens = [len(self.texts[name]) for name in names]
        batch = SimpleNamespace(
            req_ids=list(names),
            num_reqs=len(names),
            num_tokens=len(names) + sum(verified),
            idx_mapping=torch.tensor(slots, dtype=torch.int32),
            idx_mapping_np=slots,
            seq_lens_cpu_upper_bound=torch.tensor([*lens, 0, 0], dtype=torch.int32),
            num_draft_tokens_per_req=np.array(verified) if any(verified) else None,
            has_structured_output_reqs=structured,
        )
        counts = torch.tensor([len(sampled.get(name, ())) for name in names], dtype=torch.int32)
        ids = self.in_flight.find(StepView(self.adapter, batch, counts, CAP))
        self.adapter.req_states.draft_tokens[slots] = ids
        return ids.tolist()

    def report(self):
        told = self.in_flight.report()
        return told.failfast_ahead, told.failfast_rest


@pytest.fixture
def worker():
    return Worker()


def test_copies_are_found_for_each_request_in_its_own_text(worker):
    """Catches slots mixed up, ids that are none, and texts that are read beyond their end."""
    copies = worker.step({})
    assert copies == [[7, 8, 9, 5, 6, 7], [0] * CAP]


def test_lengths_are_chosen_from_the_last_step_that_has_ended(worker):
    """Catches a match of the running step, which a GPU has not found yet, and limits not kept."""
    worker.step({"a": [7], "b": [1]})
    assert worker.report() == ({"a": CAP, "b": 2}, (1, 0.0))
    worker.step({"a": [3], "b": [2]})
    worker.report()
    assert worker.planner.asked == [
        ([CAP, 2], [NOT_KNOWN, NOT_KNOWN]),
        ([CAP, 2], [3, 1]),  # of a 5 6 7, of b 1
    ]
    assert worker.planner.steps == [(["a", "b"], 2, 0)]


def test_nobody_drafts_beyond_its_end(worker):
    worker.adapter.req_states.max_seq_len[SLOTS["a"]] = 8 + 3
    worker.step({"a": [7], "b": [1]})
    worker.report()
    worker.step({"a": [8], "b": [2]})
    assert worker.report()[0]["a"] == 2, "one is left to the target"


def test_what_became_of_copies_is_learned_by_the_match_they_were_given_for(worker):
    worker.adapter.stats.on_round, told = (lambda r: told.append(r)), []
    worker.adapter.stats.drafts_only = True
    worker.step({"a": [7], "b": [1]})
    worker.report()
    worker.step({"a": [8], "b": [2]})
    worker.report()  # lengths for the next step, from 3 and 1
    worker.step({"a": [9, 5, 1], "b": [9]}, verified=(4, 2))
    worker.report()
    worker.step({"a": [1], "b": [9]}, verified=(0, 0))
    worker.report()
    (rounds,) = [r for r in worker.planner.rounds if r]
    assert [(r.req_id, r.num_verified, r.num_accepted, r.match_len) for r in rounds] == [
        ("a", 4, 2, 3),
        ("b", 2, 0, 1),
    ]
    assert [(r.emitted, r.drafted, r.known_len) for r in told] == [
        ([9, 5, 1], [9, 5, 6, 7], 9),
        ([9], [3, 4], 6),
    ]
    assert worker.planner.steps[-1] == (["a", "b"], 8, 6)
    assert (worker.adapter.stats.num_copied, worker.adapter.stats.num_copied_accepted) == (6, 2)


def test_a_rest_is_announced_and_then_it_looks_again(worker):
    """Catches a verdict on matches from before the rest, after which the next one begins."""
    for sampled in ({"a": [7], "b": [1]}, {"a": [3], "b": [2]}):
        worker.step(sampled)
        worker.report()
    worker.planner.rest = 5
    worker.step({"a": [7], "b": [1]})
    assert worker.report() == ({}, (5, 0.0))
    assert not worker.in_flight.looks
    assert worker.report() == ({}, (1, 0.0))
    assert worker.in_flight.looks
    worker.step({"a": [8], "b": [2]})
    worker.report()
    assert worker.planner.asked[-1][1] == [NOT_KNOWN, NOT_KNOWN], "what was known is old"
    worker.step({"a": [9], "b": [4]})
    worker.report()
    assert worker.planner.asked[-1][1] == [2, 2], "of the step after the rest: 7 8, and 1 2"


@pytest.mark.parametrize("why", ["grammar", "embeddings", "trace"])
def test_it_ends_where_the_host_has_to_know_drafts(worker, why):
    if why == "embeddings":
        worker.adapter.embedded["b"] = torch.tensor([True])
    if why == "trace":
        worker.adapter.stats.on_round = print
    worker.step({"a": [7], "b": [1]}, structured=why == "grammar")
    assert worker.report() == (None, None)
    assert worker.left


def test_a_part_of_a_prompt_tells_nothing(worker):
    worker.step({"a": [7]})  # b reads its prompt
    worker.report()
    worker.step({"a": [8], "b": [1]})
    worker.report()
    assert worker.planner.asked[-1][1] == [3, NOT_KNOWN]


def test_who_has_ended_is_forgotten(worker):
    """Catches rounds after a request's end, and requests that stay for ever."""
    worker.adapter.stats.on_round, told = (lambda r: told.append(r.req_id)), []
    worker.adapter.stats.drafts_only = True
    for sampled in ({"a": [7], "b": [1]}, {"a": [8], "b": [2]}):
        worker.step(sampled)
        worker.report()
    worker.step({"a": [9], "b": [9]}, verified=(4, 2))  # b has ended before: vLLM leaves its 9 out
    worker.report()
    worker.in_flight.forget(["b"])
    worker.step({"a": [8]}, names=("a",), verified=(0,))
    worker.report()
    assert told == ["a"]
    assert [[r.req_id for r in rounds] for rounds in worker.planner.rounds if rounds] == [["a"]]
    assert worker.adapter.stats.num_copied == 4
    assert worker.in_flight.known.keys() == worker.in_flight.limits.keys() == {"a"}


def test_who_comes_back_starts_anew(worker):
    """Catches a session's next request that goes by the last step of the one before."""
    for sampled in ({"a": [7], "b": [1]}, {"a": [8], "b": [2]}):
        worker.step(sampled)
        worker.report()
    worker.in_flight.forget(["b"])
    worker.step({"a": [9], "b": [3]})
    worker.report()
    assert worker.planner.asked[-1][1] == [4, NOT_KNOWN]


def test_ids_that_nobody_wanted_when_the_step_ran_are_not_told(worker):
    """Catches rounds without tokens, whose receiver counts -1 as accepted."""
    for sampled in ({"a": [7], "b": [1]}, {"a": [8], "b": [2]}):
        worker.step(sampled)
        worker.report()
    worker.step({"a": [9, 5], "b": [9]}, verified=(4, 2))
    worker.adapter.stats.on_round, worker.adapter.stats.drafts_only = pytest.fail, True
    worker.step({"a": [1], "b": [9]})
    worker.report()
    assert worker.adapter.stats.num_copied == 6


def test_the_time_until_it_goes_ahead_again_is_nobodys():
    """Catches the steps of a grammar's time in those that look for copies."""
    told = []
    ahead = SimpleNamespace(rested=lambda *step: told.append(step))
    planner = SimpleNamespace(ahead=ahead, step_ended=lambda *step: told.append(step))
    session = Session(SimpleNamespace(planner=planner), DraftStats(), frozenset(), goes_ahead=True)
    session.leave_ahead()
    assert not session.goes_ahead
    assert told == [([], 0)] * 2


@pytest.fixture
def speculator():
    """One whose copies are scheduled ahead."""
    found = object.__new__(CopySpeculator)
    found.draft_tokens, found.session = torch.full((4, CAP), 7), None
    found.params, found.embedded = [None], {}
    found.req_states = SimpleNamespace(req_id_to_index={"a": 0})
    found.forgotten = []
    found.in_flight = SimpleNamespace(
        looks=True, find=pytest.fail, forget=lambda ids: found.forgotten.extend(ids)
    )
    return found


def test_a_dummy_run_looks_for_no_copies(speculator):
    batch = SimpleNamespace(num_reqs=2, num_tokens=2)
    assert speculator.propose(batch, *[None] * 10, dummy_run=True).tolist() == [[0] * CAP] * 2


def test_limits_are_read_again_where_a_session_goes_on(speculator):
    """Catches the end of a session's first request as the end of its next."""
    new = SimpleNamespace(req_id="a", sampling_params="of a", prompt_embeds=None)
    speculator.add_requests(SimpleNamespace(scheduled_new_reqs=[new]))
    assert speculator.forgotten == ["a"]
