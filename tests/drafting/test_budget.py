"""Tokens drafted in one step, over all sequences, never exceed the budget."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import core, engine, generate, greedy_params, mixed_prompts, policy, proposer, watch
from failfast_vllm.drafting.records import share


@given(
    wanted=st.lists(st.integers(0, 60), min_size=1, max_size=70),
    increment=st.integers(1, 60),
    budget=st.integers(0, 600),
)
@settings(deadline=None)  # a busy machine is not a fault
def test_increments_share_the_budget_evenly(wanted, increment, budget):
    """Catches an overdrawn budget, tokens left over, one sequence that takes all, another order."""
    wanted = np.array(wanted)
    asked = np.minimum(wanted, increment)
    found = share(asked.copy(), budget)
    assert found.min() >= 0
    assert (found <= asked).all()
    assert found.sum() == min(asked.sum(), budget)
    cut = found < asked
    if cut.any():
        assert found.max() <= found[cut].min() + 1
    assert (found[asked == asked.max()] == np.sort(found[asked == asked.max()])[::-1]).all()


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


def test_drafts_leave_room_for_each_sequences_own_token_and_for_prompts():
    """Catches a step whose verification does not fit `max_num_batched_tokens`, or fills it."""
    limits = {"max_num_batched_tokens": 96, "max_num_seqs": 16}
    spec = {"method": "failfast", "policy": "fixed", "num_speculative_tokens": 60}
    with engine(spec, **limits) as llm, watch(llm) as record:
        prompts = [p for p in mixed_prompts(llm.get_tokenizer(), 60) if len(p) < 40][:16]
        generate(llm, prompts, greedy_params(prompts))
        assert proposer(llm).drafter.draft_budget(16) == 40
        assert core(llm).scheduler.kv_cache_manager.usage == 0.0
    rest = [(96 - len(lens)) // 2 - sum(lens) for lens in record.draft_lens]
    assert min(rest) == 0


def steps_until_a_late_request_answers(llm, prompts, late):
    """Engine steps from its arrival to its first token, while all others are being answered."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add_request(f"early {i}", {"prompt_token_ids": prompt}, params)
    for _ in range(6):
        engine.step()
    engine.add_request("late", {"prompt_token_ids": late}, params)
    waited = 0
    while waited < 60 and not any(output.request_id == "late" for output in engine.step()):
        waited += 1
    engine.abort_request([f"early {i}" for i in range(len(prompts))] + ["late"])
    engine.step()
    return waited


@pytest.mark.parametrize(("num_running", "num_tokens"), [(8, 256), (10, 512)])
def test_a_late_request_does_not_wait_for_drafts(num_running, num_tokens):
    """Catches drafts that take the whole of each step: a prompt would wait until others end."""
    limits = {"max_num_batched_tokens": num_tokens, "max_num_seqs": 16}
    with engine("failfast", **limits) as llm:
        prompts = [p for p in mixed_prompts(llm.get_tokenizer(), 60) if 30 <= len(p) <= 100]
        late = next(p for p in prompts if len(p) >= 50)[:60]
        for name in ("failfast", "fixed"):
            with policy(llm, name, num_speculative_tokens=60), watch(llm) as record:
                waited = steps_until_a_late_request_answers(llm, prompts[:num_running], late)
            assert waited <= 2, f"{name}: {waited} steps"
            assert record.num_drafted > 0
