"""Copies in an engine of either runner: who may copy, copies; who may not, drafts."""

import contextlib

import numpy as np

from engine import generate, proposer, watch
from failfast_vllm.drafting.copying import MAX_MATCH
from failfast_vllm.drafting.interfaces import Planner
from match_cases import brute_force


def literal_copy(text, num_tokens):
    """Length of the longest suffix that stands earlier (the last of those), and what follows."""
    length, start = brute_force(text, 1, MAX_MATCH)
    copy = list(text)
    for i in range(num_tokens if length else 0):
        copy.append(copy[start + i])
    return length, copy[len(text) :]


class Copying(Planner):
    """Copies wherever at least `least` tokens match; the others take a pass, if there is a drafter.

    `postpones_commits` as with the load planner: commits wait for a pass.
    """

    postpones_commits = True

    def __init__(self, draft_increment, *, drafts=True, least=1, longest=60):
        super().__init__(draft_increment)
        self.drafts, self.least, self.longest = drafts, least, longest

    def first(self, asked):
        passes, copied = super().first(asked)
        copies = asked.match_lens >= self.least
        passes = np.where(copies, 0, passes) if self.drafts else copied
        return passes, np.where(copies, np.minimum(asked.wanted, self.longest), 0)


@contextlib.contextmanager
def copying(llm, draft_increment=10, **planner):
    """The engine plans this way from now on; yields the watch."""
    drafter = proposer(llm).drafter
    before, drafter.planner = drafter.planner, Copying(draft_increment, **planner)
    try:
        with watch(llm) as record:
            yield record
    finally:
        drafter.planner = before


def check(llm, prompts, params, expected, lora=None, **planner):
    """Answers are `expected`, and each copy is of its own sequence; returns the watch."""
    with copying(llm, **planner) as record:
        assert generate(llm, prompts, params, lora) == expected
    for known, _, draft, num_passes in record.proposals:
        if draft and not num_passes:
            assert draft == literal_copy(known, len(draft))[1]
    copied = [r for r in record.rounds if r.num_copied]
    assert sum(r.num_accepted > len(r.confidences) for r in copied) > len(prompts) / 8
    assert any(r.num_accepted < r.num_verified for r in copied)
    return record
