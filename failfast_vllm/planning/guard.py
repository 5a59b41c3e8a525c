"""Whether to consider drafting at all: rests, probes, tries, and what to do about a loss.

The tables of times may be wrong, and only drafting corrects those of drafts, only steps without
drafts that of plain steps. So the guard looks at what came, not at what was expected: it compares
each run of rounds with what the same tokens would have taken without drafts.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from failfast_vllm.planning.costs import HICCUP, REST_STEPS, CostTable

SAME_LOAD = 0.8  # batches are alike from this ratio of their sizes on

# Two steps of plain decoding among many with drafts, to know what the second takes: the first finds
# caches that are full of drafting.
PROBE_STEPS, PLAIN_IN_A_ROW = 96, 2

# Drafting is judged when it ends, after so many rounds, or when it has lost more time than some
# steps without drafts take: twice as much in the first rounds, since what they commit pays later.
# After two losses in a row, it is not tried again at this load until the last loss is so small a
# share of the time since.
SPELL_ROUNDS, LOST_STEPS, FIRST_ROUNDS = 32, 8, 4
ACCEPTED_LOSS = 0.01

# Where drafting seems not to pay, only a try can tell whether the tables are wrong: so many rounds,
# the first where they are expected to lose at most as much time as so many steps without drafts
# take, later at most that share of the time since.
TRY_ROUNDS, TRY_STEPS, TRY_LOSS = 2, 4, 0.005


@dataclass
class Spell:
    """Rounds with drafts in a row, and what they took.

    What slows the whole machine down would slow steps without drafts down as well.
    """

    rounds: int = 0
    ms: float = 0.0
    plain_steps: float = 0.0  # that as many tokens take without drafts, times the slowness then
    slowness: float = 1.0  # of the last round's step of the target, against what it usually takes
    seqs: int = 0  # summed over the rounds
    is_try: bool = False

    def loss_ms(self, plain: CostTable) -> float:
        """Time lost against plain decoding."""
        return self.ms - self.plain_steps * float(plain(self.num_seqs))

    @property
    def num_seqs(self) -> float:
        return self.seqs / self.rounds


class Guard:
    """Decides when drafting is considered, tried, probed and given up."""

    def __init__(self) -> None:
        self.steps_to_rest = 0
        self._rests_from = 0  # sequences
        self._steps_to_probe = REST_STEPS
        self._num_plain = 0  # steps without drafts, in a row
        self._spell = Spell()
        self._lost: Spell | None = None  # the last one that was slower than plain decoding
        self._num_lost = 0  # in a row
        self._paid_ms = 0.0  # time since without drafts

    @property
    def is_drafting(self) -> bool:
        return self._spell.rounds > 0

    @property
    def knows_plain(self) -> bool:
        """Whether the last step was typical of those without drafts."""
        return self._num_plain >= PLAIN_IN_A_ROW

    def step_began(self, num_seqs: int, drafted: bool) -> bool:
        """Returns whether to consider drafting in this step: the rest is over, or the load fell.

        Args:
            drafted: the step before had draft passes.
        """
        self.steps_to_rest -= 1
        if self.is_drafting and not SAME_LOAD <= num_seqs / self._spell.num_seqs <= 1 / SAME_LOAD:
            self._spell = Spell()  # another load: what has paid so far says nothing
        self._num_plain = 0 if drafted else self._num_plain + 1
        return self.steps_to_rest < 0 or num_seqs < self.fewest_at_rest

    @property
    def fewest_at_rest(self) -> float:
        """Sequences below which a rest ends."""
        return SAME_LOAD * self._rests_from

    def rested(self, num_steps: int) -> None:
        """So many steps of a rest are over."""
        self.steps_to_rest -= num_steps
        self._num_plain += num_steps

    def round_took(
        self,
        num_seqs: int,
        passes_ms: Iterable[float],
        overhead_ms: float,
        verify_ms: float,
        slowness: float,
    ) -> None:
        """Count a round of drafting.

        Args:
            passes_ms: its draft passes; hiccups are capped.
            overhead_ms: of drafting, outside the passes.
            verify_ms: what the target's step after it usually takes.
            slowness: what it took this time, as a multiple of that.
        """
        spell = self._spell
        for ms in passes_ms:
            spell.ms += ms
        spell.slowness = min(max(slowness, 1.0 / HICCUP), HICCUP)
        spell.rounds += 1
        spell.ms += overhead_ms + verify_ms * spell.slowness
        spell.plain_steps += spell.slowness
        spell.seqs += num_seqs

    def accepted(self, num_tokens: int, num_seqs: int) -> None:
        """Draft tokens of the last round are accepted."""
        if self.is_drafting:
            self._spell.plain_steps += self._spell.slowness * num_tokens / num_seqs

    def decide(
        self,
        best: int,
        option: int,
        loss_ms: float,
        num_seqs: int,
        plain: CostTable,
        rest_steps: int = REST_STEPS,
    ) -> int:
        """Returns the length of the first pass: `best`, `option` for a try, or 0.

        Args:
            best: length of the highest expected rate, 0 = plain decoding.
            option: that of the lengths from 1 on.
            loss_ms: what a try of it is expected to lose against plain decoding.
            plain: time of a step without drafts.
            rest_steps: steps without a look after one in vain.
        """
        plain_ms = float(plain(num_seqs))
        tries = best == 0 and self._tries(loss_ms, plain_ms, plain)
        if self._judge(plain, ends=best == 0 and not tries):
            tries = False
        if self._owes(num_seqs, plain):
            best = 0
        elif tries:
            best, self._spell.is_try = option, True
        if best == 0:
            self.steps_to_rest, self._rests_from = rest_steps, num_seqs
            self._paid_ms += (rest_steps + 1) * plain_ms
        return best

    def probes(self, in_a_row: int = PLAIN_IN_A_ROW) -> bool:
        """Returns whether to do without drafts in this step, to time plain decoding."""
        self._steps_to_probe -= 1
        probes = self._steps_to_probe < in_a_row
        self._steps_to_probe = self._steps_to_probe or PROBE_STEPS
        return probes

    def _tries(self, loss_ms: float, plain_ms: float, plain: CostTable) -> bool:
        """Returns whether to draft for a few rounds although it seems not to pay.

        Args:
            loss_ms: what they are expected to lose against plain decoding.
            plain_ms: a step without drafts.
            plain: that, by sequences.
        """
        if self.is_drafting:
            return self._spell.is_try and self._spell.rounds < TRY_ROUNDS
        accepted_ms = TRY_LOSS * self._paid_ms
        if self._lost is None:
            return loss_ms <= accepted_ms + TRY_STEPS * plain_ms
        return max(loss_ms, self._lost.loss_ms(plain)) <= accepted_ms

    def _judge(self, plain: CostTable, ends: bool) -> bool:
        """Remember a spell of drafting that was slower than plain decoding.

        Args:
            ends: the spell is over, however short and cheap it was.

        Returns:
            Whether a spell is over.
        """
        spell = self._spell
        if not spell.rounds:
            return False
        loss_ms = spell.loss_ms(plain)
        lost_steps = LOST_STEPS if spell.rounds >= FIRST_ROUNDS else 2 * LOST_STEPS
        too_much = loss_ms > lost_steps * float(plain(spell.num_seqs))
        if not (ends or too_much or spell.rounds >= SPELL_ROUNDS):
            return False
        self._spell = Spell()
        again = self._lost is not None and spell.num_seqs >= SAME_LOAD * self._lost.num_seqs
        if loss_ms > 0:
            self._lost, self._paid_ms = spell, 0.0
            self._num_lost = self._num_lost + 1 if again else 1
        elif again:
            self._num_lost = 0
        return True

    def _owes(self, num_seqs: int, plain: CostTable) -> bool:
        """Returns whether the last loss at this load, or a lower one, is not paid off yet."""
        lost = self._lost
        if lost is None or self._num_lost < 2 or num_seqs < SAME_LOAD * lost.num_seqs:
            return False
        return lost.loss_ms(plain) > ACCEPTED_LOSS * self._paid_ms
