"""Shapes as published, weights random: memory and limits, not quality."""

import pytest
import torch
from vllm import SamplingParams

from checkpoints import tiny_config, write_checkpoint
from engine import core, engine, proposer, watch
from failfast_vllm.drafters.families import FAST_DLLM_V2
from failfast_vllm.drafters.model import Fast_dLLM_QwenForCausalLM
from failfast_vllm.tools import sizing
from published import FAST_DLLM_1_5B

MIB = 2**20
NARROW = {"hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}


def write_target(path):
    """A small target with the vocabulary of Qwen2.5-7B and up."""
    config = tiny_config(FAST_DLLM_V2, vocab_size=152064, **NARROW)
    config.update(architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    del config["bd_size"], config["mask_token_id"]
    write_checkpoint(path, FAST_DLLM_V2, config, dtype=torch.bfloat16)
    return str(path)


def requests(count, length, max_tokens):
    """Prompts of random ids of the whole vocabulary, and their greedy parameters."""
    ids = torch.randint(0, 151643, (count, length), generator=torch.Generator().manual_seed(5))
    params = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
    )
    return [{"prompt_token_ids": row} for row in ids.tolist()], params


@pytest.mark.slow
def test_the_widest_step_of_64_sequences(tmp_path):
    """Catches verification of 64 x 61 rows x 152k columns: 9 GiB in the logits and their copies."""
    config = tiny_config(FAST_DLLM_V2, vocab_size=151936, **NARROW)
    write_checkpoint(tmp_path / "drafter", FAST_DLLM_V2, config, dtype=torch.bfloat16)
    spec = {"method": "failfast", "model": str(tmp_path / "drafter"), "policy": "fixed"}
    settings = {
        "model": write_target(tmp_path / "target"),
        "dtype": "bfloat16",
        "max_num_seqs": 64,
        "skip_tokenizer_init": True,
    }
    with engine(spec, **settings) as llm, watch(llm) as record:
        rows = []
        compute_logits = proposer(llm).runner.model.compute_logits
        proposer(llm).runner.model.compute_logits = lambda hidden_states: (
            rows.append(len(hidden_states)) or compute_logits(hidden_states)
        )
        prompts, params = requests(64, 8, max_tokens=100)
        for i, prompt in enumerate(prompts):
            llm.llm_engine.add_request(str(i), prompt, params)
        for _ in range(2):  # the prompts and their drafts; the drafts' verification
            llm.llm_engine.step()
        llm.llm_engine.abort_request([str(i) for i in range(64)])
        llm.llm_engine.step()
    drafted = [sum(lens) for lens in record.draft_lens if len(lens) == 64]
    assert max(drafted) == 512  # not 64 x 60
    assert max(rows) == 512 + 64


@pytest.mark.parametrize(
    "num_layers",
    [3, pytest.param(FAST_DLLM_1_5B["num_hidden_layers"], marks=pytest.mark.large)],
)
def test_a_drafter_of_the_published_shape(tmp_path, monkeypatch, capsys, num_layers):
    """Fast-dLLM v2 1.5B, random weights: it starts, drafts, answers; its memory is the plan's."""
    layers = {"num_hidden_layers": num_layers, "layer_types": ["full_attention"] * num_layers}
    config = {**FAST_DLLM_1_5B, **layers}
    write_checkpoint(tmp_path / "drafter", FAST_DLLM_V2, config, shards=2, dtype=torch.bfloat16)
    planned = sizing.memory_of("drafter", config)
    held = []
    load_weights = Fast_dLLM_QwenForCausalLM.load_weights

    def measuring_load_weights(self, weights):  # afterwards the CPU backend packs its own copies
        loaded = load_weights(self, weights)
        held.append(sum(tensor.untyped_storage().nbytes() for tensor in self.parameters()))
        return loaded

    monkeypatch.setattr(Fast_dLLM_QwenForCausalLM, "load_weights", measuring_load_weights)
    spec = {"method": "failfast", "model": str(tmp_path / "drafter")}
    settings = {
        "model": write_target(tmp_path / "target"),
        "dtype": "bfloat16",
        "max_num_seqs": 4,
        "skip_tokenizer_init": True,
    }
    with engine(spec, **settings) as llm, watch(llm) as record:
        (answer,) = llm.generate(*requests(1, 40, max_tokens=4), use_tqdm=False)
        layers = core(llm).vllm_config.compilation_config.static_forward_context.items()
        kv = [x.kv_cache for name, x in layers if name.startswith("draft_model.")]
        kv_bytes = (
            sum(cache[0].nbytes for cache in kv) / proposer(llm).drafter.geometry.kv_block_size
        )
    assert len(answer.outputs[0].token_ids) == 4
    assert record.num_drafted
    with capsys.disabled():
        print(
            f"\n1.5B drafter, {num_layers} layers: {held[0] / MIB:.0f} MiB of weights,"
            f" planned {planned.weight_bytes / MIB:.0f};"
            f" {kv_bytes / 1024:.0f} KiB of KV per token, planned"
            f" {planned.kv_bytes_per_token / 1024:.0f}"
        )
    assert held[0] == pytest.approx(planned.weight_bytes, rel=0.05)
    assert kv_bytes == planned.kv_bytes_per_token
