"""The authors' rules of `literal.py` point by point, on a drafter whose every answer is known."""

from dataclasses import replace

import pytest

from literal import AUTHORS, AUTHORS_WITHOUT_KV, OURS, KeptKV, literal_draft

MASK, STOP = 0, 1
SURE, UNSURE = 0.9, 0.2  # both above the unmask threshold
CAREFUL = replace(AUTHORS, mistakes_kv=False)
ENDING = replace(OURS, ends_at_blocks=True)


class Drafter:
    """At position p it predicts token 100 + p, as sure as `probabilities` says."""

    block_size, logit_shift, mask_token_id = 32, 1, MASK

    def __init__(self, probabilities=None, stops=()):
        self.probabilities = probabilities or {}
        self.stops = stops
        self.seen = []  # the tokens of each pass

    def best(self, token_ids):
        self.seen.append(list(token_ids))
        predicted = range(1, len(token_ids) + 1)
        ids = [STOP if p in self.stops else 100 + p for p in predicted]
        return ids, [self.probabilities.get(p, SURE) for p in predicted]


def text(length):
    """What `Drafter` would have said so far."""
    return [100 + p for p in range(length)]


def kept(length):
    """What a round leaves that has committed the complete blocks of `length` tokens only."""
    whole = text(length // 32 * 32)
    return KeptKV(len(whole), whole)


def draft(drafter, length, rules, known=None, **given):
    settings = {"increment": 10, "threshold": 0.45, "max_draft": 60, "stop_token_ids": (STOP,)}
    return literal_draft(drafter, known or text(length), rules, **{**settings, **given})


def test_a_pass_fills_one_sub_block():
    """34:44 lies in three; a position behind it counts."""
    found = draft(Drafter({34: UNSURE}), 34, AUTHORS, kept=kept(34))
    assert (found.token_ids, found.num_passes) == (text(44)[34:], 2)
    found = draft(Drafter({47: UNSURE}), 34, AUTHORS, kept=kept(34))
    assert (found.token_ids, found.num_passes) == (text(44)[34:], 2)
    found = draft(Drafter({48: UNSURE}), 34, AUTHORS, kept=kept(34))
    assert (found.token_ids, found.num_passes) == (text(54)[34:], 3)
    assert len(draft(Drafter({47: UNSURE}), 34, OURS).token_ids) == 20


def test_a_sub_block_is_left_as_soon_as_the_increment_is_filled():
    """One position per pass, the surest first: 34:38 takes four, and 38 and 39 stay masked."""
    unsure = {p: 0.04 - p / 10_000 for p in range(32, 64)}
    found = draft(Drafter(unsure), 34, AUTHORS, increment=4, kept=kept(34))
    assert (found.token_ids, found.num_passes) == (text(38)[34:], 4)


def test_no_commit_follows_the_last_increment():
    """An unsure draft that ends with its block: 54:64, no pass over the full block."""
    drafter = Drafter({60: UNSURE})
    found = draft(drafter, 54, AUTHORS, kept=kept(54))
    assert (found.token_ids, found.num_passes) == (text(64)[54:], 2)
    assert MASK in drafter.seen[-1]


def test_a_commit_gives_a_token_without_confidence():
    """64 comes from the pass that commits 32:64; that the drafter is unsure of it is not seen."""
    found = draft(Drafter({64: UNSURE, 66: UNSURE}), 60, AUTHORS, kept=kept(60))
    assert (found.token_ids, found.num_passes) == (text(70)[60:], 3)
    found = draft(Drafter({64: UNSURE, 72: UNSURE}), 60, AUTHORS, kept=kept(60))
    assert (found.token_ids, found.num_passes) == (text(80)[60:], 4)
    assert len(draft(Drafter({64: UNSURE}), 60, OURS).token_ids) == 10


@pytest.mark.parametrize(
    ("rules", "num_passes"), [(AUTHORS, 4), (replace(AUTHORS, judges_commits=True), 3)]
)
def test_an_increment_that_a_commit_ends_waits_for_a_pass_more(rules, num_passes):
    """55:65 is unsure at 60, which is looked at only after a pass over 65:72."""
    found = draft(Drafter({60: UNSURE}), 55, rules, kept=kept(55))
    assert (found.token_ids, found.num_passes) == (text(65)[55:], num_passes)


def test_that_pass_judges_as_well():
    """55:65 is sure, but not 70: no further increment. The cap waits likewise."""
    found = draft(Drafter({70: UNSURE}), 55, AUTHORS, kept=kept(55))
    assert (found.token_ids, found.num_passes) == (text(65)[55:], 4)
    found = draft(Drafter(), 55, AUTHORS, max_draft=9, kept=kept(55))
    assert (found.token_ids, found.num_passes) == (text(65)[55:], 4)


def test_their_cap_counts_confidences():
    """36:96 has 59: 64 came from a commit. 40:100 has 61 with those behind it in its sub-block."""
    assert len(draft(Drafter(), 36, AUTHORS).token_ids) == 70
    assert len(draft(Drafter(), 40, AUTHORS).token_ids) == 60
    assert len(draft(Drafter(), 36, OURS).token_ids) == 60
    assert len(draft(Drafter(), 36, OURS, max_draft=15).token_ids) == 15


def test_a_draft_touches_three_blocks():
    """63:128 and the token that the commit of 96:128 gives."""
    found = draft(Drafter(), 63, AUTHORS, max_draft=200)
    assert found.token_ids == text(129)[63:]
    assert found.num_passes == 1 + 1 + 1 + 4 + 1 + 4 + 1
    assert len(draft(Drafter(), 63, OURS, max_draft=200).token_ids) == 200


def test_a_stop_token_ends_the_passes():
    """With all before it known. One that a commit gave, too."""
    found = draft(Drafter(stops=(41,)), 40, AUTHORS, kept=kept(40))
    assert (found.token_ids, found.num_passes) == ([140, STOP], 1)
    found = draft(Drafter(stops=(64,)), 60, AUTHORS, kept=kept(60))
    assert (found.token_ids, found.num_passes) == ([*text(64)[60:], STOP], 2)
    found = draft(Drafter(stops=(45,)), 40, OURS)
    assert (found.token_ids, found.num_passes) == ([*text(45)[40:], STOP], 1)


def test_a_round_begins_with_a_pass_over_the_blocks_that_are_not_kept():
    unsure = dict.fromkeys(range(200), UNSURE)
    assert draft(Drafter(unsure), 20, AUTHORS).num_passes == 2  # 20:24, 24:32: no block
    first = draft(Drafter(unsure), 70, AUTHORS)
    assert (first.num_passes, first.kept) == (1 + 2, kept(70))
    assert draft(Drafter(unsure), 75, AUTHORS, kept=first.kept).num_passes == 2
    assert draft(Drafter(unsure), 75, AUTHORS_WITHOUT_KV, kept=first.kept).num_passes == 1 + 2
    # 96:106 from 97 on: the pass over 64:96 has given the first token
    assert draft(Drafter(unsure), 96, AUTHORS, kept=first.kept).num_passes == 1 + 2


def test_a_prefix_of_one_block_sees_no_context():
    drafter = Drafter()
    draft(drafter, 32, AUTHORS, threshold=1.0)
    assert drafter.seen[0] == [MASK] * 32
    drafter = Drafter()
    draft(drafter, 32, CAREFUL, threshold=1.0)
    assert drafter.seen == [text(32), text(33) + [MASK] * 31, text(40) + [MASK] * 24]


def test_a_prefix_of_up_to_two_blocks_sees_what_a_commit_left():
    """Both blocks of the round before, whatever was rejected; a longer prefix does not."""
    left = draft(Drafter(), 40, AUTHORS, max_draft=30, kept=kept(40)).kept
    assert left == KeptKV(32, text(64))
    known = [*text(44), 7]
    drafter = Drafter()
    draft(drafter, 45, AUTHORS, known=known, threshold=1.0, kept=left)
    assert drafter.seen[0] == text(64) + known[32:] + [MASK] * 19
    drafter = Drafter()
    draft(drafter, 45, CAREFUL, known, threshold=1.0, kept=left)
    assert drafter.seen[0] == known + [MASK] * 19
    drafter = Drafter()
    draft(drafter, 70, AUTHORS, threshold=1.0, kept=left)
    assert drafter.seen[0] == text(70) + [MASK] * 26


def test_our_pass_has_no_row_behind_the_increment_and_crosses():
    drafter = Drafter({60: UNSURE})
    assert draft(drafter, 58, OURS).num_rows == 68 - 32
    assert drafter.seen == [text(58) + [MASK] * 10]
    drafter = Drafter({60: UNSURE})
    assert draft(drafter, 58, replace(OURS, pads_blocks=True)).num_rows == 96 - 32
    assert drafter.seen == [text(58) + [MASK] * 38]
    for rules, end in ((replace(OURS, crosses_blocks=False), 68), (ENDING, 74)):
        drafter = Drafter({67: UNSURE})
        found = draft(drafter, 58, rules)
        assert (found.token_ids, found.num_passes) == (text(end)[58:], 2)
        assert drafter.seen == [text(58) + [MASK] * 6, text(64) + [MASK] * (end - 64)]
    assert draft(Drafter({60: UNSURE}), 58, ENDING).token_ids == text(64)[58:]
