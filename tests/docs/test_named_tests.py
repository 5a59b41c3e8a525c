"""Pages name the tests that prove what they say: the tests exist, and the matrix is right."""

import ast
import re
from functools import cache

import pytest

from messages import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMED = re.compile(r"((?:tests/[\w/]+/)?test_\w+\.py)(?:::(test_\w+))?")
MATRIX = re.search(
    r"## The matrix\n(.*?)\n## ",
    (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8"),
    re.S,
)[1]
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in MATRIX.splitlines()]
ROWS = [row for row in ROWS if row][2:]
UNTESTED = "not tested"


@cache
def slow_by_name(path):
    """{name: whether the test is marked slow} of a test file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {f.name: any("slow" in ast.unparse(d) for d in f.decorator_list) for f in functions}


def files_named(name):
    pattern = name if "/" in name else f"tests/**/{name}"
    return list(ROOT.glob(pattern))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_pages_name_exist(page):
    """Catches a proof that was renamed or deleted while the page still points to it."""
    for file, test in NAMED.findall(page.read_text(encoding="utf-8")):
        found = files_named(file)
        assert found, file
        assert not test or any(test in slow_by_name(path) for path in found), f"{file}::{test}"


def on_next(cells):
    """What `make test-next` covers of a row: some files on V1, without slow tests; all on V2."""
    v1, v2 = cells
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    block = re.search(r"NEXT_TESTS :=(.*?)\n\n", makefile, re.S)[1]
    integration = re.search(r"test_,\$\(addsuffix \.py,(.*?)\)", block, re.S)[1]
    names = {f"tests/integration/test_{n}.py" for n in re.findall(r"\w+", integration)}
    names |= set(re.findall(r"tests/\S+\.py", block))
    runners = []
    if v1 != UNTESTED:
        file, test = NAMED.search(v1).groups()
        if file in names and not slow_by_name(ROOT / file)[test]:
            runners.append("V1")
    if v2 != UNTESTED:
        runners.append("V2")
    return ", ".join(runners) or UNTESTED


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_each_cell_of_the_matrix_names_its_test(row):
    """Catches a cell without a proof, a proof on the other runner, and a stale column of 0.33."""
    feature, v1, v2, next_version = row
    for cell, is_v2 in ((v1, False), (v2, True)):
        if cell != UNTESTED:
            file, test = NAMED.search(cell).groups()
            assert test, f"{feature}: {cell}"
            assert file.startswith("tests/interpreted/") == is_v2, cell
    assert next_version == on_next((v1, v2))
    assert {v1, v2} != {UNTESTED}
