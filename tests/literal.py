"""Algorithm 1 of arXiv 2512.20573, one sequence, no cache, no batch: slow and literal.

`Rules` names each point in which the product differs from the authors' code, so that a test can
switch it alone. The model is an `IndependentDrafter`.
"""

from dataclasses import dataclass
from typing import NamedTuple

WHOLE_BLOCK = 32


@dataclass(frozen=True)
class Rules:
    """The authors' choices; `OURS` is what the product does."""

    sub_block_size: int = 8  # positions filled per pass
    unmask_threshold: float = 0.05  # probability above which a pass fills a position
    trims_masks: bool = False  # MASK rows behind the increment are left out
    fills_beyond: bool = True  # a whole sub-block is filled and counted, also behind the increment
    crosses_blocks: bool = False  # one pass may fill positions of two blocks
    exact_cap: bool = False  # the cap counts drafted tokens, not recorded confidences


AUTHORS = Rules()
OURS = Rules(
    sub_block_size=WHOLE_BLOCK,
    unmask_threshold=0.0,
    trims_masks=True,
    fills_beyond=False,
    crosses_blocks=True,
    exact_cap=True,
)


class LiteralDraft(NamedTuple):
    token_ids: list[int]
    num_passes: int


def literal_draft(
    drafter, token_ids, rules, *, increment, threshold, max_draft, stop_token_ids
) -> LiteralDraft:
    """One draft round after the committed `token_ids`."""
    tokens, length = list(token_ids), len(token_ids)
    mask, shift, size = drafter.mask_token_id, drafter.logit_shift, drafter.block_size
    high = length + min(increment, max_draft if rules.exact_cap else increment)
    confidences, num_passes = [], 0
    if shift and length % size == 0 and not rules.crosses_blocks:
        tokens.append(drafter.best(tokens)[0][-1])  # the AR token: shift rule, no confidence
    while True:
        while len(tokens) < high:
            begin = len(tokens)
            sub_block_end = (begin // rules.sub_block_size + 1) * rules.sub_block_size
            end = high if rules.crosses_blocks else sub_block_end
            if not rules.fills_beyond:
                end = min(end, high)
            block_end = (begin // size + 1) * size
            tokens += [mask] * ((end if rules.trims_masks else block_end) - begin)
            masked = set(range(begin, end))
            while masked:
                ids, probabilities = drafter.best(tokens)
                num_passes += 1
                confidences += [probabilities[p - shift] for p in sorted(masked)]
                surest = max(masked, key=lambda p: probabilities[p - shift])
                sure = {p for p in masked if probabilities[p - shift] > rules.unmask_threshold}
                for p in sure | {surest}:
                    tokens[p] = ids[p - shift]
                masked -= sure | {surest}
            tokens = tokens[:end]
            if end % size == 0 and not rules.crosses_blocks and shift:
                num_passes += 1  # commits the block; its last logit is the next block's first token
                tokens.append(drafter.best(tokens)[0][-1])
        if any(confidence < threshold for confidence in confidences):
            break
        if (high - length if rules.exact_cap else len(confidences)) >= max_draft:
            break
        high += min(increment, length + max_draft - high) if rules.exact_cap else increment
    draft = tokens[length:high]
    stops = [i for i, token in enumerate(draft) if token in stop_token_ids]
    return LiteralDraft(draft[: stops[0] + 1] if stops else draft, num_passes)
