"""How many copied tokens to verify in steps that are scheduled ahead. NumPy only.

While a step runs, vLLM schedules the next one. Its copies are found on the device once the running
step has ended, so what the planner goes by is a step older:

    step t - 1    has ended: the match that its copies begin with is known
    step t        runs, with the copies that begin there
    step t + 1    is scheduled now

The chance of its tokens is learned from that match, as `CopyAcceptance` learns it from their own.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np

from failfast_vllm.drafting.interfaces import AheadPlanner
from failfast_vllm.drafting.records import NOT_KNOWN, Lengths, Round
from failfast_vllm.planning.copies import (
    MATCH_EDGES,
    CopyAcceptance,
    LookBalance,
    choose_copies,
)
from failfast_vllm.planning.costs import HICCUP, LEARNED_STEPS, OVERHEAD_RATE, CostTable, Floats

# A bin for no match, and for each of `MATCH_EDGES`; measured on answers of a chat model.
FORESEEN_EDGES = np.concatenate(([1], MATCH_EDGES)).astype(np.float32)
FORESEEN_PRIORS = np.array([0.35, 0.45, 0.55, 0.65, 0.68, 0.7, 0.75, 0.85, 0.9, 0.97])
# What a match foretells depends on the text, so outcomes count half after so many tokens.
OBSERVED_TOKENS = 1024
OBSERVED_STEPS = 8  # whose copies are learned from at once
# Steps without looking at copies, after some in vain; and a few of so many, to time plain decoding.
REST_STEPS = 64
PROBE_STEPS, PROBED_STEPS = 512, 8
# Where looking begins or ends, the first steps are of both kinds: two are in flight.
MIXED_STEPS = 3


class CopiesAhead(AheadPlanner):
    """Chooses lengths of copies for a batch of which one step is in flight.

    Args:
        plain: time of a step without drafts, by tokens; corrected while nothing is looked for.
        max_len: most tokens of a copy.
        clock: the time in seconds.
    """

    def __init__(
        self, plain: CostTable, max_len: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.plain, self.clock = plain, clock
        foreseen = FORESEEN_EDGES, FORESEEN_PRIORS, OBSERVED_TOKENS
        self.acceptance = CopyAcceptance(max_len, *foreseen)
        self.extra_ms = 0.0  # of a step that looks, beyond a plain one of as many tokens
        self._balance = LookBalance()
        self._looks_over = 1.0  # looks that would be over if none had been left out
        self._steps_to_probe = PROBE_STEPS
        self._unlearned: list[Round] = []
        self._steps_to_learn = OBSERVED_STEPS
        self._since = self.clock()
        self._running: frozenset[str] = frozenset()
        self._looked = False
        self._num_alike = 0  # steps in a row that only decoded, with or without looking
        # tokens and ms of those to be learned from: that did not look, and that did
        self._timed: tuple[list[tuple[int, float]], ...] = [], []

    def choose(self, wanted: Lengths, match_lens: Lengths) -> Lengths:
        """Tokens to verify of each copy in the next step, see `AheadPlanner`."""
        num_seqs = len(wanted)
        survival = self.acceptance.survival(match_lens)
        look_ms = float(self._looking(num_seqs))
        lens = choose_copies(survival, wanted, self._looking, look_ms)
        if (match_lens != NOT_KNOWN).any():
            gains = float(np.where(np.arange(survival.shape[1]) < lens[:, None], survival, 0).sum())
            plain_ms = float(self.plain(num_seqs)) * (num_seqs + gains) / num_seqs
            saved_ms = plain_ms - float(self._looking(num_seqs + lens.sum()))
            self._balance.looked(saved_ms, self._looks_over, REST_STEPS)
            self._looks_over = 1.0
        return lens

    def _looking(self, num_tokens: Lengths | int) -> Floats:
        """Time of a step that looks for copies, by the tokens that it computes."""
        return self.plain(num_tokens) + self.extra_ms

    def steps_to_rest(self, num_seqs: int) -> int:
        """For how many steps not to look at copies, see `AheadPlanner`."""
        if self._balance.steps_to_rest > 0:
            steps, self._balance.steps_to_rest = self._balance.steps_to_rest, 0
            self._looks_over = steps / LEARNED_STEPS
            self.extra_ms *= 1.0 - OVERHEAD_RATE  # what made copies stop may be over
            self.acceptance.forget()
            return steps
        self._balance.step_began(num_seqs)
        self._steps_to_probe -= 1
        if self._steps_to_probe > 0:
            return 0
        self._steps_to_probe = PROBE_STEPS
        return PROBED_STEPS

    def observe(self, rounds: Sequence[Round]) -> None:
        """Learn from a step's verified copies, see `AheadPlanner`."""
        self._unlearned.extend(rounds)
        self._steps_to_learn -= 1
        if self._steps_to_learn <= 0:
            self.acceptance.observe(self._unlearned)
            self._unlearned, self._steps_to_learn = [], OBSERVED_STEPS

    def step_ended(self, req_ids: Sequence[str], num_tokens: int, num_drafted: int) -> None:
        """A step that looks for copies is over, see `AheadPlanner`."""
        self._took(req_ids, num_tokens, num_tokens == len(req_ids) + num_drafted, looked=True)

    def rested(self, req_ids: Sequence[str], num_tokens: int) -> None:
        """The same of a step that does not look."""
        self._took(req_ids, num_tokens, num_tokens == len(req_ids), looked=False)

    def _took(self, req_ids: Sequence[str], num_tokens: int, decodes: bool, looked: bool) -> None:
        now = self.clock()
        ms, self._since = (now - self._since) * 1e3, now
        alike = decodes and looked == self._looked and self._running.issuperset(req_ids)
        self._running, self._looked = frozenset(req_ids), looked
        self._num_alike = self._num_alike + 1 if alike and req_ids else 0
        if self._num_alike < MIXED_STEPS:
            return
        timed = self._timed[looked]
        timed.append((num_tokens, ms))
        if len(timed) < LEARNED_STEPS:
            return
        tokens, times = (sum(values) / LEARNED_STEPS for values in zip(*timed, strict=True))
        timed.clear()
        if not looked:
            self.plain.correct(round(tokens), times)
            return
        expected_ms = float(self.plain(tokens))
        extra_ms = min(times, HICCUP * expected_ms) - expected_ms
        self.extra_ms = max(0.0, self.extra_ms + OVERHEAD_RATE * (extra_ms - self.extra_ms))

    def stood_still(self, seconds: float) -> None:
        """For so long nobody has asked the engine for its next step."""
        self._since += seconds
