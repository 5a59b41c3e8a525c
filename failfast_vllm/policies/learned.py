"""Policies that learn from verification, and the table of all policies by name. Torch only.

State of a request lives from its first draft to its end; of requests whose end nobody reports only
the latest `MAX_REQUESTS` are kept.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from failfast_vllm.config import policy_parameters
from failfast_vllm.drafting.ledger import PerRequest
from failfast_vllm.drafting.records import Lengths, Round
from failfast_vllm.planning.acceptance import CONFIDENCE_EDGES, Calibration, position_buckets
from failfast_vllm.policies.rules import (
    Confidence,
    DraftSoFar,
    FailFast,
    Fixed,
    Goodput,
    Policy,
    Survival,
    Svip,
    TokenRule,
    Verdict,
)


class AdaEdl(TokenRule):
    """1 - sqrt(g * H_i) < lambda: an entropy bound on the acceptance (AdaEDL, arXiv 2410.18351).

    Per request lambda follows the acceptance a of its rounds towards alpha:
    r <- .5 r + .5 a, then lambda <- .9 lambda + .1 (lambda + .01 sign(alpha - r)).
    Both start neutral: r at alpha, lambda at `initial_threshold`, which the paper does not state.
    """

    needs_entropy = True
    learns = True
    rate_smoothing, threshold_smoothing, threshold_step = 0.5, 0.9, 0.01

    def __init__(
        self, entropy_factor: float, target_acceptance: float, initial_threshold: float
    ) -> None:
        self.entropy_factor = entropy_factor
        self.target_acceptance = target_acceptance
        self.states = PerRequest((initial_threshold, target_acceptance))  # lambda, r
        self._thresholds = torch.empty(0)

    def begin(self, req_ids: Sequence[str], max_draft_lens: Lengths) -> Lengths:
        self._thresholds = torch.tensor([self.states[r][0] for r in req_ids], dtype=torch.float32)
        return max_draft_lens

    def fires(self, draft: DraftSoFar) -> torch.Tensor:
        assert draft.entropies is not None
        thresholds = self._thresholds.to(draft.seqs.device, non_blocking=True)[draft.seqs]
        bounds = 1.0 - (self.entropy_factor * draft.entropies).sqrt()
        return bounds < thresholds[:, None]

    def observe(self, outcomes: Sequence[Round]) -> None:
        for outcome in outcomes:
            threshold, rate = self.states[outcome.req_id]
            acceptance = outcome.num_accepted / outcome.num_verified
            rate += (1 - self.rate_smoothing) * (acceptance - rate)
            step = self.threshold_step * float(np.sign(self.target_acceptance - rate))
            threshold += (1 - self.threshold_smoothing) * step
            self.states[outcome.req_id] = (min(max(threshold, 0.0), 1.0), rate)

    def forget(self, req_ids: Iterable[str]) -> None:
        self.states.forget(req_ids)


class SpecDecPlusPlus(TokenRule):
    """1 - f_1 * ... * f_i > h: the chance of a rejection so far (SpecDec++, arXiv 2405.19715).

    Theirs is a trained head; here f is the calibrated confidence, learned while serving.
    """

    def __init__(
        self, rejection_threshold: float, min_draft_len: int, calibration: Calibration
    ) -> None:
        self.rejection_threshold = rejection_threshold
        self.min_draft_len = min_draft_len
        self.calibration = calibration
        self._table = torch.empty(0)  # set by `begin`
        self._edges = torch.from_numpy(CONFIDENCE_EDGES)

    def begin(self, req_ids: Sequence[str], max_draft_lens: Lengths) -> Lengths:
        assert self.calibration is not None
        buckets = position_buckets(np.arange(max_draft_lens.max(initial=0)))
        self._table = torch.from_numpy(self.calibration.table()[buckets]).float()
        return max_draft_lens

    def fires(self, draft: DraftSoFar) -> torch.Tensor:
        device = draft.seqs.device
        table = self._table.to(device, non_blocking=True)  # [longest draft, num_bins]
        self._edges = self._edges.to(device)
        bins = torch.bucketize(draft.confidences, self._edges, right=True)
        rows = torch.arange(bins.shape[1], device=device)
        rejection = 1.0 - table[rows, bins].cumprod(dim=1)
        return (rejection > self.rejection_threshold) & (rows >= self.min_draft_len - 1)


class DiffuSpecAdl(Policy):
    """The length is set before the round (DiffuSpec's adaptive length, arXiv 2510.02358).

    k = clip(floor(G) + d * [A >= G], k_min, k_max), where G and A are moving averages, per request,
    of the tokens drafted before the first stop token and of the tokens accepted. The first draft
    has k_min tokens; k_max is `num_speculative_tokens`.
    """

    learns = True

    def __init__(self, min_draft_len: int, length_step: int, smoothing: float) -> None:
        self.min_draft_len = min_draft_len
        self.length_step = length_step
        self.smoothing = smoothing
        self.averages = PerRequest[tuple[float, float] | None](None)  # G, A

    def begin(self, req_ids: Sequence[str], max_draft_lens: Lengths) -> Lengths:
        wanted = np.array([self._length(req_id) for req_id in req_ids], dtype=np.int64)
        lens: Lengths = np.minimum(np.maximum(wanted, self.min_draft_len), max_draft_lens)
        return lens

    def _length(self, req_id: str) -> int:
        averages = self.averages[req_id]
        if averages is None:
            return self.min_draft_len
        generated, accepted = averages
        return int(generated) + self.length_step * (accepted >= generated)

    def extend(self, draft: DraftSoFar) -> Verdict:
        return Verdict(draft.lens, torch.ones_like(draft.lens, dtype=torch.bool))

    def observe(self, outcomes: Sequence[Round]) -> None:
        for outcome in outcomes:
            generated = float(outcome.num_drafted - outcome.ends_at_stop)
            found = (generated, float(outcome.num_accepted))
            g, a = self.averages[outcome.req_id] or found
            g += self.smoothing * (found[0] - g)
            a += self.smoothing * (found[1] - a)
            self.averages[outcome.req_id] = (g, a)

    def forget(self, req_ids: Iterable[str]) -> None:
        self.averages.forget(req_ids)


class TapOut(Policy):
    """A bandit whose arms are other policies, one arm per draft (TapOut, arXiv 2511.02017).

    Reward of a draft of k tokens, m of them accepted: a * m / cap + (1 - a) * m / k, in 0..1.
    UCB1 takes the arm with the highest mean + sqrt(2 ln t / n); Thompson sampling the one with the
    highest draw of Beta(1 + sum of rewards, 1 + sum of what they lack to 1), from a seeded
    generator. A draft counts as played when it begins, so that a batch spreads over the arms.
    """

    learns = True

    def __init__(
        self, arms: Mapping[str, Policy], bandit: str, reward_weight: float, cap: int, seed: int
    ) -> None:
        self.names = tuple(arms)
        self.arms = tuple(arms.values())
        self.bandit = bandit
        self.reward_weight = reward_weight
        self.cap = cap
        self.needs_entropy = any(arm.needs_entropy for arm in self.arms)
        found = (arm.calibration for arm in self.arms if arm.calibration is not None)
        self.calibration = next(found, None)
        self.num_plays = np.zeros(len(self.arms), dtype=np.int64)
        self.num_rewards = np.zeros(len(self.arms), dtype=np.int64)
        self.sum_rewards = np.zeros(len(self.arms))
        self._generator = np.random.default_rng(seed)
        self._arm_of = PerRequest(0)  # of each request's current draft
        self._chosen = np.empty(0, dtype=np.int64)  # [num_seqs] of the current step

    def choose(self) -> int:
        """The arm of the next draft; it counts as played."""
        unplayed = np.flatnonzero(self.num_plays == 0)
        if unplayed.size:
            arm = int(unplayed[0])
        elif self.bandit == "thompson":
            lacking = self.num_rewards - self.sum_rewards
            arm = int(self._generator.beta(1 + self.sum_rewards, 1 + lacking).argmax())
        else:
            means = self.sum_rewards / np.maximum(self.num_rewards, 1)
            bonus = np.sqrt(2 * np.log(self.num_plays.sum()) / self.num_plays)
            arm = int((means + bonus).argmax())
        self.num_plays[arm] += 1
        return arm

    def begin(self, req_ids: Sequence[str], max_draft_lens: Lengths) -> Lengths:
        self._chosen = np.zeros(len(req_ids), dtype=np.int64)
        for i in np.flatnonzero(max_draft_lens > 0).tolist():
            self._chosen[i] = self._arm_of[req_ids[i]] = self.choose()
        lens = np.stack([arm.begin(req_ids, max_draft_lens) for arm in self.arms])
        picked: Lengths = np.take_along_axis(lens, self._chosen[None], axis=0)[0]
        return picked

    def extend(self, draft: DraftSoFar) -> Verdict:
        chosen = torch.from_numpy(self._chosen).to(draft.seqs.device, non_blocking=True)[draft.seqs]
        lens, goes_on = draft.lens, torch.ones_like(draft.lens, dtype=torch.bool)
        for i in np.unique(self._chosen).tolist():
            verdict = self.arms[i].extend(draft)
            lens = torch.where(chosen == i, verdict.lens, lens)
            goes_on = torch.where(chosen == i, verdict.goes_on, goes_on)
        return Verdict(lens, goes_on)

    def observe(self, outcomes: Sequence[Round]) -> None:
        of_arm: list[list[Round]] = [[] for _ in self.arms]
        for outcome in outcomes:
            arm = self._arm_of[outcome.req_id]
            of_arm[arm].append(outcome)
            share = self.reward_weight * outcome.num_accepted / self.cap
            share += (1 - self.reward_weight) * outcome.num_accepted / outcome.num_verified
            self.num_rewards[arm] += 1
            self.sum_rewards[arm] += min(share, 1.0)
        for policy, its_outcomes in zip(self.arms, of_arm, strict=True):
            policy.observe(its_outcomes)

    def forget(self, req_ids: Iterable[str]) -> None:
        ended = tuple(req_ids)
        self._arm_of.forget(ended)
        for arm in self.arms:
            arm.forget(ended)


RULES: dict[str, type[Policy]] = {
    "failfast": FailFast,
    "fixed": Fixed,
    "goodput": Goodput,
    "confidence": Confidence,
    "svip": Svip,
    "survival": Survival,
    "adaedl": AdaEdl,
    "diffuspec-adl": DiffuSpecAdl,
}


def make_policy(name: str, parameters: Mapping[str, Any], cap: int) -> Policy:
    """Build the policy that the configuration names.

    Args:
        parameters: all that `config.POLICIES` lists for it.
        cap: `num_speculative_tokens`.
    """
    if name == "specdec++":
        return SpecDecPlusPlus(**parameters, calibration=Calibration())
    if name == "tapout":
        rest = {key: value for key, value in parameters.items() if key != "arms"}
        arms = {
            arm: make_policy(arm, policy_parameters(arm, {}, cap), cap)
            for arm in parameters["arms"]
        }
        return TapOut(arms, cap=cap, **rest)
    return RULES[name](**parameters)
