"""Loading drafters: what is published loads bit for bit, what is damaged is refused in one line."""

import ast
import json
import math
import socket

import pytest
import torch

from build_config import build, edit
from checkpoints import (
    fuse_experts,
    published_shapes,
    random_tensors,
    tiny_config,
    write_checkpoint,
    write_headers,
    write_weights,
)
from engine import engine, generate, proposer
from failfast_vllm.config import METHOD, MODELS_DIR
from failfast_vllm.drafters import checks
from failfast_vllm.drafters.checkpoint import check_tensors, expected_shapes
from failfast_vllm.drafters.families import FAMILIES, FAST_DLLM_V2, SDAR, SDAR_MOE
from published import (
    FAST_DLLM_1_5B,
    FAST_DLLM_7B,
    SDAR_1_7B,
    SDAR_4B,
    SDAR_30B_A3B,
    TRADO_4B,
    TRADO_8B,
)

# name on the hub: family, config.json, parameters, block, MASK; with those of the models that they
# were trained from: Qwen2.5-1.5B and -7B; Qwen3-1.7B and -4B untied, -8B, -30B-A3B
PUBLISHED = {
    "Fast_dLLM_v2_1.5B": (FAST_DLLM_V2, FAST_DLLM_1_5B, 1_543_714_304, 32, 151665),
    "Fast_dLLM_v2_7B": (FAST_DLLM_V2, FAST_DLLM_7B, 7_615_616_512, 32, 151665),
    "SDAR-1.7B-Chat": (SDAR, SDAR_1_7B, 2_031_739_904, 4, 151669),
    "SDAR-1.7B-Chat-b32": (SDAR, SDAR_1_7B, 2_031_739_904, 32, 151669),
    "SDAR-4B-Chat-b8": (SDAR, SDAR_4B, 4_411_424_256, 8, 151669),
    "TraDo-4B-Instruct": (SDAR, TRADO_4B, 4_411_424_256, 4, 151669),
    "TraDo-8B-Instruct": (SDAR, TRADO_8B, 8_190_735_360, 4, 151669),
    "TraDo-8B-Thinking": (SDAR, TRADO_8B, 8_190_735_360, 4, 151669),
    "SDAR-30B-A3B-Chat-b16": (SDAR_MOE, SDAR_30B_A3B, 30_532_122_624, 16, 151669),
}
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def asking(path):
    return {"method": METHOD, "model": str(path)}


def published(parent, name):
    """The directory of a published checkpoint: config.json and headers; the weights are a hole."""
    family, fields, *_ = PUBLISHED[name]
    path = parent / name
    path.mkdir()
    (path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    write_headers(path, family)
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """Catches a tensor forgotten or invented: the parameters are those of the models' cards."""
    family, fields, num_parameters, *_ = PUBLISHED[name]
    assert sum(map(math.prod, expected_shapes(family, fields).values())) == num_parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_accepted(tmp_path, monkeypatch, caplog, name):
    """Catches a published field that a check refuses, and a config class from remote code.

    And SDAR in blocks of 4 where only its name says 32, or a warning where the name says it.
    """
    from failfast_vllm.drafters.hf_config import CONFIGS
    from failfast_vllm.integration.startup import stop_token_ids

    def connect(*args):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    family, fields, _, block_size, mask = PUBLISHED[name]
    target = tmp_path / "target"
    target.mkdir()
    target_fields = json.loads((MODELS_DIR / "target" / "config.json").read_text(encoding="utf-8"))
    other_padding = 152064 + 151936 - fields["vocab_size"]
    target_fields |= {"vocab_size": other_padding, "eos_token_id": 151644}
    (target / "config.json").write_text(json.dumps(target_fields), encoding="utf-8")

    drafter = published(tmp_path, name)
    built = build(asking(drafter), model=target, skip_tokenizer_init=True)
    facts = built.additional_config[METHOD]
    assert facts["mask_token_id"] == mask
    assert facts["diffusion_block_size"] == block_size
    assert facts["draft_increment"] == min(block_size, 10)
    is_silent = family is not FAST_DLLM_V2 and "-b" not in name
    assert ("in blocks of 4: the default" in caplog.text) == is_silent
    assert caplog.text.count("failfast: ") == is_silent
    assert facts["num_draftable_tokens"] == 151936  # what both padded vocabularies hold
    assert stop_token_ids(built.model_config) == [151644]  # the target ends answers
    loaded = built.speculative_config.draft_model_config
    assert type(loaded.hf_config) is CONFIGS[family.model_types[0]]
    assert not loaded.trust_remote_code
    assert loaded.hf_config.rope_parameters["rope_theta"] == 1_000_000
    assert loaded.get_head_size() == 128


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"attention_bias": True},
    ],
)
def test_layout_of_all_families(family, changes):
    """Catches a bias, a head norm, experts or an output head asked of the wrong family or layer."""
    fields = tiny_config(family, **changes)
    expected = {name: tuple(shape) for name, shape in published_shapes(family, fields).items()}
    assert expected_shapes(family, fields) == expected


