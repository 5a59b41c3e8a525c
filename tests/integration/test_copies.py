"""The copy lane in an engine: with a drafter, without one, and in whose steps."""

import pytest

from copying_cases import check
from engine import count_preemptions, engine, generate, greedy_params, mixed_prompts, proposer

NUM_PROMPTS = 42
ALONE = {"method": "failfast", "model": None, "load_aware": True}
BESIDE = {"method": "failfast", "load_aware": True, "copies": True}


@pytest.fixture(scope="module")
def plain():
    """Prompts, their sampling parameters, and what vLLM alone answers."""
    with engine() as llm:
        prompts = mixed_prompts(llm.get_tokenizer(), NUM_PROMPTS)
        params = greedy_params(prompts)
        return prompts, params, generate(llm, prompts, params)


def test_beside_a_drafter(plain):
    """Catches a copy in the place of another sequence's draft, and commits that were skipped."""
    with engine(BESIDE) as llm:
        record = check(llm, *plain, draft_increment=2, least=4, longest=6)
        passes = [r for r in record.rounds if r.num_passes]
        assert any(r.num_copied for r in passes), "no draft of a pass went on as a copy"
        assert any(not r.num_copied for r in passes)
        both = {r.step for r in record.rounds if r.num_copied} & {r.step for r in passes}
        assert both, "no step had both"


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, id="batches"),
        pytest.param({"enable_prefix_caching": True, "max_num_seqs": 4}, id="prefix hits"),
        pytest.param({"max_num_batched_tokens": 160, "max_num_seqs": 6}, id="split prompts"),
    ],
)
def test_without_a_drafter(plain, overrides):
    with engine(ALONE, **overrides) as llm:
        record = check(llm, *plain, drafts=False)
        assert not any(r.num_passes for r in record.rounds)
        assert proposer(llm).stats.num_forwards == 0


def test_without_a_drafter_under_preemption(plain):
    prompts, params, expected = plain
    short = [i for i, prompt in enumerate(prompts) if len(prompt) < 900]
    part = [[values[i] for i in short] for values in (prompts, params, expected)]
    overrides = {"num_gpu_blocks_override": 20, "block_size": 64, "max_model_len": 1024}
    with engine(ALONE, **overrides) as llm:
        preempted = count_preemptions(llm)
        check(llm, *part, drafts=False, longest=8)
        assert preempted


def test_the_planner_decides(plain):
    """The default: learned while serving; nothing is forced."""
    prompts, params, expected = plain
    with engine(ALONE) as llm:
        planner = proposer(llm).drafter.planner
        assert (planner.drafts, planner.copies) == (False, True)
        assert generate(llm, prompts, params) == expected
        assert planner.copied.calibration.counts.any(), "nothing was copied"
