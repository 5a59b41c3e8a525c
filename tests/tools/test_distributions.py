"""Wheel and source distribution: what is in them, and the command of an installed wheel."""

import ast
import email
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import numpy
import pytest
from packaging.requirements import Requirement

import failfast_vllm
from failfast_vllm.integration.hooks import INSTALL
from source_tree import ROOT, copy_to, tracked

VERSION = failfast_vllm.__version__
METADATA = f"failfast_vllm-{VERSION}.dist-info/"
LEFTOVERS = (
    "build/lib/failfast_vllm/gone.py",
    "failfast_vllm/__pycache__/cli.cpython-311.pyc",
    "requirements/next/build/lib/gone.py",
    "tests/__pycache__/conftest.cpython-311.pyc",
)


@pytest.fixture(scope="module")
def paths():
    """Of all files that belong to the project."""
    found = tracked()
    if found is None:
        pytest.skip("not a git checkout: which files belong to it is unknown")
    return found


@pytest.fixture(scope="module")
def dist(paths, tmp_path_factory):
    """A folder with a wheel and a source distribution, built as `python -m build` does."""
    source, dist = (tmp_path_factory.mktemp(name) for name in ("source", "dist"))
    copy_to(source, paths)
    for path in LEFTOVERS:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).touch()
    # no isolation: an isolated build downloads setuptools
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist)]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return dist


@pytest.fixture(scope="module")
def wheel(dist):
    return dist / f"failfast_vllm-{VERSION}-py3-none-any.whl"


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the contents of the wheel, as pip installs them without dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(folder), str(wheel)], check=True, timeout=120)
    return folder


def test_the_wheel_holds_the_packages_and_nothing_else(wheel, paths):
    """Catches a room, weights or `py.typed` left out; tests, benchmarks and leftovers inside."""
    packages = [path.removeprefix("kernels/") for path in paths]
    expected = {path for path in packages if path.startswith(("failfast_vllm/", "failfast_ker"))}
    about = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) == expected | {METADATA + name for name in about}
        for path in expected:
            folder = ROOT / "kernels" if path.startswith("failfast_kernels") else ROOT
            assert archive.getinfo(path).file_size == (folder / path).stat().st_size, path
        licence = archive.read(f"{METADATA}licenses/LICENSE")
    assert licence == (ROOT / "LICENSE").read_bytes()
    wanted = ("py.typed", "small_pair/prompts.jsonl", "small_pair/target/model.safetensors")
    assert {f"failfast_vllm/{name}" for name in wanted} <= expected


def test_the_wheel_says_what_vllm_and_pip_ask(wheel):
    """Catches another version, a vLLM range unlike that of the hooks, a lost entry point."""
    with zipfile.ZipFile(wheel) as archive:
        about = email.message_from_bytes(archive.read(f"{METADATA}METADATA"))
        points = ConfigParser(delimiters=("=",))
        points.read_string(archive.read(f"{METADATA}entry_points.txt").decode())
    assert about["Version"] == VERSION
    assert about["License-Expression"] == "Apache-2.0"
    (vllm,) = (need for need in about.get_all("Requires-Dist") if need.startswith("vllm"))
    supported = INSTALL.split("'")[1]
    assert sorted(vllm.removeprefix("vllm").split(",")) == sorted(supported[4:].split(","))
    assert dict(points["vllm.general_plugins"]) == {"failfast": "failfast_vllm.plugin:register"}
    assert dict(points["console_scripts"]) == {"failfast": "failfast_vllm.tools.cli:main"}


def test_the_wheel_asks_for_what_it_imports(wheel):
    """Catches an import that works only because something else brings the package along."""
    with zipfile.ZipFile(wheel) as archive:
        about = email.message_from_bytes(archive.read(f"{METADATA}METADATA"))
        sources = [archive.read(name) for name in archive.namelist() if name.endswith(".py")]
    asked = [Requirement(need) for need in about.get_all("Requires-Dist")]
    for need in asked:
        assert need.specifier.contains(importlib.metadata.version(need.name), prereleases=True)
    imported = {name.split(".")[0] for source in sources for name in modules(ast.parse(source))}
    others = imported - {"failfast_vllm", "failfast_kernels"} - set(sys.stdlib_module_names)
    through_transformers = {"accelerate", "gguf"}
    assert others | through_transformers == {need.name.replace("-", "_") for need in asked}


def modules(tree):
    """Names of the modules that a parsed file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_the_source_distribution_is_the_tracked_tree(dist, paths):
    """Catches a folder that MANIFEST.in does not name, and a file that nobody has committed."""
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {member.name.split("/", 1)[1] for member in tar if member.isfile()}
    made = {"PKG-INFO", "setup.cfg"} | {name for name in names if ".egg-info/" in name}
    assert names - made == set(paths)


def test_an_installed_wheel_runs_from_anywhere(installed, tmp_path):
    """Catches a command that finds modules, weights or prompts in the checkout only."""
    env = {**os.environ, "PYTHONPATH": str(installed)}

    def failfast(*args):
        command = [sys.executable, str(installed / "bin" / "failfast"), *args, "--json"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert failfast("version")["failfast-vllm"] == VERSION
    models = failfast("models")
    assert set(models) == {"target", "drafter", "ar-drafter"}
    assert all(path.startswith(f"{installed}/failfast_vllm/") for path in models.values())


def test_the_version_command_needs_no_vllm(installed, tmp_path):
    """Catches an import of vLLM or torch in the command that says that they are missing."""
    packages = Path(numpy.__file__).parents[1]
    for part in (*packages.glob("numpy*"), packages / "safetensors"):
        (tmp_path / part.name).symlink_to(part)
    code = (
        f"import sys; sys.path += [{str(installed)!r}, {str(tmp_path)!r}]; "
        "from failfast_vllm.tools.cli import main; sys.exit(main(['version', '--json']))"
    )
    bare = [sys.executable, "-I", "-S", "-c", code]  # -S: no other packages
    done = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["failfast-vllm"] == VERSION
    assert {facts[name] for name in ("vllm", "torch", "triton", "transformers")} == {
        "not installed"
    }
    assert facts["device"] == "not known without vLLM"
