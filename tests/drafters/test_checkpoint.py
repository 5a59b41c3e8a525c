"""Loading drafters: what is published loads bit for bit, what is damaged is refused in one line."""

import ast
import json
import math
import os
import random
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

from build_config import build, edit
from checkpoints import (
    fuse_experts,
    published_shapes,
    random_tensors,
    tiny_config,
    write_checkpoint,
    write_header,
    write_headers,
    write_weights,
)
from engine import engine, generate, proposer
from failfast_vllm.config import METHOD, MODELS_DIR
from failfast_vllm.drafters import checks
from failfast_vllm.drafters.checkpoint import INDEX, expected_shapes
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

    And SDAR in blocks of 4 where only its name says 32, or a warning where the name says it all.
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
    assert "failfast: " not in caplog.text
    assert facts["num_draftable_tokens"] == 151936  # what both padded vocabularies hold
    assert stop_token_ids(built.model_config) == [151644]  # the target ends answers
    loaded = built.speculative_config.draft_model_config
    assert type(loaded.hf_config) is CONFIGS[family.model_types[0]]
    assert not loaded.trust_remote_code
    assert loaded.hf_config.rope_parameters["rope_theta"] == 1_000_000
    assert loaded.get_head_size() == 128


def test_only_headers_are_read(tmp_path):
    """Catches a check that reads 3 GB before a server may start."""

    def num_bytes_read():
        with open("/proc/self/io") as file:
            return int(file.readline().split()[1])

    drafter = published(tmp_path, "Fast_dLLM_v2_1.5B")
    size = (drafter / "model.safetensors").stat().st_size
    before = num_bytes_read()
    checks.check_local_drafter(str(drafter))
    assert size > 3_000_000_000
    assert num_bytes_read() - before < 200_000


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


def raw(data):
    return lambda path, shapes: (path / "model.safetensors").write_bytes(data)


def header(text, length=None):
    data = text if isinstance(text, bytes) else text.encode()
    return raw((len(data) if length is None else length).to_bytes(8, "little") + data)


