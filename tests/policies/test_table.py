"""The table of policies: what each class declares, and that docs/policies.md says the same."""

import subprocess
import sys
from pathlib import Path

import pytest

from failfast_vllm.policies import alternatives, bandit
from failfast_vllm.policies.table import ARMS, PARAMETERS, POLICIES

PAGE = Path(__file__).parents[2] / "docs" / "policies.md"


def rows(heading):
    """The cells of the table after a heading of the page, without its head."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert len(lines) > 3
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def shown(value):
    """A default as the page writes it."""
    if isinstance(value, tuple):
        return ", ".join(map(shown, value))
    return f"`{value}`" if isinstance(value, str) else str(value)


def test_the_page_lists_every_parameter():
    """Catches a default, range or meaning that the page and the fields state differently."""
    expected = [
        [f"`{policy}`", f"`{key}`", shown(item.default), item.values, item.meaning]
        for policy, parameters in PARAMETERS.items()
        for key, item in parameters.items()
    ]
    as_table = "\n".join("| " + " | ".join(row) + " |" for row in expected)
    assert rows("Parameters") == expected, f"the table should be\n{as_table}"


def test_the_page_lists_every_policy():
    """Catches a policy without a line, a cap that was changed, a rule in the other table."""
    listed = {heading: rows(heading) for heading in ("Rules", "Alternatives")}
    modules = (alternatives.__name__, bandit.__name__)
    for heading, lines in listed.items():
        names = [
            f"`{name}`"
            for name, policy in POLICIES.items()
            if (policy.__module__ in modules) == (heading == "Alternatives")
        ]
        assert [name for name, *_ in lines] == names
    for name, cap, passes, _ in (*listed["Rules"], *listed["Alternatives"]):
        policy = POLICIES[name.strip("`")]
        assert cap == str(policy.default_cap)
        assert passes == ("one" if policy.one_pass else "as many as it takes")


@pytest.mark.parametrize(("name", "policy"), POLICIES.items())
def test_a_policy_has_the_defaults_that_it_declares(name, policy):
    """Catches a declared default that is not the one of the field; a field without a meaning."""
    built = policy()
    for key, item in PARAMETERS[name].items():
        assert getattr(built, key) == item.default
        assert item.meaning
        assert item.values


def test_arms_are_the_policies_that_decide_by_themselves():
    assert set(POLICIES) - set(ARMS) == {"goodput", "tapout"}


def test_parameters_are_known_without_torch():
    """Catches an import that costs every command seconds: the fields live beside tensor code."""
    code = (
        "import sys; from failfast_vllm.policies.table import policy_parameters; "
        "policy_parameters('tapout', {}, 60); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
