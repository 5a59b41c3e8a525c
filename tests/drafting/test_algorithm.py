"""The engine's drafts against a literal, one-sequence Algorithm 1 - and each difference alone.

The authors' rules themselves are tested in `test_literal.py`.
"""

from dataclasses import replace

import pytest
import torch
from vllm import SamplingParams

from checkpoints import tiny_config, write_checkpoint, write_weights
from engine import engine, generate, greedy_params, mixed_prompts, proposer, watch
from failfast_vllm.config import METHOD, MODELS_DIR
from failfast_vllm.drafters.families import SDAR
from independent import IndependentDrafter
from literal import AUTHORS, OURS, KeptKV, literal_draft

INCREMENT, THRESHOLD, CAP = 10, 0.45, 60
BLOCK = 32
NUM_ROUNDS = 250


@pytest.fixture(scope="module")
def recorded():
    """Proposals of a mixed batch, and what a literal draft needs to repeat them."""
    with engine("failfast") as llm, watch(llm) as record:
        prompts = [p for p in mixed_prompts(llm.get_tokenizer(), 60) if len(p) < 420]
        generate(llm, prompts, greedy_params(prompts, 64))
        own = proposer(llm)
        knobs = own.vllm_config.additional_config[METHOD]
        stop_ids = own.drafter.stop_token_ids.tolist()
        record.assert_not_vacuous()
    assert (knobs["draft_increment"], knobs["num_speculative_tokens"]) == (INCREMENT, CAP)
    dense = IndependentDrafter(MODELS_DIR / "drafter", knobs["num_draftable_tokens"])
    return dense, stop_ids, record.proposals


def literal(recorded, proposal, rules, **overrides):
    dense, stop_ids, _ = recorded
    settings = {
        "increment": INCREMENT,
        "threshold": THRESHOLD,
        "max_draft": proposal.max_draft,
        "stop_token_ids": stop_ids,
        **overrides,
    }
    return literal_draft(dense, proposal.known, rules, **settings)


