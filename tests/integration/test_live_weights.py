"""Weights of the target that are replaced while the engine runs, as in reinforcement learning."""

from engine import engine, generate, greedy_params, mixed_prompts, watch
from live_weights import other_weights, reload


def test_answers_after_reloading_are_vllms(tmp_path):
    """Catches drafts, or KV of the drafter, that tie answers to the weights of the start.

    Compared with vLLM's own reloading, which on a CPU leaves a tied output head as it was.
    """
    path = other_weights(tmp_path / "trained")
    with engine(enable_prefix_caching=True) as llm:
        prompts = mixed_prompts(llm.get_tokenizer(), 12)
        params = greedy_params(prompts)
        before = generate(llm, prompts, params)
        reload(llm, path)
        expected = generate(llm, prompts, params)
    assert before != expected
    with engine("failfast", enable_prefix_caching=True) as llm, watch(llm) as record:
        assert generate(llm, prompts, params) == before
        reload(llm, path)
        num_before = record.num_accepted
        assert generate(llm, prompts, params) == expected
    assert record.num_accepted > num_before > 0
