"""Cases of `match_suffixes` and `continue_matches`, and the answers that a plain loop gives."""

import hypothesis.strategies as st
import torch

UNKNOWN = -1
A, B, C, D, E = range(5)

# tokens, min_match, max_match, length, start
WRITTEN = {
    "nothing is known": ([], 1, 4, 0, 0),
    "one token": ([A], 1, 4, 0, 1),
    "no match": ([A, B, C, D], 1, 4, 0, 4),
    "the longest, not the latest": ([A, B, C, D, E, B, C, D, A, B, C], 1, 4, 3, 3),
    "the latest of equally long": ([A, B, C, A, B, D, A, B], 1, 4, 2, 5),
    "the cap makes matches equal": ([A, B, C, D, E, B, C, D, A, B, C], 1, 2, 2, 7),
    "a run matches itself": ([A] * 6, 1, 8, 5, 5),
    "a period matches itself": ([A, B, A, B, A, B], 1, 8, 4, 4),
    "the match begins with the row": ([B, C, A, B, C], 2, 4, 2, 2),
    "exactly long enough": ([A, B, C, A, B], 2, 4, 2, 2),
    "too short": ([A, B, C, D, B], 2, 4, 0, 5),
    "an unknown token ends a match": ([A, UNKNOWN, C, D, A, UNKNOWN, C], 1, 4, 1, 3),
    "unknown tokens do not match": ([UNKNOWN, UNKNOWN, UNKNOWN], 1, 4, 0, 3),
    "an unknown token is last": ([A, B, UNKNOWN, A, B, UNKNOWN], 1, 4, 0, 6),
}


def assert_written(match_suffixes, name, device="cpu"):
    """The case stands between rows, and before a rest, that would make other matches."""
    tokens, min_match, max_match, length, start = WRITTEN[name]
    token_ids = torch.full((3, 16), A, dtype=torch.int32, device=device)
    token_ids[1, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
    slots, known_lens = torch.tensor([[1], [len(tokens)]], device=device)
    found = match_suffixes(token_ids, slots, known_lens, min_match, max_match, 16)
    assert (found.match_lens.tolist(), found.starts.tolist()) == ([length], [start])


def brute_force(tokens, min_match, max_match):
    """(length, start) of the longest and then latest earlier occurrence of the end of `tokens`."""
    best, start = 0, len(tokens)
    for end in range(len(tokens) - 1):
        length = 0
        while length < max_match and length <= end:
            earlier, own = tokens[end - length], tokens[len(tokens) - 1 - length]
            if earlier != own or own < 0:
                break
            length += 1
        if length >= max(best, min_match):
            best, start = length, end + 1
    return best, start


@st.composite
def batches(draw, max_len=40):
    """Arguments of `match_suffixes`; few distinct tokens, also where they must not be read."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    num_slots, max_len = draw(st.integers(1, 5)), draw(st.integers(1, max_len))
    lowest, highest = draw(st.sampled_from([0, 0, -1, -2])), draw(st.sampled_from([0, 1, 2, 9]))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    shape = (num_slots, 3 * max_len)
    token_ids = torch.randint(lowest, highest + 1, shape, generator=generator, dtype=dtype)
    token_ids = token_ids[:, max_len : 2 * max_len]
    layout = draw(st.sampled_from(["part of wider rows", "contiguous", "transposed"]))
    if layout == "contiguous":
        token_ids = token_ids.contiguous()
    elif layout == "transposed":
        token_ids = token_ids.t().contiguous().t()
    known_lens = draw(st.lists(st.integers(0, max_len), max_size=6))
    slots = [draw(st.integers(0, num_slots - 1)) for _ in known_lens]
    min_match = draw(st.integers(1, 4))
    max_match = draw(st.integers(min_match, 10))
    max_known_len = draw(st.integers(max([1, *known_lens]), max_len))
    numbers = torch.tensor([slots, known_lens], dtype=torch.int64)
    return token_ids, *numbers, min_match, max_match, max_known_len


def assert_as_brute_force(match_suffixes, batch, device="cpu"):
    token_ids, slots, known_lens, min_match, max_match, _ = batch
    found = match_suffixes(*(x.to(device) for x in batch[:3]), *batch[3:])
    expected = [
        brute_force(token_ids[slot, :known_len].tolist(), min_match, max_match)
        for slot, known_len in zip(slots.tolist(), known_lens.tolist(), strict=True)
    ]
    assert found.match_lens.dtype == found.starts.dtype == torch.int64
    assert list(zip(*(x.tolist() for x in found), strict=True)) == expected


def assert_continued(continue_matches, batch, found, device="cpu"):
    """Copies of 7 and of 200 tokens of ids below 2; -5 where nothing matched."""
    token_ids, slots, known_lens, *_ = batch
    rows = zip(slots.tolist(), known_lens.tolist(), *(x.tolist() for x in found), strict=True)
    expected = []
    for slot, known_len, length, start in rows:
        followed = token_ids[slot, start:known_len].clamp(0, 1).tolist()
        copied = [followed[i % len(followed)] for i in range(200)] if length else [-5] * 200
        expected.append(copied)
    for longest in (7, 200):
        tensors = (x.to(device) for x in (token_ids, slots, known_lens, found.starts))
        copied = continue_matches(*tensors, longest, 2, -5)
        assert copied.dtype == torch.int64
        assert copied.tolist() == [tokens[:longest] for tokens in expected]
