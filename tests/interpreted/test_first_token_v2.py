"""The same on the V2 runner: drafts are made after a step's tokens have gone out."""

import pytest

from first_token_cases import (  # noqa: F401
    test_an_ended_request_is_not_drafted_for,
    test_steps_whose_drafts_nobody_asks_for,
    test_tokens_go_out_before_their_drafts,
)
from runners import v2_engine


@pytest.fixture(scope="module")
def llm():
    with v2_engine() as running:
        yield running
