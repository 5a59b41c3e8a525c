"""A bandit over the other policies; it measured no better than `failfast` (docs/policies.md)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from failfast_vllm.drafting.interfaces import DraftSoFar, Policy, Verdict
from failfast_vllm.drafting.ledger import PerRequest
from failfast_vllm.drafting.records import Lengths, Round
from failfast_vllm.policies.parameters import arm_names, choice, integer, number
from failfast_vllm.policies.rules import NamedPolicy

DEFAULT_ARMS = ("failfast", "confidence", "svip", "adaedl", "specdec++", "survival")


@dataclass(eq=False)
class TapOut(NamedPolicy):
    """A bandit whose arms are other policies, one arm per draft (TapOut, arXiv 2511.02017).

    Reward of a draft of k tokens, m of them accepted: a * m / cap + (1 - a) * m / k, in 0..1.
    UCB1 takes the arm with the highest mean + sqrt(2 ln t / n); Thompson sampling the one with the
    highest draw of Beta(1 + sum of rewards, 1 + sum of what they lack to 1), from a seeded
    generator. A draft counts as played when it begins, so that a batch spreads over the arms.
    """

    learns = True
    is_arm = False

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
        calibrations = (policy.calibration for policy in self.policies)
        self.calibration = next((found for found in calibrations if found is not None), None)
        self.num_plays = np.zeros(num_arms, dtype=np.int64)
        self.num_rewards = np.zeros(num_arms, dtype=np.int64)
        self.sum_rewards = np.zeros(num_arms)
        self._generator = np.random.default_rng(self.seed)
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
        lens = np.stack([policy.begin(req_ids, max_draft_lens) for policy in self.policies])
        picked: Lengths = np.take_along_axis(lens, self._chosen[None], axis=0)[0]
        return picked

    def extend(self, draft: DraftSoFar) -> Verdict:
        import torch

        chosen = torch.from_numpy(self._chosen).to(draft.seqs.device, non_blocking=True)[draft.seqs]
        lens, goes_on = draft.lens, draft.lens > 0
        for i in np.unique(self._chosen).tolist():
            verdict = self.policies[i].extend(draft)
            lens = torch.where(chosen == i, verdict.lens, lens)
            goes_on = torch.where(chosen == i, verdict.goes_on, goes_on)
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
