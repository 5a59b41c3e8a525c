"""Damaged input of every kind, drawn by Hypothesis: one clear line each, and nothing is run.

Written examples of each kind stand beside the tests of its room, which name what is refused. Here
any value may come under any key, and any byte of a file may be another.
"""

import contextlib
import json
import os
import pickle
import shutil
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from build_config import build
from checkpoints import tiny_config, write_checkpoint
from damage import as_json, cases, changed, damaged, nested, objection, values
from failfast_vllm import config as user_config
from failfast_vllm.config import KNOWN_KEYS, METHOD, MODELS_DIR, FailFastConfig
from failfast_vllm.drafters import checks
from failfast_vllm.drafters.families import FAMILIES, FAST_DLLM_V2
from failfast_vllm.integration import requests
from failfast_vllm.tools import bench, cli
from published_models import PUBLISHED_DRAFTERS, PUBLISHED_TARGETS, hub  # noqa: F401 - a fixture

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@pytest.fixture(autouse=True, scope="module")
def away(tmp_path_factory):
    """Relative names of files end here, and nothing of them stays."""
    here, folder = os.getcwd(), tmp_path_factory.mktemp("away")
    os.chdir(folder)
    yield
    os.chdir(here)
    assert not list(folder.iterdir())


def read_config(keys):
    return FailFastConfig.from_user(user_config.parse({"method": METHOD, **keys}))


@cases(400)
@given(st.dictionaries(st.sampled_from(KNOWN_KEYS[1:]) | st.text(), values, max_size=3))
def test_speculative_configs(keys):
    """Catches a value of a user that is echoed whole, or that raises what no front end expects."""
    keys.pop("method", None)
    objection(read_config, keys)


@EVERY_FAMILY
@cases(150)
@given(data=st.data())
def test_configs_of_drafters(family, data):
    """Catches fields that only together are wrong, and values that are echoed whole."""
    fields = data.draw(changed(tiny_config(family)))
    objection(checks.check_drafter_config, "a-drafter", fields)


def test_what_python_cannot_show():
    """Catches the errors of `repr` itself: of long integers, and of what is too deep for it."""
    for odd in (10**5000, *nested()):
        check_odd(odd)


def check_odd(odd):
    for key in KNOWN_KEYS[1:]:
        assert objection(read_config, {key: odd}), key
    for key in requests.KEYS:
        params = SimpleNamespace(extra_args={key: odd}, logprob_token_ids=None)
        assert objection(requests.check, params, 60, 0.45)
    for family in FAMILIES:
        config = tiny_config(family)
        for key in (*config, "layer_types", "quantization_config", "rope_parameters"):
            objection(checks.check_drafter_config, "a-drafter", {**config, key: odd})


@cases(400)
@given(
    st.dictionaries(
        st.sampled_from(requests.KEYS) | st.text().map("failfast{}".format) | st.integers(),
        values,
        max_size=3,
    )
)
def test_requests(extra_args):
    """Catches keys and values of a request that are not answered with its own error."""
    params = SimpleNamespace(
        extra_args=extra_args, logprob_token_ids=None, ignore_eos=True, stop_token_ids=None
    )
    objection(requests.check, params, 60, 0.45)
    requests.asked([params], [[1]], frozenset(), 60)


# --- checkpoints -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint in two shards; code and a pickle beside it would leave a file."""
    path = tmp_path_factory.mktemp("whole") / "a-drafter"
    config = tiny_config(FAST_DLLM_V2, auto_map={"AutoConfig": "modeling.Config"})
    write_checkpoint(path, FAST_DLLM_V2, config, shards=2)
    (path / "modeling.py").write_text(f"open({str(path.parent / 'run')!r}, 'w')")
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(path.parent / "run")))
    return path


class Trap:
    """Whoever loads its pickle makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def lose(file):
    file.unlink()


def be_a_folder(file):
    file.unlink()
    file.mkdir()


def be_a_pipe(file):
    file.unlink()
    os.mkfifo(file)


def be_a_pickle(file):
    shutil.copy(file.with_name("pytorch_model.bin"), file)


def be_empty(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("change", [lose, be_a_folder, be_a_pipe, be_a_pickle, be_empty])
def test_files_of_another_kind(whole, tmp_path, change):
    path = shutil.copytree(whole, tmp_path / "a-drafter")
    change(path / "config.json")
    assert objection(checks.check_local_drafter, str(path))
    assert not (whole.parent / "run").exists()


@cases(150)
@given(data=st.data())
def test_damaged_checkpoints(whole, data):
    """Catches files whose damage is found by a library only, and code that is run to find it."""
    file = whole / "config.json"
    before = file.read_bytes()
    try:
        file.write_bytes(data.draw(damaged(before)))
        objection(checks.check_local_drafter, str(whole))
    finally:
        file.write_bytes(before)
    assert not (whole.parent / "run").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@cases(12)
@given(data=st.data())
def test_damage_that_vllm_meets(whole, name, data):
    """Catches a damaged checkpoint that ends vLLM's own start-up, or whose code is run there."""
    file = whole / name
    before = file.read_bytes()
    try:
        file.write_bytes(data.draw(damaged(before) | changed(json.loads(before)).map(as_json)))
        asked = {"method": METHOD, "model": str(whole)}
        with contextlib.suppress(ValueError):  # ours, or vLLM's own
            build(asked, trust_remote_code=True)
    finally:
        file.write_bytes(before)
    assert not (whole.parent / "run").exists()


