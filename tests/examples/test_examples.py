"""The recipes that need no server. Those that do: `test_examples_served.py`."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from failfast_vllm.integration.hooks import SUPPORTED_VLLM
from source_tree import commands_of

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BIN = Path(sys.executable).parent
FILES = [
    path.relative_to(EXAMPLES).as_posix()
    for path in sorted(EXAMPLES.rglob("*"))
    if path.is_file() and path.name != "README.md" and "__pycache__" not in path.parts
]
DOCKERFILES = ["docker/Dockerfile", "docker/Dockerfile.cpu"]
NO_DRAFTS = {"vllm_xargs": {"failfast_max_len": 0}}


def read(name):
    return (EXAMPLES / name).read_text(encoding="utf-8")


def instructions(name):
    """The instructions of a Dockerfile, continued lines joined: [("RUN", "a && b"), ...]."""
    lines = [line for line in read(name).splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(None, 1)) for line in "\n".join(lines).replace("\\\n", "").split("\n")]


def copied(name):
    """The paths in the checkout that a Dockerfile copies."""
    return [
        path for key, value in instructions(name) if key == "COPY" for path in value.split()[:-1]
    ]


def program(name, package):
    """The path of a program; skips the test where it is missing."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs the program `{name}` ({package})")
    return found


def checked(*command, **settings):
    """Standard output and error of a command that must succeed."""
    found = subprocess.run(command, text=True, capture_output=True, check=False, **settings)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout + found.stderr


def test_the_table_lists_every_file():
    """Catches a recipe without a line in the table, or without a word on how it was exercised."""
    listed = re.findall(r"\]\(([\w./-]+)\)", read("README.md"))
    assert {name for name in listed if not name.startswith("..")} == set(FILES)
    for name in FILES:
        assert name.endswith(".env") or "Exercised: " in read(name), name


def test_systemd_unit(tmp_path):
    """Catches a misspelt key, which systemd only warns of, and a setting that nobody sets."""
    analyze = program("systemd-analyze", "Debian's systemd")
    text = read("systemd/failfast-vllm.service")
    path = tmp_path / "failfast-vllm.service"
    path.write_text(text.replace("/opt/failfast-vllm/.venv/bin", str(BIN)))
    assert checked(analyze, "verify", path) == ""
    (command,) = re.findall("^ExecStart=(.*)$", text.replace("\\\n", ""), re.M)
    used = set(re.findall(r"\$\{?(\w+)", command))
    assert used == set(re.findall(r"^(\w+)=", read("systemd/failfast-vllm.env"), re.M))


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfiles_are_clean(name):
    """Catches what hadolint knows about Dockerfiles."""
    checked(BIN / "hadolint", EXAMPLES / name)


def test_dockerfiles_copy_what_the_package_needs(tmp_path):
    """Catches an image without a file that setup.py reads, or without the small pair."""
    paths, of_cpu_image = map(copied, DOCKERFILES)
    assert of_cpu_image == ["requirements", *paths]
    for path in paths:
        source, target = ROOT / path, tmp_path / path
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, target, ignore=ignored)
        else:
            shutil.copy(source, target)
    checked(sys.executable, "setup.py", "build", "--build-lib", "built", cwd=tmp_path)
    assert (tmp_path / "built/failfast_vllm/small_pair/target/model.safetensors").is_file()
    assert (tmp_path / "built/failfast_kernels/block_attention.py").is_file()


def test_the_cpu_image_installs_as_the_makefile_does():
    """Catches a step of the Makefile that the image does not know."""
    made = [words for words in commands_of(".venv/.ready") if words[0] != "touch"]
    of_tests = " --requirement requirements/dev.txt"  # the image runs none
    made = [shlex.join(words).replace(of_tests, "").split() for words in made]
    runs = [value for key, value in instructions("docker/Dockerfile.cpu") if key == "RUN"]
    commands = [shlex.split(part) for run in runs for part in run.split("&&")]
    ours = [words for words in commands if words[0] not in ("apt-get", "rm")]
    assert ours == made
    assert len(ours) == 4


def test_the_gpu_image_has_a_supported_vllm():
    """Catches an image that failfast refuses to start in."""
    (image,) = [value for key, value in instructions("docker/Dockerfile") if key == "FROM"]
    version = image.removeprefix("vllm/vllm-openai:v")
    assert tuple(map(int, version.split(".")[:2])) in SUPPORTED_VLLM


