"""Each length policy against a literal, one-token-at-a-time version; learning."""

import math

import numpy as np
import pytest
import torch

from failfast_vllm.drafting import ledger
from failfast_vllm.drafting.interfaces import DraftSoFar
from failfast_vllm.drafting.ledger import PerRequest
from failfast_vllm.drafting.records import Round
from failfast_vllm.integration.session import Session
from failfast_vllm.observe.counters import DraftStats
from failfast_vllm.planning.acceptance import Calibration
from failfast_vllm.policies.alternatives import AdaEdl, DiffuSpecAdl, TapOut
from failfast_vllm.policies.rules import Confidence, FailFast, SpecDecPlusPlus
from failfast_vllm.policies.table import POLICIES, make_policy, policy_parameters
from scripted import STOP, Script, make_drafter, make_step, random_script

CAP = 60
SEEDS = range(40)


def outcome(req_id="r", drafted=10, verified=None, accepted=0, confidences=(), stops=False):
    verified = drafted if verified is None else verified
    confidences = np.array(confidences, dtype=np.float32)
    return Round(req_id, drafted, drafted, verified, accepted, confidences, stops)


def trained_calibration(seed):
    rng = np.random.default_rng(seed)
    calibration = Calibration()
    for _ in range(300):
        confidences = rng.beta(6, 1, 20).astype(np.float32)
        accepted = int((rng.random(20) > confidences**2).argmax())
        calibration.observe([outcome(drafted=20, accepted=accepted, confidences=confidences)])
    return calibration


def fires(name, p, entropy, i, calibration):
    """Whether a rule with its default parameters ends the draft after token i, in plain Python."""
    if name == "confidence":
        return p[i] < 0.4
    if name == "svip":
        return math.sqrt(0.15 * entropy[i]) > 0.3
    if name == "adaedl":
        return 1 - math.sqrt(0.2 * entropy[i]) < 0.4
    if name == "survival":
        return math.prod(p[: i + 1]) < 0.01
    assert name == "specdec++"
    places = np.arange(i + 1)
    acceptances = calibration.probabilities(np.array(p[: i + 1], dtype=np.float32), places)
    return i + 1 >= 2 and 1 - math.prod(acceptances.tolist()) > 0.3


def literal_length(name, p, entropy, cap, increment, calibration):
    """Tokens and passes of a draft without stop tokens."""
    length = passes = 0
    while length < cap:
        begin, length, passes = length, min(cap, length + increment), passes + 1
        if name == "failfast" and any(p[i] < 0.45 for i in range(begin, length)):
            break
        if name == "goodput":
            break
        if name in ("failfast", "fixed", "diffuspec-adl"):
            continue
        fired = [i for i in range(begin, length) if fires(name, p, entropy, i, calibration)]
        if fired:
            return fired[0] + 1, passes
    return length, passes


SINGLE = [name for name in POLICIES if name != "tapout"]


