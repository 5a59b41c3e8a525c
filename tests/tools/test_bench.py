"""`failfast bench`: its arithmetic on made-up runs, and a small real run."""

import json
import multiprocessing
import re
import subprocess
import sys
import types
from collections import namedtuple
from itertools import count
from pathlib import Path

import pytest

from failfast_vllm.config import METHOD, FailFastConfig
from failfast_vllm.policies.table import POLICIES
from failfast_vllm.tools import bench, cli, report
from failfast_vllm.tools import load_generator as closed_loop
from failfast_vllm.tools.load_generator import Run, Served, Sums, TracedRound

COMMAND = str(Path(sys.executable).with_name("failfast"))


def made_up(seconds, answers, **sums):
    """A run of requests with 10 ms to the first token and 5 ms for each that follows."""
    traced = [TracedRound([], [], [1]), TracedRound([2, 3], [4], [5])]
    served = [Served(ids, [10.0 + 5.0 * i for i in range(len(ids))], traced) for ids in answers]
    return Run(seconds, served, Sums(float, sums))


def watch_of(scheduler):
    """Of an engine that drafts five tokens a round with vLLM's draft_model."""
    core = types.SimpleNamespace(scheduler=scheduler)
    engine = types.SimpleNamespace(engine_core=types.SimpleNamespace(engine_core=core))
    config = {"method": "draft_model", "num_speculative_tokens": 5}
    return closed_loop.Watch(types.SimpleNamespace(llm_engine=engine), config)


def test_a_row_by_hand():
    """Catches ratios across repeats, means for medians, and percentiles of the wrong times."""
    answers = [[1, 2, 3, 4], [5, 6]]
    none = [made_up(seconds, answers) for seconds in (1.0, 2.0, 4.0)]  # 6, 3, 1.5 tokens/s
    others = [made_up(s, found) for s, found in ((0.5, answers), (0.4, answers), (2.0, [[1], [5]]))]
    row = bench.make_row("x", 2, others, none, ["a", "b"])  # 12, 15, 1 tokens/s
    assert (row["method"], row["concurrency"], row["requests"]) == ("x", 2, 6)
    assert row["tokens_per_second"] == 12
    assert row["speedups"] == [2.0, 5.0, pytest.approx(1 / 1.5, abs=1e-3)]
    assert row["speedup"] == 2.0
    assert row["answers_equal_to_none"] == pytest.approx(4 / 6, abs=1e-4)
    assert row["tpot_p50_ms"] == row["tpot_p99_ms"] == 5.0  # a single token has none
    assert row["ttft_p50_ms"] == 10.0
    # latencies 25, 15, 25, 15, 10, 10 ms over 14 tokens
    assert row["latency_p50_ms"] == 15.0
    assert row["tokens_per_second_per_request"] == 140.0


def test_drafts_are_counted_by_hand():
    """Catches rounds of a repeat that go missing, and rounds without a draft in the means."""
    answers = [[1, 2]]
    runs = [
        made_up(1.0, answers, drafts=1, drafted=3, accepted=1, passes=2),
        made_up(1.0, answers, drafts=2, drafted=4, accepted=2, passes=2),
    ]
    row = bench.make_row("x", 1, runs, runs, ["a"])
    assert row["acceptance_length"] == 2.0  # (1 + 2 + 0) / 3 + 1
    assert row["passes_per_round"] == pytest.approx(4 / 3, abs=1e-3)
    assert (row["drafts"], row["drafted_tokens"], row["accepted_tokens"]) == (3, 7, 3)
    alone = [made_up(1.0, answers)]
    none = bench.make_row("none", 1, alone, alone, ["a"])
    assert (none["acceptance_length"], none["passes_per_round"], none["drafts"]) == (1.0, 0, 0)


