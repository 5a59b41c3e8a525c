"""What a user may ask for: every mistake is one line that says what, got what, do what.

All configs go through vLLM's own door, `EngineArgs.create_engine_config`. The weight files of the
drafters here are headers with a hole behind them.
"""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GraniteMoeHybridConfig, Mamba2Config

from build_config import build, edit, refusal
from checkpoints import tiny_config, write_checkpoint, write_headers
from failfast_vllm.config import METHOD, MODELS_DIR, FailFastConfig
from failfast_vllm.drafters import checks
from failfast_vllm.drafters.families import FAMILIES, FAST_DLLM_V2, SDAR
from failfast_vllm.policies.table import PARAMETERS, make_policy
from failfast_vllm.tools import sizing as plan
from published import SDAR_1_7B
from published_models import PUBLISHED_TARGETS

TARGET = MODELS_DIR / "target"
DRAFTER = MODELS_DIR / "drafter"
DEFAULTS = {
    "num_speculative_tokens": 60,
    "confidence_threshold": 0.45,
    "draft_increment": 10,
    "policy": "failfast",
}


@pytest.fixture
def drafter(tmp_path):
    """A copy of the shipped drafter, without its weights."""
    copy = tmp_path / "a-drafter"
    shutil.copytree(DRAFTER, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    write_headers(copy, FAST_DLLM_V2)
    return copy


@pytest.fixture
def target(tmp_path):
    """A copy of the shipped target, whose path no table knows."""
    return shutil.copytree(TARGET, tmp_path / "a-target")


def asking(**given):
    return {"method": METHOD, **{key: str(v) if key == "model" else v for key, v in given.items()}}


BAD_VALUES = [
    ("num_speculative_tokens", ["60", True, None, 6.5, math.nan, [60], {}, 0, -1, 129]),
    ("draft_increment", ["10", False, None, 2.0, [10], 0, -5, 61]),
    ("confidence_threshold", ["0.45", True, None, [0.45], math.nan, math.inf, -0.1, 1.01]),
    ("policy", ["greedy", "FailFast", "", None, True, 1, ["failfast"]]),
    ("copies", ["true", 1, None]),
    ("model", ["", "  ", True, 3, ["drafter"]]),
    ("revision", ["", None, 5]),
    ("diffusion_block_size", ["32", True, None, 4.0, 0, 5, 64, [4]]),
]


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in BAD_VALUES for value in values]
)
def test_bad_value_is_named(key, value):
    """Catches bools passing as 1, strings compared as numbers, NaN passing a range check."""
    message = refusal({"method": METHOD, key: value})
    assert repr(key) in message
    assert f"got {value!r}" in message
    assert "must be" in message


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("num_speculative_token", "did you mean 'num_speculative_tokens'?"),
        ("num-speculative-tokns", "did you mean 'num_speculative_tokens'?"),
        ("confidence_treshold", "did you mean 'confidence_threshold'?"),
        ("polcy", "did you mean 'policy'?"),
        ("load-awre", "did you mean 'load_aware'?"),
        ("draft-increments", "did you mean 'draft_increment'?"),
        ("diffusion_blocksize", "did you mean 'diffusion_block_size'?"),
        ("tau", "use one of method, model, revision"),
        ("disable_padded_drafter_batch", "use one of method, model, revision"),  # ours to set
        ("", "use one of method, model, revision"),
    ],
)
def test_unknown_key_gets_a_hint(key, hint):
    """Catches a misspelt knob that silently keeps its default."""
    message = refusal({"method": METHOD, key: 5})
    assert f"unknown key {key.replace('-', '_')!r}" in message
    assert hint in message


