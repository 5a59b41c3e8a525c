"""The table of policies: what each class declares, and that docs/policies.md says the same."""

import subprocess
import sys
from pathlib import Path

import pytest

from failfast_vllm.policies.table import PARAMETERS, POLICIES

PAGE = Path(__file__).parents[2] / "docs" / "policies.md"


def rows(heading):
    """The cells of the table after a heading of the page, without its head."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert len(lines) >= 3
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_lists_every_parameter():
    """Catches a default, range or meaning that the page and the fields state differently."""
    expected = [
        [f"`{policy}`", f"`{key}`", str(item.default), f"{item.low} to {item.high}", item.meaning]
        for policy, parameters in PARAMETERS.items()
        for key, item in parameters.items()
    ]
    as_table = "\n".join("| " + " | ".join(row) + " |" for row in expected)
    assert rows("Parameters") == expected, f"the table should be\n{as_table}"


def test_the_page_lists_every_policy():
    """Catches a policy without a line, and one whose passes changed."""
    listed = rows("Rules")
    assert [name for name, *_ in listed] == [f"`{name}`" for name in POLICIES]
    for name, passes, _ in listed:
        one_pass = POLICIES[name.strip("`")].one_pass
        assert passes == ("one" if one_pass else "as many as it takes")


@pytest.mark.parametrize(("name", "policy"), POLICIES.items())
def test_a_policy_has_the_defaults_that_it_declares(name, policy):
    """Catches a declared default that is not the one of the field; a field without a meaning."""
    built = policy()
    for key, item in PARAMETERS[name].items():
        assert getattr(built, key) == item.default
        assert item.meaning


def test_parameters_are_known_without_torch():
    """Catches an import that costs every command seconds: the fields live beside tensor code."""
    code = (
        "import sys; from failfast_vllm.policies.table import policy_parameters; "
        "policy_parameters('failfast', {}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
