"""The one memory of open drafts: what it pairs, what it forgets, and for whom."""

import numpy as np

from failfast_vllm.drafting.ledger import Ledger
from failfast_vllm.policies.rules import FailFast
from scripted import Script, make_drafter, make_step

CAP = 12
IDS = ["r0", "r1", "r2"]


def opened(ledger, max_draft_lens=(CAP, CAP, 0), token_ids=True):
    """Three sequences, of which the last has no draft; its commit takes a row or none."""
    script = Script([3, 40, 64], [[1] * CAP] * 3, [[0.9] * CAP] * 3)
    drafts = make_drafter(FailFast(0.45), script).propose(make_step(script, max_draft_lens))
    ledger.open(IDS, drafts, drafts.to_lists() if token_ids else ())
    return drafts


def settle(ledger, num_verified, emitted, *, plain=False):
    return ledger.settle(IDS, num_verified, emitted, [100, 200, 300], step=7, plain=plain)


def test_a_round_says_what_became_of_its_draft():
    ledger = Ledger()
    drafts = opened(ledger)
    assert len(ledger) == 2
    found = settle(ledger, [CAP, 5, 0], [[1, 1, 9], [1] * 5 + [8], [4]])
    assert [r.req_id for r in found] == ["r0", "r1"]
    first, second = found
    assert (first.num_drafted, first.num_verified, first.num_accepted) == (CAP, CAP, 2)
    assert (second.num_drafted, second.num_verified, second.num_accepted) == (CAP, 5, 5)
    assert (second.drafted, second.emitted) == ([1] * 5, [1] * 5 + [8])
    assert len(second.confidences) == CAP
    assert [len(r.judged_confidences) for r in found] == [3, 5]
    assert [r.num_passes for r in found] == drafts.num_passes[:2].tolist()
    assert [r.num_rows for r in found] == drafts.seq_rows[:2].tolist()
    assert [r.known_len for r in found] == [100 - 3, 200 - 6]
    assert {(r.step, r.num_seqs) for r in found} == {(7, 3)}
    assert len(ledger) == 0


def test_rounds_without_a_draft_are_for_those_who_ask():
    """Catches plain rounds that policies learn from, and traces that lack them."""
    emitted = [[1, 2], [5], [4]]
    for plain, expected in ((False, [("r0", 3)]), (True, [("r0", 3), ("r1", 0), ("r2", 0)])):
        ledger = Ledger()
        opened(ledger)
        found = settle(ledger, [3, 0, 0], emitted, plain=plain)
        assert [(r.req_id, r.num_verified) for r in found] == expected
        assert len(ledger) == 0
    assert found[1].num_passes > 0, "what a draft took, though the scheduler has dropped it"
    assert [len(r.emitted) for r in found] == [2, 1, 1]
    assert (found[2].num_passes, found[2].num_rows, found[2].drafted) == (0, 0, [])


def test_a_draft_waits_until_its_request_is_sampled():
    ledger = Ledger()
    opened(ledger)
    assert settle(ledger, [0, 0, 0], [[], [], [3]]) == []
    (found,) = settle(ledger, [4, 0, 0], [[1], [], []])
    assert (found.req_id, found.num_verified, found.num_accepted) == ("r0", 4, 0)
    ledger.forget(["r1"])
    assert settle(ledger, [0, 4, 0], [[], [1, 2], []]) == []


def test_a_draft_is_verified_once():
    """Catches tokens that nobody has drafted, which vLLM schedules in its warm-up."""
    ledger = Ledger()
    opened(ledger)
    assert len(settle(ledger, [CAP, CAP, CAP], [[1], [1], [1]])) == 2
    assert settle(ledger, [CAP, CAP, CAP], [[1], [1], [1]]) == []
    assert [r.num_verified for r in settle(ledger, [CAP] * 3, [[1]] * 3, plain=True)] == [0, 0, 0]


def test_token_ids_are_kept_for_those_who_ask():
    ledger = Ledger()
    opened(ledger, token_ids=False)
    (found, _) = settle(ledger, [4, 4, 0], [[1], [1], [1]])
    assert (found.num_verified, found.drafted) == (4, [])


def test_the_next_step_takes_the_place_of_a_draft():
    ledger = Ledger()
    opened(ledger)
    opened(ledger, (0, 5, 0))
    assert len(ledger) == 1
    (found,) = settle(ledger, [3, 3, 0], [[1], [1], [1]])
    assert (found.req_id, found.num_drafted) == ("r1", 5)


def test_what_a_pass_drafted_is_known_where_it_is_not_verified():
    """Catches rows and confidences that are lost with tokens that the planner has cut."""
    ledger, drafts = Ledger(), opened(Ledger())
    drafts.lens = np.array([4, 0, 0])
    ledger.open(IDS, drafts)
    first, second, third = settle(ledger, [4, 0, 0], [[1], [1], [1]], plain=True)
    assert (first.num_drafted, len(first.confidences)) == (4, CAP)
    assert (second.num_drafted, len(second.confidences)) == (0, CAP)
    assert second.num_rows == drafts.seq_rows[1] > 0
    assert (third.num_rows, third.num_passes) == (0, 0)
