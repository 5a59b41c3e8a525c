"""Whether sampling keeps the target's distribution: every sampled token against the target's own.

Answers are sampled at temperature 1 through drafts. For each token the target's distribution after
the tokens before it is computed again, by transformers. The token's place in it, the likeliest
tokens first, is a number from 0 to 1: if the token was drawn from that distribution, the number is
uniform, and independent of all others. An acceptance that favours drafts has too many low numbers.

Counted are the tokens where more than one was likely: the others would hide a bias.
"""

import argparse
import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from failfast_vllm.config import MODELS_DIR
from failfast_vllm.drafting.interfaces import Planner
from failfast_vllm.drafting.records import FirstPass, Lengths
from failfast_vllm.tools.offline import (
    adapter,
    encode,
    engine,
    engine_environment,
    positive,
    read_prompts,
)
from failfast_vllm.tools.report import check_writable, provenance
from failfast_vllm.tools.shipped import PROMPTS, SHIPPED_PAIR

METHODS = {
    "drafter": {"method": "failfast", "load_aware": False},  # drafts for every sequence and step
    "copies": {"method": "failfast", "model": None},
}
SETTINGS = {"dtype": "float32", "enforce_eager": True}
LONGEST_COPY = 4
NUM_BINS = 20
SURE = 0.9  # share of the likeliest token beyond which nothing was open
ROUND = 512  # answers between two checkpoints
ROWS = 16  # answers whose distributions are computed at once
COUNTED = {
    "drafted": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
}


class CopiesAlways(Planner):
    """Copies wherever a token stood before, whether it pays or not."""

    postpones_commits = True  # there is no drafter to commit to

    def first(self, asked: FirstPass) -> tuple[Lengths, Lengths]:
        copied = np.where(asked.match_lens > 0, np.minimum(asked.wanted, LONGEST_COPY), 0)
        return np.zeros_like(asked.wanted), copied


@contextlib.contextmanager
def always_drafting(config: dict[str, Any], **settings: Any) -> Iterator[Any]:
    """An engine with one of `METHODS`, which drafts in every step, whether it pays or not."""
    with engine(config, **settings) as llm:
        if config == METHODS["copies"]:
            adapter(llm).drafter.planner = CopiesAlways(draft_increment=1)
        yield llm


def places(
    model: Any, prompt: list[int], answers: list[list[int]], rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """[num_open] of each open token of `answers` to a prompt its place; uniform if all is right."""
    width = max(map(len, answers))
    ids = torch.zeros(len(answers), len(prompt) + width, dtype=torch.int64)
    real = torch.zeros(len(answers), width, dtype=torch.bool)
    for row, answer in enumerate(answers):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        real[row, : len(answer)] = True
    with torch.inference_mode():
        logits = model(input_ids=ids, logits_to_keep=width + 1).logits[:, :-1]
    shares = logits[real].double().softmax(dim=-1)
    is_open = shares.amax(dim=1) < SURE
    shares, drawn_ids = shares[is_open], ids[:, len(prompt) :][real][is_open]
    drawn = shares.gather(1, drawn_ids[:, None])
    likelier = (shares * (shares > drawn)).sum(dim=1)
    as_likely = (shares * (shares == drawn)).sum(dim=1)
    return (likelier + torch.from_numpy(rng.random(len(likelier))) * as_likely).numpy()


def distance(counts: npt.NDArray[np.int64]) -> float:
    """Total variation between the places' histogram and the uniform distribution."""
    return float(np.abs(counts / counts.sum() - 1 / len(counts)).sum() / 2)


def chi_square_p(counts: npt.NDArray[np.int64]) -> float:
    """Upper tail of Pearson's statistic against the uniform distribution."""
    expected = counts.sum() / len(counts)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    half = torch.tensor([(len(counts) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def sample(config: dict[str, Any], num_tokens: int, concurrency: int) -> Iterator[dict[str, Any]]:
    """What was found so far, after each round of answers."""
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams

    model = AutoModelForCausalLM.from_pretrained(MODELS_DIR / "target", dtype=torch.float32).eval()
    settings: dict[str, Any] = {**SETTINGS, "max_num_seqs": concurrency}
    rng, counts = np.random.default_rng(0), np.zeros(NUM_BINS, dtype=np.int64)
    settings |= {"enable_prefix_caching": True, "disable_log_stats": False}
    with always_drafting(config, **settings) as llm:
        tokenizer = llm.get_tokenizer()
        prompts = [encode(tokenizer, p)["prompt_token_ids"] for p in read_prompts(PROMPTS)]
        params = SamplingParams(temperature=1.0, max_tokens=200)
        begins = num_sampled = 0
        while num_sampled < num_tokens:
            asked = [prompts[(begins + i // ROWS) % len(prompts)] for i in range(ROUND)]
            begins += ROUND // ROWS
            outputs = llm.generate(
                [{"prompt_token_ids": ids} for ids in asked], params, use_tqdm=False
            )
            answers = [list(output.outputs[0].token_ids) for output in outputs]
            num_sampled += sum(map(len, answers))
            for i in range(0, ROUND, ROWS):
                found = places(model, asked[i], answers[i : i + ROWS], rng)
                counts += np.histogram(found, bins=NUM_BINS, range=(0, 1))[0]
            totals = Counter[str]()
            for metric in llm.get_metrics():
                totals[metric.name] += getattr(metric, "value", 0)
            yield {
                "tokens": num_sampled,
                "open": int(counts.sum()),
                "total_variation": round(distance(counts), 5),
                "chi_square_p": round(chi_square_p(counts), 4),
                **{name: int(totals[metric]) for name, metric in COUNTED.items()},
            }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=positive, default=1_000_000)
    parser.add_argument("--concurrency", type=positive, default=16)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.json:
        check_writable(args.json)
    with engine_environment():
        facts = provenance(
            models=SHIPPED_PAIR,
            concurrency=args.concurrency,
            num_bins=NUM_BINS,
            methods={name: METHODS[name] for name in args.methods},
        )
        found = dict[str, Any]()
        for name in args.methods:
            for figures in sample(METHODS[name], args.tokens, args.concurrency):
                found[name] = figures
                print(name, figures, flush=True)
                if args.json:
                    result = {"provenance": facts, "found": found}
                    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
