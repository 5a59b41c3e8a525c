"""The doorway: cheap, invisible to servers without failfast, and shut on other vLLMs."""

import importlib.metadata
import inspect
import json
import os
import shutil
import subprocess
import sys
import types

import pytest
import torch
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from engine import TARGET, chat_ids, engine, generate, proposer, shipped_prompts
from failfast_vllm import plugin
from failfast_vllm.config import METHOD, MODELS_DIR
from failfast_vllm.integration import hooks
from hook_stages import replace_stage

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
MAX_REGISTER_SECONDS = 0.5  # measured: 0.001 to 0.01; importing the model runner takes over 1

# Runs in a process of its own: this one has loaded the plugin already.
SERVER_WITHOUT_FAILFAST = """
import dataclasses, json, sys, time
import torch
from vllm.engine.arg_utils import EngineArgs

def refuse():
    raise AssertionError("CUDA was touched")

torch.cuda._lazy_init = refuse
target, ngram, has_plugin = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "True"
facts = {}
if has_plugin:
    before = set(sys.modules)
    began = time.process_time()
    from failfast_vllm import plugin
    plugin.register()
    facts["register_seconds"] = time.process_time() - began
    facts["imported"] = sorted(set(sys.modules) - before)
    hooked = EngineArgs.create_speculative_config
    plugin.register()
    facts["is_idempotent"] = EngineArgs.create_speculative_config is hooked
for name, speculative_config in (("none", None), ("ngram", ngram)):
    args = EngineArgs(model=target, speculative_config=speculative_config)
    built = args.create_engine_config()
    fields = {f.name: repr(getattr(built, f.name)) for f in dataclasses.fields(built)}
    del fields["instance_id"]  # random
    facts[name] = {**fields, "hash": built.compute_hash()}
facts["is_hooked"] = hasattr(EngineArgs.create_speculative_config, "_failfast")
json.dump(facts, open(sys.argv[4], "w"))
"""


@pytest.fixture(scope="module")
def servers_without_failfast(tmp_path_factory):
    """What two processes report, one with the plugin and one without."""
    facts = []
    for has_plugin in (True, False):
        out = tmp_path_factory.mktemp("server") / "facts.json"
        environment = {k: v for k, v in os.environ.items() if k != "VLLM_PLUGINS"}
        if not has_plugin:
            environment["VLLM_PLUGINS"] = ""
        arguments = [TARGET, json.dumps(NGRAM), str(has_plugin), str(out)]
        subprocess.run(
            [sys.executable, "-c", SERVER_WITHOUT_FAILFAST, *arguments],
            env=environment,
            check=True,
            timeout=180,
        )
        facts.append(json.loads(out.read_text(encoding="utf-8")))
    return facts


@pytest.mark.parametrize("method", ["none", "ngram"])
def test_other_methods_get_the_same_engine_config(servers_without_failfast, method):
    """Catches a hook that forgets to fall through: a default changed, a key left behind."""
    with_plugin, without = servers_without_failfast
    assert with_plugin["is_hooked"]
    assert not without["is_hooked"]
    assert len(without[method]) > 20
    assert with_plugin[method] == without[method]


def test_register_is_cheap_and_idempotent(servers_without_failfast):
    """Every process of every `vllm` command pays for it. CPU time: other load does not count."""
    facts, _ = servers_without_failfast
    assert facts["is_idempotent"]
    assert facts["register_seconds"] < MAX_REGISTER_SECONDS


def test_register_imports_no_runner(servers_without_failfast):
    """A worker may be forked from this process: what imports CUDA libraries must wait for it."""
    facts, _ = servers_without_failfast
    roots = ("vllm.v1.worker", "vllm.v1.spec_decode", "vllm.model_executor.models.qwen2")
    ours = ("failfast_vllm.integration.v1", "failfast_vllm.integration.v2")
    assert "failfast_vllm.integration.configure" in facts["imported"]
    assert not [m for m in facts["imported"] if m.startswith((*roots, *ours))]


def test_vllm_finds_the_plugin_once():
    found = importlib.metadata.entry_points(group="vllm.general_plugins", name=METHOD)
    assert [entry.load() for entry in found] == [plugin.register]


def parse(*argv):
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", TARGET, *argv]))


