"""Rules of other papers; none measured better than `failfast` beyond noise (docs/policies.md)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from failfast_vllm.drafting.interfaces import DraftSoFar, Policy, Verdict
from failfast_vllm.drafting.ledger import PerRequest
from failfast_vllm.drafting.records import Lengths, Round, to_device
from failfast_vllm.policies.parameters import arm_names, choice, integer, number
from failfast_vllm.policies.rules import Fixed, NamedPolicy, TokenRule

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Svip(TokenRule):
    """sqrt(c * H_i) > h, on the draft's entropy (SVIP, arXiv 2411.18462)."""

    default_cap = 40
    needs_entropy = True
    entropy_factor: float = number(0.15, 0, 100, "factor of the entropy in nats")
    entropy_threshold: float = number(
        0.3, 0, 100, "a draft ends after a token with sqrt(entropy_factor * entropy) above this"
    )

    def fires(self, draft: DraftSoFar) -> torch.Tensor:
        assert draft.entropies is not None
        return (self.entropy_factor * draft.entropies).sqrt() > self.entropy_threshold


@dataclass(frozen=True)
class Survival(TokenRule):
    """s_i = p_1 * ... * p_i < eps (FlexDraft, arXiv 2605.20022).

    One token longer than theirs, max{i: s_i >= eps}: the token that fires stays.
    """

    survival_threshold: float = number(
        0.01, 0, 1, "a draft ends where it is less probable than this as a whole"
    )

    def fires(self, draft: DraftSoFar) -> torch.Tensor:
        return draft.confidences.cumprod(dim=1) < self.survival_threshold


@dataclass(eq=False)
class AdaEdl(TokenRule):
    """1 - sqrt(g * H_i) < lambda: an entropy bound on the acceptance (AdaEDL, arXiv 2410.18351).

    Per request lambda follows the acceptance a of its rounds towards alpha:
    r <- .5 r + .5 a, then lambda <- .9 lambda + .1 (lambda + .01 sign(alpha - r)).
    Both start neutral: r at alpha, lambda at `initial_threshold`, which the paper does not state.
    """

    needs_entropy = True
    entropy_factor: float = number(0.2, 0, 100, "factor of the entropy in nats")
    target_acceptance: float = number(0.9, 0, 1, "acceptance rate that the threshold steers to")
    initial_threshold: float = number(0.4, 0, 1, "threshold until a request has its first outcome")

    def __post_init__(self) -> None:
        self.states = PerRequest((self.initial_threshold, self.target_acceptance))  # lambda, r

    def begin(self, req_ids: Sequence[str], max_draft_lens: Lengths) -> Lengths:
        self._thresholds = np.array([self.states[r][0] for r in req_ids], np.float32)  # [num_seqs]
        return max_draft_lens

    def fires(self, draft: DraftSoFar) -> torch.Tensor:
        assert draft.entropies is not None
        thresholds = to_device(self._thresholds, draft.seqs.device)[draft.seqs]
        bounds = 1.0 - (self.entropy_factor * draft.entropies).sqrt()
        return bounds < thresholds[:, None]

    def observe(self, rounds: Sequence[Round]) -> None:
        for outcome in rounds:
            threshold, rate = self.states[outcome.req_id]
            acceptance = outcome.num_accepted / outcome.num_verified
            rate += 0.5 * (acceptance - rate)
            threshold += (1 - 0.9) * (0.01 * float(np.sign(self.target_acceptance - rate)))
            self.states[outcome.req_id] = (min(max(threshold, 0.0), 1.0), rate)

    def forget(self, req_ids: Iterable[str]) -> None:
        self.states.forget(req_ids)


