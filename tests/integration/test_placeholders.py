"""vLLM pads requests that have one token left to compute by rows for drafts nobody has made."""

import pytest

from engine import (
    core,
    engine,
    generate,
    greedy_params,
    only_drafts_are_verified,
    whole_pages_and_a_token,
)

PAGE = 64


@pytest.fixture(scope="module")
def plain():
    """Prompts, their sampling parameters, and what vLLM alone answers."""
    with engine() as llm:
        prompts = whole_pages_and_a_token(llm.get_tokenizer(), PAGE, 24)
        params = greedy_params(prompts)
        return prompts, params, generate(llm, prompts, params)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, id="hits"),
        pytest.param({"max_num_batched_tokens": 160}, id="a small budget"),
        pytest.param({"num_gpu_blocks_override": 36}, id="preemption"),
    ],
)
def test_nothing_is_verified_that_nobody_drafted(plain, overrides):
    """Catches 60 placeholders beside the last token of a prompt that is in the prefix cache."""
    prompts, params, expected = plain
    with engine("failfast", enable_prefix_caching=True, block_size=PAGE, **overrides) as llm:
        preempted, preempt = [], core(llm).scheduler._preempt_request

        def counting_preempt(request, *args, **kwargs):
            preempted.append(request.request_id)
            return preempt(request, *args, **kwargs)

        core(llm).scheduler._preempt_request = counting_preempt
        with only_drafts_are_verified(llm) as record:
            for _ in range(2):
                assert generate(llm, prompts, params) == expected
        record.assert_not_vacuous()
        assert bool(preempted) == ("num_gpu_blocks_override" in overrides)