def entry(dtype="BF16", shape=(1,), offsets=(0, 2)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def one_tensor(**changes):
    return header(json.dumps({"a": entry() | changes}) + " " * 2)


def shapes_with(**changes):
    """Write other shapes; None removes a tensor."""

    def damage(path, shapes):
        shapes = {**shapes, **changes}
        kept = {name: shape for name, shape in shapes.items() if shape is not None}
        write_header(path / "model.safetensors", kept)

    return damage


def entries_with(change):
    """Change one tensor's entry; the data stay."""

    def damage(path, shapes):
        begin = 0
        for name, shape in shapes.items():
            end = begin + 2 * math.prod(shape)
            if name == Q_PROJ:
                break
            begin = end
        changed = entry(shape=shape, offsets=(begin, end)) | change(shape, begin, end)
        write_header(path / "model.safetensors", shapes, **{Q_PROJ: changed})

    return damage


def last_as(dtype, num_bytes):
    """A sound file in which one tensor, the last, has another type."""

    def damage(path, shapes):
        begin = 2 * sum(math.prod(shape) for name, shape in shapes.items() if name != Q_PROJ)
        end = begin + num_bytes * math.prod(shapes[Q_PROJ])
        others = {name: shape for name, shape in shapes.items() if name != Q_PROJ}
        changed = entry(dtype, shapes[Q_PROJ], (begin, end))
        write_header(path / "model.safetensors", others, **{Q_PROJ: changed})
        cut(end - begin)(path, shapes)

    return damage


def cut(num_bytes):
    def damage(path, shapes):
        file = path / "model.safetensors"
        os.truncate(file, file.stat().st_size + num_bytes)

    return damage


def be_a_directory(path, shapes):
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").mkdir()


def be_a_pipe(path, shapes):
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")


def dangle(path, shapes):
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to("nowhere")


def lose_prefix(path, shapes):
    write_header(
        path / "model.safetensors",
        {name.removeprefix("model."): shape for name, shape in shapes.items()},
    )


def repeat_name(path, shapes):
    text = json.dumps({"a": entry()})
    text = text[:-1] + ", " + text[1:]
    header(text + "  ", len(text))(path, shapes)


MALFORMED_FILES = {
    "empty": (raw(b""), ["header too small"]),
    "seven-bytes": (raw(b"\1" * 7), ["header too small"]),
    "header-beyond-the-end": (header("{}", 100), ["invalid header length"]),
    "absurd-header": (header("{}", 2**63 + 5), ["header too large"]),
    "no-json": (header("weights!"), ["expected value"]),
    "no-utf8": (header(b'{"\xff": 1}'), ["utf-8"]),
    "utf16": (header('{"a": 1}'.encode("utf-16")), ["utf-8"]),
    "nested-for-ever": (header('{"a":' * 200_000), ["recursion"]),
    "endless-number": (header('{"a": ' + "9" * 5000 + "}"), ["out of range"]),
    "a-list": (header("[]"), ["invalid type: sequence"]),
    "repeated-name": (repeat_name, ["'a'", "no place"]),
    "metadata": (header('{"__metadata__": {"a": 1}}'), ["expected a string"]),
    "entry": (header('{"a": 5}'), ["integer `5`"]),
    "no-dtype": (one_tensor(dtype=None), ["invalid type: null"]),
    "boolean-shape": (one_tensor(shape=[True]), ["boolean `true`"]),
    "negative-shape": (one_tensor(shape=[-1]), ["integer `-1`"]),
    "fractional-shape": (one_tensor(shape=[1.0]), ["floating point `1.0`"]),
    "negative-offset": (one_tensor(data_offsets=[-2, 0]), ["integer `-2`"]),
    "three-offsets": (one_tensor(data_offsets=[0, 1, 2]), ["invalid length 3"]),
    "huge-offset": (one_tensor(data_offsets=[10**4000, 0]), ["out of range"]),
    "truncated": (cut(-1), ["is damaged", "not fully covered"]),
    "trailing-bytes": (cut(+1), ["is damaged", "not fully covered"]),
    "overlap": (
        entries_with(lambda shape, begin, end: {"data_offsets": [begin - 2, end - 2]}),
        [f"invalid offset for tensor `{Q_PROJ}`"],
    ),
    "decreasing": (
        entries_with(lambda shape, begin, end: {"data_offsets": [begin, begin - 2]}),
        [f"invalid offset for tensor `{Q_PROJ}`"],
    ),
    "hole": (
        entries_with(lambda shape, begin, end: {"data_offsets": [begin + 2, end]}),
        [f"invalid offset for tensor `{Q_PROJ}`"],
    ),
    "bytes-of-another-dtype": (
        entries_with(lambda *_: {"dtype": "F32"}),
        ["is damaged", "invalid shape, data type, or offset"],
    ),
    "int8": (last_as("I8", 1), [Q_PROJ, "got 'I8'", "unquantised"]),
    "fp8": (last_as("F8_E4M3", 1), [Q_PROJ, "got 'F8_E4M3'"]),
    "float64": (last_as("F64", 8), [Q_PROJ, "F16, BF16, F32"]),
    "an-unprintable-name": (
        header(json.dumps({"a\x1b" + "b" * 5000: entry(offsets=(2, 4))}) + " " * 4),
        ["is damaged", "invalid offset for tensor `a", "..."],
    ),
    "unknown-type": (one_tensor(dtype="\x1b[31m\n" * 99), ["is damaged", "unknown variant"]),
    "a-directory": (be_a_directory, ["is not a file"]),
    "a-pipe": (be_a_pipe, ["is not a file"]),
    "a-dangling-link": (dangle, ["is not a file"]),
    "nothing": (header("{}"), ["lacks 27 of its 27 tensors", "lm_head.weight"]),
    "no-embedding": (
        shapes_with(**{"model.embed_tokens.weight": None}),
        ["lacks 1 of its 27", "'model.embed_tokens.weight'", "complete"],
    ),
    "no-bias": (
        shapes_with(**{"model.layers.0.self_attn.k_proj.bias": None}),
        ["lacks 1 of its 27", "'model.layers.0.self_attn.k_proj.bias'"],
    ),
    "no-output-head": (shapes_with(**{"lm_head.weight": None}), ["lacks 1", "'lm_head.weight'"]),
    "no-prefix": (lose_prefix, ["'embed_tokens.weight'", "no place"]),
    "output-bias": (  # vLLM drops it without a word
        shapes_with(**{"model.layers.0.self_attn.o_proj.bias": [256]}),
        ["'model.layers.0.self_attn.o_proj.bias'", "no place"],
    ),
    "head-norm": (
        shapes_with(**{"model.layers.0.self_attn.q_norm.weight": [64]}),
        ["'model.layers.0.self_attn.q_norm.weight'", "no place"],
    ),
    "third-layer": (
        shapes_with(**{"model.layers.2.input_layernorm.weight": [256]}),
        ["'model.layers.2.input_layernorm.weight'", "no place"],
    ),
    "adapter": (
        shapes_with(**{"base_model.model.q_proj.lora_A.weight": [8, 256]}),
        ["'base_model.model.q_proj.lora_A.weight'", "no place"],
    ),
    "transposed": (
        shapes_with(**{"model.layers.0.self_attn.k_proj.weight": [256, 128]}),
        ["'model.layers.0.self_attn.k_proj.weight'", "[128, 256]", "got [256, 128]"],
    ),
    "flattened": (shapes_with(**{"model.norm.weight": [1, 256]}), ["[256]; got [1, 256]"]),
    "other-vocabulary": (
        shapes_with(**{"lm_head.weight": [2048, 256]}),
        ["'lm_head.weight'", "[1984, 256]; got [2048, 256]"],
    ),
}


@pytest.fixture
def checkpoint(tmp_path):
    """An untied Fast-dLLM checkpoint, headers only, and its shapes."""
    fields = tiny_config(FAST_DLLM_V2, tie_word_embeddings=False)
    path = tmp_path / "ck"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    write_headers(path, FAST_DLLM_V2)
    return path, published_shapes(FAST_DLLM_V2, fields)


@pytest.mark.parametrize(
    ("damage", "fragments"), MALFORMED_FILES.values(), ids=MALFORMED_FILES.keys()
)
def test_malformed_file(checkpoint, damage, fragments):
    """Catches weights that vLLM would load partly, or fail on deep inside a worker."""
    path, shapes = checkpoint
    checks.check_local_drafter(str(path))
    damage(path, shapes)
    message = refusal(path)
    assert all(fragment in message for fragment in [str(path), *fragments]), message


def test_a_malformed_file_is_refused_before_the_engine_is_configured(checkpoint):
    """Catches checks that nobody calls; with dummy weights no file is asked for."""
    path, _ = checkpoint
    (path / "model.safetensors").unlink()
    arguments = {"skip_tokenizer_init": True}
    assert build(asking(path), load_format="dummy", **arguments).speculative_config
    (path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"\Afailfast: .*header too small"):
        build(asking(path), **arguments)


def test_what_is_accepted_is_safetensors(tmp_path):
    """Catches headers that only we can read, and errors that are not ours, among 2,000 damages."""
    sizes = {"hidden_size": 8, "head_dim": 2, "intermediate_size": 6, "vocab_size": 10}
    path, dice, num_accepted = tmp_path / "ck", random.Random(0), 0
    write_checkpoint(path, SDAR, tiny_config(SDAR, **sizes, num_hidden_layers=1))
    good = (path / "model.safetensors").read_bytes()
    num_bytes = 8 + int.from_bytes(good[:8], "little")
    for _ in range(2000):
        data = bytearray(good)
        position = dice.randrange(num_bytes)
        if dice.random() < 0.9:
            data[position] = dice.choice(b'0123456789[]{},:"-. eE_\\\x00\xff')
        else:
            data = data[:position]
        (path / "model.safetensors").write_bytes(data)
        message = objection(checks.check_local_drafter, str(path))
        if message is None:
            num_accepted += 1
            load_file(path / "model.safetensors")
        else:
            assert message.startswith("failfast: ")
            assert "\n" not in message
    assert 0 < num_accepted < 100


def rewrite_index(change):
    def damage(path):
        file = path / INDEX
        index = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(change(index)), encoding="utf-8")

    return damage


