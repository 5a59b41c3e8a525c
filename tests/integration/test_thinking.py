"""Thinking budgets (V1) beside other requests: what an engine without speculation answers."""

import pytest

from engine import engine, generate, mixed_prompts, policy

REASONING = {"reasoning_start_str": "Here", "reasoning_end_str": "The answer"}
BUDGETS = (None, 9, None, 0, 25, None, 40)


@pytest.fixture(scope="module")
def expected():
    """Prompts, their answers with budgets, and those without."""
    with engine(reasoning_config=REASONING) as llm:
        prompts = mixed_prompts(llm.get_tokenizer(), 2 * len(BUDGETS))[::2]
        return prompts, generate(llm, prompts, budgeted()), generate(llm, prompts, budgeted()[0])


@pytest.fixture(scope="module")
def drafting(expected):
    """After `expected`, so that one engine runs at a time."""
    with engine("failfast", reasoning_config=REASONING) as llm:
        yield llm


def budgeted(**more):
    from vllm import SamplingParams

    return [
        SamplingParams(temperature=0.0, max_tokens=60, thinking_token_budget=budget, **more)
        for budget in BUDGETS
    ]


def check_budgets(llm, expected, **more):
    prompts, answers, _ = expected
    for some in (slice(0, 2), slice(1, 3), slice(0, len(prompts))):
        assert generate(llm, prompts[some], budgeted(**more)[some]) == answers[some]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        pytest.param("failfast", {}, id="the paper's rule"),
        pytest.param("fixed", {}, id="fixed"),
        pytest.param("failfast", {"extra_args": {"failfast_max_len": 0}}, id="undrafted"),
    ],
)
def test_budgets_in_a_mixed_batch(expected, drafting, name, more):
    """Catches steps without drafts that take another sampler: a budget's state would count no rows

    and force the end of thinking upon the first request of the batch.
    """
    with policy(drafting, name):
        check_budgets(drafting, expected, **more)


def test_a_budget_ends_with_its_request(expected, drafting):
    """Catches a budget that vLLM leaves to the request which moves into its place: of requests

    without a budget the last takes the place of the first that ends, and must think on.
    """
    from vllm import SamplingParams

    prompts = expected[0]
    greedy = SamplingParams(temperature=0.0, max_tokens=60)
    short = SamplingParams(temperature=0.0, max_tokens=12, thinking_token_budget=14)
    answers = generate(drafting, prompts, greedy)
    for i, prompt in enumerate(prompts):
        for more in ({}, {"extra_args": {"failfast_max_len": 0}}):
            params = SamplingParams(temperature=0.0, max_tokens=60, **more)
            (_, found) = generate(drafting, [prompts[0], prompt], [short, params])
            assert found == answers[i]


def test_budgets_under_the_default(expected):
    """Catches the same in steps in which the load leaves some or all without drafts."""
    with engine({"method": "failfast", "load_aware": True}, reasoning_config=REASONING) as llm:
        check_budgets(llm, expected)


def test_the_budgets_bite(expected):
    """Else the tests above prove nothing: with a budget of 0 the answer is another."""
    _, answers, unlimited = expected
    changed = [a != b for a, b in zip(answers, unlimited, strict=True)]
    assert any(changed)
    assert not any(c for c, budget in zip(changed, BUDGETS, strict=True) if budget is None)
