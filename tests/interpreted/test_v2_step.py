"""What the V2 adapter reads of its runner and hands back, on tensors written by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from failfast_vllm.drafting.records import UNKNOWN, Copies, Drafts
from failfast_vllm.integration import v2

CPU = torch.device("cpu")
SLOTS = [3, 1]  # of the two requests, in another order than those of the batch


class Short(v2._Speculator):
    position_limit = 40


def by_slot(slot_3, slot_1, dtype=torch.int32):
    return torch.tensor([99, slot_1, 99, slot_3], dtype=dtype)


@pytest.fixture
def speculator():
    """One whose runner has 12 and 7 tokens of two requests, all but the last computed."""
    found = object.__new__(Short)
    found.device, found.max_num_reqs, found.kv_group = CPU, 4, 0
    found.block_tables = SimpleNamespace(input_block_tables=[torch.zeros(4, 2, dtype=torch.int32)])
    blocks = SimpleNamespace(committed_lens=lambda table, computed: computed // 4 * 4)
    found.session = SimpleNamespace(
        drafter=SimpleNamespace(blocks=blocks), forget=lambda req_ids: None
    )
    found.keep_requests(
        SimpleNamespace(
            total_len=SimpleNamespace(gpu=by_slot(12, 7)),
            num_computed_tokens=SimpleNamespace(gpu=by_slot(11, 6)),
            all_token_ids=SimpleNamespace(gpu=torch.arange(4 * 20).view(4, 20)),
            max_seq_len=by_slot(30, 90).numpy(),
            draft_tokens=torch.full((4, 8), 77),
        )
    )
    found.params[3], found.params[1] = "of a", "of b"
    return found


def view_of(speculator, structured=False):
    """Of a step in which the first request had two of three drafted tokens accepted."""
    batch = SimpleNamespace(
        req_ids=["a", "b"],
        num_reqs=2,
        num_tokens=5,
        idx_mapping=torch.tensor(SLOTS),
        idx_mapping_np=np.array(SLOTS, dtype=np.int32),
        num_draft_tokens_per_req=np.array([3, 0]),
        has_structured_output_reqs=structured,
    )
    view = v2.StepView(speculator, batch, torch.tensor([3, 1], dtype=torch.int32), 60)
    view.read_outcome()
    view.read_state(np.array([True, True]))
    return view


def test_a_step_is_read_by_state_slot(speculator):
    """Catches tokens, limits and parameters of another slot, and shifted emitted tokens."""
    view = view_of(speculator)
    assert view.num_verified == [3, 0]
    assert view.emitted == [[69, 70, 71], [26]]
    assert view.known_lens.tolist() == [12, 7]
    assert view.computed_lens.tolist() == [11, 6]
    assert view.committed_lens.tolist() == [8, 4]
    assert view.room.tolist() == [30 - 12 - 1, 40 - 7 - 1]
    assert view.params == ["of a", "of b"]
    assert view.slots.tolist() == SLOTS


def test_embedded_positions_are_unknown_until_their_request_ends(speculator):
    """Catches a table of vLLM's that is written to, and masks that outlive their request."""
    table = speculator.req_states.all_token_ids.gpu
    before = table.clone()
    speculator.embedded["b"] = torch.tensor([True, True, False])
    view = view_of(speculator)
    assert view.token_ids[view.slots[1], :4].tolist() == [UNKNOWN, UNKNOWN, 22, 23]
    assert view.token_ids[view.slots[0], :3].tolist() == [60, 61, 62]
    assert torch.equal(table, before)
    speculator.forget(["b"])
    assert view_of(speculator).slots.tolist() == SLOTS


@pytest.mark.parametrize("structured", [True, False])
def test_drafts_are_handed_out_by_state_slot(speculator, structured):
    """Catches drafts of another slot, tokens beyond a draft, and a grammar that sees no ids."""
    token_ids = torch.tensor([[5, 6, 7], [8, 9, 9]])
    drafts = Drafts.of_copies(Copies(np.array([2, 1]), token_ids), np.array([2, 1]))
    lists = view_of(speculator, structured).hand_out(drafts)
    assert lists == ([[5, 6], [8]] if structured else [[-1, -1], [-1]])
    ids = speculator.req_states.draft_tokens
    assert ids[SLOTS, :4].tolist() == [[5, 6, 0, 77], [8, 0, 0, 77]]
    assert (ids[[0, 2]] == 77).all()