def remap(**shard_of):
    """Move tensors to other shards in the index only; None removes one."""

    def change(index):
        weight_map = {**index["weight_map"], **shard_of}
        return {"weight_map": {k: v for k, v in weight_map.items() if v is not None}}

    return rewrite_index(change)


def index_text(text):
    return lambda path: (path / INDEX).write_text(text, encoding="utf-8")


def lose_index(path):
    (path / INDEX).unlink()


def lose_shard(path):
    (path / SHARDS[1]).unlink()


def truncate_shard(path):
    os.truncate(path / SHARDS[1], (path / SHARDS[1]).stat().st_size - 4)


def hold_twice(path):
    """The second shard also holds what the index puts into the first."""
    tensors = load_file(path / SHARDS[1])
    save_file({**tensors, FIRST: torch.zeros(1984, 128)}, path / SHARDS[1])


def consolidate(path):
    """All weights a second time, without an index that chooses."""
    lose_index(path)
    write_header(path / "all.safetensors", {"model.norm.weight": [128]})


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FIRST = "model.embed_tokens.weight"  # in the first shard
MALFORMED_SHARDS = {
    "missing-shard": (lose_shard, [INDEX, repr(SHARDS[1]), "not there"]),
    "truncated-shard": (truncate_shard, [SHARDS[1], "not fully covered"]),
    "outside": (remap(**{FIRST: f"../{SHARDS[0]}"}), [f"'../{SHARDS[0]}'", "not there"]),
    "not-safetensors": (remap(**{FIRST: "pytorch_model.bin"}), ["'pytorch_model.bin'"]),
    "held-twice": (hold_twice, [SHARDS[1], repr(FIRST), "also holds"]),
    "held-twice-without-index": (consolidate, ["'model.norm.weight'", "also holds"]),
    "garbage-index": (index_text("{"), [INDEX, "cannot read"]),
    "nested-index": (index_text("[" * 200_000), [INDEX, "recursion"]),
    "list-index": (index_text("[]"), [INDEX, "'weight_map'", "got None"]),
    "index-of-numbers": (index_text('{"weight_map": {"a": 1}}'), [INDEX, "got {'a': 1}"]),
    "empty-index": (index_text('{"weight_map": {}}'), ["lacks 24 of its 24 tensors"]),
}


