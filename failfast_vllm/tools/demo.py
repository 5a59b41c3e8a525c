"""`failfast demo`: the same prompts without and with failfast, one at a time, in one process.

Batch size 1, so the speed-up is a speed-up of latency. In float32, because in bfloat16 verifying
many tokens at once rounds differently from decoding one, and a near-tie may flip an argmax.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from failfast_vllm.config import MODELS_DIR
from failfast_vllm.tools.arguments import UsageError, add_answer_arguments, refusals
from failfast_vllm.tools.offline import (
    TracedRound,
    adapter,
    encode,
    engine,
    engine_environment,
    traced,
)
from failfast_vllm.tools.shipped import held_out_prompts

DTYPE = "float32"
GREEN, YELLOW, RED_STRUCK, DIM, RESET = "\033[32m", "\033[33m", "\033[2;9;31m", "\033[2m", "\033[0m"


class Prompt(NamedTuple):
    """A held-out question."""

    task: str
    messages: list[dict[str, str]]


class Answer(NamedTuple):
    """One greedy answer; `rounds` is empty without failfast."""

    token_ids: list[int]
    seconds: float
    rounds: list[TracedRound]


@dataclass(frozen=True)
class Comparison:
    """Both sides of the demo, and what follows from them."""

    prompts: list[Prompt]
    baseline: list[Answer]
    failfast: list[Answer]
    device: str
    tokenizer: Any

    @property
    def outputs_identical(self) -> bool:
        return [a.token_ids for a in self.baseline] == [a.token_ids for a in self.failfast]

    @property
    def rounds(self) -> list[TracedRound]:
        """Rounds in which the target verified a draft: not the prefill, nor a last single token."""
        return [r for answer in self.failfast for r in answer.rounds if r.num_drafted]

    @property
    def speedup(self) -> float:
        return _tokens_per_second(self.failfast) / _tokens_per_second(self.baseline)

    @property
    def acceptance_length(self) -> float:
        return _mean([r.num_emitted for r in self.rounds])

    @property
    def passes_per_round(self) -> float:
        return _mean([r.num_passes for r in self.rounds])

    @property
    def longest_accepted(self) -> int:
        return max((len(r.accepted) for r in self.rounds), default=0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "outputs_identical": self.outputs_identical,
            "speedup": self.speedup,
            "acceptance_length": self.acceptance_length,
            "passes_per_round": self.passes_per_round,
            "longest_accepted": self.longest_accepted,
            "tokens_per_second": {
                "baseline": _tokens_per_second(self.baseline),
                "failfast": _tokens_per_second(self.failfast),
            },
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `failfast demo`."""
    add_answer_arguments(parser)
    parser.add_argument("--target", type=Path, metavar="PATH", help="default: the shipped target")
    parser.add_argument("--drafter", type=Path, metavar="PATH", help="default: the target's own")


def run(args: argparse.Namespace) -> int:
    """Compare, and print both sides; returns 1 if the answers differ."""
    needed = [] if args.target else ["target"] if args.drafter else ["target", "drafter"]
    prompts = held_out_prompts(needed)
    for path in filter(None, (args.target, args.drafter)):
        if not (path / "config.json").is_file():
            raise UsageError(f"{path} has no config.json. Give a checkpoint directory.")
    target, drafter = args.target or MODELS_DIR / "target", args.drafter
    if not args.target:  # 5 M parameters: waiting for a second thread costs more than it computes
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    with engine_environment(), refusals():
        chosen = choose_prompts(prompts, args.num_prompts)
        result = compare(str(target), drafter and str(drafter), chosen, args.max_tokens)
    print(json.dumps(result.to_dict()) if args.json else render(result, sys.stdout))
    return 0 if result.outputs_identical else 1


def choose_prompts(path: Path, num_prompts: int) -> list[Prompt]:
    """`num_prompts` of a file's prompts, one of each task in turn; raises ValueError if short."""
    by_task: dict[str, list[Prompt]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        prompt = Prompt(entry["task"], entry["messages"])
        by_task.setdefault(prompt.task, []).append(prompt)
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*by_task.values()))
    prompts = [prompt for prompt in in_turn if prompt is not None]
    if num_prompts > len(prompts):
        raise ValueError(
            f"--num-prompts must be at most {len(prompts)}, what {path.name} holds; "
            f"got {num_prompts}."
        )
    return prompts[:num_prompts]


def compare(target: str, drafter: str | None, prompts: list[Prompt], max_tokens: int) -> Comparison:
    """Answer `prompts` without, then with failfast; raises ValueError where vLLM refuses."""
    import torch
    from tqdm import tqdm  # type: ignore[import-untyped]
    from vllm.platforms import current_platform

    speculative = {"method": "failfast", **({"model": drafter} if drafter else {})}
    with tqdm(total=2 * (2 * len(prompts) + 1), unit="step", leave=False) as bar:
        with _engine(target, None, bar) as llm:
            tokenizer = llm.get_tokenizer()
            baseline = _answer_all(llm, prompts, max_tokens, bar)
        with _engine(target, speculative, bar) as llm:
            failfast = _answer_all(llm, prompts, max_tokens, bar)
    device = str(current_platform.device_type)
    if device == "cpu":
        device = f"cpu (threads: {torch.get_num_threads()})"
    return Comparison(prompts, baseline, failfast, device, tokenizer)


