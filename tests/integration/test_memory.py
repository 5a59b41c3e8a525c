"""What a worker keeps on a CPU does not grow with the number of its requests."""

import functools
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from engine import core, engine, proposer
from failfast_vllm.drafters.hosted import row_class
from failfast_vllm.integration import startup

SOAK = Path(__file__).parents[2] / "benchmarks" / "endurance" / "soak.py"
spec = importlib.util.spec_from_file_location("soak", SOAK)
soak = importlib.util.module_from_spec(spec)
sys.modules["soak"] = soak  # else its turns cannot go through a pipe
spec.loader.exec_module(soak)

pytestmark = pytest.mark.skipif(
    "malloc" in os.environ.get("LD_PRELOAD", ""), reason="glibc's malloc counts what is in use"
)


@pytest.fixture(scope="module")
def llm():
    with engine({"method": "failfast"}, max_num_seqs=64) as llm:
        yield llm


def growth_mib(run, sizes):
    """Of the heap in use, over passes of these many rows."""
    before = soak.memory()["heap_in_use_mib"]
    with torch.inference_mode():
        for size in sizes:
            run(size)
    return soak.memory()["heap_in_use_mib"] - before


def test_draft_passes_of_all_row_counts_share_kernels(llm):
    """Catches kernels that oneDNN compiles, and keeps, for each row count of a draft pass."""
    model = proposer(llm).drafter.model

    def draft_pass(num_rows):
        hidden_states = model.forward(model.idle_pass(1, num_rows))
        assert len(hidden_states) == num_rows
        assert len(model.confidence(hidden_states).token_ids) == num_rows

    assert growth_mib(draft_pass, range(1, 301)) < 100


def test_steps_of_all_row_counts_keep_a_bounded_number_of_kernels(llm):
    """Catches a cache of kernels that is larger than that of a server without failfast."""
    runner = core(llm).model_executor.driver_worker.worker.model_runner
    assert growth_mib(functools.partial(proposer(llm).target_step, runner), range(1, 501)) < 330


def test_row_classes():
    """Catches classes that drop rows, that are many, or that are much wider than asked."""
    classes = [row_class(n) for n in range(1, 4097)]
    assert all(n <= wide for n, wide in enumerate(classes, start=1))
    assert all(wide <= n * 9 / 8 for n, wide in enumerate(classes[31:], start=32))
    assert max(wide - n for n, wide in enumerate(classes[:31], start=1)) == 3
    assert classes == sorted(classes)
    assert len(set(classes)) == 64


def test_drift_is_what_the_second_half_adds():
    """Catches a drift since the start, or between other records than the middle and the last."""
    sizes = {0: 100.0, 40: 150.0, 60: 170.0, 90: 171.0, 100: 172.5}
    turn = {"concurrency": 2, "tokens": 30, "drafts": 5, "drafted": 20, "accepted": 10}
    records = [
        {"requests": n, "rss_mib": mib, "heap_in_use_mib": mib / 2, "heap_free_mib": 1.0, **turn}
        for n, mib in sizes.items()
    ]
    records[-1].update(drafts=10, accepted=20, concurrency=8)
    found = soak.summarize(records)
    assert found["rss_mib"] == {"start": 100.0, "half": 170.0, "end": 172.5, "drift": 2.5}
    assert found["heap_in_use_mib"]["drift"] == 1.2
    assert found["heap_free_mib"]["drift"] == 0.0
    assert found["first_half"] == {
        "acceptance_length": 3.0,
        "accepted_of_drafted": 0.5,
        "share_of_steps_with_drafts": {"2": 0.25},
    }
    assert found["second_half"] == {
        "acceptance_length": 3.0,
        "accepted_of_drafted": 0.75,
        "share_of_steps_with_drafts": {"2": 0.25, "8": 1.0},
    }


