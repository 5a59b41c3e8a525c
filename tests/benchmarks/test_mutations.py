"""`benchmarks/endurance/mutations.py`: its faults still apply, and its verdicts are true."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "endurance" / "mutations.py"
RESULTS = ROOT / "benchmarks" / "results" / "endurance_mutations.json"

spec = importlib.util.spec_from_file_location("mutations", SCRIPT)
mutations = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutations)
FAULTS = mutations.read_faults()


def test_every_fault_changes_the_code_in_one_place():
    """Catches a list that has been left behind by the code: its faults would not be there."""
    assert len(FAULTS) >= 40
    for fault in FAULTS:
        mutations.with_fault(fault)


def test_every_fault_has_tests_that_exist():
    """Catches a renamed test, and two faults whose results would share a line."""
    assert max(Counter(fault.what for fault in FAULTS).values()) == 1
    for fault in FAULTS:
        for test in fault.tests:
            path, _, name = test.partition("::")
            text = (ROOT / path).read_text(encoding="utf-8")
            assert not name or f"def {name.partition('[')[0]}(" in text, test


@pytest.mark.parametrize(
    ("old", "new", "fragment"),
    [
        ("x = 1", "x = 2", "2 places"),
        ("y = 1", "y = 2", "0 places"),
        ("# one", "# two", "stays the same"),
        ("z = 3", "z  =  3", "stays the same"),
    ],
)
def test_what_is_no_fault_is_refused(tmp_path, old, new, fragment):
    """Catches a fault that is applied nowhere, or to a comment, and then counts as missed."""
    (tmp_path / "module.py").write_text("x = 1  # one\nif x:\n    x = 1\nz = 3\n")
    fault = mutations.Fault("wrong", "module.py", old, new, (), "")
    with pytest.raises(ValueError, match=fragment):
        mutations.with_fault(fault, tmp_path)


def test_verdicts(tmp_path):
    """Catches a run that tests the package as it is, where all faults survive."""
    (tmp_path / "toy_fault.py").write_text("def half(x):\n    return x // 2\n\n\nUNUSED = 1\n")
    test = "from toy_fault import half\n\n\ndef test_half():\n    assert half(4) == 2\n"
    (tmp_path / "test_toy_fault.py").write_text(test)
    faults = [
        mutations.Fault("wrong", "toy_fault.py", "x // 2", "x // 4", ("test_toy_fault.py",), ""),
        mutations.Fault("unused", "toy_fault.py", "= 1", "= 2", ("test_toy_fault.py",), "unused"),
    ]
    found = list(mutations.try_faults(tmp_path, faults, 100.0))
    assert [record["verdict"] for record in found] == ["caught", "survived"]
    assert found[0]["test"] == "test_toy_fault.py::test_half"
    assert "x // 2" in (tmp_path / "toy_fault.py").read_text(), "the next fault comes alone"


def test_no_survivor_goes_unexplained():
    """Catches a survivor without a test or a reason; code of some faults has gone since."""
    records = {record["what"]: record for record in json.loads(RESULTS.read_text())["faults"]}
    tried = [fault for fault in FAULTS if fault.what in records]
    assert len(tried) > 100
    for fault in tried:
        assert records[fault.what]["verdict"] in ("caught", "hangs") or fault.reason, fault.what