@contextlib.contextmanager
def _engine(target: str, speculative_config: dict[str, Any] | None, bar: Any) -> Iterator[Any]:
    bar.set_description("failfast" if speculative_config else "baseline")
    settings = {"model": target, "dtype": DTYPE, "enforce_eager": True, "max_num_seqs": 1}
    with engine(speculative_config, **settings) as llm:
        bar.update()
        yield llm


def _answer_all(llm: Any, prompts: list[Prompt], max_tokens: int, bar: Any) -> list[Answer]:
    """One prompt at a time, after a first go that warms up (a CPU compiles per row count)."""
    from vllm import SamplingParams

    drafter = adapter(llm)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    tokenizer = llm.get_tokenizer()

    def answer(prompt: Prompt) -> Answer:
        encoded = encode(tokenizer, {"messages": prompt.messages})
        rounds: list[Any] = []
        if drafter is not None:
            drafter.stats.on_round = rounds.append
        began = time.perf_counter()
        (output,) = llm.generate([encoded], params, use_tqdm=False)
        seconds = time.perf_counter() - began
        token_ids = list(output.outputs[0].token_ids)
        bar.update()
        return Answer(token_ids, seconds, traced(rounds, len(token_ids)))

    for prompt in prompts:
        answer(prompt)
    return [answer(prompt) for prompt in prompts]


def record(target: str, prompts: list[Prompt], max_tokens: int, path: Path, with_ids: bool) -> None:
    """Answer `prompts` once with failfast, one at a time, into the trace `path`; as `compare`."""
    from tqdm import tqdm
    from vllm import SamplingParams

    speculative = {"method": "failfast", "trace": str(path), "trace_ids": with_ids}
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    with (
        tqdm(total=len(prompts) + 1, unit="step", leave=False) as bar,
        _engine(target, speculative, bar) as llm,
    ):
        for prompt in prompts:
            llm.chat([*prompt.messages], params, use_tqdm=False)
            bar.update()


def render(result: Comparison, stream: TextIO) -> str:
    """The report for people, coloured if `stream` shows colours."""
    return "\n".join((*_trajectory(result, use_color(stream)), "", *_table(result)))


def use_color(stream: TextIO) -> bool:
    """https://no-color.org, https://force-color.org, else whether it is a terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()


def _trajectory(result: Comparison, color: bool) -> Iterator[str]:
    """The answer with the median number of rounds, one line per round."""
    by_rounds = sorted(range(len(result.prompts)), key=lambda i: len(result.failfast[i].rounds))
    typical = by_rounds[len(by_rounds) // 2]
    prompt, answer = result.prompts[typical], result.failfast[typical]

    def text(token_ids: list[int]) -> str:
        decoded: str = result.tokenizer.decode(token_ids, skip_special_tokens=False)
        return decoded.replace("\n", "\\n")

    def paint(code: str, piece: str) -> str:
        return f"{code}{piece}{RESET}" if color and piece else piece

    question = prompt.messages[-1]["content"].replace("\n", "\\n")
    yield f"Question ({prompt.task}): {question}"
    yield "Answer, round by round: " + (
        f"{paint(GREEN, 'accepted')} {paint(YELLOW, 'bonus')} {paint(RED_STRUCK, 'rejected')}"
        if color
        else "accepted, [bonus], (number of rejected)"
    )
    yield paint(DIM, "round  draft  accepted")
    for i, r in enumerate(answer.rounds):
        line = paint(DIM, f"{i:>5}  {r.num_drafted:>5}  {len(r.accepted):>8}") + "  "
        line += paint(GREEN, text(r.accepted))
        if color:
            yield line + paint(YELLOW, text(r.bonus)) + paint(RED_STRUCK, text(r.rejected))
            continue
        line += f"[{text(r.bonus)}]" if r.bonus else ""
        yield line + (f" ({len(r.rejected)})" if r.rejected else "")


def _table(result: Comparison) -> Iterator[str]:
    num_tokens = sum(len(a.token_ids) for a in result.failfast)
    yield (
        f"{len(result.prompts)} prompts, {num_tokens} tokens, greedy, batch 1, "
        f"{DTYPE}, {result.device}"
    )
    for label, value in (
        ("tokens/s without", f"{_tokens_per_second(result.baseline):.1f}"),
        ("tokens/s with failfast", f"{_tokens_per_second(result.failfast):.1f}"),
        ("speed-up", f"{result.speedup:.2f} x"),
        ("acceptance length", f"{result.acceptance_length:.2f} tokens per round"),
        ("draft passes", f"{result.passes_per_round:.2f} per round"),
        ("longest accepted run", f"{result.longest_accepted} tokens"),
        ("outputs", "identical" if result.outputs_identical else "DIFFERENT"),
    ):
        yield f"  {label:<24}{value}"


def _tokens_per_second(answers: list[Answer]) -> float:
    return sum(len(a.token_ids) for a in answers) / sum(a.seconds for a in answers)


def _mean(values: list[int]) -> float:
    return sum(values) / len(values) if values else 0.0