def test_warm_up_goes_from_wide_to_narrow():
    """Catches kernels compiled in another order: narrow ones first leave gaps of 100 to 190 MiB.

    Through these glibc searches whenever it allocates: a step without drafts was a tenth slower.
    """
    target, draft = [], []

    def record(into, size):
        into.append(size)
        return torch.zeros(1, 1)

    drafter = types.SimpleNamespace(
        device=torch.device("cpu"),
        diffusion_block_size=32,
        draft_increment=4,
        longest_prefix=lambda num_rows: 0,
        idle_pass=lambda num_seqs, num_rows, num_keys: num_rows,
        forward=lambda num_rows: record(draft, num_rows),
        confidence=lambda masks: types.SimpleNamespace(probabilities=masks),
    )
    config = types.SimpleNamespace(
        additional_config={"failfast": {"draft_budget": 64, "drafts": True}},
        scheduler_config=types.SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=2048),
        parallel_config=types.SimpleNamespace(data_parallel_size=1, tensor_parallel_size=1),
    )
    startup.measure_costs(lambda size: record(target, size), drafter, config, clock=lambda: 0.0)
    timed = [size for power in range(7) for size in [2**power] * 2]
    rows = list(range(1, 8 + 64 + 1))
    assert target[: 14 + 72] == timed + rows[::-1]
    assert draft[: 14 + len(set(map(row_class, rows)))] == timed + sorted(
        set(map(row_class, rows)), reverse=True
    )


def test_a_short_soak():
    """Catches a benchmark whose engine loses requests or drafts nothing. In this process."""
    ours, theirs = multiprocessing.Pipe()
    asked = list(soak.turns(20))
    for turn in [*asked, None]:
        ours.send(turn)
    settings = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 2**29}
    soak.serve(theirs, soak.METHODS["failfast"], settings, 20, soak.MAX_PROMPT_LEN)
    start = ours.recv()
    records, answers = zip(*(ours.recv() for _ in asked), strict=True)
    assert [r["requests"] for r in records] == [8, 20]
    assert [len(some) for some in answers] == [8, 12]
    assert all(r["rss_mib"] > r["heap_in_use_mib"] > 100 for r in (start, *records))
    found = soak.summarize([{"requests": 0, **start}, *records])
    assert found["unanswered"] == 0
    assert found["accepted"] > 0


def test_a_soak_compares_answers(monkeypatch):
    """Catches a benchmark that compares nothing; what stands in for an engine counts its tokens."""

    def serve(pipe, config, settings, count, max_prompt_len):
        pipe.send(dict.fromkeys(("rss_mib", "heap_in_use_mib", "heap_free_mib"), 1.0))
        done = 0
        while (turn := pipe.recv()) is not None:
            answers = [[n, n] for n in range(done, done + turn.num_requests)]
            done += turn.num_requests
            if config and done > 8:
                answers[3] = [0]
            record = {"requests": done, "concurrency": 1, "tokens": 2 * turn.num_requests}
            pipe.send(({**record, **soak.memory()}, answers))

    monkeypatch.setattr(soak, "serve", serve)
    fork = multiprocessing.get_context("fork")  # else a process that knows nothing of `serve`
    monkeypatch.setattr(soak.multiprocessing, "get_context", lambda method: fork)
    *_, found = soak.soak(20, {}, list(soak.METHODS))
    assert found["different_answers"] == 1
    assert found["generated_tokens"] == 2 * 2 * 20


def test_the_load_can_be_constant():
    """Catches a comparison of decisions at one load that has other loads in it."""
    assert [turn.concurrency for turn in soak.turns(40, (4,))] == [4] * 5
    assert [turn.concurrency for turn in soak.turns(1000)][: len(soak.CONCURRENCIES)] == list(
        soak.CONCURRENCIES
    )


@pytest.mark.large
def test_the_script_of_a_short_soak(tmp_path):
    """Both in processes of their own, with what they write."""
    path = tmp_path / "soak.json"
    subprocess.run([sys.executable, SOAK, "--requests", "20", "--json", path], check=True)
    found = json.loads(path.read_text())
    assert found["different_answers"] == 0
    assert found["provenance"]["requests"] == 20
    for name, records in found["records"].items():
        assert [r["requests"] for r in records] == [0, 8, 20]
        assert all(r["rss_mib"] > r["heap_in_use_mib"] > 100 for r in records)
        assert found["summary"][name]["unanswered"] == 0
    assert found["summary"]["none"]["drafted"] == 0
    assert found["summary"]["failfast"]["accepted"] > 0
