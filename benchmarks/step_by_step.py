"""What failfast costs where drafts hardly pay: engines with and without it take turns step by step.

    python benchmarks/long_prompts.py 3200 --shared --count 32 > long.jsonl
    python benchmarks/step_by_step.py --prompts long.jsonl --max-model-len 4096 --json found.json

`failfast bench` compares whole runs; on a machine whose speed changes within seconds two engines
that are alike differ there by as much as is asked about. Here each engine answers the same requests
at once, one step after a step of the others, and each step is timed. Two of the engines are alike:
what they differ by is noise. Prompts are cached, as is vLLM's default: after a first round, which
does not count, a round is nearly all decoding.
"""

import argparse
import contextlib
import itertools
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from failfast_vllm.tools.load_generator import Watch
from failfast_vllm.tools.offline import encode, engine, engine_environment, positive, read_prompts
from failfast_vllm.tools.report import check_writable, provenance, save
from failfast_vllm.tools.shipped import PROMPTS, SHIPPED_PAIR

BASELINE = "none"


class Turns:
    """An engine that is asked for one step at a time."""

    def __init__(self, llm: Any, config: dict[str, Any] | None) -> None:
        self.engine, self.watch = llm.llm_engine, Watch(llm, config)
        self.answers: dict[str, list[int]] = {}
        self.left, self.seconds = time.perf_counter(), 0.0

    def ask(self, prompts: Sequence[Any], params: Any) -> None:
        self.answers.clear()
        self.watch.begin()
        self.seconds = 0.0
        for i, prompt in enumerate(prompts):
            self.engine.add_request(str(i), prompt, params)

    def step(self) -> bool:
        """Returns whether anything is left to answer."""
        if not self.engine.has_unfinished_requests():
            return False
        began = time.perf_counter()
        self.watch.stood_still(began - self.left)
        for output in self.engine.step():
            if output.finished:
                self.answers[output.request_id] = list(output.outputs[0].token_ids)
        self.left = time.perf_counter()
        self.seconds += self.left - began
        return True


def one_round(engines: dict[str, Turns], prompts: Sequence[Any], params: Any) -> None:
    """All engines answer `prompts` at once, each step in another order: who goes first differs."""
    for turns in engines.values():
        turns.ask(prompts, params)
    order = random.Random(0)
    while sum(turns.step() for turns in order.sample(list(engines.values()), len(engines))):
        pass


def compare(
    engines: dict[str, Turns], prompts: Sequence[Any], num_seqs: int, repeats: int, max_tokens: int
) -> dict[str, Any]:
    """Times of the engines for the same answers of `num_seqs` requests at once, against none's."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    asked = list(itertools.islice(itertools.cycle(prompts), num_seqs))
    found: dict[str, Any] = {
        name: {"speedups": [], "ms": [], "drafts": 0, "accepted": 0, "different_answers": 0}
        for name in engines
    }
    for number in range(repeats + 1):
        one_round(engines, asked, params)
        if number == 0:
            continue
        base = engines[BASELINE]
        for method, turns in engines.items():
            each = found[method]
            each["speedups"].append(round(base.seconds / turns.seconds, 4))
            each["ms"].append(round(turns.seconds * 1e3, 1))
            for name in ("drafts", "accepted"):
                each[name] += int(turns.watch.sums[name])
            each["different_answers"] += sum(
                turns.answers[i] != base.answers[i] for i in base.answers
            )
    for each in found.values():
        each["speedup"] = round(statistics.median(each["speedups"]), 3)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--concurrency", type=positive, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--max-tokens", type=positive, default=100)
    parser.add_argument("--max-model-len", type=positive, default=2048)
    parser.add_argument("--target", help="default: the shipped one")
    parser.add_argument("--drafter", help="default: the target's own")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.json:
        check_writable(args.json)
    configs = {
        BASELINE: None,
        "none again": None,
        "failfast": {"method": "failfast", **({"model": args.drafter} if args.drafter else {})},
    }
    with engine_environment(), contextlib.ExitStack() as stack:
        settings = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": args.max_model_len,
            "max_num_seqs": max(args.concurrency),
            "enable_prefix_caching": True,
        }
        model = {"model": args.target} if args.target else {}
        engines = {}
        for name, config in configs.items():
            llm = stack.enter_context(engine(config, **model, **settings))
            engines[name] = Turns(llm, config)
        tokenizer = llm.get_tokenizer()
        prompts = [encode(tokenizer, prompt) for prompt in read_prompts(args.prompts)]
        facts = provenance(
            target=args.target or SHIPPED_PAIR,
            prompts=args.prompts.name,
            answers_of=args.max_tokens,
            **settings,
        )
        points: dict[str, Any] = {}
        for num_seqs in args.concurrency:
            point = compare(engines, prompts, num_seqs, args.repeats, args.max_tokens)
            points[str(num_seqs)] = point
            print(
                num_seqs,
                {name: (x["speedup"], x["speedups"]) for name, x in point.items()},
                flush=True,
            )
            if args.json:
                save({"provenance": facts, "points": points}, args.json)


if __name__ == "__main__":
    main()
