"""Bits of committed blocks against a literal model of pages that are shared, freed and reused."""

import random
from types import SimpleNamespace

import pytest
import torch

from failfast_vllm.drafting.committed_blocks import CommittedBlocks
from failfast_vllm.drafting.workspace import Geometry
from failfast_vllm.integration.session import new_pages

PAGE, BLOCK, NUM_PAGES = 8, 4, 24
PER_PAGE = PAGE // BLOCK


class Pages:
    """A paged cache in miniature: what each block truly holds, and who may read it."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.free = list(range(1, NUM_PAGES))
        self.users = dict.fromkeys(range(NUM_PAGES), 0)
        self.new = []  # given out since the bits were told
        self.cached = {}  # tokens up to a page's end -> page, as a prefix cache has it
        self.holds = {}  # (page, block) -> tokens up to its end whose drafter KV is there

    def allocate(self):
        page = self.free.pop(self.rng.randrange(len(self.free)))
        self.new.append(page)
        self.holds = {place: held for place, held in self.holds.items() if place[0] != page}
        self.cached = {tokens: p for tokens, p in self.cached.items() if p != page}
        self.users[page] = 1
        return page


def admit(pages, tokens):
    """Pages of a new request, and how many of its tokens are a prefix hit."""
    table, hit = [], 0
    while hit + PAGE < len(tokens) and tuple(tokens[: hit + PAGE]) in pages.cached:
        page = pages.cached[tuple(tokens[: hit + PAGE])]
        if page in pages.free:
            pages.free.remove(page)
        pages.users[page] += 1
        table.append(page)
        hit += PAGE
    return table, hit


def blocks_of(num_pages, window=None):
    geometry = Geometry(9, 9, PAGE, 64, torch.device("cpu"), BLOCK, window=window)
    return CommittedBlocks(num_pages, geometry)


@pytest.mark.parametrize("seed", range(15))
def test_a_block_is_read_only_if_its_kv_is_there(seed):
    """Catches bits that outlive their tokens, and bits that a neighbour's garbage clears."""
    pages = Pages(seed)
    rng = pages.rng
    bits = blocks_of(NUM_PAGES)
    requests, num_hits, num_postponed = [], 0, 0
    texts = [[rng.randrange(9) for _ in range(40)]]
    for _ in range(300):
        if len(requests) < 3 and rng.random() < 0.4:
            tokens = [*rng.choice(texts)[: rng.randrange(40)], rng.randrange(9)]
            texts.append(tokens)
            table, hit = admit(pages, tokens)
            requests.append({"tokens": tokens, "table": table, "computed": hit})
            num_hits += hit > 0
        if not requests:
            continue
        for request in requests:  # the target computes what is known, and samples some
            request["before"] = request["computed"]
            request["computed"] = len(request["tokens"])
            accepted = [rng.randrange(9) for _ in range(rng.choice((1, 5)))]
            request["tokens"] = request["tokens"] + accepted
            while len(request["table"]) * PAGE < len(request["tokens"]):
                request["table"].append(pages.allocate())
            for end in range(PAGE, request["computed"] + 1, PAGE):
                pages.cached.setdefault(
                    tuple(request["tokens"][:end]), request["table"][end // PAGE - 1]
                )
        width = 10
        garbage = [[rng.randrange(NUM_PAGES) for _ in range(width)] for _ in requests]
        table = torch.tensor(
            [r["table"] + g[len(r["table"]) :] for r, g in zip(requests, garbage, strict=True)]
        )
        computed = torch.tensor([r["before"] for r in requests])
        bits.clear(pages.new, PAGE)
        pages.new = []
        committed = bits.committed_lens(table, computed).tolist()
        places = [
            [(r["table"][p // PAGE], p % PAGE // BLOCK) for p in range(0, len(r["tokens"]), BLOCK)]
            for r in requests
        ]
        marked = []
        for request, length, own in zip(requests, committed, places, strict=True):
            there = 0
            while pages.holds.get(own[there]) == tuple(request["tokens"][: (there + 1) * BLOCK]):
                there += 1
            assert length == there * BLOCK
            final = request["computed"] // BLOCK * BLOCK
            if rng.random() < 0.5:
                num_postponed += 1
                continue
            slots = [-1] + [
                request["table"][p // PAGE] * PAGE + p % PAGE for p in range(length, final)
            ]
            bits.mark(torch.tensor(slots))
            marked += [(own[p // BLOCK], request, p + BLOCK) for p in range(length, final, BLOCK)]
        for place, request, end in marked:
            pages.holds[place] = tuple(request["tokens"][:end])
        for request in list(requests):
            if len(request["tokens"]) > 45 or rng.random() < 0.1 or len(pages.free) < 8:
                requests.remove(request)
                for page in request["table"]:
                    pages.users[page] -= 1
                    if not pages.users[page]:
                        pages.free.append(page)
    assert num_hits > 0
    assert num_postponed > 50


def test_committed_blocks_are_found_again():
    """Catches bits that are never read: the test above would pass with none at all."""
    bits = blocks_of(4)
    table = torch.tensor([[2, 3, 2**31 - 1]], dtype=torch.int32)  # garbage behind its pages

    def committed(computed):
        return bits.committed_lens(table, torch.tensor([computed])).tolist()

    assert committed(14) == [0]
    bits.mark(torch.arange(2 * PAGE, 2 * PAGE + 8))
    bits.mark(torch.arange(3 * PAGE, 3 * PAGE + 4))
    assert committed(13) == [12]
    assert committed(8) == [8]
    bits.clear([], PAGE)
    bits.clear([3, 1], PAGE)
    assert committed(13) == [8]
    bits.clear([1], 2 * PAGE)  # of a scheduler whose pages are two of ours
    assert committed(13) == [0]


def test_blocks_before_the_window_need_no_kv():
    """Catches a window that waits for the commits of the whole prompt, or trusts its own blocks."""
    bits = blocks_of(4, window=PAGE)
    table = torch.tensor([[2, 3, 0]])

    def committed(computed):
        return bits.committed_lens(table, torch.tensor([computed])).tolist()

    assert committed(2 * PAGE) == [PAGE]  # the window begins with the second page
    assert committed(3 * PAGE - 1) == [PAGE]
    assert committed(3 * PAGE) == [2 * PAGE]
    bits.mark(torch.arange(3 * PAGE, 3 * PAGE + BLOCK))
    assert committed(2 * PAGE) == [PAGE + BLOCK]
    assert committed(PAGE) == [0]


def step_of(new=(), cached=(), resumed=()):
    """What a scheduler says: (num_computed, pages) of new requests, (id, num_computed, pages)."""
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(num_computed_tokens=computed, block_ids=([99], pages))
            for computed, pages in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[req_id for req_id, _, _ in cached],
            num_computed_tokens=[computed for _, computed, _ in cached],
            new_block_ids=[pages and ([99], pages) for _, _, pages in cached],
            resumed_req_ids=set(resumed),
        ),
    )


@pytest.mark.parametrize("trusts_hits", [True, False])
def test_pages_that_a_step_gives_out(trusts_hits):
    """Catches prefix hits that are forgotten, and stale bits of a page that is partly a hit."""
    step = step_of(
        new=[(0, [1, 2]), (16, [3, 4, 5]), (20, [6, 7, 8])],
        cached=[("a", 40, None), ("b", 32, [9]), ("c", 8, [10, 11])],
        resumed=["c"],
    )
    found = new_pages(step, 1, 8, trusts_hits=trusts_hits)
    assert found == ([1, 2, 5, 8, 9, 11] if trusts_hits else [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
