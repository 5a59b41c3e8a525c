"""Commands in README and docs: each is run by a test, or it says why not."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from messages import ROOT
from published_models import fill_hub

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
PROGRAM = re.compile(r"(\w+=\S+ )*(\.venv/bin/)?(vllm|failfast|make|curl|pip|python|\$ask)\b")

RUN = "run below"
NO_GPU = "needs a GPU and downloads a published model"
NETWORK = "installs from a package index"
SUITE = "is what runs this test"
# by how a command starts, the longest first that fits: the test that runs it, or why none does
COMMANDS = {
    "make demo": "tests/tools/test_cli.py::test_demo_is_lossless_and_prints_only_json",
    "make test": SUITE,
    "make check": SUITE,
    "make wheel": "builds another environment, from a package index",
    "make docs": "tests/docs/test_site.py::test_nothing_is_loaded_from_elsewhere",
    "make test-slow": "takes half an hour",
    "make test-next": "builds another environment, from a package index",
    "vllm serve Qwen/": NO_GPU,
    "vllm serve MODEL": "tests/integration/test_http.py::test_chat_completion",
    "vllm serve ...": "tests/observe/test_trace.py::test_what_an_engine_records",
    "VLLM_CPU_KVCACHE_SPACE=1 .venv/bin/vllm serve failfast_vllm/small_pair/target": (
        "tests/integration/test_chaos.py::test_a_server_in_chaos"
    ),
    "curl -s http://localhost:8000/v1/chat": "tests/integration/test_http.py::test_chat_completion",
    "curl -s http://localhost:8000/metrics": (
        "tests/integration/test_http.py::test_metrics_agree_with_each_other"
    ),
    "$ask": "tests/integration/test_http.py::test_vllms_clients_run_to_their_end",
    "pip install": NETWORK,
    "failfast doctor": "tests/tools/test_cli.py::test_doctor_is_content_here",
    "failfast plan": RUN,
    "failfast models --fetch": "tests/tools/test_fetch.py::test_a_fetched_model_answers",
    "failfast bench --from": (
        "tests/tools/test_page.py::test_committed_results_make_a_page_that_loads_nothing"
    ),
    "failfast bench --concurrency": "tests/tools/test_bench.py::test_a_real_run_agrees_with_itself",
    "failfast bench --target PATH": "tests/tools/test_bench.py::test_a_real_run_agrees_with_itself",
    "failfast bench --target Qwen": NO_GPU,
}


def shell_commands():
    """[(page, command)] of the fenced blocks, with continued lines joined."""
    found = []
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            if language not in ("", "sh", "bash", "console"):
                continue
            lines = re.sub(r"\\\n\s*", "", block).splitlines()
            found += [
                (page.name, line.split("#")[0].strip()) for line in lines if PROGRAM.match(line)
            ]
    return found


FOUND = shell_commands()


def fitting(command):
    return max((start for start in COMMANDS if command.startswith(start)), key=len, default=None)


@pytest.mark.parametrize(("page", "command"), FOUND)
def test_every_command_is_accounted_for(page, command):
    """Catches a command that nobody has run since it was written."""
    start = fitting(command)
    assert start, f"{page}: {command}"
    file, _, test = COMMANDS[start].partition("::")
    if test:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8")


def test_the_table_has_no_idle_rows():
    """Catches a reason that has outlived its command, and a reader of pages that finds nothing."""
    assert {fitting(command) for _, command in FOUND} == set(COMMANDS)


@pytest.mark.parametrize(
    "command", sorted({c for _, c in FOUND if COMMANDS.get(fitting(c)) == RUN})
)
def test_light_commands_run(command, tmp_path):
    """Catches an argument that a page spells differently from the program."""
    fill_hub(tmp_path)
    program = Path(sys.executable).with_name("failfast")
    done = subprocess.run(
        [sys.executable, program, *shlex.split(command)[1:]],
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