@pytest.fixture
def sharded(tmp_path):
    write_checkpoint(tmp_path / "ck", SDAR, tiny_config(SDAR), shards=2)
    return tmp_path / "ck"


@pytest.mark.parametrize(
    ("damage", "fragments"), MALFORMED_SHARDS.values(), ids=MALFORMED_SHARDS.keys()
)
def test_malformed_shards(sharded, damage, fragments):
    """Catches half-downloaded checkpoints, and tensors that replace each other."""
    checks.check_local_drafter(str(sharded))
    damage(sharded)
    message = refusal(sharded)
    assert all(fragment in message for fragment in [str(sharded), *fragments]), message


def test_an_index_chooses_as_in_vllm(sharded):
    """Catches a check of other files than those vLLM loads."""
    from vllm.model_executor.model_loader.weight_utils import filter_duplicate_safetensors_files

    (sharded / "consolidated.safetensors").touch()
    (sharded / "pytorch_model.bin").touch()
    checks.check_local_drafter(str(sharded))
    files = [str(path) for path in sharded.glob("*.safetensors")]
    chosen = filter_duplicate_safetensors_files(files, str(sharded), INDEX)
    assert sorted(chosen) == [str(sharded / shard) for shard in SHARDS]


@pytest.mark.parametrize("shard_of", [{FIRST: SHARDS[1]}, {FIRST: None}, {"extra": SHARDS[0]}])
def test_an_index_chooses_no_tensors(sharded, shard_of):
    """Catches a refusal of what vLLM loads completely: it reads all that the files hold."""
    remap(**shard_of)(sharded)
    checks.check_local_drafter(str(sharded))