# --- the command -----------------------------------------------------------------------------


def refused(capsys, *argv):
    """Whether a command refuses its arguments, in one line."""
    code = cli.main(list(argv))
    out, error = capsys.readouterr()
    assert code in (0, 2)
    if code == 2:
        assert out == ""
        assert error.startswith(f"failfast {argv[0]}: ")
        assert error.count("\n") == 1
        assert len(error) < 1500, error[:200]
    return code == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


LINES = (
    {"prompt": "a", "task_id": "HumanEval/1"},
    {"messages": [{"role": "user", "content": "a"}]},
    {"question": "a"},
    {"turns": ["a"], "category": "b"},
)


@cases(300)
@given(data=st.data())
def test_prompts(folder, data):
    """Catches a line that is accepted as a prompt but holds none, and a traceback."""
    fields = data.draw(st.sampled_from(LINES))
    line = data.draw(damaged(as_json(fields)) | changed(fields).map(as_json))
    (folder / "p.jsonl").write_bytes(as_json(LINES[0]) + b"\n" + line)
    found = []
    objection(lambda: found.extend(bench.read_prompts(folder / "p.jsonl")), prefix="")
    for prompt in found:
        if not isinstance(prompt.get("prompt"), str):
            assert prompt["messages"]
            assert all({"role", "content"} <= message.keys() for message in prompt["messages"])


ODD_SETTINGS = ("[" * 9000, "9" * 5000, "NaN", "1e999", "\u0663", "007", "0", "-1")


@cases(300)
@given(
    st.sampled_from(sorted(bench.methods())),
    st.sampled_from((*KNOWN_KEYS, *bench.SHORT_KEYS)) | st.text(max_size=5),
    st.sampled_from(("[" * 9000, "9" * 5000, "NaN", "1e999", "\u0663"))
    | st.text()
    | values.map(str),
)
def test_settings_of_methods(name, key, value):
    """Catches a setting of ours that only an engine would refuse, minutes later."""
    setting = f"{name}:{key}={value}"
    objection(lambda: bench.with_settings(setting, bench.methods()), prefix="")


ROW = {"method": "none", "concurrency": 1, "tokens_per_second": 1.0, "speedup": None}
ROW |= {"tokens_per_second_per_request": 1.0, "acceptance_length": 1.5, "trajectory": []}
RESULT = {"provenance": {"target": "t"}, "rows": [ROW, {**ROW, "method": "x", "speedup": 2.0}]}


@cases(300)
@given(data=st.data())
def test_earlier_results(folder, capsys, data):
    """Catches results that are printed half, or that end the command with a traceback."""
    row = data.draw(changed(ROW))
    content = data.draw(
        damaged(as_json(RESULT))
        | changed(RESULT).map(as_json)
        | st.just(as_json({**RESULT, "rows": [ROW, row]}))
    )
    (folder / "r.json").write_bytes(content)
    refused(capsys, "bench", "--from", str(folder / "r.json"))


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("which", ["target", "drafter"])
@cases(200)
@given(data=st.data())
def test_plans(folder, capsys, which, data):
    """Catches sizes that take for ever to add up, or are too large to be shown."""
    models = {"target": PUBLISHED_TARGETS, "drafter": PUBLISHED_DRAFTERS}[which]
    fields = models[data.draw(st.sampled_from(sorted(models)))]
    content = data.draw(damaged(as_json(fields)) | changed(fields).map(as_json))
    (folder / "config.json").write_bytes(content)
    argv = [str(folder)] if which == "target" else ["Qwen/Qwen3-8B", "--drafter", str(folder)]
    refused(capsys, "plan", *argv)


def test_the_shipped_pair_is_whole(capsys):
    """Else a test above may refuse for another reason than its damage."""
    assert not refused(capsys, "plan", str(MODELS_DIR / "target"))
    assert objection(checks.check_local_drafter, str(MODELS_DIR / "drafter")) is None
