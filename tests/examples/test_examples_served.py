"""The recipes that need a server: the one of tests/conftest.py, which the systemd unit starts."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from engine import TARGET, shipped_prompts
from http_server import EXAMPLES, START_SECONDS, free_port, server_environment

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
FLAGS = "--enforce-eager --dtype float32 --max-model-len 2048"
NUM_PROMPTS = 32


@pytest.fixture(scope="module")
def prometheus(server, tmp_path_factory):
    """Prometheus with the configuration of the example, but our target and a short interval.

    An HTTP client for its API; None where it is not installed.
    """
    program = shutil.which("prometheus")
    if program is None:
        yield None
        return
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


def run(command, env, **settings):
    """Standard output of a recipe."""
    found = subprocess.run(
        [str(word) for word in command],
        env=env,
        capture_output=True,
        text=True,
        timeout=2 * START_SECONDS,  # the longest starts vLLM twice
        check=False,
        **settings,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    return found.stdout


def environment(**variables):
    """What a user of the recipe sets."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**server_environment(), "PATH": path, "MODEL": TARGET, **variables}


def test_openai_client(server):
    """Catches an example that does not run, or drafts that change its answer."""
    prompt = shipped_prompts()[0]["messages"][0]["content"]
    script = EXAMPLES / "clients/openai_chat.py"
    env = environment(BASE_URL=f"{server.url}/v1", PROMPT=prompt)
    streamed, undrafted = run([sys.executable, script], env).split("without drafts: ")
    assert len(streamed) > 20
    assert streamed.strip() == undrafted.strip()


@pytest.fixture(scope="module")
def measured(server, prometheus, tmp_path_factory):
    """The two results of `vllm_bench.sh`, while Prometheus looks on."""
    folder = tmp_path_factory.mktemp("bench")
    prompts = folder / "prompts.jsonl"
    asked = [prompt["messages"][0]["content"] for prompt in shipped_prompts()[:NUM_PROMPTS]]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    paths = {"PROMPTS": str(prompts), "RESULTS": str(folder)}
    env = environment(BASE_URL=server.url, NUM_PROMPTS=str(NUM_PROMPTS), **paths)
    run([EXAMPLES / "benchmarks/vllm_bench.sh"], env)
    return [json.loads((folder / f"{name}.json").read_text()) for name in ("failfast", "plain")]


def test_vllm_bench(measured):
    """Catches a script whose second run drafts, or whose first does not."""
    drafted, plain = measured
    assert drafted["completed"] == plain["completed"] == NUM_PROMPTS
    assert drafted["spec_decode_acceptance_length"] > 1.5
    assert not plain.get("spec_decode_num_drafts")


def ask(prometheus, path, **parameters):
    answer = prometheus.get(path, params=parameters).json()
    assert answer["status"] == "success", answer
    return answer["data"]


def values(prometheus, query):
    return [
        float(series["value"][1]) for series in ask(prometheus, "/query", query=query)["result"]
    ]


def test_every_panel_has_data(prometheus, measured):
    """Catches a query that Prometheus refuses, or that matches none of the server's series."""
    if prometheus is None:
        pytest.skip("needs the program `prometheus` (Debian's package of that name)")
    dashboard = json.loads((ROOT / "docs/grafana-dashboard.json").read_text())
    # as Grafana does where All is chosen; it makes the intervals of what it shows and scrapes
    variables = {"$__rate_interval": "2m", "$__range": "5m"}
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            query = variable["query"]["query"]
            series, label = re.fullmatch(r"label_values\((.+), (\w+)\)", query).groups()
            found = ask(prometheus, f"/label/{label}/values", **{"match[]": series})
            variables[f"${variable['name']}"] = "|".join(map(re.escape, found))
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            query = target["expr"]
            for name, value in variables.items():
                query = query.replace(name, value.replace("\\", "\\\\"))
            found = values(prometheus, query)
            # 0 / 0 where nothing is copied, as on this server
            number = "copied_tokens_total" in query or not all(map(math.isnan, found))
            assert found, (panel["title"], query)
            assert number, (panel["title"], query)


def test_offline_batch():
    """Catches an example that does not run, or that counts nothing."""
    prompts = [prompt["messages"][0]["content"] for prompt in shipped_prompts()]
    asked = "\n".join([prompt for prompt in prompts if "\n" not in prompt][:4])
    script = EXAMPLES / "offline_batch.py"
    flags = ["--model", TARGET, *FLAGS.split()]
    env = environment(VLLM_ENABLE_V1_MULTIPROCESSING="0")
    output = run([sys.executable, script, *flags], env, input=asked)
    accepted, drafted = re.search(r"^(\d+) of (\d+) draft tokens accepted$", output, re.M).groups()
    assert 0 < int(accepted) <= int(drafted)
