"""Causal path search (DiffuSpec, arXiv 2510.02358): which of a pass's candidates make a text.

The best token of each mask need not follow from the best token before it. A beam search from left
to right maximises

    WEIGHT * log p(drafter) + (1 - WEIGHT) * log p(token | the two before it)

Where the paper trains the 3-gram model on a corpus, this one counts what the server has read and
written. The search is NumPy only: a few small arrays per mask.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from failfast_kernels import TokenConfidence
from failfast_vllm.drafting.interfaces import DraftModel, TokenChooser
from failfast_vllm.drafting.records import UNKNOWN, DraftStep, Flags, to_device
from failfast_vllm.drafting.workspace import Masks, Workspace

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Hashes = npt.NDArray[np.uint64]

MAX_CANDIDATES = 15
MASS = 0.8  # candidates are the smallest top set with this much probability
BEAM = 3
WEIGHT = 0.5
ORDER_SHARES = (0.1, 0.3, 0.6)  # of 1-, 2- and 3-grams in a probability
FLOOR = 1e-6  # of what was never seen
TABLE_BITS = 22  # 4 M counts, 16 MiB
MAX_SEEN = 2 ** (TABLE_BITS - 2)  # tokens after which all counts are halved

# odd, random: of a 3-gram's first, second and last token
FACTORS = np.array([0xD6E8FEB86659FD93, 0xC2B2AE3D27D4EB4F, 0x9E3779B97F4A7C15], dtype=np.uint64)


class Path(NamedTuple):
    """The best way through the candidates of some masks."""

    token_ids: Ints  # [n, num_masks], undefined where not valid
    confidences: npt.NDArray[np.float32]  # [n, num_masks] of each among its candidates, 0 to 1


class Trigrams:
    """Counts of 1-, 2- and 3-grams in a table of fixed size, by hash."""

    def __init__(self) -> None:
        self.counts = np.zeros(2**TABLE_BITS, dtype=np.int32)
        self.num_seen = 0  # tokens

    def see(self, grams: Ints) -> None:
        """Count tokens, [num_tokens, 3]: the two before each and itself; UNKNOWN where none."""
        for order in (1, 2, 3):
            known = grams[(grams[:, 3 - order :] != UNKNOWN).all(axis=1), 3 - order :]
            np.add.at(self.counts, _places((_numbers(known) * FACTORS[-order:]).sum(axis=1)), 1)
        self.num_seen += int((grams[:, 2] != UNKNOWN).sum())
        while self.num_seen > MAX_SEEN:
            self.counts //= 2
            self.num_seen //= 2

    def times(self, mixed: Hashes) -> npt.NDArray[np.int32]:
        """How often n-grams were seen, each the sum of its `_numbers` times their FACTORS."""
        return self.counts[_places(mixed)]


def _numbers(token_ids: Ints) -> Hashes:
    return (token_ids + 2).astype(np.uint64)  # UNKNOWN is not 0 either


def _places(mixed: Hashes) -> Ints:
    mixed = (mixed ^ (mixed >> np.uint64(29))) * FACTORS[2]
    places: Ints = (mixed >> np.uint64(64 - TABLE_BITS)).astype(np.int64)
    return places


class PathSearch(TokenChooser):
    """Chooses drafts by what the server has seen so far.

    Deterministic in the steps that it is given, so that the ranks of a tensor-parallel group agree.
    """

    def __init__(self) -> None:
        self.trigrams = Trigrams()
        self._seen: dict[str, int] = {}  # request -> tokens that are counted

    def see(self, step: DraftStep) -> None:
        """Count what the sequences have said since the last step that was looked at."""
        rows, positions = self.unseen(step.req_ids, step.known_lens)
        columns = positions[:, None] + np.array([-2, -1, 0])
        slots = np.broadcast_to(step.slots[rows][:, None], columns.shape)
        at = to_device(np.array((slots, np.maximum(columns, 0))), step.token_ids.device)
        grams = step.token_ids[at[0], at[1]].cpu().numpy()
        self.trigrams.see(np.where(columns < 0, UNKNOWN, grams))

    def choose(
        self,
        model: DraftModel,
        hidden_states: torch.Tensor,
        work: Workspace,
        masks: Masks,
        *,
        details: bool,
    ) -> TokenConfidence:
        """A copy to the host and one back, on top of the one that every increment makes."""
        confidence, candidates = model.candidates(hidden_states, details=details)
        columns = (work.first_columns + work.lens)[masks.seqs, None] + np.array([-2, -1])
        owners = np.broadcast_to(masks.seqs[:, None], columns.shape)
        at = work.to_device(np.array((owners, columns)))
        tokens = work.canvas[at[0], at[1].clamp(min=0)].cpu().numpy()
        before = np.where(columns < 0, UNKNOWN, tokens)
        ids, probabilities = (
            part.view(*masks.valid.shape, -1).cpu().numpy() for part in candidates
        )
        path = self.best(before, ids, probabilities, masks.valid)
        return confidence._replace(
            token_ids=work.to_device(path.token_ids).flatten(),
            probabilities=work.to_device(path.confidences).flatten(),
        )

    def unseen(self, req_ids: Sequence[str], known_lens: Ints) -> tuple[Ints, Ints]:
        """What is new since it was last asked: [n] rows of the step and [n] positions."""
        seen = np.array([self._seen.get(req_id, 0) for req_id in req_ids], dtype=np.int64)
        num_new = np.maximum(known_lens - seen, 0)
        self._seen.update(zip(req_ids, (seen + num_new).tolist(), strict=True))
        rows = np.repeat(np.arange(len(seen)), num_new)
        return rows, np.arange(len(rows)) - (num_new.cumsum() - num_new - seen)[rows]

    def forget(self, req_ids: Iterable[str]) -> None:
        """The requests have ended; what they said stays counted."""
        for req_id in req_ids:
            self._seen.pop(req_id, None)

    def best(self, before: Ints, token_ids: Ints, probabilities: Floats, valid: Flags) -> Path:
        """The best path through each sequence's masks.

        Args:
            before: [n, 2] the two tokens before the first mask; UNKNOWN where there is none.
            token_ids: [n, num_masks, k] candidates, the most probable first, at least one.
            probabilities: [n, num_masks, k] the drafter's; falling.
            valid: [n, num_masks] false after a sequence's last mask.
        """
        candidate = probabilities.cumsum(axis=2) - probabilities < MASS
        candidate[:, :, 0] = True
        k = int(candidate.sum(axis=2).max(initial=1))
        candidate, token_ids = candidate[:, :, :k], token_ids[:, :, :k]
        shares = np.where(candidate, probabilities[:, :, :k], 0.0)
        logs = np.where(candidate, WEIGHT * np.log(np.maximum(shares, 1e-30)), -np.inf)
        gains, parents, choices = self._search(_numbers(before), _numbers(token_ids), logs, valid)
        sure = np.exp(gains - gains.max(axis=3, keepdims=True))  # [num_masks, n, BEAM, k]
        sure *= shares.sum(axis=2).T[:, :, None, None] / sure.sum(axis=3, keepdims=True)
        n, num_masks, _ = token_ids.shape
        path = Path(np.empty((n, num_masks), np.int64), np.empty((n, num_masks), np.float32))
        seqs, beam = np.arange(n), np.zeros(n, dtype=np.int64)
        for i in reversed(range(num_masks)):
            choice, beam = choices[i, seqs, beam], parents[i, seqs, beam]
            path.token_ids[:, i] = token_ids[seqs, i, choice]
            path.confidences[:, i] = sure[i, seqs, beam, choice]
        return path

    def _search(
        self, before: Hashes, numbers: Hashes, logs: Floats, valid: Flags
    ) -> tuple[Floats, Ints, Ints]:
        """Extend the best paths mask by mask.

        Args:
            before, numbers: tokens and candidates, as in `best`; these two as `_numbers`.
            logs: [n, num_masks, k] what the drafter gives to each; -inf = no candidate.

        Returns:
            [num_masks, n, BEAM, k] gain of each candidate after each path, and of each path that
            was kept, the best first, [num_masks, n, BEAM] the path that it extends and by which
            candidate.
        """
        (n, num_masks, k), times = numbers.shape, self.trigrams.times
        gains = np.empty((num_masks, n, BEAM, k))
        parents = np.empty((num_masks, n, BEAM), dtype=np.int64)
        choices = np.empty_like(parents)
        num_seen = times(numbers * FACTORS[2])  # [n, num_masks, k]
        alone = FLOOR + ORDER_SHARES[0] * num_seen / max(self.trigrams.num_seen, 1)
        rows = np.arange(n)[:, None]
        scores = np.full((n, BEAM), -np.inf)
        scores[:, 0] = 0.0
        # the two tokens before, and how often they were seen: [n, BEAM] each
        before_last, last = np.repeat(before.T[:, :, None], BEAM, axis=2)
        last_seen = times(last * FACTORS[2])
        both_seen = times(last * FACTORS[2] + before_last * FACTORS[1])
        for i in range(num_masks):
            pairs = (numbers[:, i] * FACTORS[2])[:, None] + (last * FACTORS[1])[:, :, None]
            triples = pairs + (before_last * FACTORS[0])[:, :, None]
            pairs_seen, triples_seen = times(np.array((pairs, triples)))  # [n, BEAM, k] each
            chances = (
                alone[:, i, None]
                + (ORDER_SHARES[1] / np.maximum(last_seen, 1))[:, :, None] * pairs_seen
                + (ORDER_SHARES[2] / np.maximum(both_seen, 1))[:, :, None] * triples_seen
            )
            gains[i] = logs[:, i, None] + (1 - WEIGHT) * np.log(chances)
            gains[i, ~valid[:, i]] = np.where(np.arange(k) == 0, 0.0, -np.inf)
            totals = (scores[:, :, None] + gains[i]).reshape(n, -1)
            order = np.argsort(-totals, axis=1, kind="stable")[:, :BEAM]
            scores = totals[rows, order]
            parents[i], choices[i] = parent, choice = np.divmod(order, k)
            before_last, last = last[rows, parent], numbers[rows, i, choice]
            last_seen, both_seen = num_seen[rows, i, choice], pairs_seen[rows, parent, choice]
        return gains, parents, choices
