"""Weights of the target that are replaced while the V2 runner serves."""

from engine import mixed_prompts, watch
from failfast_vllm.config import MODELS_DIR
from independent import IndependentDrafter
from live_weights import assert_served, drifted, train
from runners import v1_engine, v2_engine
from state_check import TOLERANCE, largest_error

DRIFT = [0.3, 0.0]  # of the weights; 0: as at start
NUM_TOKENS = 64  # of each answer


def test_changes_under_load():
    """Catches tokens that come from weights of before a change, and KV that a change has spoilt."""
    dense = IndependentDrafter(MODELS_DIR / "drafter", num_draftable_tokens=1)
    steps_of_training, served = [drifted(scale) for scale in DRIFT], []
    with v2_engine(enable_prefix_caching=True) as llm, watch(llm) as record:
        prompts = [p for p in mixed_prompts(llm.get_tokenizer(), 30) if 10 < len(p) < 300]

        def run():
            served.append(train(llm, prompts, steps_of_training, NUM_TOKENS))

        error, num_checked = largest_error(llm, dense, run)
    record.assert_not_vacuous()
    assert num_checked > 20
    assert error < TOLERANCE
    with v1_engine(enable_prefix_caching=True) as llm:
        assert_served(llm, *served, steps_of_training)
