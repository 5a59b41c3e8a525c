"""Planners that draft and rest in turns."""

import random

from copying_cases import Copying
from failfast_vllm.drafting.interfaces import Planner


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
