"""The copy lane against a literal search, and how drafts and copies meet."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from copying_cases import Copying, literal_copy
from failfast_vllm.drafting.copying import MAX_MATCH, OwnText
from failfast_vllm.drafting.records import COPY, NO_TOKEN, UNKNOWN
from failfast_vllm.policies.rules import FailFast
from scripted import MASK, STOP, Script, make_drafter, make_step

VOCAB_SIZE = 90


def step_of(texts, max_draft_lens):
    """A step of sequences with these known tokens, in rows of a table with more rows."""
    script = Script([len(text) for text in texts], [[0]], [[1.0]])
    rng = np.random.default_rng(len(texts))
    slots = rng.permutation(len(texts) + 2)[: len(texts)]
    table = torch.from_numpy(rng.integers(0, 4, (len(texts) + 2, max(map(len, texts)) + 3)))
    for slot, text in zip(slots, texts, strict=True):
        table[slot, : len(text)] = torch.tensor(text)
    return replace(make_step(script, max_draft_lens), token_ids=table, slots=slots)


def find(texts, max_draft_lens):
    return OwnText(VOCAB_SIZE, torch.device("cpu")).find(step_of(texts, max_draft_lens))


def test_copies_equal_the_literal_ones():
    """Catches a shorter match, an earlier one, tokens beyond the known ones, a wrong row."""
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        lens = rng.integers(1, 40, rng.integers(1, 6))
        alphabet = rng.integers(1, 6)
        least = rng.choice([UNKNOWN, 0])
        texts = [rng.integers(least, alphabet, length).tolist() for length in lens]
        wanted = rng.integers(0, 12, len(texts))
        copies = find(texts, wanted)
        for i, (text, num_tokens) in enumerate(zip(texts, wanted.tolist(), strict=True)):
            length, expected = literal_copy(text, num_tokens) if num_tokens else (0, [])
            assert copies.match_lens[i] == length
            seen.add(length)
            if length:
                drafted = copies.token_ids[i, :num_tokens].tolist()
                assert drafted == [max(token, 0) for token in expected]
            elif num_tokens and copies.match_lens.any():
                assert (copies.token_ids[i] == NO_TOKEN).all()
    assert seen == set(range(MAX_MATCH + 1))


def test_ids_beyond_the_vocabulary_are_not_drafted():
    """Catches a draft of the id that holds the place of an image."""
    copies = find([[5, VOCAB_SIZE, 6, 5]], [3])
    assert copies.token_ids[0].tolist() == [VOCAB_SIZE - 1, 6, 5]


def scripted(texts, tokens, **options):
    """A drafter that drafts `tokens`, sure of all, and the step that asks for it."""
    confidences = np.ones((len(tokens), len(tokens[0])))
    script = Script([len(t) for t in texts], tokens, confidences)
    lane = OwnText(VOCAB_SIZE, torch.device("cpu"))
    drafter = make_drafter(FailFast(0.45), script, increment=2, copies=lane, **options)
    return drafter, replace(step_of(texts, [12] * len(texts)), token_ids=padded(texts))


def padded(texts):
    table = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    for row, text in zip(table, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    return table


def on_rows(step):
    return replace(step, slots=np.arange(len(step.req_ids)))


def test_a_draft_that_agrees_goes_on_as_a_copy():
    """Catches a copy after a draft that says something else, and passes after one that agrees."""
    text = [1, 2, 3, 4, 5, 6, 8, 9, 1, 2]
    drafter, step = scripted([text, text, [1, 2, 3]], [[3, 4], [3, 5], [3, 4]])
    drafts = drafter.propose(on_rows(replace(step, max_draft_lens=np.array([6, 6, 2]))))
    assert drafts.to_lists() == [[3, 4, 5, 6, 8, 9], [3, 5, 5, 5, 5, 5], [3, 4]]
    assert drafts.num_passes.tolist() == [1, 3, 1]
    assert drafts.num_confidences.tolist() == [2, 6, 2]
    assert drafts.match_lens[0] == 2 + 2
    assert drafts.stop_reasons[0] == COPY != drafts.stop_reasons[1]


def test_copies_behind_passes_share_what_is_left():
    """Catches drafts that each copy as much as a step may draft in all."""
    text = [1, 2, 3, 4, 5, 6, 8, 9, 1, 2]
    drafter, step = scripted([text, text], [[3, 4], [3, 4]])
    drafts = drafter.propose(on_rows(replace(step, draft_budget=9)))
    assert drafts.to_lists() == [[3, 4, 5, 6], [3, 4, 5, 6]]
    assert drafts.num_passes.tolist() == [1, 1], "the ninth is worth no pass"


def test_nothing_is_copied_after_a_stop_token():
    text = [1, 2, 3, STOP, 5, 6, 8, 9, 1, 2]
    drafter, step = scripted([text], [[3, STOP]])
    assert drafter.propose(on_rows(step)).to_lists() == [[3, STOP]]


@pytest.mark.parametrize("budget", [4096, 5])
def test_copies_and_passes_in_one_step(budget):
    """Catches a copy in the column of another sequence, a pass for a copy, a budget exceeded."""
    texts = [[1, 2, 3, 4, 1], [1, 2, 3], [5] * 40]
    drafter, step = scripted(texts, [[6, 8], [6, 8], [6, 8]])
    drafter.planner = Copying(2)
    step = replace(step, max_draft_lens=np.array([4, 2, 3]), draft_budget=budget)
    seen, forward = [], drafter.model.forward
    drafter.model.forward = lambda batch: seen.append(batch.input_ids.tolist()) or forward(batch)
    drafts = drafter.propose(on_rows(step))
    assert seen == [[1, 2, 3, MASK, MASK]], "copies are nothing to the pass of another sequence"
    expected = [[2, 3, 4, 1], [6, 8], [5, 5, 5]]
    assert drafts.num_passes.tolist() == [0, 1, 0]
    assert drafts.seq_rows[[0, 2]].tolist() == [0, 0], "their commits wait"
    assert drafts.lens.sum() == min(budget, 9)
    for draft, full in zip(drafts.to_lists(), expected, strict=True):
        assert draft == full[: len(draft)]
    assert drafts.match_lens[[0, 2]].tolist() == [1, MAX_MATCH]
