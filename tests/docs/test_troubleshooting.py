"""docs/troubleshooting.md has every message of the product, with its remedy."""

import re

import pytest

from messages import ROOT, templates, tidy

PAGE = ROOT / "docs" / "troubleshooting.md"
FOUND = templates()


@pytest.fixture(scope="module")
def documented():
    """What stands in code on the page, tidied like the templates."""
    rows = re.findall(r"^\|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.M)
    return [tidy(message) for row in rows for message in re.findall(r"`([^`]+)`", row)]


@pytest.mark.parametrize("where", [where for where, _ in FOUND])
def test_every_message_has_a_remedy(where, documented):
    """Catches an error that was added or reworded without its entry."""
    template = dict(FOUND)[where].replace("`", "")
    assert any(template in message for message in documented), template


def test_messages_are_found():
    """Catches a collector that has gone blind: one of each form it must see."""
    texts = [text for _, text in FOUND]
    assert len(texts) > 80
    assert any(text.startswith("unknown key … in the speculative config") for text in texts)
    assert "the drafter … must have finite weights" in texts  # refusal(must, ...)
    assert any(text.startswith("on CPUs, vLLM does not") for text in texts)  # a generator
    assert "failfast is off:" in texts  # a warning
    assert "not installed" in texts  # of the doctor
