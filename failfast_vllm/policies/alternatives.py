"""Rules of other papers; none measured better than `failfast` beyond noise (docs/policies.md).

State of a request lives from its first draft to its end; of requests whose end nobody reports only
the latest `ledger.MAX_REQUESTS` are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from failfast_vllm.drafting.interfaces import DraftSoFar, Verdict
from failfast_vllm.drafting.ledger import PerRequest
from failfast_vllm.drafting.records import Lengths, Round
from failfast_vllm.policies.parameters import length, number
from failfast_vllm.policies.rules import NamedPolicy, TokenRule

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
    learns = True
    rate_smoothing: ClassVar[float] = 0.5
    threshold_smoothing: ClassVar[float] = 0.9
    threshold_step: ClassVar[float] = 0.01

    entropy_factor: float = number(0.2, 0, 100, "factor of the entropy in nats")
    target_acceptance: float = number(0.9, 0, 1, "acceptance rate that the threshold steers to")
    initial_threshold: float = number(0.4, 0, 1, "threshold until a request has its first outcome")
    states: PerRequest[tuple[float, float]] = field(init=False, repr=False)  # lambda, r
    _thresholds: torch.Tensor = field(init=False, repr=False)  # [num_seqs] lambda, of this step

    def __post_init__(self) -> None:
        self.states = PerRequest((self.initial_threshold, self.target_acceptance))

    def begin(self, req_ids: Sequence[str], max_draft_lens: Lengths) -> Lengths:
        import torch

        self._thresholds = torch.tensor([self.states[r][0] for r in req_ids], dtype=torch.float32)
        return max_draft_lens

    def fires(self, draft: DraftSoFar) -> torch.Tensor:
        assert draft.entropies is not None
        thresholds = self._thresholds.to(draft.seqs.device, non_blocking=True)[draft.seqs]
        bounds = 1.0 - (self.entropy_factor * draft.entropies).sqrt()
        return bounds < thresholds[:, None]

    def observe(self, rounds: Sequence[Round]) -> None:
        for outcome in rounds:
            threshold, rate = self.states[outcome.req_id]
            acceptance = outcome.num_accepted / outcome.num_verified
            rate += (1 - self.rate_smoothing) * (acceptance - rate)
            step = self.threshold_step * float(np.sign(self.target_acceptance - rate))
            threshold += (1 - self.threshold_smoothing) * step
            self.states[outcome.req_id] = (min(max(threshold, 0.0), 1.0), rate)

    def forget(self, req_ids: Iterable[str]) -> None:
        self.states.forget(req_ids)


@dataclass(eq=False)
class DiffuSpecAdl(NamedPolicy):
    """The length is set before the round (DiffuSpec's adaptive length, arXiv 2510.02358).

    k = clip(floor(G) + d * [A >= G], k_min, k_max), where G and A are moving averages, per request,
    of the tokens drafted before the first stop token and of the tokens accepted. The first draft
    has k_min tokens; k_max is `num_speculative_tokens`.
    """

    default_cap = 30
    one_pass = True
    learns = True

    min_draft_len: int = length(20, 1, "least length, and the length of a request's first draft")
    length_step: int = length(10, 0, "tokens added while the average draft is accepted whole")
    smoothing: float = number(0.5, 0, 1, "weight of the latest outcome in the averages")
    averages: PerRequest[tuple[float, float] | None] = field(init=False, repr=False)  # G, A

    def __post_init__(self) -> None:
        self.averages = PerRequest(None)

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
        return Verdict(draft.lens, draft.lens > 0)  # always, up to the length set before

    def observe(self, rounds: Sequence[Round]) -> None:
        for outcome in rounds:
            generated = float(outcome.num_drafted - outcome.ends_at_stop)
            found = (generated, float(outcome.num_accepted))
            g, a = self.averages[outcome.req_id] or found
            g += self.smoothing * (found[0] - g)
            a += self.smoothing * (found[1] - a)
            self.averages[outcome.req_id] = (g, a)

    def forget(self, req_ids: Iterable[str]) -> None:
        self.averages.forget(req_ids)