def test_engine_drafts_equal_the_literal_ones(recorded):
    proposals = recorded[2][:: max(1, len(recorded[2]) // (NUM_ROUNDS + 50))]
    assert len(proposals) >= NUM_ROUNDS
    different = [
        (i, proposal, expected)
        for i, proposal in enumerate(proposals)
        for expected in [literal(recorded, proposal, OURS)]
        if (proposal.draft, proposal.num_passes) != (expected.token_ids, expected.num_passes)
    ]
    assert not different, different[:3]
    assert len({len(p.draft) for p in proposals}) > 5
    assert sum(p.num_passes > 1 for p in proposals) > 20, "no draft ever grew"


def within_one_block(proposal):
    return len(proposal.known) % BLOCK and len(proposal.known) % BLOCK + len(proposal.draft) < BLOCK


def test_only_crossing_block_ends_needs_the_crossing_rule(recorded):
    """Inside a block the authors' block-by-block order gives the same draft."""
    rules = replace(OURS, crosses_blocks=False, commits_apart=True)
    inside = [p for p in recorded[2] if within_one_block(p)][:60]
    assert len(inside) == 60
    for proposal in inside:
        assert literal(recorded, proposal, rules).token_ids == proposal.draft
    crossing = [p for p in recorded[2] if not within_one_block(p)][:60]
    assert any(literal(recorded, p, rules).token_ids != p.draft for p in crossing)


def mean(values):
    return sum(values) / len(values)


def sample(recorded, count=40):
    proposals = [p for p in recorded[2] if p.max_draft == CAP]
    return proposals[:: max(1, len(proposals) // count)][:count]


def test_one_pass_per_increment_takes_fewer_passes(recorded):
    """Difference: theirs is one pass per sub-block of 8 and one per committed block.

    Those over the prefix, which the same block's commit in the round before may have spared, are
    left out.
    """
    some = sample(recorded)
    ours = mean([p.num_passes for p in some])
    theirs = []
    for proposal in some:
        prefix = proposal.known[: len(proposal.known) // BLOCK * BLOCK]
        kept = KeptKV(len(prefix), prefix)
        theirs.append(literal(recorded, proposal, AUTHORS, kept=kept).num_passes)
    assert mean(theirs) > 1.5 * ours


def test_trailing_masks_change_few_drafts(recorded):
    """Difference: MASK rows behind the increment are left out (an approximation)."""
    some = sample(recorded)
    padded = replace(OURS, pads_blocks=True)
    same = mean([literal(recorded, p, padded).token_ids[:3] == p.draft[:3] for p in some])
    assert same >= 0.7


def test_the_cap_is_exact(recorded):
    """Difference: the authors' cap counts confidences and lets a draft grow past it."""
    cap = 15
    some = sample(recorded)
    settings = {"threshold": 0.0, "max_draft": cap, "stop_token_ids": ()}
    assert all(
        len(literal_draft(recorded[0], p.known, OURS, increment=10, **settings).token_ids) == cap
        for p in some[:10]
    )
    theirs = replace(OURS, exact_cap=False)
    assert all(
        len(literal_draft(recorded[0], p.known, theirs, increment=10, **settings).token_ids) == 20
        for p in some[:10]
    )


def test_a_short_cap_in_the_engine(recorded):
    with engine({"method": "failfast", "num_speculative_tokens": 7}) as llm, watch(llm) as record:
        prompts = mixed_prompts(llm.get_tokenizer(), 8)
        generate(llm, prompts, greedy_params(prompts))
    assert max(len(p.draft) for p in record.proposals) == 7


def test_fixed_drafts_take_one_pass(recorded):
    spec = {"method": "failfast", "policy": "fixed", "num_speculative_tokens": 16}
    with engine(spec) as llm, watch(llm) as record:
        prompts = mixed_prompts(llm.get_tokenizer(), 8)
        generate(llm, prompts, greedy_params(prompts))
        stop_ids = set(proposer(llm).drafter.stop_token_ids.tolist())
    assert {p.num_passes for p in record.proposals} == {1}
    for proposal in record.proposals:
        ended = proposal.draft[-1] in stop_ids
        assert ended or len(proposal.draft) == proposal.max_draft


def test_the_stop_token_ends_a_draft(recorded):
    stop_ids = set(recorded[1])
    with_stop = [p.draft for p in recorded[2] if stop_ids & set(p.draft)]
    assert with_stop
    assert all(not stop_ids & set(draft[:-1]) for draft in with_stop)


def test_mask_is_never_drafted(recorded):
    mask = recorded[0].mask_token_id
    assert all(mask not in p.draft for p in recorded[2])
    assert torch.tensor([max(p.draft) for p in recorded[2]]).max() < recorded[0].vocab_size


@pytest.mark.parametrize("size", [4, 16, 32])
def test_sdar_drafts_equal_the_literal_ones(size, tmp_path):
    """The other family: blocks of another size, and no shift. Random weights, made confident."""
    path = tmp_path / "drafter"
    config = tiny_config(SDAR, block_size=size, tie_word_embeddings=False)
    tensors = write_checkpoint(path, SDAR, config)
    tensors["lm_head.weight"] *= (
        5 if size == 4 else 20
    )  # so that some increments are sure throughout
    write_weights(path, tensors)
    with engine({"method": "failfast", "model": str(path)}) as llm, watch(llm) as record:
        prompts = [p for p in mixed_prompts(llm.get_tokenizer(), 24) if len(p) < 200]
        generate(llm, prompts, SamplingParams(temperature=0.0, max_tokens=30))
        knobs = proposer(llm).vllm_config.additional_config[METHOD]
        stop_ids = proposer(llm).drafter.stop_token_ids.tolist()
    assert knobs["draft_increment"] == min(size, 10)
    independent = IndependentDrafter(path, knobs["num_draftable_tokens"])
    proposals = record.proposals[:: max(1, len(record.proposals) // 120)]
    assert len(proposals) >= 100
    for proposal in proposals:
        expected = literal_draft(
            independent,
            proposal.known,
            OURS,
            increment=knobs["draft_increment"],
            threshold=THRESHOLD,
            max_draft=proposal.max_draft,
            stop_token_ids=stop_ids,
        )
        assert proposal.draft == expected.token_ids
    assert sum(p.num_passes > 1 for p in proposals) > 10, "no draft ever grew"
    assert len({len(p.known) % size for p in proposals}) == size
