"""The `failfast` command: exit codes, what reaches stdout, and a demo that must be lossless."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import failfast_vllm
from failfast_vllm.integration import hooks as hook_registry
from failfast_vllm.tools import cli, demo, doctor, shipped
from failfast_vllm.tools.load_generator import Run, Served, Sums, TracedRound

COMMAND = str(Path(sys.executable).with_name("failfast"))


def run(*args, **env):
    return subprocess.run(
        [COMMAND, *args], capture_output=True, text=True, env={**os.environ, **env}, timeout=600
    )


@pytest.fixture
def other_models(tmp_path, monkeypatch):
    """An empty directory in place of the shipped models."""
    monkeypatch.setattr(shipped, "MODELS_DIR", tmp_path)
    monkeypatch.setattr(shipped, "PROMPTS", tmp_path / "prompts.jsonl")
    return tmp_path


def test_models_are_shipped_and_complete(capsys):
    assert cli.main(["models", "--json"]) == 0
    paths = json.loads(capsys.readouterr().out)
    assert list(paths) == ["target", "drafter", "ar-drafter"]
    assert all(Path(path).is_absolute() and Path(path).is_dir() for path in paths.values())
    assert cli.main(["models"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        [name, path] for name, path in paths.items()
    ]


@pytest.mark.parametrize("command", ["models", "demo"])
def test_missing_models_are_one_line_and_exit_code_2(command, other_models, capsys):
    assert cli.main([command]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"failfast {command}: {other_models / 'target'} has no config.json")
    assert err.count("\n") == 1
    assert "Reinstall" in err


def fake_model(path, weights):
    path.mkdir()
    for name in shipped.SHIPPED_FILES:
        (path / name).write_text("{}")
    (path / "model.safetensors").write_bytes(weights)
    return path


def test_damaged_weights_are_found(tmp_path):
    header = b'{"__metadata__": {}, "w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}'
    weights = len(header).to_bytes(8, "little") + header + b"1234"
    assert shipped.model_problem(fake_model(tmp_path / "whole", weights)) == ""
    for name, damaged in (
        ("cut", weights[:-1]),
        ("longer", weights + b"5"),
        ("lfs", b"version https://git-lfs"),
        ("empty", b""),
    ):
        path = fake_model(tmp_path / name, damaged)
        problem = shipped.model_problem(path)
        assert problem.startswith(f"{path / 'model.safetensors'} is not a whole safetensors file")
        assert "\n" not in problem


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["serve"],
        ["models", "--yaml"],
        ["demo", "--num-prompts", "0"],
        ["demo", "--max-tokens", "-1"],
        ["demo", "--max-tokens", "many"],
    ],
)
def test_wrong_arguments_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert "failfast" in capsys.readouterr().err


def test_light_commands_import_no_engine():
    code = (
        "import sys; from failfast_vllm.tools.cli import main; "
        "main(['models']); main(['plan', sys.argv[1]]); "
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, shipped.MODELS_DIR / "target"], check=True)


def test_version_says_the_same_to_people_and_programs(capsys):
    """Catches a fact that only one of the two forms has."""
    assert cli.main(["version", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["failfast-vllm"] == failfast_vllm.__version__
    assert list(facts) == [
        *("failfast-vllm", "vllm", "torch", "triton", "transformers"),
        *("python", "platform", "device"),
    ]
    assert "not installed" not in facts.values()
    assert cli.main(["version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [tuple(line.split(maxsplit=1)) for line in lines] == list(facts.items())


def test_doctor_is_content_here(capsys, monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    found = {check["name"]: check["found"] for check in report["checks"]}
    assert {"python", "vllm", "torch", "triton", "transformers", "platform"} <= set(found)
    hooks = [check for check in report["checks"] if check["name"].startswith("hook ")]
    assert len(hooks) == len(hook_registry.all_hooks())


def test_doctor_names_a_missing_hook_and_the_remedy(capsys, monkeypatch):
    first = hook_registry.hooks_of("v1")[0]
    gone = first._replace(path=f"{first.path}_gone")
    monkeypatch.setattr(hook_registry, "all_hooks", lambda: (gone,))
    assert cli.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (where,) = [i for i, line in enumerate(lines) if line.startswith("PROBLEM")]
    assert f"vLLM has no {gone.name}" in lines[where]
    assert lines[where + 1].strip() == f"-> {doctor.INSTALL_VLLM}"


def test_doctor_sees_an_environment_in_the_way(capsys, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert cli.main(["doctor", "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    (problem,) = [check for check in checks if not check["ok"]]
    assert "VLLM_PLUGINS" in problem["problem"]
    assert problem["remedy"]


def test_doctor_misses_models(other_models, capsys):
    assert cli.main(["doctor", "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    bad = [check["name"] for check in checks if not check["ok"]]
    assert bad == ["model target", "model drafter", "model ar-drafter", "prompts"]


@pytest.mark.slow
def test_demo_is_lossless_and_prints_only_json(tmp_path):
    """Catches a replay that drops steps: its last frame counts other tokens than were answered."""
    recording = tmp_path / "demo.svg"
    asked = ["--num-prompts", "2", "--max-tokens", "64", "--record", str(recording)]
    done = run("demo", "--json", *asked)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) == {
        "outputs_identical",
        "speedup",
        "acceptance_length",
        "passes_per_round",
        "longest_accepted",
        "tokens_per_second",
    }
    assert result["outputs_identical"] is True
    assert result["acceptance_length"] > 1
    assert result["passes_per_round"] > 0  # a copy takes none
    assert type(result["longest_accepted"]) is int
    assert result["longest_accepted"] >= 1
    rates = result["tokens_per_second"]
    assert set(rates) == {"baseline", "failfast"}
    assert result["speedup"] == pytest.approx(rates["failfast"] / rates["baseline"])
    text = recording.read_text(encoding="utf-8").replace("&#160;", " ")
    figures = re.findall(r"([\d.]+) tokens/s</text><text [^>]*>: (\d+) in ([\d.]+) s", text)[-2:]
    for (shown, num_tokens, seconds), rate in zip(figures, rates.values(), strict=True):
        assert float(shown) == pytest.approx(rate, rel=0.02)
        assert int(num_tokens) / float(seconds) == pytest.approx(rate, rel=0.05)
    assert figures[0][1] == figures[1][1]


def test_prompts_are_mixed(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"task": task, "messages": [{"role": "user", "content": task}]} for task in "aaabbc"]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert [prompt["task"] for prompt in demo.choose_prompts(path, 5)] == ["a", "b", "c", "a", "b"]


class Letters:
    """Token id i is the i-th letter."""

    def decode(self, token_ids, skip_special_tokens):
        return "".join(chr(ord("a") + i) for i in token_ids)


def comparison(failfast_ids):
    rounds = [TracedRound([], [], [0]), TracedRound([1, 2], [9, 9], [3])]
    sums = Sums(float, drafts=1, drafted=4, accepted=2, passes=1, longest=2)
    prompt = {"task": "task", "messages": [{"role": "user", "content": "why\nnot"}]}
    baseline = Run(2.0, [Served([0, 1, 2, 3], [500.0, 1000.0, 1500.0, 2000.0], [])], Sums(float))
    failfast = Run(1.0, [Served(failfast_ids, [400.0, 1000.0], rounds)], sums)
    return demo.Comparison([prompt], baseline, failfast, "cpu", Letters())


def shown(capsys, result, **given):
    """What the demo prints on stdout."""
    demo.show(result, argparse.Namespace(**{"json": False, "record": None, **given}))
    return capsys.readouterr().out


@pytest.mark.parametrize("variable", ["", "FORCE_COLOR", "NO_COLOR"])
def test_a_pipe_gets_plain_text(variable, capsys, monkeypatch):
    """Catches escape codes in a file, and a replay that nobody watches."""
    monkeypatch.setenv(variable or "TERM", "1")
    plain = shown(capsys, comparison([0, 1, 2, 3]))
    assert "\033" not in plain
    assert "batch 1, float32, cpu" in plain
    assert "2.00 x" in plain
    assert "3.00 tokens per round" in plain  # the prefill's token is no round
    assert "identical" in plain


def test_different_outputs_are_said_aloud(capsys):
    result = comparison([0, 1, 2, 4])
    assert not result.outputs_identical
    assert "DIFFERENT" in shown(capsys, result)


def test_demo_fails_if_outputs_differ(capsys, monkeypatch):
    monkeypatch.setattr(demo, "compare", lambda *args: comparison([0, 1, 2, 4]))
    assert cli.main(["demo", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["outputs_identical"] is False


@pytest.mark.parametrize("command", ["models", pytest.param("doctor", marks=pytest.mark.large)])
def test_a_reader_that_has_seen_enough(command):
    """Catches a traceback behind `failfast models | head -c1`."""
    done = subprocess.run(
        f"{COMMAND} {command} | head -c1", shell=True, capture_output=True, text=True, check=False
    )
    assert len(done.stdout) == 1
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    done = subprocess.run(
        f"{COMMAND} models > /dev/full", shell=True, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "failfast models: cannot write the output (No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupt_is_one_line_and_130(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "failfast demo: interrupted\n"
