"""Algorithm 1 of arXiv 2512.20573, one sequence, no cache, no batch: slow and literal.

`AUTHORS` is the loop of the authors' code, read in November 2026: `failfast.py` of
github.com/ruipeterpan/failfast, and its `generate_draft_tokens_arbitrary_length` in forks that keep
the authors' comments (their own copy of that file is no longer public). `OURS` is the product.
`Rules` names each point in which the two differ, so that a test can switch it alone. The model is
an `IndependentDrafter`; that MASK and ids which the target lacks are never drafted is ours, always.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True)
class Rules:
    """The authors' choices; `OURS` is what the product does."""

    sub_block_size: int | None = 8  # a pass fills positions of one only; None = any
    unmask_threshold: float = 0.05  # probability above which a pass fills a position
    pads_blocks: bool = True  # a pass has MASK rows up to its block's end, else to what it fills
    fills_beyond: bool = True  # a whole sub-block is filled and counted, also behind the increment
    crosses_blocks: bool = False  # one pass may fill positions of two blocks
    ends_at_blocks: bool = False  # increments are cut there
    exact_cap: bool = False  # the cap counts drafted tokens, not recorded confidences
    max_blocks: int | None = 3  # that a draft may touch
    # complete blocks take a pass of their own, whose last logit is the next block's first token, of
    # no confidence; else the next increment's pass commits them and fills that position as well
    commits_apart: bool = True
    judges_commits: bool = False  # confidence and cap are looked at after such a pass, too
    keeps_kv: bool = True  # from round to round, else the first pass of a round commits the prefix
    # a prefix of one block counts as none, and KV is taken for the prefix's if the pass that left
    # it had as many rows - which is that of any block's commit, where the prefix has one block
    mistakes_kv: bool = True


AUTHORS = Rules()
OURS = Rules(
    sub_block_size=None,
    unmask_threshold=0.0,
    pads_blocks=False,
    fills_beyond=False,
    crosses_blocks=True,
    exact_cap=True,
    max_blocks=None,
    commits_apart=False,
    judges_commits=True,
    keeps_kv=True,
    mistakes_kv=False,
)
AUTHORS_WITHOUT_KV = replace(AUTHORS, keeps_kv=False)


class KeptKV(NamedTuple):
    """What the last pass that committed blocks leaves to the next round."""

    num_rows: int  # of that pass
    token_ids: list[int]  # whose KV there is


class LiteralDraft(NamedTuple):
    token_ids: list[int]
    num_passes: int
    num_rows: int  # over those passes that fill positions; committed blocks not counted
    kept: KeptKV | None


def literal_draft(
    drafter, token_ids, rules, *, increment, threshold, max_draft, stop_token_ids, kept=None
) -> LiteralDraft:
    """One draft round after the committed `token_ids`; `kept` is what the round before left."""
    assert drafter.logit_shift or not rules.commits_apart, "the authors have no such drafter"
    assert not (rules.crosses_blocks and rules.commits_apart)
    mask, shift, size = drafter.mask_token_id, drafter.logit_shift, drafter.block_size
    tokens, length = list(token_ids), len(token_ids)
    confidences, num_passes, num_rows, num_blocks, complete = [], 0, 0, 1, False

    def grown(end):
        increments = [increment]
        if rules.exact_cap:
            increments.append(length + max_draft - end)
        if rules.ends_at_blocks:
            increments.append(size - end % size)
        return end + min(increments)

    end = grown(length)

    def judge(filled):
        """Once all positions up to `end` are filled, the draft is complete or grows."""
        nonlocal end, complete
        if filled < end or complete:
            return
        num_drafted = end - length if rules.exact_cap else len(confidences)
        complete = any(c < threshold for c in confidences) or num_drafted >= max_draft
        if not complete:
            end = grown(end)

    def is_stopped(filled):
        return any(token in stop_token_ids for token in tokens[length:filled])

    prefix = tokens[: length // size * size]
    context = prefix  # whose KV a pass sees, in front of its own block
    if rules.commits_apart and length <= (size if rules.mistakes_kv else size - 1):
        context, kept = [], None
    elif rules.commits_apart:
        fits = kept and (
            kept.num_rows == len(prefix) if rules.mistakes_kv else kept.token_ids == prefix
        )
        if not (rules.keeps_kv and fits):
            kept = KeptKV(len(prefix), prefix)
            num_passes = 1
        context = kept.token_ids
        if length == len(prefix):
            tokens.append(drafter.best(context)[0][-1])
            if rules.judges_commits:
                judge(len(tokens))

    while not complete and not is_stopped(len(tokens)):
        begin = len(tokens)
        block = begin // size * size
        stop = end if rules.crosses_blocks else block + size
        if rules.sub_block_size:
            stop = min(stop, (begin // rules.sub_block_size + 1) * rules.sub_block_size)
        if not rules.fills_beyond:
            stop = min(stop, end)
        tokens += [mask] * ((-(-stop // size) * size if rules.pads_blocks else stop) - begin)
        if not rules.commits_apart:
            context = tokens[:block]
        first = block - len(context)  # position of the first row, 0 unless KV was mistaken
        masked = set(range(begin, stop))
        while masked and not complete and not is_stopped(min(masked)):
            ids, probabilities = drafter.best(context + tokens[block:])
            num_passes += 1
            num_rows += len(tokens) - (block if rules.commits_apart else len(prefix))
            rows = {p: max(0, p - first - shift) for p in masked}
            confidences += [probabilities[rows[p]] for p in sorted(masked)]
            surest = max(sorted(masked), key=lambda p: probabilities[rows[p]])
            sure = {p for p in masked if probabilities[rows[p]] > rules.unmask_threshold}
            for p in sure | {surest}:
                tokens[p] = ids[rows[p]]
            masked -= sure | {surest}
            judge(min(masked, default=stop))
        if complete or masked:
            break
        tokens = tokens[:stop]
        if rules.commits_apart and stop % size == 0 and not is_stopped(stop):
            context = context + tokens[block:]
            kept = KeptKV(size, context)
            num_passes += 1
            tokens.append(drafter.best(context)[0][-1])
            if num_blocks == rules.max_blocks:
                break
            num_blocks += 1
            if rules.judges_commits:
                judge(len(tokens))
    draft = tokens[length:end]
    stops = [i for i, token in enumerate(draft) if token in stop_token_ids]
    return LiteralDraft(draft[: stops[0] + 1] if stops else draft, num_passes, num_rows, kept)