def test_what_the_scheduler_reports_is_counted():
    """Catches a method of vLLM whose empty drafts count, or whose statistics get lost."""
    told = []
    scheduler = types.SimpleNamespace(
        make_spec_decoding_stats=lambda stats, **given: told.append((stats, *given.values()))
    )
    watch = watch_of(scheduler)
    watch.begin()
    watch.sums["steps"] += 3
    for num_drafted, num_accepted in ((5, 2), (0, 0), (5, 0)):
        given = {"num_draft_tokens": num_drafted, "num_accepted_tokens": num_accepted}
        scheduler.make_spec_decoding_stats("stats", **given, request_id="0")
    counts = {"steps": 3, "drafts": 2, "drafted": 10, "accepted": 2, "passes": 10, "longest": 2}
    assert watch.end(1.0) == counts
    assert told == [("stats", 5, 2, "0"), ("stats", 0, 0, "0"), ("stats", 5, 0, "0")]
    assert watch.rounds is None


def test_the_warm_up_is_not_counted_and_methods_take_turns():
    order, speeds = [], iter([9.0, 9.0, 1.0, 0.5, 1.0, 0.5])

    def contender(name):
        def ask(*asked):
            for _ in range(2):
                order.append((name, *asked))
                yield None
            order.append((name, "ends"))
            yield made_up(next(speeds), [[1]])

        return ask

    bar = types.SimpleNamespace(update=lambda: None, set_description=lambda text: None)
    contenders = {name: contender(name) for name in ("none", "x")}
    runs = bench.measure_point(contenders, 4, 2, 12, bar)
    turns = [("none", 4, 12), ("x", 4, 12)] * 2 + [("none", "ends"), ("x", "ends")]
    assert order == turns * 3
    seconds = {name: [run.seconds for run in found] for name, found in runs.items()}
    assert seconds == {"none": [1.0, 1.0], "x": [0.5, 0.5]}


class FakeEngine:
    """Request i answers (i + 1) % 3 + 1 tokens, one per step."""

    def __init__(self):
        self.running, self.in_flight = {}, []
        self.llm_engine = self

    def add_request(self, request_id, prompt, params):
        assert prompt == {"prompt_token_ids": [int(request_id) % 2]}  # the prompts come again
        self.running[request_id] = 0

    def step(self):
        self.in_flight.append(len(self.running))
        outputs = []
        for request_id in list(self.running):
            self.running[request_id] += 1
            num_tokens = self.running[request_id]
            finished = num_tokens == (int(request_id) + 1) % 3 + 1
            if finished:
                del self.running[request_id]
            outputs.append(
                types.SimpleNamespace(
                    request_id=f"{request_id}-abc",
                    finished=finished,
                    prompt_token_ids=[int(request_id) % 2],
                    outputs=[types.SimpleNamespace(token_ids=[int(request_id)] * num_tokens)],
                )
            )
        return outputs


def loop(monkeypatch, rounds, pause=lambda: None):
    stub = types.SimpleNamespace(SamplingParams=lambda **given: given)
    monkeypatch.setitem(sys.modules, "vllm", stub)
    slept = []
    watch = types.SimpleNamespace(
        begin=lambda: None,
        stood_still=slept.append,
        sums=Sums(float),
        end=lambda seconds: watch.sums,
        rounds=rounds,
    )
    llm, prompts = FakeEngine(), [{"prompt_token_ids": [i]} for i in (0, 1)]
    turns = closed_loop.closed_loop(llm, watch, prompts, 50, concurrency=4, num_requests=9)
    while (run := next(turns)) is None:
        pause()
    assert next(turns, "no more") == "no more"
    return llm, run, slept


