"""Hidden states from committed blocks equal a full recompute, after every step."""

import pytest
import torch

from engine import core, engine, generate, greedy_params, mixed_prompts, proposer, watch
from failfast_vllm.config import METHOD, MODELS_DIR
from independent import IndependentDrafter
from state_check import TOLERANCE, largest_error


@pytest.fixture(scope="module")
def dense():
    return IndependentDrafter(MODELS_DIR / "drafter", num_draftable_tokens=1)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, id="plain"),
        pytest.param({"enable_prefix_caching": True}, id="prefix hits"),
        pytest.param({"max_num_batched_tokens": 160}, id="split prompts"),
        pytest.param({"num_gpu_blocks_override": 36, "block_size": 64}, id="preemption"),
        pytest.param({"block_size": 32}, id="smallest page"),
        # a compiled model keeps no guards: another dtype or layout would pass unnoticed
        pytest.param({"enforce_eager": False}, id="torch.compile"),
    ],
)
def test_committed_blocks(dense, overrides):
    with engine("failfast", **overrides) as llm, watch(llm) as record:
        prompts = mixed_prompts(llm.get_tokenizer(), 40)
        prompts = [prompt for prompt in prompts if len(prompt) < 700]
        # the same prompts at once and again: hits within a step and across steps
        prompts = prompts + prompts[:16]
        params = greedy_params(prompts, 64)
        error, num_checked = largest_error(
            llm, dense, lambda: generate(llm, prompts, params), every=3
        )
        record.assert_not_vacuous()
    assert num_checked > 100
    assert error < TOLERANCE


def test_the_check_sees_a_block_that_was_never_committed(dense):
    """Without the commit the check must fail, or it proves nothing."""
    with engine("failfast") as llm:
        model = proposer(llm).drafter.model
        forward = model.forward
        model.forward = lambda batch: forward(batch._replace(slot_mapping=None))
        prompts = [p for p in mixed_prompts(llm.get_tokenizer(), 90) if 40 < len(p) < 300]
        params = greedy_params(prompts)
        error, _ = largest_error(llm, dense, lambda: generate(llm, prompts, params), every=3)
    assert error > 100 * TOLERANCE


def test_kv_blocks_return_to_the_pool():
    with engine("failfast") as llm:
        prompts = mixed_prompts(llm.get_tokenizer(), 20)
        generate(llm, prompts, greedy_params(prompts))
        assert core(llm).scheduler.kv_cache_manager.usage == 0.0
        assert torch.isfinite(torch.tensor(proposer(llm).stats.total_ms))


def test_a_window_of_long_prompts(dense):
    """Catches a pass that reads pages before its window, or the window's with other positions.

    A request's first pass commits its window, and sees what a drafter of that text alone sees.
    """
    with engine(block_size=32) as llm:
        prompts = [p for p in mixed_prompts(llm.get_tokenizer(), 90) if 200 < len(p) < 700]
        params = greedy_params(prompts)
        plain = generate(llm, prompts, params)
    with engine({"method": METHOD, "drafter_window": 64}, block_size=32) as llm:
        model, errors = proposer(llm).drafter.model, []
        forward = model.forward

        def checking_forward(batch):
            hidden_states, bounds = forward(batch), batch.query_start_loc.tolist()
            for s, start in enumerate(batch.committed_lens.tolist()):
                rows = slice(bounds[s], bounds[s + 1])
                if start == 0 and batch.positions[bounds[s]] > 0:
                    expected = dense.hidden_states(batch.input_ids[rows].tolist())
                    errors.append((hidden_states[rows] - expected).abs().max().item())
            return hidden_states

        model.forward = checking_forward
        assert generate(llm, prompts, params) == plain
    assert len(errors) > len(prompts) // 2
    assert max(errors) < 5 * TOLERANCE  # other positions, other roundings