def test_hidden_files_do_not_count(checkpoint):
    """Catches an interrupted copy that vLLM would not see either."""
    path, _ = checkpoint
    (path / ".left-over.safetensors").touch()
    checks.check_local_drafter(str(path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_float_type_is_accepted(tmp_path, dtype):
    """Catches bytes counted for another type."""
    write_checkpoint(tmp_path / "ck", SDAR, tiny_config(SDAR), dtype=dtype)
    checks.check_local_drafter(str(tmp_path / "ck"))


@pytest.mark.parametrize("rows", [1984, 2048])
def test_a_tied_checkpoint_may_carry_its_output_head(tmp_path, rows):
    """Catches one of another shape, which says that the config belongs to another model."""
    path, fields = tmp_path / "ck", tiny_config(SDAR, tie_word_embeddings=True)
    tensors = write_checkpoint(path, SDAR, fields)
    write_weights(path, {**tensors, "lm_head.weight": torch.zeros(rows, 128)})
    if rows == 1984:
        checks.check_local_drafter(str(path))
    else:
        assert "'lm_head.weight' of shape [1984, 128]; got [2048, 128]" in refusal(path)


# --- configs ---------------------------------------------------------------------------------


def bad(key, value, *fragments, family=FAST_DLLM_V2):
    label = f"{family.model_types[0]}-{key}-{str(value)[:30]}"
    return pytest.param(family, {key: value}, [repr(key), *fragments], id=label)


LLAMA3 = {"type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
BAD_CONFIGS = [
    *(bad(key, value, "integer") for key in SIZES for value in (0, -1, "many", True, 2.5, 1 << 30)),
    *(bad(key, "absent", "got None") for key in SIZES if key not in SDAR.defaults),
    *(bad(key, "absent", "got None", family=SDAR_MOE) for key in SIZES),
    bad("rope_theta", "absent", "got None", family=SDAR_MOE),
    bad("head_dim", "absent", "got None", family=SDAR_MOE),
    *(bad("head_dim", value, "integer", family=SDAR) for value in (0, None, "64", 64.0, 1 << 20)),
    bad("head_dim", 63, "even", family=SDAR),
    bad("head_dim", 128, "(64)"),
    bad("num_attention_heads", 3, "divisor", "(3)", family=SDAR),
    bad("num_attention_heads", 6, "splits 'hidden_size' (256)"),
    bad("hidden_act", "gelu", "silu"),
    bad("use_sliding_window", True, "false"),
    bad("layer_types", ["full_attention", "sliding_attention"], "full_attention"),
    bad("layer_types", ["full_attention"], "each layer"),
    bad("layer_types", 5, "each layer"),
    bad("tie_word_embeddings", "yes", "true"),
    bad("attention_bias", False, "true"),
    bad("attention_bias", 1, "true", family=SDAR),
    bad("qk_norm", True, "false"),
    bad("qk_norm", False, "true", family=SDAR),
    bad("is_causal", False, "true"),
    bad("dual_chunk_attention_config", {"chunk_size": 4}, "null"),
    bad("num_experts", 128, "null", family=SDAR),
    bad("num_local_experts", 8, "null"),
    bad("n_routed_experts", 8, "null"),
    bad("shared_expert_intermediate_size", 64, "null", family=SDAR_MOE),
    *(
        bad(key, value, "integer", family=SDAR_MOE)
        for key in ("num_experts", "moe_intermediate_size", "num_experts_per_tok")
        for value in (0, "absent", True, 1 << 30)
    ),
    bad("num_experts", 4096, "from 1 to 1024", family=SDAR_MOE),  # 50 M tensors in 4096 layers
    bad("num_experts_per_tok", 9, "from 1 to 8", family=SDAR_MOE),
    bad("norm_topk_prob", "absent", "got None", family=SDAR_MOE),
    bad("norm_topk_prob", 1, "true", family=SDAR_MOE),
    *(bad("decoder_sparse_step", value, "as 1", family=SDAR_MOE) for value in (0, 2, None, True)),
    *(bad("mlp_only_layers", value, "as []", family=SDAR_MOE) for value in ([0], 1, ["0"])),
    bad("quantization_config", {"quant_method": "gptq"}, "gptq", "unquantised"),
    bad("compression_config", {"format": "int-quantized"}, "unquantised"),
    bad("rms_norm_eps", 0, "between 0 and 1"),
    bad("rms_norm_eps", 2, "between 0 and 1"),
    bad("rms_norm_eps", math.nan, "between 0 and 1"),
    bad("rope_theta", -1.0, "positive"),
    bad("rope_theta", math.inf, "positive"),
    bad("rope_theta", 10**400, "positive"),
    bad("rope_theta", "1e6", "positive"),
    bad("rope_scaling", "yarn", "'rope_type'"),
    bad("rope_scaling", {"rope_type": "spiral", "factor": 2.0}, "spiral"),
    bad("rope_scaling", {"type": "mrope", "mrope_section": [8, 12, 12]}, "mrope"),
    bad("rope_scaling", {"rope_type": ["yarn"]}, "'rope_type'"),
    bad("rope_scaling", {"rope_type": "default", "mrope_section": [8, 12, 12]}, "mrope"),
    bad("rope_scaling", {"rope_type": "linear"}, "'factor'"),
    bad("rope_scaling", {"rope_type": "linear", "factor": 0}, "'factor'"),
    bad("rope_scaling", {"type": "yarn"}, "'factor'"),
    *(
        bad("rope_scaling", {"type": "yarn", "factor": 4.0, key: value}, repr(key))
        for key in ("original_max_position_embeddings", "beta_fast", "beta_slow")
        for value in (None, 0)
    ),
    bad("rope_scaling", {"type": "llama3", "factor": 4.0}, "'low_freq_factor'"),
    bad("rope_scaling", LLAMA3 | {"low_freq_factor": 4.0}, "above"),
    bad("rope_scaling", {"rope_type": "longrope", "factor": 4.0}, "linear, dynamic, yarn, llama3"),
    bad("rope_parameters", {"full_attention": {"rope_theta": 1e4}, "rope_theta": None}),
]


@pytest.mark.parametrize(("family", "changes", "fragments"), BAD_CONFIGS)
def test_bad_config(tmp_path, family, changes, fragments):
    """Catches sizes that fail deep in vLLM, and settings that it would silently not follow."""
    fields = tiny_config(family) | changes
    fields = {key: value for key, value in fields.items() if value != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    message = refusal(tmp_path)
    if "rope_parameters" in changes:
        fragments = ["'rope_theta'", "got None"]
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
            if message is None:
                assert all(map(math.prod, expected_shapes(family, changed).values()))
            else:
                assert message.startswith("failfast: "), (key, value)
                assert "\n" not in message, (key, value)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_scaling": LLAMA3},
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
            }
        },
        {"attention_bias": True},
        {"num_experts": 0},
    ],
)
def test_what_vllm_does_follow_is_accepted(tmp_path, changes):
    """Catches checks that refuse every checkpoint but the published ones."""
    write_checkpoint(tmp_path / "ck", SDAR, tiny_config(SDAR, **changes))
    checks.check_local_drafter(str(tmp_path / "ck"))


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
    with pytest.raises(ValueError, match=r"\Afailfast: .*'quantization_config' absent") as caught:
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
