"""`failfast plan`: bytes against real models, and against the documented table."""

import json
import struct
from pathlib import Path

import pytest

from failfast_vllm.config import MODELS_DIR
from failfast_vllm.tools import cli
from failfast_vllm.tools import sizing as plan
from failfast_vllm.tools.sizing import memory_of
from published_models import PUBLISHED_DRAFTERS, PUBLISHED_TARGETS, hub  # noqa: F401 - a fixture

DOCS = Path(__file__).parents[2] / "docs" / "drafters.md"
MODELS = {**PUBLISHED_TARGETS, **PUBLISHED_DRAFTERS}
pytestmark = pytest.mark.usefixtures("hub")
DRAFTER = "Efficient-Large-Model/Fast_dLLM_v2_1.5B"
MOE = {  # Qwen3-30B-A3B
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "decoder_sparse_step": 1,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}


def memory(name):
    return memory_of(name, MODELS[name])


def write(path, config):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def num_parameters(config):
    """Of the model that transformers builds, without memory for it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kinds = {"Fast_dLLM_Qwen": "qwen2", "sdar": "qwen3", "sdar_moe": "qwen3_moe"}
    kind = kinds.get(config["model_type"], config["model_type"])
    fields = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "config",
    [
        MODELS["Qwen/Qwen2.5-7B-Instruct"],
        MODELS["Qwen/Qwen3-4B"],
        MODELS[DRAFTER],
        MODELS["JetLM/SDAR-1.7B-Chat-b32"],
        {**MODELS["Qwen/Qwen3-4B"], "attention_bias": True, "num_hidden_layers": 2},
        {**MOE, "num_hidden_layers": 2},
        {**MODELS["JetLM/SDAR-30B-A3B-Chat"], "num_hidden_layers": 2},
    ],
    ids=["qwen2", "qwen3-tied", "fast-dllm", "sdar", "qwen3-bias", "moe", "sdar-moe"],
)
def test_weights_are_those_of_the_model(config):
    """Catches a forgotten bias, norm, router, or a tied head counted twice."""
    assert memory_of("it", config).weight_bytes == 2 * num_parameters(config)


@pytest.mark.parametrize(
    ("name", "millions"),  # of the safetensors, as the hub shows them
    [
        ("Qwen/Qwen2.5-14B-Instruct", 14770),
        ("Qwen/Qwen2.5-32B-Instruct", 32764),
        ("Qwen/Qwen2.5-72B-Instruct", 72706),
        ("Qwen/Qwen3-8B", 8191),
        ("Qwen/Qwen3-14B", 14768),
        ("Qwen/Qwen3-32B", 32762),
        ("JetLM/SDAR-4B-Chat", 4411),
        ("JetLM/SDAR-8B-Chat-b16", 8191),
        ("Gen-Verse/TraDo-8B-Instruct", 8191),
        ("JetLM/SDAR-30B-A3B-Chat-b32", 30532),
    ],
)
def test_published_sizes(name, millions):
    """Catches a wrong field in our table of published configs."""
    assert round(memory(name).weight_bytes / 2e6) == millions


@pytest.mark.parametrize("name", ["target", "drafter"])
def test_weights_are_those_of_the_shipped_checkpoints(name):
    """Catches a count that fits transformers but not what is on the disk."""
    data = (MODELS_DIR / name / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    spans = [entry["data_offsets"] for key, entry in header.items() if key != "__metadata__"]
    _, config = plan.load_config(str(MODELS_DIR / name))
    assert memory_of(name, config).weight_bytes == sum(b - a for a, b in spans)


@pytest.mark.parametrize(
    ("name", "kv_kib"),
    [
        (DRAFTER, 28),
        ("Qwen/Qwen2.5-7B-Instruct", 56),
        ("Qwen/Qwen2.5-14B-Instruct", 192),
        ("Qwen/Qwen2.5-32B-Instruct", 256),
    ],
)
def test_kv_of_a_token(name, kv_kib):
    """Catches units that are off."""
    assert memory(name).kv_bytes_per_token == kv_kib * 1024


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("JetLM/SDAR-1.7B-Chat-b32", 32),
        ("JetLM/SDAR-4B-Chat-b8", 8),
        ("JetLM/SDAR-30B-A3B-Chat-b16", 16),
        ("Efficient-Large-Model/Fast_dLLM_v2_7B", 32),
    ],
)
def test_published_drafters_have_the_blocks_of_their_names(name, size):
    """Catches a size that only our table states: the published files of SDAR do not."""
    result = plan.make_plan("Qwen/Qwen3-8B", name)
    assert result["diffusion_block_size"] == size
    assert not any("drafts in blocks of" in note for note in result["notes"])
    assert ("block_size" in MODELS[result["drafter"]]) is False


def test_a_doubtful_block_size_is_said(tmp_path, capsys):
    """Catches a size that nobody has stated and that passes for one that somebody has."""
    path = write(tmp_path / "mine", MODELS["JetLM/SDAR-1.7B-Chat"])
    assert cli.main(["plan", "Qwen/Qwen3-8B", "--drafter", path]) == 0
    text = capsys.readouterr().out
    assert "blocks of 4)" in text
    assert "drafts in blocks of 4: the default of SDAR, as neither its config.json nor" in text


def test_a_silent_drafter_is_counted_with_the_defaults_of_its_class(tmp_path):
    """Catches a plan that refuses, or counts otherwise, what the server loads."""
    config = {**MODELS["JetLM/SDAR-4B-Chat"], "num_key_value_heads": 32, "rope_theta": 10000.0}
    defaults = ("head_dim", "num_key_value_heads", "rope_theta", "max_position_embeddings")
    silent = {key: value for key, value in config.items() if key not in defaults}
    assert memory_of("it", silent) == memory_of("it", config)
    stated = {**config, "head_dim": 80}
    assert memory_of("it", stated).kv_bytes_per_token < memory_of("it", config).kv_bytes_per_token
    found = plan.make_plan("Qwen/Qwen3-8B", write(tmp_path / "it", silent))
    assert found["kv_bytes_per_token"]["drafter"] == 2 * 36 * 32 * 128 * 2


def test_quantised_weights_are_not_called_exact(tmp_path):
    """Catches bf16 bytes that pass for those of weights of 4 bits."""
    config = MODELS["Qwen/Qwen2.5-7B-Instruct"]
    awq = {**config, "quantization_config": {"quant_method": "awq", "bits": 4}}
    found = plan.make_plan(write(tmp_path / "known", awq))
    assert found["weight_bytes_exact"] == {"target": False, "drafter": True}
    assert found["weight_bytes"]["target"] == memory("Qwen/Qwen2.5-7B-Instruct").weight_bytes
    assert "(not exact)" in plan.render(found)
    assert "is quantised: it takes less than these unquantised weights" in plan.render(found)


def test_the_command_prints_bytes(capsys):
    """Catches a unit or a share that is off by a thousand or 1024."""
    assert cli.main(["plan", "Qwen/Qwen3-8B", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["drafter"] == "JetLM/SDAR-1.7B-Chat-b32"
    assert cli.main(["plan", "Qwen/Qwen3-8B"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "target    Qwen/Qwen3-8B",
        "drafter   JetLM/SDAR-1.7B-Chat-b32 (SDAR, blocks of 32)",
        "weights   target 16.38 GB, drafter 4.06 GB",
        "KV        target 144 KiB per token, drafter 112 KiB: 44% of the pool",
        "logits    2373 MB float32 at most: 64 drafts of 60 tokens, verified at once",
    ]


@pytest.mark.parametrize("target", PUBLISHED_TARGETS)
def test_documented_table_is_what_the_command_computes(target):
    """Catches docs/drafters.md left behind by a change of the model or of a config."""
    result = plan.make_plan(target)
    weights, kv = result["weight_bytes"], result["kv_bytes_per_token"]
    cells = [
        target.split("/")[1],
        result["drafter"].split("/")[1],
        " + ".join(f"{count / 1e9:.2f}" for count in weights.values()),
        " + ".join(f"{count // 1024}" for count in kv.values()),
        f"{result['drafter_share_of_kv']:.0%}",
    ]
    assert "| " + " | ".join(cells) + " |" in DOCS.read_text(encoding="utf-8").splitlines()


def test_the_shipped_pair_is_planned(capsys):
    """Catches a config.json that is not taken for its directory."""
    path = str(MODELS_DIR / "target" / "config.json")
    assert cli.main(["plan", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["drafter"] == str(MODELS_DIR / "drafter")


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["nowhere/model"], "or a hub id"),
        (["Qwen/Qwen3-8B", "--drafter", "some/drafter"], "or a hub id"),
        ([str(Path(__file__))], "give a config.json"),
    ],
)
def test_what_cannot_be_planned_is_one_line(argv, hint, capsys):
    """Catches a traceback, or an error without a way out."""
    assert cli.main(["plan", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("failfast plan: ")
    assert err.count("\n") == 1
    assert hint in err


@pytest.mark.parametrize(
    ("changed", "hint"),
    [
        ({"hidden_size": "big"}, "'hidden_size'"),
        ({"hidden_size": 10**400}, "'hidden_size' as an integer"),  # too large for gigabytes
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' as an integer"),  # takes for ever
        ({"head_dim": ["128"]}, "'head_dim' as an integer"),
        ({"dtype": "int3"}, "int3"),
        ({**MOE, "mlp_only_layers": [0]}, "mixes dense and expert"),
    ],
)
def test_unknown_configs_are_refused(changed, hint, tmp_path):
    """Catches bytes that are guessed for tensors we do not know."""
    path = write(tmp_path / "it", {**MODELS["Qwen/Qwen2.5-7B-Instruct"], **changed})
    with pytest.raises(ValueError, match=hint):
        plan.make_plan(path)


def test_lists_in_lists_are_refused(tmp_path):
    """Catches a traceback of Python's JSON reader."""
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"give a config\.json"):
        plan.make_plan(str(tmp_path))


@pytest.mark.parametrize("changed", [{"model_type": "llama"}, {"vocab_size": 32000}])
def test_a_target_without_a_drafter(changed, tmp_path, capsys):
    path = write(tmp_path / "it", {**MODELS["Qwen/Qwen2.5-7B-Instruct"], **changed})
    assert plan.make_plan(path) == {"target": str(path), "drafter": None}
    assert cli.main(["plan", str(path)]) == 0
    assert "drafter   none is known: drafts are copies" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["plan"], ["plan", "x", "--gpu", "H200"]])
def test_wrong_arguments_exit_with_2(argv, capsys):
    """Catches a plan of nothing, and a flag that is ignored."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert "failfast" in capsys.readouterr().err
