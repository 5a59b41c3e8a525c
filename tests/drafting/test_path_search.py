"""The causal path search against a literal beam search, and the counts of its 3-grams."""

import math
from collections import Counter

import numpy as np
import pytest

from failfast_vllm.drafting import path_search as paths
from failfast_vllm.drafting.path_search import (
    BEAM,
    FLOOR,
    MASS,
    MAX_CANDIDATES,
    ORDER_SHARES,
    WEIGHT,
    PathSearch,
    Trigrams,
)
from failfast_vllm.drafting.records import UNKNOWN

VOCAB = 30


def as_grams(tokens):
    padded = [UNKNOWN, UNKNOWN, *tokens]
    return np.array([padded[i : i + 3] for i in range(len(tokens))]).reshape(-1, 3)


def literal_counts(texts):
    return Counter(
        tuple(text[i : i + n])
        for text in texts
        for n in (1, 2, 3)
        for i in range(len(text) - n + 1)
    )


def literal_probability(counts, num_seen, a, b, c):
    found = FLOOR
    for share, context in zip(ORDER_SHARES, ((), (b,), (a, b)), strict=True):
        times = counts[context] if context else num_seen
        found += share * counts[(*context, c)] / max(times, 1)
    return found


def literal_best(counts, num_seen, before, ids, probabilities):
    """One sequence, one list of candidates per mask: tokens and their shares."""
    beam = [(0.0, tuple(before), ())]
    for candidates, chances in zip(ids, probabilities, strict=True):
        size = next((n for n in range(1, len(chances)) if sum(chances[:n]) >= MASS), len(chances))
        grown = []
        for score, tokens, shares in beam:
            weights = [
                p**WEIGHT * literal_probability(counts, num_seen, *tokens[-2:], c) ** (1 - WEIGHT)
                for c, p in zip(candidates[:size], chances[:size], strict=True)
            ]
            for c, weight in zip(candidates, weights, strict=False):
                share = weight / sum(weights) * sum(chances[:size])
                grown.append((score + math.log(weight), (*tokens, c), (*shares, share)))
        beam = sorted(grown, key=lambda path: -path[0])[:BEAM]
    return list(beam[0][1][2:]), beam[0][2]


@pytest.mark.parametrize("seed", range(30))
def test_against_a_literal_beam_search(seed):
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, VOCAB, rng.integers(1, 60)).tolist() for _ in range(5)]
    search, counts = PathSearch(), literal_counts(texts)
    for text in texts:
        search.trigrams.see(as_grams(text))
    num_seen = sum(map(len, texts))
    n, num_masks, k = rng.integers(1, 5), rng.integers(1, 12), int(rng.integers(1, MAX_CANDIDATES))
    lens = rng.integers(1, num_masks + 1, n)
    before = rng.integers(0, VOCAB, (n, 2))
    before[0, 0] = UNKNOWN
    ids = np.stack([[rng.permutation(VOCAB)[:k] for _ in range(num_masks)] for _ in range(n)])
    probabilities = -np.sort(-rng.dirichlet(np.full(k + 1, 0.3), (n, num_masks))[:, :, :k])
    valid = np.arange(num_masks) < lens[:, None]
    found = search.best(before, ids, probabilities, valid)
    for i, length in enumerate(lens):
        expected, shares = literal_best(
            counts,
            num_seen,
            before[i].tolist(),
            ids[i, :length].tolist(),
            probabilities[i, :length].tolist(),
        )
        assert found.token_ids[i, :length].tolist() == expected
        assert found.confidences[i, :length] == pytest.approx(shares, abs=1e-5)


def test_a_text_that_was_seen_is_found_again():
    """What it is for: of candidates that are nearly as good, those that follow each other."""
    search, text = PathSearch(), [5, 6, 7, 8, 9]
    for _ in range(3):
        search.trigrams.see(as_grams(text))
    ids = np.array([[[i + 10, i] for i in text[2:]]])
    probabilities = np.tile([0.5, 0.4], (1, 3, 1))
    valid = np.ones((1, 3), dtype=bool)
    before = np.array([text[:2]])
    assert search.best(before, ids, probabilities, valid).token_ids[0].tolist() == text[2:]
    unseen = PathSearch().best(before, ids, probabilities, valid)
    assert unseen.token_ids[0].tolist() == [17, 18, 19]
    assert unseen.confidences[0] == pytest.approx([0.9 * 0.5**0.5 / (0.5**0.5 + 0.4**0.5)] * 3)


def test_each_token_is_counted_once():
    """Over steps, prompts in parts, and a request that comes again under its name."""
    search, text = PathSearch(), np.arange(20) % 7
    for known_lens in ([5, 0], [9, 3], [9, 3], [8, 3], [20, 4]):
        rows, positions = search.unseen(["a", "b"], np.array(known_lens))
        grams = [as_grams(text)[p] for p in positions]
        search.trigrams.see(np.array(grams).reshape(-1, 3))
        assert set(rows.tolist()) <= {0, 1}
    assert search.trigrams.num_seen == 24
    search.forget(["a", "never came"])
    assert [part.tolist() for part in search.unseen(["a"], np.array([2]))] == [[0, 0], [0, 1]]
    counts = literal_counts([text.tolist(), text[:4].tolist()])
    trigrams = np.array([gram for gram in counts if len(gram) == 3])
    found = search.trigrams.times((paths._numbers(trigrams) * paths.FACTORS).sum(axis=1))
    assert found.tolist() == [counts[tuple(gram)] for gram in trigrams.tolist()]


def test_counts_are_bounded(monkeypatch):
    monkeypatch.setattr(paths, "MAX_SEEN", 100)
    trigrams = Trigrams()
    for _ in range(1000):
        trigrams.see(as_grams([1, 2, 3]))
        assert trigrams.num_seen <= 100
        assert trigrams.counts.max() <= 100
    triple = (paths._numbers(np.array([1, 2, 3])) * paths.FACTORS).sum(keepdims=True)
    assert trigrams.times(triple) >= 0.8 * trigrams.num_seen / 3