@pytest.mark.parametrize("name", SINGLE)
def test_lengths_equal_the_literal_ones(name):
    """Catches a cut before the token that fires, an increment judged alone, padding that fires."""
    found_lens = set()
    for seed in SEEDS:
        script = random_script(seed)
        policy = make_policy(name, policy_parameters(name, {}, CAP), CAP)
        if name == "specdec++":
            policy.calibration = trained_calibration(seed)
        caps = np.random.default_rng(seed).choice([0, 1, 7, 35, CAP], 6)
        increment = (10, 4, 17)[seed % 3]
        drafts = make_drafter(policy, script, increment=increment).propose(make_step(script, caps))
        limits = np.minimum(caps, 20) if name == "diffuspec-adl" else caps
        expected = [
            literal_length(name, p, h, cap, increment, policy.calibration)
            for p, h, cap in zip(
                script.confidences.tolist(), script.entropies.tolist(), limits, strict=True
            )
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
    script = Script([5, 6, 7], tokens, confidences, np.zeros((3, 5)))
    drafts = make_drafter(Confidence(0.4), script, increment=5).propose(make_step(script, [5] * 3))
    assert drafts.lens.tolist() == [3, 2, 2]
    assert drafts.ends_at_stop.tolist() == [True, False, True]


def test_padding_does_not_fire():
    """A budget gives increments of different length: catches a verdict on what is not there."""
    calibration = Calibration()
    calibration.table = lambda: np.array([[0.95] * 14 + [0.1]] * 7)
    policy = SpecDecPlusPlus(0.3, 2, calibration)
    policy.begin(["r0", "r1"], np.array([10, 10]))
    confidences = torch.tensor([[0.97, 0.97] + [1.0] * 8, [0.97] * 10])
    lens = torch.tensor([2, 10])
    verdict = policy.extend(DraftSoFar(torch.arange(2), lens, confidences, None))
    assert verdict.goes_on.tolist()[0]
    assert verdict.lens.tolist()[0] == 2


def test_lengths_do_not_depend_on_how_a_pass_is_split():
    """Catches per-sequence state that is looked up by the row of a part of the batch."""
    for name in POLICIES:
        script = random_script(3, num_seqs=9)
        lens = []
        for max_num_rows in (8192, 130):
            policy = make_policy(name, policy_parameters(name, {}, CAP), CAP)
            drafter = make_drafter(policy, script, max_num_rows=max_num_rows)
            script.num_forwards = 0
            lens.append(drafter.propose(make_step(script, [CAP] * 9)).lens.tolist())
        assert script.num_forwards > 2, "nothing was split"
        assert lens[0] == lens[1]


@pytest.mark.parametrize("name", POLICIES)
def test_one_copy_to_the_host_per_increment(name, monkeypatch):
    """Catches a policy that reads a tensor on the host: every such read waits for the device."""
    script = random_script(5)
    policy = make_policy(name, policy_parameters(name, {}, CAP), CAP)
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
    session.learn(rounds)


def run_rounds(policy, script, num_rounds, target, **drafter_settings):
    """Draft and verify; `target` says how many of a draft's tokens are accepted."""
    drafter = make_drafter(policy, script, **drafter_settings)
    session = Session(drafter, DraftStats(), frozenset())
    step = make_step(script, [CAP] * len(script.known_lens))
    found = [(0, 0)] * len(step.req_ids)
    for _ in range(num_rounds):
        verified = [length for length, _ in found]
        verify(session, step.req_ids, verified, [accepted + 1 for _, accepted in found])
        drafts = drafter.propose(step)
        session.ledger.open(step.req_ids, drafts)
        found = [(n, target(i, n)) for i, n in enumerate(drafts.lens.tolist())]
        yield drafts, found


def test_adaedl_threshold_follows_the_acceptance_of_its_request():
    """Catches a threshold shared by all requests, a wrong sign, updates out of order."""
    script = random_script(1, num_seqs=2)
    policy = AdaEdl(0.2, 0.9, 0.4)
    expected = [(0.4, 0.9), (0.4, 0.9)]
    last = []
    for _, found in run_rounds(
        policy, script, 400, lambda seq, length: length if seq else length // 3
    ):
        for seq, (length, accepted) in enumerate(last):
            threshold, rate = expected[seq]
            rate = 0.5 * rate + 0.5 * accepted / length
            sign = 1 if rate < 0.9 else -1
            threshold = 0.9 * threshold + 0.1 * (threshold + 0.01 * sign)
            expected[seq] = (threshold, rate)
            assert policy.states[f"r{seq}"] == pytest.approx(expected[seq])
        last = found
    assert expected[0][0] > 0.5 > 0.3 > expected[1][0]


def test_adaedl_thresholds_decide():
    """Catches a threshold that is learned and not used."""
    script = Script([9, 9], [[0] * 10] * 2, [[0.5] * 10] * 2, [[0.5] * 10] * 2)
    policy = AdaEdl(0.2, 0.9, 0.4)
    policy.states["r1"] = (0.9, 0.9)
    assert make_drafter(policy, script).propose(make_step(script, [10, 10])).lens.tolist() == [
        10,
        1,
    ]


def test_diffuspec_lengths_equal_the_literal_ones():
    """Catches a stop token counted as generated, averages of one request used for another."""
    rng = np.random.default_rng(2)
    policy = DiffuSpecAdl(min_draft_len=5, length_step=10, smoothing=0.5)
    literal = {}
    lens = set()
    for _ in range(300):
        req_id = f"r{rng.integers(3)}"
        g, a = literal.get(req_id, (0, -1))
        k = min(max(math.floor(g) + (10 if a >= g else 0), 5), 30)
        assert policy.begin([req_id], np.array([30])).tolist() == [k]
        lens.add(k)
        stops = bool(rng.random() < 0.3)
        drafted = int(rng.integers(1, k + 1)) if stops else k
        accepted = drafted if rng.random() < 0.3 else int(rng.integers(drafted + 1))
        policy.observe([outcome(req_id, drafted, accepted=accepted, stops=stops)])
        generated = drafted - stops
        if req_id in literal:
            literal[req_id] = (0.5 * g + 0.5 * generated, 0.5 * a + 0.5 * accepted)
        else:
            literal[req_id] = (generated, accepted)
    assert len(lens) > 10


class Arm(FailFast):
    """An arm of its own name, so that plays can be told apart."""


def bandit(name, num_arms=4, seed=0):
    arms = [Arm(0.45) for _ in range(num_arms)]
    return TapOut(bandit=name, reward_weight=0.5, policies=arms, cap=10, seed=seed)


def play(policy, rates, num_rounds, rng):
    """The arms chosen by one request whose tokens are accepted at a rate per arm."""
    chosen = []
    for _ in range(num_rounds):
        policy.begin(["r"], np.array([10]))
        arm = int(policy._chosen[0])
        chosen.append(arm)
        policy.observe([outcome(drafted=10, accepted=int(rng.binomial(10, rates[arm])))])
    return np.array(chosen)


@pytest.mark.parametrize("name", ["ucb1", "thompson"])
def test_the_bandit_finds_the_best_arm(name):
    """Catches rewards given to another arm, a bonus that never shrinks, an arm never tried."""
    rates = np.array([0.3, 0.8, 0.5, 0.2])
    lost, tail = [], []
    for seed in range(5):
        chosen = play(bandit(name, seed=seed), rates, 4000, np.random.default_rng(seed))
        assert set(chosen) == {0, 1, 2, 3}
        regret = (rates.max() - rates[chosen]).cumsum()
        lost.append((regret[499], regret[3999]))
        tail.append((chosen[-500:] == 1).mean())
    early, late = np.mean(lost, axis=0)
    assert late < 3 * early, "eight times the rounds: linear regret would be eight times as large"
    assert np.mean(tail) > 0.8


def test_the_bandit_spreads_a_first_batch_over_its_arms():
    """Catches a batch that plays one arm because no reward has come in yet."""
    policy = bandit("ucb1")
    policy.begin([f"r{i}" for i in range(8)], np.array([10] * 6 + [0] * 2))
    assert sorted(policy._chosen[:4].tolist()) == [0, 1, 2, 3]
    assert policy.num_plays.sum() == 6, "a request without a draft plays no arm"


def test_bandit_rewards():
    policy = bandit("ucb1", num_arms=2)
    policy.begin(["a", "b"], np.array([10, 10]))
    policy.observe([outcome("b", 8, accepted=4), outcome("a", 5, accepted=5)])
    assert policy.sum_rewards.tolist() == pytest.approx([0.5 * 0.5 + 0.5, 0.5 * 0.4 + 0.5 * 0.5])


def test_bandits_on_two_ranks_choose_alike():
    """Catches the process's own randomness or hash order."""
    runs = [
        play(bandit("thompson", seed=3), [0.5, 0.6, 0.4, 0.5], 500, np.random.default_rng(0))
        for _ in range(2)
    ]
    assert (runs[0] == runs[1]).all()


def test_each_draft_follows_the_arm_that_it_plays():
    """Catches a verdict of one arm used for the drafts of another."""
    script = random_script(11, num_seqs=9)
    names = ("fixed", "confidence", "svip", "adaedl", "survival", "diffuspec-adl")
    parameters = policy_parameters("tapout", {"arms": names}, CAP)
    policy = make_policy("tapout", parameters, CAP)
    lens = make_drafter(policy, script).propose(make_step(script, [CAP] * 9)).lens
    assert len(set(policy._chosen[:6].tolist())) == 6
    for i, arm in enumerate(policy._chosen.tolist()):
        alone = make_policy(names[arm], policy_parameters(names[arm], {}, CAP), CAP)
        expected = make_drafter(alone, script).propose(make_step(script, [CAP] * 9)).lens
        assert lens[i] == expected[i]


def test_specdec_learns_from_verification():
    """Catches a calibration that nobody feeds: overconfident drafts must become shorter."""
    script = Script([3] * 4, [[1] * CAP] * 4, [[0.97] * CAP] * 4, np.zeros((4, CAP)))
    policy = SpecDecPlusPlus(0.3, 2, Calibration())
    runs = run_rounds(policy, script, 60, lambda seq, length: min(length, 1))
    lens = [drafts.lens.tolist() for drafts, _ in runs]
    assert min(lens[0]) > 5
    assert lens[-1] == [2] * 4


def test_rounds_pair_each_draft_with_its_verification():
    """Catches outcomes of requests without a draft, skipped requests, drafts reported twice."""
    script = random_script(4, num_seqs=4)
    policy = AdaEdl(0.2, 0.9, 0.4)
    session = Session(make_drafter(policy, script), DraftStats(), frozenset())
    observed = []
    policy.observe = observed.extend
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


def test_state_ends_with_its_request():
    """Catches a server whose memory grows with every request."""
    script = random_script(4)
    for name in ("adaedl", "diffuspec-adl", "tapout"):
        parameters = {"arms": ("adaedl", "diffuspec-adl")} if name == "tapout" else {}
        policy = make_policy(name, policy_parameters(name, parameters, CAP), CAP)
        for _ in run_rounds(policy, script, 4, lambda seq, length: length // 2):
            pass
        arms = policy.policies if name == "tapout" else (policy,)
        states = [getattr(arm, "states", None) or arm.averages for arm in arms]
        assert sum(map(len, states)) >= 6
        policy.forget(["r0", "r1", "r2", "r3", "r4"])
        assert all(len(state) <= 1 for state in states)
        assert name != "tapout" or len(policy._arm_of) == 1


def test_state_of_requests_that_nobody_ends_is_bounded(monkeypatch):
    monkeypatch.setattr(ledger, "MAX_REQUESTS", 3)
    states = PerRequest(0)
    for i in (1, 2, 3, 1, 4):
        states[f"r{i}"] = i
    assert [states[f"r{i}"] for i in (1, 2, 3, 4)] == [1, 0, 3, 4]
