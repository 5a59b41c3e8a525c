"""Random lives of requests, in their short form; `benchmarks/endurance/fuzz_engine.py` has more."""

import pytest

import fuzzing
from cache_model import modelled
from engine import TARGET, engine
from failfast_vllm.config import MODELS_DIR
from failfast_vllm.integration.session import Session
from independent import IndependentDrafter
from live_weights import other_weights

NUM_LIVES = 40


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    paths = [TARGET, other_weights(tmp_path_factory.mktemp("weights") / "other")]
    with engine(None, **fuzzing.ENGINE) as llm:
        return fuzzing.learn(llm, paths)


@pytest.fixture
def world(known):
    dense = IndependentDrafter(MODELS_DIR / "drafter", num_draftable_tokens=1)
    with engine("failfast", **fuzzing.small(64)) as llm, modelled(llm, dense) as model:
        yield fuzzing.World(llm, known, model)


def lives(world, count):
    """What went wrong in each of the first lives."""
    for seed in range(count):
        yield seed, world.live(fuzzing.make(seed, len(world.known.prompts)))


def test_lives(world):
    """Catches a page, a bit or an answer that one order of events in a thousand makes wrong."""
    assert [(seed, lines) for seed, lines in lives(world, NUM_LIVES) if lines] == []
    counts = {**world.counts, **world.model.counts}
    assert counts["passes compared"] > NUM_LIVES
    assert counts["blocks read"] > 10 * NUM_LIVES
    names = ("abort", "abort late", "preempt", "reset", "reload", "no drafts", "preemptions")
    assert all(counts[name] > 0 for name in (*names, "pages found in the prefix cache"))


def test_the_model_sees_pages_that_are_not_cleared(world):
    """Else the test above proves nothing: a page's next owner reads the last one's bits."""
    world.model.drafter.blocks.clear = lambda pages, page_size: None
    lines = [line for _, lines in lives(world, 20) for line in lines]
    assert any("not committed" in line for line in lines)
    assert any("a bit that lies" in line for line in lines)


def test_what_is_left_over_is_seen(world, monkeypatch):
    """Likewise: requests that nobody forgets."""
    monkeypatch.setattr(Session, "forget", lambda self, req_ids: None)
    assert any("left over" in line for _, lines in lives(world, 10) for line in lines)
