"""Drafts of the engine with the Triton kernels equal those with the references."""

from engine import chat_ids, engine, generate, shipped_prompts, watch

NUM_ROUNDS = 20


def test_drafts_equal_those_of_the_references(monkeypatch):
    from vllm import SamplingParams

    from failfast_kernels import block_attention, confidence

    launches = []
    for home, name in (
        (block_attention, "block_diffusion_attention"),
        (block_attention, "commit_kv"),
        (confidence, "confidence_argmax"),
    ):
        original = getattr(home, name)

        def counting(*args, original=original, name=name, **kwargs):
            launches.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(home, name, counting)

    # Short drafts of two passes, so that few and small passes make many rounds; prefixes too
    # short for splits, which cost the interpreter most.
    method = {"method": "failfast", "num_speculative_tokens": 6, "draft_increment": 3}
    params = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    records = []
    with engine(method, max_num_seqs=2, max_model_len=256) as llm:
        prompt = chat_ids(llm.get_tokenizer(), shipped_prompts()[0])
        prompts = [prompt[:n] for n in (1, 9, 20, 31, 32, 33, 40, 55)]
        for value in ("0", "1"):
            monkeypatch.setenv("FAILFAST_TRITON", value)  # read on every call
            with watch(llm) as record:
                answers = generate(llm, prompts, params)
            records.append((answers, record))
            assert bool(launches) == (value == "1")
    assert set(launches) == {"block_diffusion_attention", "commit_kv", "confidence_argmax"}
    (answers, torch_record), (triton_answers, triton_record) = records
    assert triton_answers == answers
    assert triton_record.proposals == torch_record.proposals
    assert len([p for p in triton_record.proposals if p.draft]) >= NUM_ROUNDS
    assert triton_record.num_accepted > 0
