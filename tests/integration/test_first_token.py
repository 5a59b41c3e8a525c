"""Drafts are made after a step's tokens have gone out, and none for a request that has ended."""

import pytest

from engine import engine
from first_token_cases import (  # noqa: F401
    test_an_ended_request_is_not_drafted_for,
    test_steps_whose_drafts_nobody_asks_for,
    test_tokens_go_out_before_their_drafts,
)


@pytest.fixture(scope="module")
def llm():
    with engine("failfast") as running:
        yield running
