"""The copy lane on the V2 runner: with a drafter, and without one, in Triton."""

import pytest

from copying_cases import check
from engine import proposer
from runners import answered, v2_engine

NUM_PROMPTS = 24
ALONE = {"method": "failfast", "model": None, "load_aware": True}
BESIDE = {"method": "failfast", "load_aware": True, "copies": True}


@pytest.fixture(scope="module")
def some():
    return answered(NUM_PROMPTS, 96)


def test_beside_a_drafter(some):
    with v2_engine(BESIDE) as llm:
        record = check(llm, *some, draft_increment=2, least=4, longest=6)
        steps = [
            {r.step for r in record.rounds if bool(r.num_copied) == copied} for copied in (0, 1)
        ]
        assert steps[0] & steps[1], "no step had both"


@pytest.mark.parametrize("triton", [False, True])
def test_without_a_drafter(some, triton, monkeypatch):
    """On V2 the token ids lie on the device, where the kernel reads them."""
    if triton:
        monkeypatch.setenv("FAILFAST_TRITON", "1")
    with v2_engine(ALONE, enable_prefix_caching=True) as llm:
        assert type(proposer(llm)).__name__ == "CopySpeculator"
        check(llm, *some, drafts=False)
