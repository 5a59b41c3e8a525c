"""What the drafter's KV cache must hold, told by vLLM's scheduler alone; for running engines."""

import collections
import contextlib

import torch

from engine import core, proposer
from state_check import TOLERANCE


class CacheModel:
    """For each diffusion block of the KV pages: the tokens up to its end, as they were committed.

    Follows the scheduler's pages and requests, not the runner's block tables, bits and token ids.
    What differs is kept in `wrong`, since an error inside of a step would end the engine.
    """

    def __init__(self, llm, dense, every):
        """Args: `dense` is an `IndependentDrafter`; `every` n-th pass is compared with it."""
        self.scheduler, self.drafter = core(llm).scheduler, proposer(llm).drafter
        self.pages, self.dense, self.every = self.scheduler.kv_cache_manager, dense, every
        self.size = self.drafter.geometry.diffusion_block_size
        self.per_page = self.scheduler.block_size // self.size
        self.held = {}  # number of a block -> tokens up to its end
        self.requests, self.tables = {}, {}  # by request id; of the latter, those of this step
        self.step, self.wrong, self.aborted = None, [], set()
        self.counts = collections.Counter()

    def blocks_of(self, req_id):
        """Numbers of the diffusion blocks of a request, in the order of its tokens."""
        (pages,) = self.pages.get_block_ids(req_id)
        return [page * self.per_page + i for page in pages for i in range(self.per_page)]

    def blames(self, what, *about):
        self.wrong.append(f"{what}: {', '.join(map(str, about))}")

    def given_anew(self, pages):
        """The scheduler has given these pages to a request: what was there is gone."""
        for page in pages:
            for i in range(self.per_page):
                self.held.pop(page.block_id * self.per_page + i, None)

    def passed(self, batch, hidden_states):
        """The drafter has taken a pass."""
        step, size = self.step, self.size
        ended = self.requests.keys() - self.scheduler.requests
        owners = {tuple(row): i for i, row in enumerate(step.block_table.tolist())}
        bounds = batch.query_start_loc.tolist()
        self.counts["passes"] += 1
        for s, start in enumerate(batch.committed_lens.tolist()):
            i = owners[tuple(batch.block_table[s].tolist())]
            req_id, rows = step.req_ids[i], slice(bounds[s], bounds[s + 1])
            known, computed = self._known(req_id, i, req_id in ended)
            blocks, ids = self.tables[req_id], batch.input_ids[rows].tolist()
            if start % size:
                self.blames("a start inside of a block", req_id, start)
            for b in range(start // size):
                self.counts["blocks read"] += 1
                if self.held.get(blocks[b]) != known[: (b + 1) * size]:
                    self.blames("block that is read but not committed", req_id, b, start)
            if batch.slot_mapping is not None:
                slots = batch.slot_mapping[rows].tolist()
                if start + sum(slot >= 0 for slot in slots) > computed:
                    self.blames("committed before its target KV", req_id, start, computed)
                self._committed(req_id, known, blocks, start, ids, slots)
            if self.counts["passes"] % self.every == 0:
                self._compare(known[:start] + ids, start, hidden_states[rows])

    def _known(self, req_id, i, has_ended):
        """Tokens of a request, and how many of them the target has computed."""
        if not has_ended:
            request = self.requests[req_id]
            return list(request.all_token_ids), request.num_computed_tokens
        # aborted in this very step: its tokens were never booked, and the runner cannot know
        if req_id not in self.aborted:
            self.blames("a pass for a request that has ended", req_id)
        num_known = int(self.step.known_lens[i])
        return self.step.token_ids[self.step.slots[i], :num_known].tolist(), num_known

    def _committed(self, req_id, known, blocks, start, ids, slots):
        """Which blocks the rows from `start` on have written."""
        size, written = self.size, [slot >= 0 for slot in slots]
        num = sum(written)
        if num % size or not all(written[:num]):
            self.blames("a part of a block is committed", req_id, start, written)
            return
        for b in range(start // size, (start + num) // size):
            first, end = b * size - start, (b + 1) * size
            slot = blocks[b] * size
            if slots[first : first + size] != list(range(slot, slot + size)):
                self.blames("committed to another place", req_id, b)
            if ids[first : first + size] != known[b * size : end]:
                self.blames("other tokens are committed", req_id, b)
            self.held[blocks[b]] = known[:end]
            self.counts["blocks committed"] += 1

    def _compare(self, token_ids, start, hidden_states):
        """What the drafter computes from its cache is what a full recompute gives."""
        error = (hidden_states - self.dense.hidden_states(token_ids)[start:]).abs().max().item()
        self.counts["passes compared"] += 1
        if not error < TOLERANCE:  # NaN, too
            self.blames("the cache holds other KV", start, error)

    def stepped(self, complete):
        """The engine has ended a step; `complete`: nothing may be left to commit."""
        bits = self.drafter.blocks.bits
        for request in self.scheduler.running:
            req_id, known = request.request_id, list(request.all_token_ids)
            for b, number in enumerate(self.blocks_of(req_id)):
                is_held = self.held.get(number) == known[: (b + 1) * self.size]
                if bool(bits[number]) != is_held:
                    self.blames("a bit that lies", req_id, b, bool(bits[number]))
                if complete and not is_held and (b + 1) * self.size <= request.num_computed_tokens:
                    self.blames("a block that is left out", req_id, b)


@contextlib.contextmanager
def modelled(llm, dense, every=4):
    """A `CacheModel` of an engine with a drafter, from its start on."""
    model = CacheModel(llm, dense, every)
    scheduler, drafter, pool = model.scheduler, model.drafter, model.pages.block_pool
    add_request, get_new_blocks, touch = scheduler.add_request, pool.get_new_blocks, pool.touch
    schedule, preempt = scheduler.schedule, scheduler._preempt_request
    propose, forward = drafter.propose, drafter.model.forward

    def adding(request):
        model.requests[request.request_id] = request
        add_request(request)

    def giving(num_blocks):
        pages = get_new_blocks(num_blocks)
        model.given_anew(pages)
        return pages

    def touching(blocks):
        model.counts["pages found in the prefix cache"] += len(blocks)
        touch(blocks)

    def scheduling(*args):
        output = schedule(*args)
        model.tables = {r.request_id: model.blocks_of(r.request_id) for r in scheduler.running}
        return output

    def preempting(*args, **more):
        model.counts["preemptions"] += 1
        preempt(*args, **more)

    def proposing(step):
        model.step = step
        return propose(step)

    def passing(batch):
        hidden_states = forward(batch)
        model.passed(batch, hidden_states)
        return hidden_states

    scheduler.add_request, pool.get_new_blocks, pool.touch = adding, giving, touching
    scheduler.schedule, scheduler._preempt_request = scheduling, preempting
    drafter.propose, drafter.model.forward = proposing, passing
    assert not torch.any(drafter.blocks.bits[:-1]), "it must see the engine from its start"
    try:
        yield model
    finally:
        del (
            scheduler.schedule,
            scheduler._preempt_request,
            scheduler.add_request,
            pool.get_new_blocks,
            pool.touch,
        )
        drafter.propose, drafter.model.forward = propose, forward
