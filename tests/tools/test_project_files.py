"""Files that no module reads: workflows, forms for issues, the citation, the changelog."""

import re
import subprocess
import sys

import pytest
import yaml

import failfast_vllm
from source_tree import ROOT

GITHUB = ROOT / ".github"
FORMS = GITHUB / "ISSUE_TEMPLATE"
WORKFLOWS = ["workflows/test.yml", "workflows/publish.yml"]


def headings(text):
    """Titles of the second level, in their order."""
    return re.findall(r"^## (.+)$", text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", sorted((GITHUB / "workflows").glob("*.yml"))),
        ("github-issue-forms", [FORMS / "bug_report.yml", FORMS / "feature_request.yml"]),
        ("github-issue-config", [FORMS / "config.yml"]),
        ("citation-file-format", [ROOT / "CITATION.cff"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_follows_its_schema(schema, files):
    """Catches a misspelt key, which GitHub would ignore or refuse; the schemas are installed."""
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    filetype = ["--default-filetype", "yaml"]
    done = subprocess.run(
        [*command, *filetype, *map(str, files)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def commands():
    """What the workflows run, line by line."""
    for path in WORKFLOWS:
        jobs = yaml.safe_load((GITHUB / path).read_text(encoding="utf-8"))["jobs"]
        for job in jobs.values():
            runs = [step["run"] for step in job.get("steps", ()) if "run" in step]
            matrix = job.get("strategy", {}).get("matrix", {}).get("include", ())
            yield from (line for run in runs for line in run.splitlines())
            yield from (row["command"] for row in matrix)


def test_workflows_run_what_there_is():
    """Catches a target of make that was renamed, and a workflow that has left the versions."""
    targets = re.findall(
        r"^([\w-]+(?: [\w-]+)*):(?! export)", (ROOT / "Makefile").read_text(), re.M
    )
    known = {name for line in targets for name in line.split()}
    called = [line.split() for line in commands()]
    makes = {words[1] for words in called if words[0] == "make"}
    assert makes == {"test-next"}
    assert makes <= known
    assert [".ci/run"] in called
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100


def test_the_changelog_is_in_order():
    """Catches a version without its section, and entries that belong to none."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *released = headings(text)
    assert first == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+( - \d{4}-\d\d-\d\d)?", title) for title in released)
    numbers = [tuple(map(int, title.split(" ")[0].split("."))) for title in released]
    assert numbers == sorted(set(numbers), reverse=True)
    assert failfast_vllm.__version__ == ".".join(map(str, numbers[0]))
    assert text.startswith("# Changelog\n\n## ")


def test_the_version_has_one_source():
    """Catches a version that is raised in one place of several."""
    about = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert "version" not in about
    for name in ("setup.py", "pyproject.toml"):
        assert failfast_vllm.__version__ not in (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("form", ["bug_report.yml", "feature_request.yml"])
def test_a_form_asks_for_what_exists(form):
    """Catches a command in a form that `failfast` does not have."""
    from failfast_vllm.tools.cli import COMMANDS

    text = (FORMS / form).read_text(encoding="utf-8")
    asked = set(re.findall(r"`failfast ([a-z]+)", text))
    assert asked <= set(COMMANDS)
    assert form != "bug_report.yml" or {"version", "doctor"} <= asked
