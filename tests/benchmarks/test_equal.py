"""`benchmarks/endurance/equal.py`: drafts in every step, answers as without."""

import importlib.util
from pathlib import Path

import pytest

from failfast_vllm.config import MODELS_DIR
from failfast_vllm.tools.offline import read_prompts
from failfast_vllm.tools.shipped import PROMPTS

FOLDER = Path(__file__).parents[2] / "benchmarks" / "endurance"


@pytest.mark.large
def test_copies_in_every_step_change_no_answer(monkeypatch):
    """Catches a comparison of answers that nothing was drafted for."""
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("equal", FOLDER / "equal.py")
    equal = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(equal)
    from draws import METHODS

    monkeypatch.setattr(equal, "CHUNK", 8)
    asked = str(MODELS_DIR / "target"), read_prompts(PROMPTS)[:12]
    chunks = list(equal.compare(METHODS["copies"], *asked, max_tokens=40, concurrency=4))
    assert [found["prompts"] for found in chunks] == [8, 12]
    assert chunks[-1]["different"] == 0
    assert 0 < chunks[-1]["accepted"] < chunks[-1]["drafted"]