@pytest.mark.parametrize(
    ("argv", "cap"),
    [
        (["--speculative-config", "failfast"], 60),
        (["-sc", "failfast"], 60),
        (["--speculative-config=failfast"], 60),
        (["--speculative_config", "failfast"], 60),
        (["-sc", '{"method": "failfast", "num_speculative_tokens": 20}'], 20),
        (["-sc.method", "failfast", "-sc.num_speculative_tokens", "20"], 20),
        (["-sc.method", "failfast", "-sc.num-speculative-tokens", "20"], 20),
    ],
)
def test_command_line_forms(argv, cap):
    built = parse(*argv).create_engine_config()
    assert built.additional_config[METHOD]["num_speculative_tokens"] == cap


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], None),
        (["-sc", "None"], None),
        (["-sc", json.dumps(NGRAM)], NGRAM),
    ],
)
def test_command_lines_of_others_are_read_as_before(argv, expected):
    assert parse(*argv).speculative_config == expected


@pytest.mark.parametrize("word", ["fialfast", "failfast2", "{failfast}"])
def test_wrong_word_gets_vllms_own_error(capsys, word):
    """Catches a parser that takes any word, or an error that hides which flag it is about."""
    with pytest.raises(SystemExit):
        parse("--speculative-config", word)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--speculative-config" in error
    assert f"Value {word} cannot be converted" in error


def creation():
    """The hook that meets a speculative config."""
    return hooks.hooks_of("configuration")[0]


@pytest.fixture
def unhooked(monkeypatch):
    """`EngineArgs` as vLLM ships it, until the test ends."""
    original = inspect.unwrap(EngineArgs.create_speculative_config)
    monkeypatch.setattr(EngineArgs, "create_speculative_config", original)
    assert hooks.hook_problem(creation()) is None


@pytest.fixture
def pretend_version(monkeypatch):
    def pretend(version):
        real = importlib.metadata.version

        def lie(name):
            return version if name == "vllm" else real(name)

        monkeypatch.setattr(importlib.metadata, "version", lie)

    return pretend


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0", "1.32.0", "dev"])
def test_unsupported_versions(pretend_version, version):
    pretend_version(version)
    problem = hooks.version_problem()
    assert problem == (f"vLLM {version} is not supported; install a version of 'vllm>=0.32,<0.34'.")


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0rc2", "0.33.4.dev3+gabc"])
def test_supported_versions(pretend_version, version):
    pretend_version(version)
    assert hooks.version_problem() is None


def test_vllm_without_metadata_names_its_version_itself(monkeypatch):
    """A source tree on PYTHONPATH, or a build under another distribution name."""

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr("vllm.__version__", "0.99.1")
    assert "vLLM 0.99.1 is not supported" in hooks.version_problem()


def hook_another_signature(monkeypatch):
    changed = creation()._replace(body=lambda original, self, renamed: None)
    others = hooks.hooks_of("configuration")[1:]
    replace_stage(monkeypatch, "configuration", changed, *others)


@pytest.mark.parametrize("reason", ["version", "signature"])
@pytest.mark.usefixtures("unhooked")
def test_unknown_vllm_serves_everything_but_failfast(monkeypatch, pretend_version, caplog, reason):
    """Catches a plugin that takes the server down with it, or is silently off."""
    if reason == "version":
        pretend_version("0.99.1")
        expected = "vLLM 0.99.1 is not supported"
    else:
        hook_another_signature(monkeypatch)
        expected = f"{creation().name} takes (self, target_model_config), not (self, renamed)"
    with caplog.at_level("WARNING", hooks.logger.name):
        plugin.register()
    warnings = [r.getMessage() for r in caplog.records if r.name == hooks.logger.name]
    assert len(warnings) == 1
    assert f"failfast is off: {expected}" in warnings[0]

    assert EngineArgs(model=TARGET).create_engine_config().speculative_config is None
    ngram = EngineArgs(model=TARGET, speculative_config=dict(NGRAM)).create_engine_config()
    assert ngram.speculative_config.method == "ngram"
    for asked in ("failfast", {"method": "failfast"}):
        with pytest.raises(ValueError, match="failfast: this vLLM cannot run it: ") as caught:
            EngineArgs(model=TARGET, speculative_config=asked).create_engine_config()
        assert expected in str(caught.value)
        assert "install a version of 'vllm>=0.32,<0.34'" in str(caught.value)


@pytest.fixture
def renamed():
    """A hook on a function whose parameters are not those of its body."""
    creation = hooks.hooks_of("configuration")[0]
    return creation._replace(body=lambda original, self, renamed: None)


@pytest.mark.parametrize("stage", ["v1", "v2"])
def test_changed_runner_stops_the_worker_before_it_drafts(stage, monkeypatch, renamed):
    replace_stage(monkeypatch, stage, renamed)
    with pytest.raises(RuntimeError, match=r"failfast cannot run: vllm\.engine\.arg_utils"):
        hooks.install(stage)


