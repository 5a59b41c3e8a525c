"""Planners that draft and rest in turns."""

import random

import numpy as np

from copying_cases import Copying
from failfast_vllm.drafting.interfaces import Planner
from failfast_vllm.drafting.records import NOT_KNOWN


class Turns(Planner):
    """Drafts for some steps and rests for some, drawn; says so beforehand, as the load planner."""

    postpones_commits = True

    def __init__(self, increment, seed=0):
        super().__init__(increment)
        self.random, self.rest, self.num_rested = random.Random(seed), 0, 0

    def step_began(self, req_ids, num_tokens):
        self.rest -= 1
        return self.rest < 0

    def rested(self, req_ids, num_tokens):
        self.num_rested += 1
        self.step_began(req_ids, num_tokens)

    @property
    def steps_to_look(self):
        return 1 + max(0, self.rest)

    def step_ended(self, req_ids, num_drafted):
        if not num_drafted:
            self.rest = self.random.choice((1, 2, 3, 5))

    def first(self, asked):
        passes, copies = super().first(asked)
        drafts = self.random.random() < 0.7
        return passes * drafts, copies * drafts


class CopyingTurns(Turns):
    def first(self, asked):
        passes, copies = Copying(self.draft_increment, drafts=False).first(asked)
        drafts = self.random.random() < 0.7
        return passes, copies * drafts


class DrawnLengths:
    """In place of `CopiesAhead`: draws how long copies are, and when not to look for any."""

    def __init__(self, longest=12, rests=0.05, seed=0):
        self.random, self.longest, self.rests = random.Random(seed), longest, rests
        self.rounds, self.looked, self.num_rested = [], [], 0

    def choose(self, wanted, match_lens):
        known = match_lens != NOT_KNOWN
        drawn = [self.random.choice((0, 1, 3, self.longest)) for _ in wanted]
        return np.where(known, np.minimum(drawn, wanted), 0)

    def steps_to_rest(self, num_seqs):
        return self.random.choice((1, 2, 5)) if self.random.random() < self.rests else 0

    def observe(self, rounds):
        self.rounds.extend(rounds)

    def step_ended(self, req_ids, num_tokens, num_drafted):
        self.looked.append((tuple(req_ids), num_tokens, num_drafted))

    def rested(self, req_ids, num_tokens):
        self.num_rested += 1


class CopyingAhead(CopyingTurns):
    """Copies ahead where the batch may, else in turns."""

    def __init__(self, increment, seed=0, **drawn):
        super().__init__(increment, seed)
        self.ahead = DrawnLengths(seed=seed, **drawn)
