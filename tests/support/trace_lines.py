"""What a trace holds."""

import json
from types import SimpleNamespace


def rounds_of(path):
    """The lines of a trace that are rounds, in its order; every line must be whole."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert "failfast_trace" in lines[0]
    return [SimpleNamespace(**line) for line in lines if "failfast_trace" not in line]