def test_the_turns_of_others_do_not_count(monkeypatch):
    """Catches throughput and latencies over what an engine has waited, and a planner misled."""
    now = [100.0]
    monkeypatch.setattr(closed_loop.time, "perf_counter", lambda: now[0])
    step = FakeEngine.step

    def slow_step(self):
        now[0] += 0.125
        return step(self)

    monkeypatch.setattr(FakeEngine, "step", slow_step)
    llm, run, slept = loop(monkeypatch, None, lambda: now.__setitem__(0, now[0] + 5.0))
    num_steps = len(llm.in_flight)
    assert run.seconds == 0.125 * num_steps
    assert run.sums["steps"] == num_steps
    assert slept == [5.0] * ((num_steps - 1) // 2)  # a turn is two steps
    assert {s.ttft_ms for s in run.served} == {125.0}
    assert [s.latency_ms for s in run.served] == [125.0 * s.num_tokens for s in run.served]


def test_a_request_that_ends_is_replaced_at_once(monkeypatch):
    """Catches batches that drain, and answers in the order in which they end."""
    llm, run, _ = loop(monkeypatch, None)
    assert [s.token_ids for s in run.served] == [[i] * ((i + 1) % 3 + 1) for i in range(9)]
    assert llm.in_flight == [4, 4, 4, 4, 1, 1]  # after the third step none is left to start
    assert not any(s.rounds for s in run.served)
    assert [s.num_tokens for s in run.served] == [2, 3, 1] * 3
    assert [len(s.step_ms) for s in run.served] == [2, 3, 1] * 3


def test_rounds_without_a_draft_are_put_between():
    """Catches a trajectory that ends early, or that has tokens twice."""
    answer = [7, 1, 2, 3, 8, 4, 5, 6]  # behind 3 tokens
    rounds = [
        namedtuple("Round", "drafted emitted num_accepted known_len confidences")(*fields)
        for fields in (
            ([1, 2, 6], [1, 2, 3], 2, 4, [0.9]),
            ([4, 9], [4, 5], 1, 8, [0.9, 0.9]),
        )
    ]
    assert closed_loop.whole_trajectory(rounds, 3, answer) == [
        TracedRound([], [], [7]),
        TracedRound([1, 2], [6], [3], num_copied=1),
        TracedRound([], [], [8]),
        TracedRound([4], [9], [5]),
        TracedRound([], [], [6]),
    ]
    assert [r.bonus for r in closed_loop.whole_trajectory([], 3, answer)] == [[i] for i in answer]


def test_rounds_end_where_the_answer_ends():
    """What the target adds after an accepted stop token is dropped by the engine; so do we."""
    rounds = [
        types.SimpleNamespace(
            drafted=drafted,
            emitted=emitted,
            num_accepted=len(emitted) - 1,
            known_len=known_len,
            confidences=drafted,
        )
        for drafted, emitted, known_len in (([6, 7, 8], [6, 9], 4), ([1, 2], [1, 2, 4], 6))
    ]
    assert closed_loop.whole_trajectory(rounds, 3, [5, 6, 9, 1, 2]) == [
        TracedRound([], [], [5]),
        TracedRound([6], [7, 8], [9]),
        TracedRound([1, 2], [], []),
    ]


def test_methods_cover_all_policies_and_say_what_load_does():
    """Catches a policy that cannot be chosen, and a default of load_aware that creeps in."""
    configs = bench.methods("my-drafter")
    assert set(POLICIES) < set(configs)
    ours = {name: c for name, c in configs.items() if c and c["method"] == "failfast"}
    assert all(type(c["load_aware"]) is bool and c["model"] == "my-drafter" for c in ours.values())
    assert ours["failfast"]["load_aware"] is FailFastConfig.from_user({}).load_aware
    assert not ours["fixed"]["load_aware"]
    for config in ours.values():
        FailFastConfig.from_user(config)  # raises where keys do not go together
    fixed = bench.with_settings("fixed:k=8", configs)
    assert fixed == {**configs["fixed"], "num_speculative_tokens": 8}
    for name in bench.DEFAULT_METHODS:
        assert bench.with_settings(name, configs)


def test_tables():
    none, other = made_up(1.0, [[1, 2]]), made_up(0.5, [[1, 2]])
    rows = [bench.make_row("none", 1, [none], [none], ["a"])]
    rows += [bench.make_row("x", 1, [other], [none], ["a"])]
    *_, speedups, figures = report.report({"provenance": {}, "rows": rows}).split("\n\n")
    assert speedups.splitlines() == [
        "| concurrency | none, tokens/s | x |",
        "| --- | --- | --- |",
        "| 1 | 2 | 2.00x |",
    ]
    last = figures.splitlines()[-1]
    assert last.startswith("| 1 | x | 4 | 2.00x | ")
    assert last.endswith(" | 100.0% |")
    rows[1]["ttft_p50_ms"] = None
    assert "-" in report.full_table(rows)[1][1]


def test_milliseconds_per_step():
    """Catches means of means, and zeros where nothing was timed."""
    times = [
        {"steps": 2, "draft_ms": 8.0, "own_ms": 1.0, "verify_ms": 4.0, "other_ms": 0.0},
        {"steps": 8, "draft_ms": 12.0, "own_ms": 1.0, "verify_ms": 6.0, "other_ms": 5.0},
    ]
    runs = [made_up(1.0, [[1, 2]], **each) for each in times]
    row = bench.make_row("x", 1, runs, runs, ["a"])
    names = ("draft_ms", "own_ms", "verify_ms", "other_ms")
    assert [row[name] for name in names] == [2.0, 0.2, 1.0, 0.5]
    assert report.full_table([row])[1][0][-5:-1] == ["2.00", "0.20", "1.00", "0.50"]
    runs = [made_up(1.0, [[1, 2]])]
    untimed = bench.make_row("x", 1, runs, runs, ["a"])
    assert report.full_table([untimed])[1][0][-5:-1] == ["-"] * 4


class FakeProcess:
    """In place of an engine's process: all answers at once, in the second turn."""

    running, started = [], []

    def __init__(self, name, config, engine_args, prompts, max_tokens):
        FakeProcess.running.append(name)
        FakeProcess.started.append(list(FakeProcess.running))

    def __call__(self, concurrency, num_requests):
        yield None
        yield made_up(1.0, [[1, 2]] * num_requests)

    def close(self):
        FakeProcess.running.pop()


@pytest.fixture
def fake_processes(monkeypatch):
    monkeypatch.setattr(FakeProcess, "running", [])
    monkeypatch.setattr(FakeProcess, "started", [])
    monkeypatch.setattr(bench, "EngineProcess", FakeProcess)
    return FakeProcess


def bench_on(monkeypatch, device, argv):
    """The exit code of a run with fake engines on a device of this type."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(current_platform, "device_type", device)
    monkeypatch.setattr(report, "device", lambda: device)
    small = ["--repeats", "1", "--requests-per-point", "2", "--concurrency", "1", "2"]
    return cli.main(["bench", "--methods", "ngram", "failfast", *small, *argv])


def test_one_gpu_holds_one_engine(tmp_path, monkeypatch, fake_processes):
    """Catches a GPU's memory cut into parts that no model fits into, and points that go missing."""
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "found.json"
    argv = ["--target", str(tmp_path), "--json", str(path)]
    assert bench_on(monkeypatch, "cuda", argv) == 0
    names = [["none"], ["ngram"], ["failfast"]]
    assert fake_processes.started == names
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["provenance"]["engines"] == "one after another"
    rows = [(row["concurrency"], row["method"]) for row in found["rows"]]
    assert rows == [(c, name) for c in (1, 2) for (name,) in names]
    assert {row["speedup"] for row in found["rows"]} == {1.0}


def test_engines_on_a_cpu_take_turns(monkeypatch, fake_processes):
    """Catches methods that see different states of the machine."""
    assert bench_on(monkeypatch, "cpu", []) == 0
    assert fake_processes.started[-1] == ["none", "ngram", "failfast"]
    assert not fake_processes.running


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--methods", "failfats"], "unknown method 'failfats'; choose from none, ngram,"),
        (["--prompts", "{tmp}/none.jsonl"], "cannot read the prompts of"),
        (["--prompts", "{tmp}/bad.jsonl"], "bad.jsonl, line 2 must hold"),
        (["--prompts", "{tmp}/other.jsonl"], 'other.jsonl, line 3 must hold "messages"'),
        (["--prompts", "{tmp}/empty.jsonl"], "holds no prompts"),
        (["--json", "{tmp}"], "Is a directory"),
        (["--json", "{tmp}/bad.jsonl/x.json"], "File exists"),
        (["--html", "{tmp}/bad.jsonl/x.html"], "File exists"),
        (["--from", "{tmp}/none.json"], "No such file"),
        (["--from", "{tmp}/bad.jsonl"], "holds no results of `failfast bench`."),
        (["--from", "{tmp}/list.json"], "holds no results of `failfast bench`."),
        (["--from", "{tmp}/deep.json"], "holds no results of `failfast bench`."),
        (["--from", "{tmp}/huge.json"], "holds no results of `failfast bench`."),
        (["--prompts", "{tmp}/deep.json"], "deep.json, line 1 must hold"),
    ],
)
def test_bad_input_is_one_line(argv, message, tmp_path, capsys, monkeypatch):
    """Catches a mistake that is found only after minutes of measuring."""
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "other.jsonl").write_text('{"prompt": "a"}\n\n{"messages": []}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    row = {"method": "none", "concurrency": 1, "tokens_per_second": 10**400}
    (tmp_path / "huge.json").write_text(json.dumps({"provenance": {}, "rows": [row]}))
    monkeypatch.setattr(bench, "EngineProcess", None)
    argv = [each.replace("{tmp}", str(tmp_path)) for each in argv]
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["bench", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("failfast bench: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "argv", [["--concurrency", "4", "0"], ["--repeats", "0"], ["--num-prompts", "-3"]]
)
def test_counts_start_at_one(argv, capsys):
    """Catches a count that divides by zero, or that measures nothing."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *argv])
    assert stopped.value.code == 2
    assert f"must be a positive integer; got '{argv[-1]}'" in capsys.readouterr().err


def test_missing_matplotlib_is_one_line(tmp_path, capsys, monkeypatch):
    find = bench.importlib.util.find_spec
    monkeypatch.setattr(
        bench.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    assert cli.main(["bench", "--html", str(tmp_path / "found.html")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("target", [[], ["--target", "some/model"]])
def test_the_shipped_draft_model_is_for_the_shipped_target(target):
    """Catches a default that vLLM refuses, for another vocabulary."""
    args = cli._parser().parse_args(["bench", *target])
    bench.prepare(args)
    assert ("draft_model" in args.methods) == (not target)
    args = cli._parser().parse_args(["bench", *target, "--methods", "draft_model"])
    bench.prepare(args)
    assert args.methods == ["draft_model"]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A real run of two methods: its results, and the folder."""
    folder = tmp_path_factory.mktemp("bench")
    done = measure(folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done


def measure(folder):
    small = ["--num-prompts", "3", "--max-tokens", "40", "--repeats", "1"]
    asked = ["--methods", METHOD, "--concurrency", "1", "2", "--requests-per-point", "4"]
    files = ["--json", folder / "found.json", "--html", folder / "found.html"]
    command = [COMMAND, "bench", *small, *asked, *files]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_a_real_run_agrees_with_itself(real):
    """Catches figures that come from different runs, and counts that miss the drafter's rounds."""
    folder, done = real
    found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    facts = found["provenance"]
    assert facts["command"].startswith("failfast bench --num-prompts 3 ")
    assert facts["methods"] == ["none", METHOD]
    assert facts["target"] == "the shipped small pair"
    assert "/" not in facts["device"] + facts["vllm"]
    rows = {(row["method"], row["concurrency"]): row for row in found["rows"]}
    assert list(rows) == [(m, c) for c in (1, 2) for m in ("none", METHOD)]
    for (method, concurrency), row in rows.items():
        base = rows["none", concurrency]
        ratio = row["tokens_per_second"] / base["tokens_per_second"]
        assert row["speedup"] == pytest.approx(ratio, rel=0.01)
        assert row["speedups"] == [row["speedup"]]
        assert row["answers_equal_to_none"] == 1.0
        assert row["requests"] == 4
        slowest, fastest = row["tpot_p99_ms"], row["tpot_p50_ms"]
        assert 0 < fastest <= slowest < row["latency_p99_ms"]
        assert 0 < row["ttft_p50_ms"] < row["latency_p50_ms"]
        # requests overlap: their rates add up to at least the whole's
        assert row["tokens_per_second_per_request"] * concurrency > 0.9 * row["tokens_per_second"]
        if method == "none":
            assert (row["acceptance_length"], row["passes_per_round"], row["drafts"]) == (1, 0, 0)
            assert row["draft_ms"] is row["own_ms"] is None
            continue
        length = 1 + row["accepted_tokens"] / row["drafts"]
        assert row["acceptance_length"] == pytest.approx(length, abs=1e-3)
        assert row["acceptance_length"] > 1.5
        assert row["passes_per_round"] >= 1
        assert 0 < row["own_ms"] < row["draft_ms"]
        assert row["verify_ms"] > 0
        assert row["other_ms"] > 0  # also where engines take turns
        assert 0 < row["accepted_tokens"] <= row["drafted_tokens"]
    assert f"| 2 | {METHOD} | " in done.stdout
    assert "concurrency 1" not in done.stderr  # no progress bar without a terminal


def test_the_page_of_earlier_results_is_the_page_of_the_run(real, tmp_path, capsys):
    """Catches a page that needs more than the JSON holds, and engines that start for it."""
    folder, done = real
    path = tmp_path / "again.html"
    assert cli.main(["bench", "--from", str(folder / "found.json"), "--html", str(path)]) == 0
    assert capsys.readouterr().out == done.stdout
    pages = [each.read_text(encoding="utf-8") for each in (folder / "found.html", path)]
    pictures = [page.count("<img ") for page in pages]
    assert pictures == [1, 1]
    tables = [re.sub('src="[^"]*"', "", page) for page in pages]  # an SVG has a time and random ids
    assert tables[0] == tables[1]


def test_an_engine_that_cannot_start_says_why():
    """Catches a parent that waits for ever, or shows a traceback of pickles."""
    with pytest.raises(ValueError, match=r"the engine of 'x' failed: .*nowhere"):
        closed_loop.EngineProcess("x", None, {"model": "/nowhere"}, [], 5)


def test_an_engine_that_died_is_named():
    dead = object.__new__(closed_loop.EngineProcess)
    dead.name, (dead._pipe, theirs) = "x", multiprocessing.Pipe()
    theirs.close()
    with pytest.raises(ValueError, match="the engine of 'x' died"):
        next(dead(1, 2))


def test_points_are_written_as_they_are_measured(tmp_path, monkeypatch, fake_processes):
    """Catches a killed run that has nothing to show."""
    path = tmp_path / "found.json"
    argv = ["bench", "--methods", "failfast", "--repeats", "1", "--requests-per-point", "2"]
    argv += ["--json", str(path), "--concurrency", "1", "2"]
    point, calls = bench.measure_point, count()

    def measure_point(*args):
        if next(calls):
            raise KeyboardInterrupt
        return point(*args)

    monkeypatch.setattr(bench, "measure_point", measure_point)
    assert cli.main(argv) == 130
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [(row["concurrency"], row["method"]) for row in rows] == [(1, "none"), (1, "failfast")]


def test_what_was_not_measured_is_null():
    """Catches nan, which is no JSON: answers of one token have no time per further token."""
    runs = [made_up(1.0, [[1]])]
    row = bench.make_row("x", 1, runs, runs, ["a"])
    assert (row["tpot_p50_ms"], row["tpot_p99_ms"]) == (None, None)
    json.dumps(row, allow_nan=False)
