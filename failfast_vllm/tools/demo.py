"""`failfast demo`: the same prompts without and with failfast, one at a time, in one process.

Batch size 1, so the speed-up is a speed-up of latency. In float32, because in bfloat16 verifying
many tokens at once rounds differently from decoding one, and a near-tie may flip an argmax.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from failfast_vllm.tools import offline
from failfast_vllm.tools.load_generator import Run, Watch, closed_loop
from failfast_vllm.tools.offline import Prompt, positive
from failfast_vllm.tools.report import check_writable
from failfast_vllm.tools.shipped import PROMPTS, check_shipped
from failfast_vllm.tools.version import device

SETTINGS = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 1}


class Comparison(NamedTuple):
    """Both sides of the demo."""

    prompts: list[Prompt]
    baseline: Run
    failfast: Run
    device: str
    tokenizer: Any

    @property
    def outputs_identical(self) -> bool:
        pairs = zip(self.baseline.served, self.failfast.served, strict=True)
        return all(a.token_ids == b.token_ids for a, b in pairs)

    def to_dict(self) -> dict[str, Any]:
        """A round verified a draft: not the prefill, nor a last single token."""
        baseline, failfast = self.baseline.tokens_per_second, self.failfast.tokens_per_second
        sums = self.failfast.sums
        rounds = max(1, sums["drafts"])
        return {
            "outputs_identical": self.outputs_identical,
            "speedup": failfast / baseline,
            "acceptance_length": 1 + sums["accepted"] / rounds,
            "passes_per_round": sums["passes"] / rounds,
            "longest_accepted": int(sums["longest"]),
            "tokens_per_second": {"baseline": baseline, "failfast": failfast},
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `failfast demo`."""
    count: dict[str, Any] = {"type": positive, "metavar": "N"}
    parser.add_argument("--num-prompts", default=6, help="default: 6", **count)
    parser.add_argument("--max-tokens", default=256, help="per answer; default: 256", **count)
    parser.add_argument("--record", type=Path, metavar="FILE.svg", help="write the replay here")


def run(args: argparse.Namespace) -> int:
    """Compare, and print both sides; returns 1 if the answers differ."""
    check_shipped("target", "drafter")
    if args.record:
        check_writable(args.record)
    # 5 M parameters: waiting for a second thread costs more than it computes
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with offline.engine_environment():
        result = compare(choose_prompts(PROMPTS, args.num_prompts), args.max_tokens)
    show(result, args)
    return 0 if result.outputs_identical else 1


def choose_prompts(path: Path, num_prompts: int) -> list[Prompt]:
    """At most `num_prompts` of a file's prompts, one of each task in turn."""
    by_task = defaultdict[str, list[Prompt]](list)
    for prompt in offline.read_prompts(path):
        by_task[prompt["task"]].append(prompt)
    turns = zip_longest(*by_task.values())
    return [prompt for turn in turns for prompt in turn if prompt][:num_prompts]


def compare(prompts: list[Prompt], max_tokens: int) -> Comparison:
    """Answer `prompts` without, then with failfast."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    runs = []
    with tqdm(total=6, unit="step", leave=False) as bar:
        for config in (None, {"method": "failfast"}):
            bar.set_description("failfast" if config else "baseline")
            with offline.engine(config, **SETTINGS) as llm:
                bar.update()
                tokenizer = llm.get_tokenizer()
                runs.append(_answer_all(llm, config, prompts, max_tokens, bar))
    return Comparison(prompts, runs[0], runs[1], device(), tokenizer)


def _answer_all(
    llm: Any, config: dict[str, Any] | None, prompts: list[Prompt], max_tokens: int, bar: Any
) -> Run:
    """One prompt at a time, after a first go that warms up (a CPU compiles per row count)."""
    watch = Watch(llm, config)
    encoded = [offline.encode(llm.get_tokenizer(), prompt) for prompt in prompts]
    for _ in range(2):
        *_, run = closed_loop(llm, watch, encoded, max_tokens, 1, len(prompts))
        bar.update()
    assert run is not None
    return run


def show(result: Comparison, args: argparse.Namespace) -> None:
    """Print the result, on a terminal behind a replay of both sides, and record that if asked."""
    is_live = sys.stdout.isatty() and not args.json
    if is_live or args.record:
        from rich.console import Console

        from failfast_vllm.tools.replay import Replay

        questions = [prompt["messages"][-1]["content"] for prompt in result.prompts]
        caption = f"replayed at the measured times; {SETTINGS['dtype']}, {result.device}"
        runs = {"without": result.baseline, "with failfast": result.failfast}
        replay = Replay(runs, questions, result.tokenizer, caption)
        if args.record:
            args.record.write_text(replay.record(), encoding="utf-8")
        if is_live:
            replay.play(Console())
    if args.json:
        print(json.dumps(result.to_dict()))
    else:
        print(*table(result), sep="\n")


def table(result: Comparison) -> Iterator[str]:
    """The figures of both sides."""
    num_tokens = sum(s.num_tokens for s in result.failfast.served)
    yield (
        f"{len(result.prompts)} prompts, {num_tokens} tokens, greedy, batch 1, "
        f"{SETTINGS['dtype']}, {result.device}"
    )
    figures = result.to_dict()
    rates = figures["tokens_per_second"]
    yield f"  tokens/s without        {rates['baseline']:.1f}"
    yield f"  tokens/s with failfast  {rates['failfast']:.1f}"
    yield f"  speed-up                {figures['speedup']:.2f} x"
    yield f"  acceptance length       {figures['acceptance_length']:.2f} tokens per round"
    yield f"  draft passes            {figures['passes_per_round']:.2f} per round"
    yield f"  longest accepted run    {figures['longest_accepted']} tokens"
    yield f"  outputs                 {'identical' if result.outputs_identical else 'DIFFERENT'}"
