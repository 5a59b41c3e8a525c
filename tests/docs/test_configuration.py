"""The keys and defaults that docs/configuration.md and README.md list are those of the code."""

import json
import re

import pytest

from failfast_vllm.config import KNOWN_KEYS, METHOD, FailFastConfig
from failfast_vllm.policies.table import PARAMETERS
from messages import ROOT

# a policy's own keys are in docs/policies.md, but for the default's
OTHERS = {key for policy, keys in PARAMETERS.items() if policy != METHOD for key in keys}
KEYS = set(KNOWN_KEYS) - {"method"} - (OTHERS - set(PARAMETERS[METHOD]))
DEFAULTS = FailFastConfig.from_user({}).to_dict()


def rows(page):
    """{key: default as written} of a page's table of keys."""
    text = (ROOT / page).read_text(encoding="utf-8")
    table = re.search(r"^\| key \| default \|.*?\n\n", text, re.M | re.S)[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.M))


def test_all_keys_are_listed():
    """Catches a key that was added, renamed or removed without its row."""
    assert set(rows("docs/configuration.md")) == KEYS


@pytest.mark.parametrize("page", ["docs/configuration.md", "README.md"])
def test_defaults_are_those_of_the_code(page):
    """Catches a default that was changed without its row; words, such as "by target", are none."""
    num_checked = 0
    for key, written in rows(page).items():
        assert key in KEYS
        literal = re.fullmatch(r"`(\w+)`|([\d.]+|true|false)", written)
        if literal:
            value = literal[1] or json.loads(literal[2])
            assert DEFAULTS[key] == value, key
            num_checked += 1
    assert num_checked >= 4
