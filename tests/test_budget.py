"""Tokens drafted in one step, over all sequences, never exceed the budget."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine import core, engine, generate, greedy_params, mixed_prompts, proposer, watch
from failfast_vllm.drafter import share


@given(
    wanted=st.lists(st.integers(0, 60), min_size=1, max_size=70),
    increment=st.integers(1, 60),
    budget=st.integers(0, 600),
)
def test_increments_share_the_budget_evenly(wanted, increment, budget):
    """Catches an overdrawn budget, tokens left over, and one sequence that takes them all."""
    wanted = np.array(wanted)
    asked = np.minimum(wanted, increment)
    found = share(asked.copy(), budget)
    assert found.min() >= 0
    assert (found <= asked).all()
    assert found.sum() == min(asked.sum(), budget)
    cut = found < asked
    if cut.any():
        assert found.max() <= found[cut].min() + 1


def test_a_small_budget_in_the_engine():
    budget = 40
    with engine(None) as llm:
        prompts = mixed_prompts(llm.get_tokenizer(), 32)
        params = greedy_params(prompts)
        expected = generate(llm, prompts, params)
    with engine({"method": "failfast", "draft_budget": budget}) as llm, watch(llm) as record:
        assert generate(llm, prompts, params) == expected
    per_step = [sum(lens) for lens in record.draft_lens]
    assert max(per_step) == budget
    record.assert_not_vacuous()


def test_drafts_leave_room_for_each_sequences_own_token():
    """Catches a step whose verification does not fit `max_num_batched_tokens`."""
    limits = {"max_num_batched_tokens": 96, "max_num_seqs": 16}
    spec = {"method": "failfast", "policy": "fixed", "num_speculative_tokens": 60}
    with engine(spec, **limits) as llm, watch(llm) as record:
        prompts = [p for p in mixed_prompts(llm.get_tokenizer(), 60) if len(p) < 40][:16]
        generate(llm, prompts, greedy_params(prompts))
        assert proposer(llm).drafter.draft_budget(16) == 80
        assert core(llm).scheduler.kv_cache_manager.usage == 0.0
    assert max(sum(lens) + len(lens) for lens in record.draft_lens) == 96
