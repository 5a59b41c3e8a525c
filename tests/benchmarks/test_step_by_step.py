"""`benchmarks/step_by_step.py` in short: engines in turns, step by step."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_all_engines_answer_alike_and_are_timed(monkeypatch, tmp_path):
    """Catches engines that are asked different things, and steps that are not counted."""
    monkeypatch.syspath_prepend(FOLDER)
    from step_by_step import main

    path = tmp_path / "found.json"
    asked = ["--concurrency", "2", "--repeats", "2", "--max-tokens", "12", "--json", str(path)]
    main(asked)
    found = json.loads(path.read_text())["points"]["2"]
    assert list(found) == ["none", "none again", "failfast"]
    assert [each["different_answers"] for each in found.values()] == [0, 0, 0]
    assert all(ms > 0 for each in found.values() for ms in each["ms"])
    base = found["none"]["ms"]
    for each in found.values():
        ratios = [ours / theirs for ours, theirs in zip(base, each["ms"], strict=True)]
        assert each["speedups"] == pytest.approx(ratios, rel=0.01)
