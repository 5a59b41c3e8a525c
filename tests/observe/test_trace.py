"""Traces: what is written, what is read back, and that the engine never suffers from it."""

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
from failfast_vllm.tools import cli, trace_report
from scripted import make_drafter, make_step, random_script

HEADER = {"failfast_trace": 1, "version": "0", "target": "T", "drafter": "D", "policy": "failfast"}
KEYS = {"step", "seqs", "request", "known", "drafted", "passes", "rows", "accepted", "confidences"}


def line(request, known, drafted=0, accepted=0, passes=0, rows=0, confidences=(), step=1, seqs=1):
    fields = (step, seqs, request, known, drafted, passes, rows, accepted, list(confidences))
    return dict(zip(traces.Round._fields, fields, strict=True))


ROUNDS = [  # two requests: a prompt's first token each, and three drafts
    line(0, 7),
    line(1, 9),
    line(0, 8, drafted=4, accepted=2, passes=1, rows=12, confidences=(0.95, 0.92, 0.31, 0.2)),
    line(1, 10, drafted=40, accepted=40, passes=4, rows=140, confidences=(1.0,) * 40, seqs=2),
    line(0, 11, drafted=10, accepted=0, passes=1, rows=20, confidences=(0.3,) * 10),
]


def write(path, *lines, end="\n"):
    texts = (text if isinstance(text, str) else json.dumps(text) for text in lines)
    path.write_text("\n".join(texts) + end)
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "t.jsonl", HEADER, *ROUNDS)


def test_figures_by_hand(file):
    """Catches rounds without a draft in the means, and tokens behind a rejection that count."""
    found = trace_report.summarize(traces.read(file))
    assert (found["requests"], found["rounds"], found["steps"]) == (2, 3, 2)
    assert (found["drafted"], found["accepted"], found["emitted"]) == (54, 42, 47)
    assert found["acceptance_length"] == pytest.approx((3 + 41 + 1) / 3)
    assert found["passes_per_round"] == pytest.approx(6 / 3)
    assert found["rows_per_pass"] == pytest.approx(172 / 6)
    assert found["sequences_per_step"] == pytest.approx(4 / 3)
    assert found["share_of_long_drafts"] == pytest.approx(1 / 3)
    by_position = [(p["judged"], p["accepted"]) for p in found["acceptance_by_position"]]
    assert by_position == [(3, 2), (2, 2), (2, 1)] + [(1, 1)] * 37


def test_the_report(file, capsys):
    assert cli.main(["trace", str(file)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("T with D, policy failfast\n")
    for expected in (
        "15.00 tokens per round",
        "2.00 per round",
        "3, and 2 without a draft",
        "drafts of 30 or more    33.3%",
        "           3        2     50.0%\n",
        "       31-40       10    100.0%\n",
    ):
        assert expected in text
    assert cli.main(["trace", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == [HEADER]


def test_a_trace_without_drafts(tmp_path, capsys):
    """Catches means and shares of nothing."""
    assert cli.main(["trace", str(write(tmp_path / "t", HEADER, line(0, 3)))]) == 0
    assert "0, and 1 without a draft" in capsys.readouterr().out
    assert cli.main(["trace", str(write(tmp_path / "t", HEADER))]) == 0


@pytest.mark.parametrize("kept", [1, 30, 60])
def test_a_trace_that_grows(tmp_path, kept):
    """Catches a reader that fails on a line whose end is not written yet."""
    part = json.dumps(ROUNDS[2])[:kept]
    path = write(tmp_path / "t.jsonl", HEADER, *ROUNDS[:2], part, end="")
    assert len(traces.read(path).rounds) == 2


def test_several_runs_in_a_file(tmp_path):
    """Catches requests of different runs taken for one, and the cut line of a killed run."""
    part = json.dumps(ROUNDS[0])[:20]
    path = write(tmp_path / "t.jsonl", HEADER, *ROUNDS, part, {**HEADER, "target": "U"}, *ROUNDS)
    trace = traces.read(path)
    assert [r.request for r in trace.rounds] == [0, 1, 0, 1, 0, 2, 3, 2, 3, 2]
    assert trace.headers[-1]["target"] == "U"


@pytest.mark.parametrize(
    "damaged",
    [
        "{",
        "[]",
        {**ROUNDS[2], "known": -1},
        {**ROUNDS[2], "known": "8"},
        {**ROUNDS[2], "rows": 10**400},  # too large for a mean
        {**ROUNDS[2], "drafted": 10**9},  # a line of the report for each
        {**ROUNDS[2], "accepted": 5},
        {**ROUNDS[2], "confidences": [0.5] * 5},
        {**ROUNDS[2], "confidences": [1.5]},
        {**ROUNDS[2], "confidences": None},
        {"step": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("last", [False, True])
def test_a_damaged_line_is_named(tmp_path, capsys, damaged, last):
    """Catches damage that is skipped or read as figures; whole last lines are no exception."""
    rest = [] if last else ROUNDS[:1]
    path = write(tmp_path / "t.jsonl", HEADER, *ROUNDS[:2], damaged, *rest)
    assert cli.main(["trace", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}, line 4: must be a round; got " in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "is empty"),
        (b"# README\n", "line 1: must be a trace's header; got '# README'"),
        (b"\xff\xfe\n", "line 1: must be a trace's header"),
        (b'{"failfast_trace": 2}\n', "line 1: must be of trace format 1; got 2"),
        (None, "cannot read"),
    ],
)
def test_no_trace(tmp_path, capsys, content, fragment):
    path = tmp_path / "t.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert cli.main(["trace", str(path)]) == 2
    error = capsys.readouterr().err
    assert fragment in error
    assert error.count("\n") == 1


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
        assert traces.read(path).rounds[0] == (*list(expected.values())[:-1], (0.123, 1.0))


def test_lines_are_there_within_a_second(tmp_path):
    """Catches rounds that stay in a buffer while the engine idles."""
    path = tmp_path / "t.jsonl"
    writer = traces.TraceWriter(path, {})
    writer.observe([A_ROUND])
    time.sleep(1.0)
    assert len(traces.read(path).rounds) == 1
    writer.close()


def test_a_run_goes_on_behind_a_killed_one(tmp_path):
    """Catches a header glued to the line at which an earlier run was killed."""
    path = write(tmp_path / "t.jsonl", HEADER, ROUNDS[0], '{"step":1,"se', end="")
    writer = traces.TraceWriter(path, {})
    writer.observe([A_ROUND])
    writer.close()
    trace = traces.read(path)
    assert len(trace.headers) == 2
    assert [r.request for r in trace.rounds] == [0, 1]


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
    found = traces.read(path).rounds
    assert len(rounds) > 50
    indexes = {}
    for r, seen in zip(found, rounds, strict=True):
        assert r.request == indexes.setdefault(seen.req_id, len(indexes))
        assert (r.drafted, r.accepted) == (len(seen.drafted), len(seen.emitted) - 1)
        assert r.passes == seen.num_passes
        assert r.confidences == pytest.approx(seen.verified_confidences, abs=0.00051)
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
    assert all(set(fields) == KEYS for fields in lines)
    assert {"target": "target", "drafter": "drafter", "dtype": "float32"}.items() <= header.items()
    assert (header["policy"], header["confidence_threshold"]) == ("failfast", 0.45)
    assert (header["draft_increment"], header["diffusion_block_size"]) == (10, 32)
    assert header["kv_block_size"] % 32 == 0
    assert not {"trace", "trace_ids"} & set(header)