def test_prometheus_configuration():
    """Catches a configuration that Prometheus refuses."""
    promtool = program("promtool", "Debian's prometheus")
    checked(promtool, "check", "config", EXAMPLES / "monitoring/prometheus.yml")


def test_compose_parts_fit():
    """Catches mounts of files that do not exist, and addresses of services that do not."""
    folder = EXAMPLES / "monitoring"
    compose = yaml.safe_load(read("monitoring/compose.yaml"))
    services = compose["services"]
    mounted = {}
    for service in services.values():
        for source, target, *_ in (volume.split(":") for volume in service["volumes"]):
            if source.startswith("."):
                assert (folder / source).is_file(), source
                mounted[target] = (folder / source).resolve()
            else:
                assert source in compose["volumes"]
    build = services["vllm"]["build"]
    assert (folder / build["context"]).resolve() == ROOT
    assert build["dockerfile"] == "examples/docker/Dockerfile"
    scraped = yaml.safe_load(read("monitoring/prometheus.yml"))
    (job,) = scraped["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["vllm:8000"]}]
    (source,) = yaml.safe_load(read("monitoring/grafana/datasource.yml"))["datasources"]
    assert (source["url"], source["type"]) == ("http://prometheus:9090", "prometheus")
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]
    (provider,) = yaml.safe_load(read("monitoring/grafana/dashboards.yml"))["providers"]
    dashboard = mounted[f"{provider['options']['path']}/failfast.json"]
    assert dashboard == ROOT / "docs/grafana-dashboard.json"
    assert {"/etc/prometheus/prometheus.yml"} <= set(mounted)
    assert {
        f"/etc/grafana/provisioning/{kind}/failfast.yml" for kind in ("datasources", "dashboards")
    } <= set(mounted)


def test_kubernetes_manifest():
    """Catches keys and types that Kubernetes does not have, and a service that finds no pod."""
    manifests = list(yaml.safe_load_all(read("kubernetes/deployment.yaml")))
    for manifest in manifests:
        kubernetes_validate.validate(manifest, "1.37", strict=True)
    deployment, service = manifests
    pod = deployment["spec"]["template"]
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    (container,) = pod["spec"]["containers"]
    assert {m["name"] for m in container["volumeMounts"]} == {
        v["name"] for v in pod["spec"]["volumes"]
    }
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    (model,) = yaml.safe_load(read("kubernetes/production-stack-values.yaml"))["servingEngineSpec"][
        "modelSpec"
    ]
    assert f"{model['repository']}:{model['tag']}" == container["image"]
    assert [model["modelURL"], *model["vllmConfig"]["extraArgs"]] == container["args"]


def test_litellm_configuration():
    """Catches two entries that differ in more than their drafts."""
    drafted, plain = yaml.safe_load(read("clients/litellm.yaml"))["model_list"]
    assert plain["litellm_params"] == {**drafted["litellm_params"], "extra_body": NO_DRAFTS}
    assert drafted["litellm_params"]["model"].startswith("hosted_vllm/")


def recorded(script, stand_in, tmp_path):
    """The arguments of each call that a script makes of a program that is not installed."""
    record = tmp_path / "record"
    path = tmp_path / stand_in
    path.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" end >> {record}\n')
    path.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PROMPTS": "prompts.jsonl"}
    checked("sh", EXAMPLES / "benchmarks" / script, env=variables)
    return [call.split("\0") for call in record.read_text().split("\0end\0")[:-1]]


def test_guidellm_measures_with_and_without_drafts(tmp_path):
    """Catches JSON that the shell has torn apart. GuideLLM itself is not installed here."""
    calls = recorded("guidellm.sh", "guidellm", tmp_path)
    backends = [json.loads(call[call.index("--backend") + 1]) for call in calls]
    drafted, plain = (backend["extras"]["body"] for backend in backends)
    assert plain == {**drafted, **NO_DRAFTS}
    assert {backend["kind"] for backend in backends} == {"openai_http"}


def test_lm_eval_evaluates_with_and_without_drafts(tmp_path):
    """Catches JSON that the shell has torn apart. lm-eval itself is not installed here."""
    calls = recorded("lm_eval.sh", "lm-eval", tmp_path)
    drafted, plain = (json.loads(call[call.index("--gen_kwargs") + 1]) for call in calls)
    assert plain == {**drafted, **NO_DRAFTS}
    assert [call[call.index("--output_path") + 1] for call in calls] == ["./failfast", "./plain"]