# --- damaged checkpoints ---------------------------------------------------------------------


def refusal(path):
    """The one line that refuses the checkpoint at `path`."""
    with pytest.raises(ValueError, match=r"\Afailfast: ") as caught:
        checks.check_local_drafter(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


def objection(check, *args):
    """The message of the ValueError that a check raises, or None."""
    try:
        check(*args)
    except ValueError as error:
        return str(error)
    return None


@pytest.fixture
def checkpoint(tmp_path):
    """An untied Fast-dLLM checkpoint, headers only, and its shapes."""
    fields = tiny_config(FAST_DLLM_V2, tie_word_embeddings=False)
    path = tmp_path / "ck"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    write_headers(path, FAST_DLLM_V2)
    return path, published_shapes(FAST_DLLM_V2, fields)


@pytest.mark.parametrize("rows", [1984, 2048])
def test_a_tied_checkpoint_may_carry_its_output_head(rows):
    """Catches one of another shape, which says that the config belongs to another model."""
    fields = tiny_config(SDAR, tie_word_embeddings=True)
    tensors = random_tensors(SDAR, fields) | {"lm_head.weight": torch.zeros(rows, 128)}
    passed = check_tensors("a-drafter", tensors.items(), expected_shapes(SDAR, fields))
    if rows == 1984:
        assert dict(passed).keys() == tensors.keys()
    else:
        with pytest.raises(ValueError, match=r"'lm_head.weight' of shape \[1984, 128\]; got"):
            list(passed)


# --- configs ---------------------------------------------------------------------------------


def bad(key, value, *fragments, family=FAST_DLLM_V2):
    label = f"{family.model_types[0]}-{key}-{str(value)[:30]}"
    return pytest.param(family, {key: value}, [repr(key), *fragments], id=label)


BAD_CONFIGS = [
    *(bad("num_hidden_layers", n, "integer", f"got {n!r}") for n in (1 << 31, 0, "2", True, None)),
    bad("quantization_config", {"quant_method": "gptq"}, "gptq"),
    bad("compression_config", {"format": "int-quantized"}, "int-quantized"),
    bad("use_sliding_window", True, family=SDAR),
]


@pytest.mark.parametrize(("family", "changes", "fragments"), BAD_CONFIGS)
def test_bad_config(tmp_path, family, changes, fragments):
    """Catches settings that would silently not be followed, and layers listed until memory ends."""
    fields = tiny_config(family) | changes
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    message = refusal(tmp_path)
    assert all(fragment in message for fragment in [str(tmp_path), *fragments]), message


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_no_config_value_escapes(family):
    """Catches a TypeError or KeyError from a value that nobody thought of, under any key."""
    values = (None, True, 0, -1, 7, 10**400, 0.5, math.nan, "", "a\nb", [], [None], {}, {"a": []})
    fields = tiny_config(family, head_dim=64, rope_parameters={}, layer_types=[], num_experts=0)
    checks.check_drafter_config("a-drafter", family_config := tiny_config(family))
    assert fields.keys() >= family_config.keys()
    for key in fields:
        for value in values:
            changed = {**family_config, key: value}
            message = objection(checks.check_drafter_config, "a-drafter", changed)
            if message is not None:
                assert message.startswith("failfast: "), (key, value)
                assert "\n" not in message, (key, value)


@pytest.mark.parametrize("family", [FAST_DLLM_V2, SDAR], ids=lambda family: family.name)
def test_a_silent_config_means_the_published_classes_defaults(tmp_path, family):
    """Catches a refusal of what transformers loads, and checks of other sizes than vLLM builds."""
    stated = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "rope_theta": 10000.0}
    stated |= {"head_dim": 128} if family is SDAR else {}
    fields = tiny_config(family, num_attention_heads=32, vocab_size=151936, **stated)
    del fields["mask_token_id"]
    path = tmp_path / "SDAR-4B-Chat"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    write_headers(path, family)
    edit(path / "config.json", **dict.fromkeys(stated))
    built = build(asking(path), skip_tokenizer_init=True)
    loaded = built.speculative_config.draft_model_config
    head_dim = stated.get("head_dim", fields["hidden_size"] // 32)
    assert (loaded.get_total_num_kv_heads(), loaded.get_head_size()) == (32, head_dim)
    assert loaded.hf_config.max_position_embeddings == 32768
    assert loaded.hf_config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_null_kv_heads_are_as_many_as_heads(tmp_path):
    """As in the published classes; catches the default of 32, which an absent key means."""
    fields = tiny_config(SDAR, num_attention_heads=6, num_key_value_heads=6)
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    write_headers(tmp_path, SDAR)
    fields["num_key_value_heads"] = None
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    built = build(asking(tmp_path), skip_tokenizer_init=True)
    assert built.speculative_config.draft_model_config.get_total_num_kv_heads() == 6


def test_a_config_that_needs_remote_code(checkpoint):
    """Catches advice to use another method, or to trust the code."""
    path, _ = checkpoint
    edit(
        path / "config.json",
        architectures=["LLaDAModelLM"],
        auto_map={"AutoModel": "modeling.LLaDA"},
    )
    message = refusal(path)
    assert "got LLaDAModelLM" in message
    assert "'auto_map'" in message
    assert "own code is never run" in message


def test_a_config_from_the_hub_is_checked_alike(monkeypatch):
    """Catches checks that only directories meet; the hub is replaced."""
    fields = {**FAST_DLLM_1_5B, "quantization_config": {"quant_method": "awq"}}
    monkeypatch.setattr("vllm.transformers_utils.repo_utils.get_hf_file_to_dict", lambda *_: fields)
    with pytest.raises(ValueError, match=r"\Afailfast: .*no 'quantization_config'") as caught:
        build(asking("somebody/a-drafter"))
    assert "'somebody/a-drafter'" in str(caught.value)


# --- weights ---------------------------------------------------------------------------------

ROTARY = "model.layers.0.self_attn.rotary_emb.inv_freq"
LOADED = {  # family, config.json, shards, whether the file has an output head in any case
    "fast-dllm-tied": (FAST_DLLM_V2, tiny_config(FAST_DLLM_V2), 3, False),
    "sdar-untied": (SDAR, tiny_config(SDAR, tie_word_embeddings=False), 2, False),
    "sdar-tied-with-a-head": (SDAR, tiny_config(SDAR), 1, True),
    "sdar-moe": (SDAR_MOE, tiny_config(SDAR_MOE), 2, False),
}


def poison(value):
    def change(tensors):
        tensors[Q_PROJ] = tensors[Q_PROJ].clone()
        tensors[Q_PROJ][-1, -1] = value
        return tensors.items()

    return change


BAD_WEIGHTS = {
    "nan": (poison(math.nan), ["NaN or infinity", repr(Q_PROJ)]),
    "inf": (poison(math.inf), ["NaN or infinity", repr(Q_PROJ)]),
    "-inf": (poison(-math.inf), ["NaN or infinity", repr(Q_PROJ)]),
    "missing": (
        lambda tensors: [item for item in tensors.items() if item[0] != Q_PROJ],
        ["lacks 1 of its", repr(Q_PROJ)],
    ),
    "twice": (lambda tensors: [*tensors.items(), *tensors.items()], ["twice"]),
    "extra": (
        lambda tensors: [("model.layers.0.self_attn.o_proj.bias", torch.zeros(1))],
        ["'model.layers.0.self_attn.o_proj.bias'", "no place"],
    ),
    "mis-shaped": (
        lambda tensors: [("model.norm.weight", torch.zeros(7))],
        ["'model.norm.weight' of shape", "got [7]"],
    ),
    "none": (lambda tensors: [], ["lacks"]),
    "quantised": (
        lambda tensors: [("model.norm.weight", tensors["model.norm.weight"].to(torch.int8))],
        ["'model.norm.weight' in 16 or 32 bits", "got torch.int8"],
    ),
}


@pytest.fixture(scope="module", params=LOADED)
def loading(request, tmp_path_factory):
    """Per engine its checkpoint, the loaded parameters, and what was refused before them.

    CPUs repack linear weights after loading, so parameters are copied when vLLM's loader returns.
    """
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    from failfast_vllm.drafters import model

    family, fields, shards, has_head = LOADED[request.param]
    path = tmp_path_factory.mktemp("loading") / "ck"
    tensors = write_checkpoint(path, family, fields, shards, seed=5)
    if has_head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    write_weights(path, {**tensors, ROTARY: torch.full((32,), math.nan)}, shards)

    cls = getattr(model, family.architecture)
    load_weights, held = cls.load_weights, {}
    refused, dummy = {}, {}

    def watched(self, weights):
        DummyModelLoader(LoadConfig(load_format="dummy")).load_weights(self, None)
        dummy.update({k: v.detach().clone() for k, v in self.named_parameters()})
        for name, (change, _) in BAD_WEIGHTS.items():
            with pytest.raises(ValueError, match=r"\Afailfast: [^\n]*\Z") as caught:
                load_weights(self, change(dict(tensors)))
            refused[name] = str(caught.value)
        loaded = load_weights(self, weights)
        held.update({k: v.detach().clone() for k, v in self.named_parameters()})
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, "load_weights", watched)
        with engine(asking(path)) as llm:
            from vllm import SamplingParams

            params = SamplingParams(temperature=0.0, max_tokens=4)
            assert len(generate(llm, [[5, 6, 7]], params)[0]) == 4
            assert proposer(llm).stats.num_steps > 0
    return path, tensors, held, refused, dummy


