"""Each length policy against a literal, one-token-at-a-time version."""

import numpy as np
import pytest
import torch

from cutting import Confidence
from failfast_vllm.integration.session import Session
from failfast_vllm.observe.counters import DraftStats
from failfast_vllm.policies.rules import FailFast
from failfast_vllm.policies.table import POLICIES
from scripted import STOP, Script, make_drafter, make_step, random_script

CAP = 60
SEEDS = range(40)


def literal_length(name, p, cap, increment):
    """Tokens and passes of a draft without stop tokens, by a rule with its default parameters."""
    length = passes = 0
    while length < cap:
        begin, length, passes = length, min(cap, length + increment), passes + 1
        doubts = [i for i in range(begin, length) if p[i] < (0.4 if name == "cutting" else 0.45)]
        if name == "failfast" and doubts:
            break
        if name == "cutting" and doubts:
            return doubts[0] + 1, passes
    return length, passes


@pytest.mark.parametrize("name", [*POLICIES, "cutting"])
def test_lengths_equal_the_literal_ones(name):
    """Catches a cut before the token that fires, an increment judged alone, padding that fires."""
    found_lens = set()
    for seed in SEEDS:
        script = random_script(seed)
        policy = Confidence(0.4) if name == "cutting" else POLICIES[name]()
        caps = np.random.default_rng(seed).choice([0, 1, 7, 35, CAP], 6)
        increment = (10, 4, 17)[seed % 3]
        drafts = make_drafter(policy, script, increment=increment).propose(make_step(script, caps))
        expected = [
            literal_length(name, p, cap, increment)
            for p, cap in zip(script.confidences.tolist(), caps, strict=True)
        ]
        assert list(zip(drafts.lens, drafts.num_passes, strict=True)) == expected
        for i, length in enumerate(drafts.lens):
            assert drafts.token_ids[i, :length].tolist() == script.tokens[i, :length].tolist()
            kept = drafts.confidences[i, :length]
            assert kept.tolist() == script.confidences[i, :length].tolist()
        assert (drafts.num_confidences == drafts.lens).all()
        found_lens |= set(drafts.lens.tolist())
    assert len(found_lens) >= 3


def test_a_stop_token_ends_a_draft_only_before_the_rule_does():
    """Catches a stop token behind the cut that counts, or a rule that fires behind a stop token."""
    tokens = [[0, 0, STOP, 0, 0], [0, 0, 0, STOP, 0], [0, STOP, 0, 0, 0]]
    confidences = [[0.9, 0.9, 0.9, 0.1, 0.9], [0.9, 0.1, 0.9, 0.9, 0.9], [0.9, 0.1, 0.9, 0.9, 0.9]]
    script = Script([5, 6, 7], tokens, confidences)
    drafts = make_drafter(Confidence(0.4), script, increment=5).propose(make_step(script, [5] * 3))
    assert drafts.lens.tolist() == [3, 2, 2]
    assert drafts.ends_at_stop.tolist() == [True, False, True]


def test_padding_does_not_fire():
    """A budget gives increments of different length: catches a verdict on what is not there."""
    confidences = torch.tensor([[0.97, 0.97] + [1.0] * 8, [0.97] * 9 + [0.3]])
    lens, goes_on = Confidence(0.98).extend(torch.tensor([2, 10]), confidences)
    assert lens.tolist() == [1, 1]
    assert goes_on.tolist() == [False, False]
    lens, goes_on = Confidence(0.4).extend(torch.tensor([2, 10]), confidences)
    assert lens.tolist() == [2, 10]
    assert goes_on.tolist() == [True, False]


def test_lengths_do_not_depend_on_how_a_pass_is_split():
    """Catches per-sequence state that is looked up by the row of a part of the batch."""
    for name in POLICIES:
        script = random_script(3, num_seqs=9)
        lens = []
        for max_num_rows in (8192, 130):
            policy = POLICIES[name]()
            drafter = make_drafter(policy, script, max_num_rows=max_num_rows)
            script.num_forwards = 0
            lens.append(drafter.propose(make_step(script, [CAP] * 9)).lens.tolist())
        assert script.num_forwards > 2, "nothing was split"
        assert lens[0] == lens[1]


@pytest.mark.parametrize("name", POLICIES)
def test_one_copy_to_the_host_per_increment(name, monkeypatch):
    """Catches a policy that reads a tensor on the host: every such read waits for the device."""
    script = random_script(5)
    policy = POLICIES[name]()
    drafter = make_drafter(policy, script)
    copies = []

    def spying(method):
        original = getattr(torch.Tensor, method)

        def spy(self, *args, **kwargs):
            copies.append(method)
            return original(self, *args, **kwargs)

        return spy

    step = make_step(script, [CAP] * 6)
    for method in ("cpu", "item", "tolist", "nonzero", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, method, spying(method))
    drafter.propose(step)
    monkeypatch.undo()
    assert copies == ["cpu"] * script.num_forwards


def verify(session, req_ids, num_verified, num_emitted):
    """Tell a session what became of its open drafts."""
    emitted = [[0] * num for num in num_emitted]
    known_lens = [100] * len(req_ids)
    rounds = session.ledger.settle(req_ids, num_verified, emitted, known_lens, step=1, plain=False)
    session.stats.observe(rounds)
    session.drafter.planner.observe(rounds)


def test_rounds_pair_each_draft_with_its_verification():
    """Catches outcomes of requests without a draft, skipped requests, drafts reported twice."""
    script = random_script(4, num_seqs=4)
    session = Session(make_drafter(FailFast(), script), DraftStats(), frozenset())
    observed = []
    session.drafter.planner.observe = observed.extend
    step = make_step(script, [CAP, CAP, 0, CAP])
    drafts = session.drafter.propose(step)
    session.ledger.open(step.req_ids, drafts)
    n = drafts.lens.tolist()
    # r0 accepts all, r1 is not scheduled, r2 had no draft, r3 is preempted: nothing was verified
    verify(session, ["r3", "r2", "r0"], [0, 0, n[0]], [1, 1, n[0] + 1])
    assert [(o.req_id, o.num_drafted, o.num_accepted) for o in observed] == [("r0", n[0], n[0])]
    assert observed[0].confidences.tolist() == script.confidences[0, : n[0]].tolist()
    verify(session, ["r0", "r1", "r3"], [3, n[1] - 1, 3], [1, 1, 1])
    assert [(o.req_id, o.num_verified, o.num_accepted) for o in observed[1:]] == [
        ("r1", n[1] - 1, 0)
    ]
