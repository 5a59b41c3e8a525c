"""The recipes that need a server: one for all, started by the ExecStart of the systemd unit."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from engine import TARGET, shipped_prompts
from http_server import START_SECONDS, free_port, server_environment, started

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BIN = Path(sys.executable).parent
FLAGS = "--enforce-eager --dtype float32 --max-model-len 2048"
NUM_PROMPTS = 48


def settings(text):
    """The variables of an environment file."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def exec_start(unit, variables):
    """The command of a unit: `${X}` is one word, `$X` is split at spaces, as systemd does it."""
    (line,) = re.findall(r"^ExecStart=(.*)$", unit, re.M)
    words = []
    for word in line.split():
        if word.startswith("${"):
            words.append(variables[word[2:-1]])
        elif word.startswith("$"):
            words += variables[word[1:]].split()
        else:
            words.append(word)
    return words


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = EXAMPLES / "systemd"
    variables = settings((folder / "failfast-vllm.env").read_text())
    assert variables["SPECULATIVE_CONFIG"] == "failfast"
    port = free_port()
    variables |= {"MODEL": TARGET, "PORT": str(port), "VLLM_ARGS": FLAGS}
    variables["SPECULATIVE_CONFIG"] = '{"method": "failfast", "copies": true}'
    unit = (folder / "failfast-vllm.service").read_text()
    command = exec_start(unit, variables)
    command[0] = command[0].replace("/opt/failfast-vllm/.venv/bin", str(BIN))
    log = tmp_path_factory.mktemp("server") / "server.log"
    with started(command, port, log) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(server, tmp_path_factory):
    """Prometheus with the configuration of the example, but our target and a short interval."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("needs the program `prometheus` (Debian's package of that name)")
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    text = (EXAMPLES / "monitoring/prometheus.yml").read_text()
    for old, new in (("vllm:8000", server.url[7:]), ("scrape_interval: 5s", "scrape_interval: 1s")):
        assert text.count(old) == 1
        text = text.replace(old, new)
    config = folder / "prometheus.yml"
    config.write_text(text)
    listen = f"127.0.0.1:{port}"
    flags = [f"--config.file={config}", f"--storage.tsdb.path={folder}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [program, *flags, f"--web.listen-address={listen}"], stdout=log, stderr=log
        )
    try:
        yield httpx.Client(base_url=f"http://{listen}/api/v1", trust_env=False)
    finally:
        process.terminate()
        process.wait(timeout=15)


def run(command, server, **variables):
    """Standard output of a recipe, run as users run it."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    found = subprocess.run(
        [str(word) for word in command],
        env={**server_environment(), "PATH": path, "MODEL": TARGET, **variables},
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    return found.stdout


def test_openai_client(server):
    """Catches an example that does not run, or drafts that change its answer."""
    prompt = shipped_prompts()[0]["messages"][0]["content"]
    variables = {"BASE_URL": f"{server.url}/v1", "PROMPT": prompt}
    script = EXAMPLES / "clients/openai_chat.py"
    streamed, undrafted = run([sys.executable, script], server, **variables).split(
        "without drafts: "
    )
    assert len(streamed) > 20
    assert streamed.strip() == undrafted.strip()


@pytest.fixture(scope="module")
def measured(server, prometheus_if_any, tmp_path_factory):
    """The two results of `vllm_bench.sh`, while Prometheus looks on."""
    folder = tmp_path_factory.mktemp("bench")
    prompts = folder / "prompts.jsonl"
    asked = [prompt["messages"][0]["content"] for prompt in shipped_prompts()[:NUM_PROMPTS]]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    variables = {"BASE_URL": server.url, "PROMPTS": str(prompts), "RESULTS": str(folder)}
    run([EXAMPLES / "benchmarks/vllm_bench.sh"], server, NUM_PROMPTS=str(NUM_PROMPTS), **variables)
    return [json.loads((folder / f"{name}.json").read_text()) for name in ("failfast", "plain")]


@pytest.fixture(scope="module")
def prometheus_if_any(request):
    with contextlib.suppress(pytest.skip.Exception):
        return request.getfixturevalue("prometheus")


def test_vllm_bench(measured):
    """Catches a script whose second run drafts, or whose first does not."""
    drafted, plain = measured
    assert drafted["completed"] == plain["completed"] == NUM_PROMPTS
    assert drafted["spec_decode_acceptance_length"] > 1.5
    assert not plain.get("spec_decode_num_drafts")
