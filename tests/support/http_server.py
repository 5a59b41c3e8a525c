"""A server in processes of its own, started by any command; HTTP clients for it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine import TARGET

NAME = "tiny"
FLAGS = [  # of every server of the shipped target
    *("--enforce-eager", "--dtype", "float32", "--max-model-len", "2048"),
    *("--served-model-name", TARGET, NAME),
    # the parser has no format of its own: a forced call's arguments are bound to the schema
    *("--enable-auto-tool-choice", "--tool-call-parser", "xlam"),
    # a small model rambles; no spaces, at which systemd splits
    *("--structured-outputs-config", '{"backend":"xgrammar","disable_any_whitespace":true}'),
]
EXAMPLES = Path(__file__).parents[2] / "examples"
START_SECONDS = 120  # a quarter of it on an idle machine
REQUEST_SECONDS = 60


def server_environment():
    ours = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "INFO",
        "HF_HUB_OFFLINE": "1",
    }
    # a server always runs its engine in a process of its own
    theirs = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    return {**theirs, **ours}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server(NamedTuple):
    url: str
    log: Path
    process: subprocess.Popen

    def get(self, path):
        return httpx.get(self.url + path, timeout=10, trust_env=False)

    def is_healthy(self):
        try:
            return self.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def metric(self, name):
        """Sum over the labels of one metric."""
        families = text_string_to_metric_families(self.get("/metrics").text)
        found = [s.value for f in families for s in f.samples if s.name == f"vllm:{name}"]
        assert found, name
        return sum(found)

    def client(self):
        http_client = httpx.Client(trust_env=False)
        return openai.OpenAI(**self._settings(), http_client=http_client)

    def async_client(self):
        http_client = httpx.AsyncClient(trust_env=False, limits=httpx.Limits())
        return openai.AsyncOpenAI(**self._settings(), http_client=http_client)

    def _settings(self):
        url = f"{self.url}/v1"
        return {"base_url": url, "api_key": "none", "max_retries": 0, "timeout": REQUEST_SECONDS}


@contextmanager
def started(command, port, log):
    """The `Server` that a command starts on a port, once it is healthy."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=server_environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    running = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not running.is_healthy():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start:\n{log.read_text()[-8000:]}")
            time.sleep(0.5)
        yield running
    finally:
        stop_group(process)


def stop_group(process):
    """End the server and its engine process, politely at first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=15)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def settings(text):
    """The variables of an environment file."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def exec_start(unit, variables):
    """The command of a unit: `${X}` is one word, `$X` is split at spaces, as systemd does it."""
    (line,) = re.findall("^ExecStart=(.*)$", unit.replace("\\\n", ""), re.M)
    words = []
    for word in line.split():
        if word.startswith("${"):
            words.append(variables[word[2:-1]])
        elif word.startswith("$"):
            words += variables[word[1:]].split()
        else:
            words.append(word)
    return words


def started_by_systemd(log):
    """A server that drafts at any load, started by the ExecStart of the unit in the examples."""
    folder = EXAMPLES / "systemd"
    variables = settings((folder / "failfast-vllm.env").read_text())
    assert variables["SPECULATIVE_CONFIG"] == "failfast"
    # what is measured shall not depend on the machine
    variables["SPECULATIVE_CONFIG"] = '{"method": "failfast", "load_aware": false}'
    port = free_port()
    flags = " ".join([*FLAGS, "--per-request-spec-decode-metrics", "detailed"])
    variables |= {"MODEL": TARGET, "PORT": str(port), "VLLM_ARGS": flags}
    command = exec_start((folder / "failfast-vllm.service").read_text(), variables)
    programs = str(Path(sys.executable).parent)
    command[0] = command[0].replace("/opt/failfast-vllm/.venv/bin", programs)
    return started(command, port, log)
