"""Traces: what is written, and that the engine never suffers from it."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engine import engine, generate, mixed_prompts, proposer, watch
from failfast_vllm.config import FailFastConfig
from failfast_vllm.drafting.records import Round
from failfast_vllm.observe import trace as traces
from failfast_vllm.policies.rules import FailFast
from scripted import make_drafter, make_step, random_script
from trace_lines import rounds_of

HEADER = {"failfast_trace": 1, "version": "0", "target": "T", "drafter": "D", "policy": "failfast"}
KEYS = ("step", "seqs", "request", "known", "drafted", "passes", "rows", "accepted", "confidences")


def line(request, known, drafted=0, accepted=0, passes=0, rows=0, confidences=(), step=1, seqs=1):
    fields = (step, seqs, request, known, drafted, passes, rows, accepted, list(confidences))
    return dict(zip(KEYS, fields, strict=True))


def write(path, *lines, end="\n"):
    texts = (text if isinstance(text, str) else json.dumps(text) for text in lines)
    path.write_text("\n".join(texts) + end)
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "t.jsonl", HEADER, line(0, 7))


def a_round(req_id):
    """Two of three drafted tokens are verified, one is accepted."""
    return Round(
        req_id,
        num_drafted=3,
        num_verified=2,
        num_accepted=1,
        confidences=np.array([0.12345, 1.0, 0.5], dtype=np.float32),
        num_passes=1,
        num_rows=16,
        token_ids=[4, 5, 9],
        emitted=[4, 6],
        known_len=5,
        step=3,
        num_seqs=2,
    )


A_ROUND = a_round("client-a")


def test_a_line(tmp_path):
    """Catches ids, or anything else that was not asked for, in a trace."""
    for with_ids in (False, True):
        path = tmp_path / f"{with_ids}.jsonl"
        writer = traces.TraceWriter(path, {"target": "T"}, with_ids)
        writer.observe([a_round(req_id) for req_id in ("client-a", "b", "client-a")])
        writer.forget(["client-a"])
        writer.observe([A_ROUND])
        writer.close()
        header, *lines = map(json.loads, path.read_text().splitlines())
        assert set(header) == {"failfast_trace", "version", "date", "target"}
        assert [fields["request"] for fields in lines] == [0, 1, 0, 2]
        expected = line(0, 5, 2, 1, 1, 16, [0.123, 1.0], step=3, seqs=2)
        ids = {"id": "client-a", "draft_ids": [4, 5], "emitted_ids": [4, 6]}
        assert lines[0] == {**expected, **(ids if with_ids else {})}


def test_lines_are_there_within_a_second(tmp_path):
    """Catches rounds that stay in a buffer while the engine idles."""
    path = tmp_path / "t.jsonl"
    writer = traces.TraceWriter(path, {})
    writer.observe([A_ROUND])
    time.sleep(1.0)
    assert len(rounds_of(path)) == 1
    writer.close()


def test_a_run_goes_on_behind_a_killed_one(tmp_path):
    """Catches a header glued to the line at which an earlier run was killed."""
    path = write(tmp_path / "t.jsonl", HEADER, line(0, 7), '{"step":1,"se', end="")
    writer = traces.TraceWriter(path, {})
    writer.observe([A_ROUND])
    writer.close()
    text = path.read_text()
    assert text.count('"failfast_trace"') == 2
    assert text.splitlines()[2] == '{"step":1,"se'  # the line that was cut


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(traces.logger, "warning", lambda text, *args: found.append(text % args))
    return found


@pytest.mark.parametrize("path", ["/dev/full", "/nowhere/t.jsonl"])
def test_a_full_disk_ends_the_trace(path, warnings):
    """Catches an error, or a warning per round, where one line and silence are due."""
    writer = traces.TraceWriter(path, {})
    for _ in range(3):
        writer.observe([A_ROUND])
        writer.flush()
    writer.close()
    assert len(warnings) == 1
    assert f"the trace {path} ends here (" in warnings[0]
    assert not writer._pending


def test_a_disk_that_hangs_ends_the_trace(tmp_path, monkeypatch, warnings):
    """Catches memory that fills up behind it."""
    monkeypatch.setattr(traces, "MAX_PENDING", 5)
    monkeypatch.setattr(traces.TraceWriter, "flush", lambda self: None)
    writer = traces.TraceWriter(tmp_path / "t.jsonl", {})
    for _ in range(20):
        writer.observe([A_ROUND])
    assert [w for w in warnings if "5 rounds wait for the disk" in w] == warnings != []
    assert not writer._pending


@pytest.mark.parametrize(
    ("given", "fragment"),
    [
        ({"trace": 3}, "must be the name of a file; got 3"),
        ({"trace": " "}, "must be the name of a file; got ' '"),
        ({"trace": "/nowhere/t.jsonl"}, "in an existing, writable folder; got '/nowhere/t.jsonl'"),
        ({"trace": str(Path(__file__).parent)}, "must be a new file, or a trace"),
        ({"trace": __file__}, "must be a new file, or a trace to go on with; got"),
        ({"trace_ids": True}, "'trace_ids' belongs to a trace; got none"),
        ({"trace": "t.jsonl", "trace_ids": 1}, "'trace_ids' must be true or false; got 1"),
    ],
)
def test_what_cannot_be_a_trace_is_refused(given, fragment):
    """Catches a server that starts and then writes nothing, or into somebody's file."""
    with pytest.raises(ValueError, match=r"^failfast: 'trace") as refused:
        FailFastConfig.from_user(given)
    assert fragment in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_trace_may_go_on(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    knobs = FailFastConfig.from_user({"trace": file.name})
    assert (knobs.trace, knobs.trace_ids) == (str(file), False)


@pytest.mark.parametrize("max_num_rows", [8192, 130])
def test_rows_are_shared_out(max_num_rows):
    """Catches rows of commits, split passes, or later passes that no sequence is charged for."""
    script = random_script(1, num_seqs=5)
    step = make_step(script, [60, 0, 60, 3, 10])
    step = type(step)(**{**vars(step), "committed_lens": np.zeros_like(step.committed_lens)})
    drafts = make_drafter(FailFast(0.45), script, max_num_rows=max_num_rows).propose(step)
    assert drafts.seq_rows.sum() == drafts.num_rows
    lens, passes = drafts.lens[[0, 2]], drafts.num_passes[[0, 2]]
    final, known = step.final_lens[[0, 2]], step.known_lens[[0, 2]]
    by_hand = [  # commits and the first pass, then the live block and the draft so far again
        f + (k - f) * n + sum(min(10 * (i + 1), length) for i in range(n))
        for length, n, f, k in zip(lens, passes, final, known, strict=True)
    ]
    assert drafts.seq_rows[[0, 2]].tolist() == by_hand
    assert drafts.seq_rows[1] == step.final_lens[1]


def same_rounds(path, rounds):
    """A trace tells what an observer of the engine saw."""
    found = rounds_of(path)
    assert len(rounds) > 50
    indexes = {}
    for r, seen in zip(found, rounds, strict=True):
        assert r.request == indexes.setdefault(seen.req_id, len(indexes))
        assert (r.drafted, r.accepted) == (len(seen.drafted), len(seen.emitted) - 1)
        assert r.passes == seen.num_passes
        assert r.confidences == pytest.approx(seen.confidences[: seen.num_verified], abs=0.00051)
    return found


@pytest.mark.parametrize(("rank", "data_parallel_index"), [(1, 0), (0, 1)])
def test_only_the_first_rank_writes(tmp_path, rank, data_parallel_index):
    """Catches several writers of one file."""
    from failfast_vllm.integration.startup import _trace_writer

    ranks = SimpleNamespace(rank=rank, data_parallel_index=data_parallel_index)
    knobs = FailFastConfig.from_user({"trace": str(tmp_path / "t.jsonl")}).to_dict()
    config = SimpleNamespace(parallel_config=ranks, additional_config={"failfast": knobs})
    assert _trace_writer(config, 32) is None


def test_what_an_engine_records(tmp_path, warnings, monkeypatch):
    """Catches a trace that differs from what was drafted, and an engine that a full disk stops."""
    from vllm import SamplingParams

    monkeypatch.setattr(traces, "FLUSH_SECONDS", 600)  # only the engine's end writes
    path, full = tmp_path / "t.jsonl", Path("/dev/full")
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    with engine({"method": "failfast", "trace": str(path)}, max_num_seqs=4) as llm:
        prompts = [p for p in mixed_prompts(llm.get_tokenizer(), 24) if len(p) < 500][:10]
        with watch(llm) as record:
            answers = generate(llm, prompts, params)
            stats = proposer(llm).stats
            assert (
                len(proposer(llm).session.ledger) <= 4
            )  # of the 10 requests only those that ended last
            first_rounds = list(record.rounds)
            num_steps, num_rows = stats.num_steps, stats.num_rows
        own = stats.trace
        stats.trace = traces.TraceWriter(full, {})
        assert generate(llm, prompts, params) == answers
        stats.trace.flush()
        assert sum("/dev/full ends here" in warning for warning in warnings) == 1
        stats.trace = own
        with watch(llm) as record:
            generate(llm, prompts[:1], params)
    # the engine's end has written the rest
    found = same_rounds(path, first_rounds + record.rounds)[: len(first_rounds)]
    assert {r.step for r in found} <= set(range(1, num_steps + 1))
    assert sum(r.rows for r in found) <= num_rows
    assert sum(r.rows for r in found) > 0.8 * num_rows
    assert {r.seqs for r in found} >= {1, 4}
    assert {r.request for r in found} == set(range(len(answers)))
    for i, (answer, prompt) in enumerate(zip(answers, prompts, strict=True)):
        request = [r for r in found if r.request == i]
        assert request[0].known == len(prompt)
        assert request[-1].known + request[-1].accepted + 1 == len(prompt) + len(answer)
    header, *lines = map(json.loads, path.read_text().splitlines())
    assert all(tuple(fields) == KEYS for fields in lines)
    assert {"target": "target", "drafter": "drafter", "dtype": "float32"}.items() <= header.items()
    assert (header["policy"], header["confidence_threshold"]) == ("failfast", 0.45)
    assert (header["draft_increment"], header["diffusion_block_size"]) == (10, 32)
    assert header["kv_block_size"] % 32 == 0
    assert not {"trace", "trace_ids"} & set(header)