@dataclass(eq=False)
class DiffuSpecAdl(Fixed):
    """The length is set before the round (DiffuSpec's adaptive length, arXiv 2510.02358).

    k = clip(floor(G) + d * [A >= G], k_min, k_max), where G and A are moving averages, per request,
    of the tokens drafted before the first stop token and of the tokens accepted. The first draft
    has k_min tokens; k_max is `num_speculative_tokens`.
    """

    default_cap = 30
    min_draft_len: int = integer(
        20, 1, None, "least length, and the length of a request's first draft"
    )
    length_step: int = integer(
        10, 0, None, "tokens added while the average draft is accepted whole"
    )
    smoothing: float = number(0.5, 0, 1, "weight of the latest outcome in the averages")

    def __post_init__(self) -> None:
        self.averages = PerRequest[tuple[float, float] | None](None)  # G, A

    def begin(self, req_ids: Sequence[str], max_draft_lens: Lengths) -> Lengths:
        wanted = np.zeros_like(max_draft_lens)
        for i, req_id in enumerate(req_ids):
            generated, accepted = self.averages[req_id] or (0.0, -1.0)
            wanted[i] = int(generated) + self.length_step * (accepted >= generated)
        lens: Lengths = np.minimum(np.maximum(wanted, self.min_draft_len), max_draft_lens)
        return lens

    def observe(self, rounds: Sequence[Round]) -> None:
        for outcome in rounds:
            generated = float(outcome.num_drafted - outcome.ends_at_stop)
            g, a = self.averages[outcome.req_id] or (generated, float(outcome.num_accepted))
            g += self.smoothing * (generated - g)
            a += self.smoothing * (outcome.num_accepted - a)
            self.averages[outcome.req_id] = (g, a)

    def forget(self, req_ids: Iterable[str]) -> None:
        self.averages.forget(req_ids)


DEFAULT_ARMS = ("failfast", "confidence", "svip", "adaedl", "specdec++", "survival")


@dataclass(eq=False)
class TapOut(NamedPolicy):
    """A bandit whose arms are other policies, one arm per draft (TapOut, arXiv 2511.02017).

    Reward of a draft of k tokens, m of them accepted: a * m / cap + (1 - a) * m / k, in 0..1.
    UCB1 takes the arm with the highest mean + sqrt(2 ln t / n); Thompson sampling the one with the
    highest draw of Beta(1 + sum of rewards, 1 + sum of what they lack to 1), from a seeded
    generator. A draft counts as played when it begins, so that a batch spreads over the arms.
    """

    arms: Sequence[str] = arm_names(DEFAULT_ARMS, "the policies to choose among")
    bandit: str = choice("ucb1", ("ucb1", "thompson"), "how an arm is chosen")
    reward_weight: float = number(
        0.5, 0, 1, "weight of the accepted length; the rest is for the accepted share"
    )
    seed: int = integer(0, 0, 2**32 - 1, "seed of the draws of `thompson`")
    policies: Sequence[Policy] = ()  # of the arms
    cap: int = NamedPolicy.default_cap  # num_speculative_tokens

    def __post_init__(self) -> None:
        num_arms = len(self.policies)
        self.needs_entropy = any(policy.needs_entropy for policy in self.policies)
        self.calibration = next(filter(None, (p.calibration for p in self.policies)), None)
        self.num_plays = np.zeros(num_arms, dtype=np.int64)
        self.num_rewards = np.zeros(num_arms, dtype=np.int64)
        self.sum_rewards = np.zeros(num_arms)
        self._generator = np.random.default_rng(self.seed)
        self._arm_of = PerRequest(0)  # of each request's current draft

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
        self._chosen = np.zeros(len(req_ids), dtype=np.int64)  # [num_seqs] arms
        for i in np.flatnonzero(max_draft_lens > 0).tolist():
            self._chosen[i] = self._arm_of[req_ids[i]] = self.choose()
        lens = np.stack([policy.begin(req_ids, max_draft_lens) for policy in self.policies])
        picked: Lengths = np.take_along_axis(lens, self._chosen[None], axis=0)[0]
        return picked

    def extend(self, draft: DraftSoFar) -> Verdict:
        chosen = to_device(self._chosen, draft.seqs.device)[draft.seqs]
        lens, goes_on = draft.lens, draft.lens > 0
        for i in np.unique(self._chosen).tolist():
            verdict = self.policies[i].extend(draft)
            lens = verdict.lens.where(chosen == i, lens)
            goes_on = verdict.goes_on.where(chosen == i, goes_on)
        return Verdict(lens, goes_on)

    def observe(self, rounds: Sequence[Round]) -> None:
        of_arm: list[list[Round]] = [[] for _ in self.policies]
        for outcome in rounds:
            arm = self._arm_of[outcome.req_id]
            of_arm[arm].append(outcome)
            share = self.reward_weight * outcome.num_accepted / self.cap
            share += (1 - self.reward_weight) * outcome.num_accepted / outcome.num_verified
            self.num_rewards[arm] += 1
            self.sum_rewards[arm] += min(share, 1.0)
        for policy, its_rounds in zip(self.policies, of_arm, strict=True):
            policy.observe(its_rounds)

    def forget(self, req_ids: Iterable[str]) -> None:
        ended = tuple(req_ids)
        self._arm_of.forget(ended)
        for policy in self.policies:
            policy.forget(ended)