def test_every_parameter_is_the_files(loading):
    """Catches fused parts in the wrong order, a tensor left random, a tied head overwritten."""
    _, tensors, held, _, _ = loading
    expected = fuse_experts(tensors)
    for layer in {name.split(".self_attn")[0] for name in tensors if ".self_attn" in name}:
        for kind in ("weight", "bias"):
            fused = {
                "self_attn.qkv_proj": [f"self_attn.{x}_proj" for x in "qkv"],
                "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
            }
            for name, parts in fused.items():
                names = [f"{layer}.{part}.{kind}" for part in parts]
                if names[0] in tensors:
                    expected[f"{layer}.{name}.{kind}"] = torch.cat([expected.pop(n) for n in names])
    for ours, theirs in (("gate_up_proj", "w13_weight"), ("down_proj", "w2_weight")):
        for name in [name for name in expected if name.endswith(f"experts.{ours}")]:
            renamed = name.removesuffix(ours) + f"routed_experts.{theirs}"
            expected[renamed] = expected.pop(name)
    assert held.keys() == expected.keys()
    different = [name for name in held if not torch.equal(held[name], expected[name])]
    assert not different


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights_are_refused_while_loading(loading, name):
    """Catches values that only the weights show, and checkpoints from the hub."""
    path, _, _, refused, _ = loading
    assert all(part in refused[name] for part in [str(path), *BAD_WEIGHTS[name][1]]), refused[name]


def test_dummy_weights_need_no_checkpoint(loading):
    """Catches `--load-format dummy` asking for tensors by their names."""
    _, tensors, held, _, dummy = loading
    assert dummy.keys() == held.keys()
    assert not torch.equal(dummy["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])


def test_random_tensors_differ_by_seed():
    """Catches a parity test between two checkpoints that are the same."""
    fields = tiny_config(SDAR)
    first, again, other = (random_tensors(SDAR, fields, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first[Q_PROJ], again[Q_PROJ])
    assert not torch.equal(first[Q_PROJ], other[Q_PROJ])


@pytest.mark.parametrize("name", ["config", "drafters/checkpoint", "drafters/checks"])
def test_checks_are_no_asserts(name):
    """Catches a check that `python -O` leaves out, as of a name in vLLM (CVE-2026-41523)."""
    path = MODELS_DIR.parent / f"{name}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