@pytest.mark.parametrize("stage", ["requests", "engine"])
def test_changed_process_stops_failfast_and_nobody_else(monkeypatch, renamed, stage):
    """Catches a plugin that breaks every server of a vLLM whose front end or core has changed."""
    replace_stage(monkeypatch, stage, renamed)
    plugin.register()
    with pytest.raises(RuntimeError, match=r"failfast cannot run: vllm\.engine\.arg_utils"):
        EngineArgs(model=TARGET, speculative_config=METHOD).create_engine_config()


def test_other_drafters_must_still_match_the_vocabulary(tmp_path):
    """Catches a hook that lets any drafter's vocabulary differ, which vLLM refuses."""
    drafter = shutil.copytree(MODELS_DIR / "ar-drafter", tmp_path / "drafter")
    config = json.loads((drafter / "config.json").read_text(encoding="utf-8"))
    (drafter / "config.json").write_text(json.dumps({**config, "vocab_size": 1984}))
    other = {"method": "draft_model", "model": str(drafter), "num_speculative_tokens": 3}
    with pytest.raises(ValueError, match="should have the same vocabulary size"):
        EngineArgs(model=TARGET, speculative_config=other).create_engine_config()


def test_failfast_leaves_the_choice_of_the_runner_to_vllm():
    gaps = [
        EngineArgs(model=TARGET, speculative_config=asked)
        .create_engine_config()
        ._get_v2_model_runner_unsupported_features()
        for asked in (None, "failfast")
    ]
    assert gaps[0] == gaps[1]


def test_proposer_is_ours_only_when_asked_for(monkeypatch):
    """Catches vLLM's own drafters being replaced, subclasses included."""
    from failfast_vllm.integration.v1 import FailFastProposer

    made = []

    def built(self, vllm_config, device, runner=None):
        made.append((vllm_config, device))

    monkeypatch.setattr(DraftModelProposer, "__init__", built)
    monkeypatch.setattr(FailFastProposer, "__init__", built)
    hooks.install("v1")

    class Another(DraftModelProposer):
        pass

    ours = types.SimpleNamespace(additional_config={METHOD: {}})
    for theirs in (None, {}, {"other": 1}):
        config = types.SimpleNamespace(additional_config=theirs)
        assert type(DraftModelProposer(config, "cpu", None)) is DraftModelProposer
        assert made.pop() == (config, "cpu")
    assert type(DraftModelProposer(vllm_config=ours, device="cpu")) is FailFastProposer
    assert type(Another(ours, "cpu", None)) is Another
    assert made == [(ours, "cpu")] * 2


def test_length_check_of_other_drafters_is_vllms():
    """For failfast alone, a sequence near the end must not stop the drafts of all others."""
    hooks.install("v1")
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from failfast_vllm.integration.v1 import FailFastProposer

    runner = types.SimpleNamespace(
        drafter=object(),
        speculative_config=types.SimpleNamespace(use_dflash=lambda: False),
        num_spec_tokens=3,
        effective_drafter_max_model_len=100,
    )

    def fits(seq_len):
        metadata = None if seq_len is None else types.SimpleNamespace(max_seq_len=seq_len)
        return GPUModelRunner._input_fits_in_drafter(runner, metadata)

    assert [fits(n) for n in (None, 97, 98)] == [False, True, False]
    runner.drafter = object.__new__(FailFastProposer)
    assert [fits(n) for n in (None, 97, 98)] == [False, True, True]


def test_engine_of_another_method_runs_through_the_hooks():
    """All runner hooks are in place; vLLM's own drafter drafts and is verified as without them."""
    from vllm import SamplingParams

    hooks.install("v1")
    # the target drafts for itself
    given = {"method": "draft_model", "model": TARGET, "num_speculative_tokens": 3}
    params = SamplingParams(temperature=0.0, max_tokens=32)
    answers = []
    for speculative_config in (None, given):
        with engine(speculative_config, max_num_seqs=4) as llm:
            prompts = [chat_ids(llm.get_tokenizer(), p) for p in shipped_prompts()[:8]]
            answers.append(generate(llm, prompts, params))
            if speculative_config:
                assert type(proposer(llm)) is DraftModelProposer
                counts = {metric.name: metric for metric in llm.get_metrics()}
                drafted = counts["vllm:spec_decode_num_draft_tokens"].value
                assert drafted > 0
                assert counts["vllm:spec_decode_num_accepted_tokens"].value == drafted
    assert answers[0] == answers[1]


def test_register_left_no_device_initialised():
    assert not torch.cuda.is_initialized()