@pytest.mark.parametrize(
    ("given", "fragments"),
    [
        ({"x" * 100_000: 1}, ["unknown key 'xxx", "(100002 characters)", "use one of method"]),
        ({"model": "m" * 10_000}, ["the drafter 'mmm", "(10002 characters)", "hub id"]),
        ({"model": "a\nb"}, ["the drafter 'a\\nb'", "give a checkpoint directory or a hub id"]),
        ({"model": "a b/c"}, ["the drafter 'a b/c'", "give a checkpoint directory or a hub id"]),
        ({"model": "a\0b"}, ["the drafter", "give a checkpoint directory or a hub id"]),
        ({"trace": "t" * 300}, ["'trace' must be a file", "name too long"]),
        ({"trace": "~no-such-user/t"}, ["'trace' must be a file", "'~no-such-user/t'"]),
        ({"policy": "p" * 10_000}, ["'policy' must be one of", "(10002 characters)"]),
        ({"trace": "a\0b"}, ["'trace' must be the name of a file", "a\\x00b"]),
        ({"trace": "/proc/trace.jsonl"}, ["'trace' must be a file", "writable folder"]),
        ({"draft-budget": 5, "draft_budget": 6}, ["'draft_budget' must be given once"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_odd_values_are_one_short_line(given, fragments):
    """Catches raw exceptions of the libraries, and values that are echoed whole."""
    message = refusal({"method": METHOD, **given})
    assert all(fragment.lower() in message.lower() for fragment in fragments), message
    assert len(message) < 1000


def test_a_check_leaves_no_trace_behind(tmp_path):
    built = build({"method": METHOD, "trace": str(tmp_path / "t.jsonl")})
    assert built.additional_config[METHOD]["trace"] == str(tmp_path / "t.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_the_method_is_known_in_capitals():
    assert knobs(build({"method": "FAILFAST"})) == DEFAULTS


BAD_PARAMETERS = [
    ("failfast", "confidence_threshold", [-0.1, "0.5", 1.5, True, math.nan, None, [0.9]]),
]


@pytest.mark.parametrize(
    ("policy", "key", "value"),
    [(p, k, value) for p, k, values in BAD_PARAMETERS for value in values],
)
def test_bad_parameter_of_a_policy_is_named(policy, key, value):
    """Catches a parameter that is taken unchecked into the hot path."""
    message = refusal({"method": METHOD, "policy": policy, key: value})
    assert f"{key!r} must be" in message
    assert f"got {value!r}" in message


def test_every_parameter_has_its_checks():
    """Catches a parameter that is added without a refusal."""
    checked = {(policy, key) for policy, key, _ in BAD_PARAMETERS}
    listed = {(policy, key) for policy, keys in PARAMETERS.items() for key in keys}
    assert listed == checked


@pytest.mark.parametrize("policy", ["fixed"])
def test_a_parameter_of_another_policy_says_whose_it_is(policy):
    """Catches a parameter that is accepted and changes nothing."""
    message = refusal({"method": METHOD, "policy": policy, "confidence_threshold": 0.5})
    assert "'confidence_threshold' belongs to the policy 'failfast'" in message
    assert f"got the policy {policy!r}" in message


@pytest.mark.parametrize("policy", PARAMETERS)
def test_every_policy_is_built_from_its_defaults(policy):
    """Catches parameters that the policy's class does not take, or a cap below a minimum."""
    for given in ({}, {"num_speculative_tokens": 1}):
        flat = FailFastConfig.from_user({"policy": policy, **given}).to_dict()
        make_policy(flat)


def test_increment_may_not_exceed_a_lowered_cap():
    """Catches a range taken from the default cap instead of the given one."""
    message = refusal(asking(num_speculative_tokens=8, draft_increment=9))
    assert "'draft_increment' must be an integer from 1 to 8; got 9" in message


@pytest.mark.parametrize(
    ("engine_args", "fragments"),
    [
        ({"block_size": 16}, ["multiple of 32", "got 16", "--block-size"]),
        ({"block_size": 48}, ["multiple of 32", "got 48", "--block-size"]),
        ({"pipeline_parallel_size": 2}, ["pipeline", "got 2", "--tensor-parallel-size"]),
        (
            {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
            ["decode-context", "got 2"],
        ),
        ({"prefill_context_parallel_size": 2}, ["prefill-context", "got 2"]),
        ({"async_scheduling": True}, ["--async-scheduling needs", "got True", "Leave it out"]),
        ({"max_num_batched_tokens": 91}, ["at least 92", "got 91", "num_speculative_tokens"]),
        ({"runner": "pooling"}, ["text generation", "Leave"]),
        ({"convert": "embed"}, ["text generation", "Leave"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_engine_argument_that_cannot_work(engine_args, fragments):
    """Catches engines that start and then fail, or draft nonsense, in their first step."""
    message = refusal("failfast", **engine_args)
    assert all(fragment in message for fragment in fragments), message


def test_target_with_latent_attention(target, monkeypatch):
    """Catches a drafter that reads pages which hold no keys and values of its layout."""
    from vllm.platforms import current_platform

    latent = {"kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 48, "v_head_dim": 48}
    architecture = "DeepseekV2ForCausalLM"
    edit(target / "config.json", architectures=[architecture], model_type="deepseek_v2", **latent)
    assert f"MLA targets; got {architecture!r}" in refusal("failfast", model=target)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda platform: False)
    message = refusal(asking(model=DRAFTER), model=target)
    assert f"got {architecture!r}. Leave 'model' out" in message


def be_whisper(path):
    """A target with an encoder and cross-attention; its config only."""
    sizes = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    lengths = {"max_source_positions": 100, "max_target_positions": 128, "num_mel_bins": 80}
    fields = json.loads((path / "config.json").read_text(encoding="utf-8"))
    fields = {"vocab_size": fields["vocab_size"], "torch_dtype": "float32"}
    fields |= {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"}
    (path / "config.json").write_text(json.dumps({**fields, **sizes, **heads, **lengths}))


def test_target_with_an_encoder(target):
    """Catches an engine that is built for a target of which the drafter sees but a part."""
    be_whisper(target)
    message = refusal(asking(model=DRAFTER), model=target)
    assert "decoder-only targets" in message
    assert "got 'WhisperForConditionalGeneration'. Leave the speculative config out" in message


def test_lora_without_room_for_drafts():
    """Catches another bound than the documented one: a whole draft of each sequence."""
    for max_num_seqs, fits in ((33, True), (34, False)):
        args = {"enable_lora": True, "max_num_seqs": max_num_seqs, "max_num_batched_tokens": 2048}
        if fits:
            assert build("failfast", **args).lora_config is not None
        else:
            with pytest.raises(ValueError, match="increasing max_num_batched_tokens"):
                build("failfast", **args)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({"max_window_layers": 6}, id="all"),
        pytest.param({"layer_types": ["sliding_attention", "full_attention"] * 3}, id="some"),
        pytest.param(
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, id="Mistral"
        ),
    ],
)
def test_target_with_a_sliding_window(target, overrides):
    """Catches layers of target and drafter in different groups of pages: vLLM fails on loading."""
    edit(target / "config.json", use_sliding_window=True, sliding_window=64, **overrides)
    message = refusal(asking(model=DRAFTER), model=target)
    assert all(part in message for part in ("sliding-window", "got '", "--disable-sliding-window"))
    assert copies_alone(build("failfast", model=target))


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (GraniteMoeHybridConfig(layer_types=["mamba", "attention"], num_hidden_layers=2), "CPUs"),
        (Mamba2Config(), "without attention"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_target_whose_drafts_leave_their_mark(target, config, part):
    """Catches answers that rejected drafts have changed: vLLM keeps one state of a sequence."""
    architecture = type(config).__name__.replace("Config", "ForCausalLM")
    config.architectures = [architecture]
    config.save_pretrained(target)
    message = refusal("failfast", model=target)
    assert all(word in message for word in (part, f"got '{architecture}'"))


@pytest.mark.parametrize(
    ("overrides", "engine_args"),
    [
        ({"use_sliding_window": False}, {}),  # as Qwen2.5 is published
        ({"use_sliding_window": True}, {"disable_sliding_window": True}),
    ],
)
def test_target_whose_window_is_off(target, overrides, engine_args):
    """Catches the refusal of every Qwen2.5: its config names a window that it does not use."""
    edit(target / "config.json", sliding_window=2048, max_window_layers=6, **overrides)
    built = build(asking(model=DRAFTER), model=target, **engine_args)
    assert built.speculative_config.method == "draft_model"


def copies_alone(config):
    """A configuration in which all drafts are copies."""
    facts = config.additional_config[METHOD]
    assert config.speculative_config.method == "ngram"
    assert config.speculative_config.num_speculative_tokens == facts["num_speculative_tokens"]
    return (facts["drafts"], facts["copies"]) == (False, True)


def test_unknown_target_without_a_drafter(target):
    """Catches a guess: a drafter of another family would load and never be accepted."""
    assert copies_alone(build("failfast", model=target))
    assert copies_alone(build(asking(num_speculative_tokens=8), model=target, block_size=16))


def test_no_drafter_is_asked_for():
    """`"model": null`, for a target that has one."""
    assert copies_alone(build({"method": "failfast", "model": None}))


@pytest.mark.parametrize("given", [{"load_aware": False}, {"copies": False}])
def test_neither_drafter_nor_copies(target, given):
    message = refusal({"method": "failfast", **given}, model=target)
    assert f"no drafter is known for the target {str(target)!r}, and copies are switched" in message
    assert f"got {given!r}. Remove these keys, or name a drafter" in message


def test_copies_without_measured_times():
    message = refusal({"method": "failfast", "copies": True, "load_aware": False})
    assert message.endswith("got 'load_aware' false. Remove one of the two keys.")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "models/no/where"])
def test_missing_directory(name):
    """Catches a mistyped path that is asked of the hub, after retries and with a page of text."""
    assert f"{name!r} is not a directory; give a checkpoint" in refusal(asking(model=name))


def lose_config(path):
    (path / "config.json").unlink()


def break_json(path):
    (path / "config.json").write_text('{"architectures": [')


def break_utf8(path):
    (path / "config.json").write_bytes(b'{"a": "\xff"}')


def list_json(path):
    (path / "config.json").write_text('["Fast_dLLM_QwenForCausalLM"]')


def be_autoregressive(path):
    edit(path / "config.json", architectures=["Qwen2ForCausalLM"], model_type="qwen2")


def lose_architectures(path):
    edit(path / "config.json", architectures=None)


def name_architecture_without_list(path):
    edit(path / "config.json", architectures="Fast_dLLM_QwenForCausalLM")


def number_architecture(path):
    edit(path / "config.json", architectures=5)


def change_block_size(path):
    edit(path / "config.json", bd_size=64)


def lose_weights(path):
    (path / "model.safetensors").unlink()


def pickle_weights(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def lose_tokenizer(path):
    for file in path.glob("tokenizer*"):
        file.unlink()


def lose_one_tokenizer_file(path):
    """Its settings stay: transformers then makes an empty tokenizer."""
    (path / "tokenizer.json").unlink()


def empty_tokenizer(path):
    (path / "tokenizer.json").write_text("{}", encoding="utf-8")


def pipe_config(path):
    (path / "config.json").unlink()
    os.mkfifo(path / "config.json")


def swap_tokens(path):
    """Two ids change places: the size of the vocabulary says nothing."""
    fields = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = fields["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (path / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")


def shrink_vocabulary(path):
    """A byte-level tokenizer with the same first ids."""
    fields = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    merged = {a + b for a, b in map(_pair, fields["model"]["merges"])}
    vocab = fields["model"]["vocab"]
    fields["model"].update(merges=[], vocab={t: i for t, i in vocab.items() if t not in merged})
    (path / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")


def _pair(merge):
    return merge.split(" ") if isinstance(merge, str) else merge


def lose_mask(path):
    edit(path / "config.json", mask_token_id=None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (path / name).read_text(encoding="utf-8")
        (path / name).write_text(text.replace("|<MASK>|", "|<NONE>|"), encoding="utf-8")


def overshoot_mask(path):
    edit(path / "config.json", mask_token_id=1984)


def negate_mask(path):
    edit(path / "config.json", mask_token_id=-1)


def turn_mask_boolean(path):
    edit(path / "config.json", mask_token_id=True)


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (lose_config, ["cannot read", "config.json", "No such file", "complete Fast-dLLM v2"]),
        (break_json, ["cannot read", "config.json", "line 1", "complete Fast-dLLM v2"]),
        (break_utf8, ["cannot read", "config.json", "utf-8", "complete Fast-dLLM v2"]),
        (list_json, ["must be a Fast_dLLM_QwenForCausalLM", "got no architecture"]),
        (be_autoregressive, ["got Qwen2ForCausalLM", "method 'draft_model'"]),
        (lose_architectures, ["must be a Fast_dLLM_QwenForCausalLM", "got no architecture"]),
        (name_architecture_without_list, ["must be a Fast_dLLM_Qwen", "got no architecture"]),
        (number_architecture, ["must be a Fast_dLLM_QwenForCausalLM", "got no architecture"]),
        (change_block_size, ["must have a 'bd_size' of 4, 8, 16, 32", "got 64"]),
        (lose_weights, ["no .safetensors", "convert it"]),
        (pickle_weights, ["no .safetensors", "pickles are never loaded"]),
        (lose_tokenizer, ["cannot load the tokenizer", "complete Fast-dLLM v2 checkpoint"]),
        (lose_one_tokenizer_file, ["another tokenizer", "target's family"]),
        (empty_tokenizer, ["cannot load the tokenizer", "complete Fast-dLLM v2 checkpoint"]),
        (pipe_config, ["cannot read", "config.json", "it is not a file"]),
        (swap_tokens, ["another tokenizer", "' there)", "of the target's family"]),
        (shrink_vocabulary, ["another tokenizer", "unknown to the drafter", "target's family"]),
        (lose_mask, ["MASK token is unknown", "'|<MASK>|'", "set 'mask_token_id'"]),
        (overshoot_mask, ["'mask_token_id'", "from 0 to 1983", "got 1984"]),
        (negate_mask, ["'mask_token_id'", "from 0 to 1983", "got -1"]),
        (turn_mask_boolean, ["'mask_token_id'", "from 0 to 1983", "got True"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_drafter(drafter, damage, fragments):
    """Catches checkpoints that fail late, load a pickle, or draft tokens that mean other words."""
    damage(drafter)
    message = refusal(asking(model=drafter))
    assert all(fragment in message for fragment in fragments), message


def test_the_undamaged_drafter_is_accepted_without_reading_weights(drafter):
    """Catches the tests above passing for another reason than their damage."""
    built = build(asking(model=drafter))
    assert built.speculative_config.draft_model_config.model == str(drafter)


def knobs(engine_config):
    return {key: engine_config.additional_config[METHOD][key] for key in DEFAULTS}


@pytest.mark.parametrize("word", ["failfast", " failfast ", {"method": "failfast"}])
def test_the_bare_word_means_the_papers_defaults(word):
    built = build(word)
    assert knobs(built) == DEFAULTS
    assert built.speculative_config.num_speculative_tokens == 60
    assert built.speculative_config.method == "draft_model"
    assert built.speculative_config.disable_padded_drafter_batch
    assert not built.scheduler_config.async_scheduling


def test_every_key_reaches_the_engine(drafter):
    given = {
        "num_speculative_tokens": 24,
        "confidence_threshold": 1,
        "draft_increment": 3,
        "policy": "failfast",
    }
    built = build(asking(model=drafter, **given))
    assert knobs(built) == given
    assert isinstance(knobs(built)["confidence_threshold"], float)
    assert built.speculative_config.num_speculative_tokens == 24


def test_hyphens_and_underscores_are_one_key():
    """vLLM's own flags have hyphens, and people write keys the same way."""
    built = build({"method": METHOD, "num-speculative-tokens": 20, "confidence-threshold": 0.25})
    assert knobs(built) == {**DEFAULTS, "num_speculative_tokens": 20, "confidence_threshold": 0.25}


NAMED_SIZES = {  # the names of a directory or a hub id -> the size of SDAR's blocks, a doubt
    "JetLM/SDAR-1.7B-Chat-b32": (32, False),  # the default drafter of Qwen3
    "/models/SDAR-1.7B-Chat-b8": (8, False),
    "/models/SDAR-1.7B-Chat-b16/": (16, False),
    "./sdar-1.7b-chat-b16": (16, False),
    "/c/hub/models--JetLM--SDAR-1.7B-Chat-b32/snapshots/2c83c05": (32, False),
    "/c/hub/models--JetLM--SDAR-8B-Chat/snapshots/2c83c05": (4, True),
    "yuezhouhu/RCD-SDAR-4B-b32-Thinking": (32, False),
    "JetLM/SDAR-1.7B-Chat": (4, True),
    "/models/drafter": (4, True),
    "somebody/SDAR-4B-Chat-distill-search": (4, True),
    "somebody/SDAR-1.7B-Chat-bf16": (4, True),
}
SILENT = {"architectures": ["SDARForCausalLM"], "model_type": "sdar"}


@pytest.mark.parametrize(("name", "expected"), NAMED_SIZES.items())
def test_the_block_size_of_a_silent_config_is_in_the_name(name, expected):
    """Catches SDAR-1.7B-Chat-b32 in blocks of 4: its config.json does not state the size."""
    size, doubt = checks.find_block_size(name, SDAR, SILENT)
    assert (size, doubt is not None) == expected
    if doubt:
        assert "the default of SDAR" in doubt
        assert "set 'diffusion_block_size'" in doubt


def test_what_says_the_block_size():
    """Catches an order of config, user, name and origin in which a hint beats a statement."""

    def find(name, asked=None, family=SDAR, **fields):
        return checks.find_block_size(name, family, SILENT | fields, asked)

    assert find("x/SDAR-b32", block_size=8) == (8, None)
    assert find("x/SDAR-b32", block_size=8, asked=8) == (8, None)
    assert find("x/drafter", asked=16) == (16, None)
    assert find("x/SDAR-b16", asked=16) == (16, None)
    size, doubt = find("x/SDAR-b32", asked=16)
    assert size == 16
    assert doubt == "as 'diffusion_block_size' says, though 'SDAR-b32' stands for 32"
    assert find("x/drafter", _name_or_path="JetLM/SDAR-1.7B-Chat-b32") == (32, None)
    assert find("x/SDAR-b8", _name_or_path="JetLM/SDAR-1.7B-Chat-b32") == (8, None)
    assert find("x/Fast_dLLM-b8", family=FAST_DLLM_V2) == (32, None)  # its class has a default
    assert find("x/Fast_dLLM-b8", family=FAST_DLLM_V2, bd_size=16) == (16, None)


def test_a_link_or_a_dot_has_the_name_of_its_directory(tmp_path, monkeypatch):
    """Catches a renamed link that turns blocks of 32 into blocks of 4."""
    (tmp_path / "SDAR-1.7B-Chat-b32").mkdir()
    (tmp_path / "drafter").symlink_to("SDAR-1.7B-Chat-b32")
    monkeypatch.chdir(tmp_path / "drafter")
    for name in (str(tmp_path / "drafter"), ".", "../drafter"):
        assert checks.find_block_size(name, SDAR, SILENT) == (32, None)


@pytest.mark.parametrize(
    ("name", "fields", "asked", "fragments"),
    [
        ("x/SDAR-8B-Chat-b64", {}, None, ["4, 8, 16, 32", "got 64", "'SDAR-8B-Chat-b64'"]),
        ("x/SDAR-8B-Chat-b64", {"block_size": 64}, None, ["'block_size' of 4", "got 64"]),
        ("x/SDAR-8B-Chat", {"block_size": None}, None, ["'block_size' of 4", "got None"]),
        ("x/SDAR-8B-Chat", {"block_size": 8}, 16, ["'diffusion_block_size'", "8; got 16", "Leave"]),
        ("x/SDAR-8B-Chat-b16", {"block_size": 8}, 16, ["'block_size'", "8; got 16", "Leave"]),
    ],
)
def test_block_size_that_cannot_be(name, fields, asked, fragments):
    """Catches blocks that no kernel has, and a user who contradicts the checkpoint unheard."""
    with pytest.raises(ValueError, match=r"\Afailfast: [^\n]*\Z") as caught:
        checks.find_block_size(name, SDAR, SILENT | fields, asked)
    assert all(fragment in str(caught.value) for fragment in [repr(name), *fragments])


def test_a_name_may_hold_any_number():
    """Catches Python's own error for a number of thousands of digits."""
    assert checks.find_block_size("SDAR-b" + "9" * 5000, SDAR, SILENT).size == 4


def silent_drafter(path):
    """SDAR as published: nothing but its name says the block size."""
    write_checkpoint(path, SDAR, tiny_config(SDAR))
    edit(path / "config.json", block_size=None)
    return path


@pytest.mark.parametrize(
    ("name", "given", "size", "warning"),
    [
        ("SDAR-x-b32", {}, 32, None),
        ("a-drafter", {}, 4, "in blocks of 4: the default of SDAR, as neither"),
        ("b-drafter", {"diffusion_block_size": 8}, 8, None),
        ("b-drafter-b32", {"diffusion_block_size": 8}, 8, "'b-drafter-b32' stands for 32"),
    ],
)
def test_the_engine_drafts_in_the_blocks_that_the_plan_counts(
    tmp_path, caplog, name, given, size, warning
):
    """Catches a size that `failfast plan` sees and the server does not, or a second warning."""
    path = silent_drafter(tmp_path / name)
    for _ in range(2):
        facts = build(asking(model=path, **given)).additional_config[METHOD]
    assert facts["diffusion_block_size"] == size
    assert facts["draft_increment"] == min(size, 10)
    lines = [line for line in caplog.messages if line.startswith("failfast: ")]
    assert len(lines) == (warning is not None)
    if not given:  # a plan counts what is published
        target = tmp_path / "config.json"
        target.write_text(json.dumps(PUBLISHED_TARGETS["Qwen/Qwen3-8B"]), encoding="utf-8")
        planned = plan.make_plan(str(target), str(path))
        assert planned["diffusion_block_size"] == size
    if warning:
        assert warning in lines[0]
        assert "\n" not in lines[0]
    if warning and not given:
        assert lines[0].removeprefix(f"failfast: {str(path)!r}") in str(planned["notes"])


def test_the_engine_refuses_to_contradict_the_config(tmp_path):
    """Catches a key that is checked by a function which the engine does not call."""
    write_checkpoint(tmp_path / "drafter", SDAR, tiny_config(SDAR))
    message = refusal(asking(model=tmp_path / "drafter", diffusion_block_size=32))
    assert "'diffusion_block_size' must be the 'block_size'" in message
    assert "4; got 32. Leave it out." in message


def test_the_default_drafter_of_qwen3_has_blocks_of_32(monkeypatch, tmp_path):
    """From a hub cache, where no user names anything; catches a default that drafts in 4."""
    snapshot = (
        tmp_path / "hub" / f"models--{SDAR.drafter.replace('/', '--')}" / "snapshots" / "2c83"
    )
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(SDAR_1_7B), encoding="utf-8")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("2c83")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    target = tmp_path / "target"
    target.mkdir()
    fields = PUBLISHED_TARGETS["Qwen/Qwen3-4B"]
    (target / "config.json").write_text(json.dumps(fields), encoding="utf-8")

    for chosen in ("failfast", asking(model=snapshot)):
        built = build(chosen, model=target, skip_tokenizer_init=True, load_format="dummy")
        facts = built.additional_config[METHOD]
        assert (facts["diffusion_block_size"], facts["draft_increment"]) == (32, 10)
        assert facts["mask_token_id"] == 151669


@pytest.mark.parametrize(
    ("given", "increment"),
    [
        ({"policy": "fixed"}, 60),
        ({"policy": "fixed", "num_speculative_tokens": 16}, 16),
        ({"policy": "fixed", "num_speculative_tokens": 16, "draft_increment": 4}, 4),
        ({"num_speculative_tokens": 16}, 10),
        ({"num_speculative_tokens": 4}, 4),
    ],
)
def test_default_increment(given, increment):
    """A fixed draft takes one pass; a small cap must not need a second knob."""
    assert FailFastConfig.from_user(given).draft_increment == increment


@pytest.mark.parametrize("cap", [1, 128])
@pytest.mark.parametrize("threshold", [0, 1])
def test_the_ends_of_the_ranges_are_allowed(cap, threshold):
    given = {"num_speculative_tokens": cap, "confidence_threshold": threshold}
    assert knobs(build(asking(**given)))["num_speculative_tokens"] == cap


def test_what_the_user_already_put_in_additional_config_stays():
    built = build("failfast", additional_config={"theirs": 1})
    assert built.additional_config["theirs"] == 1
    assert knobs(built) == DEFAULTS


def test_multiples_of_32_tokens_per_page_are_accepted():
    assert build("failfast", block_size=64).cache_config.block_size == 64


def test_the_shipped_target_has_the_shipped_drafter(monkeypatch):
    """Catches a comparison of spellings: the relative path is the same directory."""
    monkeypatch.chdir(MODELS_DIR.parent)
    for name in (str(TARGET), "small_pair/target", "./small_pair/../small_pair/target/"):
        built = build("failfast", model=name)
        assert Path(built.speculative_config.draft_model_config.model) == DRAFTER


@pytest.mark.parametrize("vocab_size", [151936, 152064])
def test_qwen25_targets_have_the_published_drafter(vocab_size):
    assert checks.choose_drafter("Qwen/Any", "qwen2", vocab_size) == FAST_DLLM_V2.drafter


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe"])
def test_qwen3_targets_have_the_published_drafter(model_type):
    """Catches Qwen2.5's drafter for Qwen3, which pads to the same size."""
    assert checks.choose_drafter("Qwen/Any", model_type, 151936) == SDAR.drafter


@pytest.mark.parametrize(("model_type", "vocab_size"), [("llama", 151936), ("qwen2", 151646)])
def test_other_families_have_no_drafter(model_type, vocab_size):
    assert checks.choose_drafter("Qwen/Any", model_type, vocab_size) is None


def test_a_family_has_the_vocabulary_of_its_targets(monkeypatch):
    """Catches a family of another vocabulary that is paired, or given a MASK, by Qwen's sizes."""
    other = dataclasses.replace(
        SDAR, name="Other", drafter="a/drafter", targets=("llama",), vocab_sizes=(128256,)
    )
    monkeypatch.setattr(checks, "FAMILIES", (*FAMILIES, other))
    assert checks.choose_drafter("a/target", "llama", 128256) == "a/drafter"
    for model_type, vocab_size in (("llama", 151936), ("qwen2", 128256), ("qwen3", 128256)):
        assert checks.choose_drafter("a/target", model_type, vocab_size) is None
    assert checks.mask_token_id(other, {"vocab_size": 128256}, {}) == 151669
    with pytest.raises(ValueError, match="failfast: the drafter's MASK token is unknown"):
        checks.mask_token_id(other, {"vocab_size": 151936}, {})


@pytest.mark.parametrize("sizes", [(152064, 151936), (151936, 152064)])
def test_padded_vocabularies_may_differ(target, drafter, sizes):
    """Qwen2.5 pads to 151,936 up to 3B and to 152,064 from 7B on; vLLM alone refuses the pair."""
    edit(target / "config.json", vocab_size=sizes[0])
    edit(drafter / "config.json", vocab_size=sizes[1])
    write_headers(drafter, FAST_DLLM_V2)
    facts = build(asking(model=drafter), model=target).additional_config[METHOD]
    assert facts["mask_token_id"] == 3
    assert facts["num_draftable_tokens"] < 151936  # no padding is ever drafted


def test_mask_token_of_the_published_checkpoints():
    """Their config.json does not name it."""
    assert checks.mask_token_id(FAST_DLLM_V2, {"vocab_size": 151936}, {}) == 151665
    assert checks.mask_token_id(SDAR, {"vocab_size": 151936}, {}) == 151669
    assert checks.mask_token_id(FAST_DLLM_V2, {"vocab_size": 99}, {"|<MASK>|": 7}) == 7
    assert checks.mask_token_id(SDAR, {"vocab_size": 99}, {"<|MASK|>": 7}) == 7


def test_a_drafter_may_have_a_mask_token_that_the_target_lacks():
    """Catches equality of the vocabularies as the rule."""
    target = {chr(97 + i): i for i in range(20)}
    checks.check_tokenizers("target", target, "drafter", {**target, "|<MASK>|": 20}, 20)


def test_the_code_of_a_drafter_is_never_run(drafter, tmp_path, monkeypatch):
    """Catches vLLM's rule that a drafter inherits the trust given to the target."""
    executed = tmp_path / "executed"
    (drafter / "modeling.py").write_text(f"open({str(executed)!r}, 'w')\nraise RuntimeError('ran')")
    auto_map = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    edit(drafter / "config.json", auto_map=auto_map)
    tokenizer_map = {"AutoTokenizer": ["modeling.Tokenizer", None]}
    edit(drafter / "tokenizer_config.json", auto_map=tokenizer_map)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))

    built = build(asking(model=drafter), trust_remote_code=True)
    assert not executed.exists()
    assert built.model_config.trust_remote_code  # the target keeps it
    assert not built.speculative_config.draft_model_config.trust_remote_code

    with pytest.raises(RuntimeError, match="ran"):  # the trap is live
        AutoTokenizer.from_pretrained(drafter, trust_remote_code=True)
    assert executed.exists()
