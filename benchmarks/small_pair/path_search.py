"""Whether DiffuSpec's causal path search would earn its time on the small pair.

One pass of masks gives candidates per position. The draft is either the best of each, or the path
through them that maximises .5 log p(drafter) + .5 log p(3-gram) (arXiv 2510.02358: candidates up to
a mass of .8, at most 15; beam 3). The 3-grams are counted in the prompts and answers so far, as a
server could. Drafts are checked against the target's greedy answers.
"""

import argparse
import math
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoTokenizer

from evaluate import load_model, load_prompts, target_answers
from train import MODELS_DIR

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from independent import IndependentDrafter

MASS, MOST_CANDIDATES, BEAM, WEIGHT = 0.8, 15, 3, 0.5
SHARES = (0.6, 0.3, 0.1)  # of 3-gram, 2-gram and 1-gram


class Trigrams:
    """Interpolated counts of what was seen."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.counts: Counter[tuple[int, ...]] = Counter()

    def see(self, token_ids: list[int]) -> None:
        for n in (0, 1, 2, 3):
            self.counts.update(tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1))

    def log_probability(self, before: tuple[int, int], token_id: int) -> float:
        found = 0.0
        for share, context in zip(SHARES, (before, before[1:], ()), strict=True):
            seen = self.counts[context]
            found += share * self.counts[(*context, token_id)] / seen if seen else 0.0
        return math.log(found + 0.01 / self.vocab_size)


def best_of_each(probabilities: torch.Tensor) -> list[int]:
    found: list[int] = probabilities.argmax(-1).tolist()
    return found


def path(probabilities: torch.Tensor, known: list[int], trigrams: Trigrams) -> list[int]:
    """The best path through [num_masks, vocab_size]."""
    tops = probabilities.topk(MOST_CANDIDATES)
    sizes = ((tops.values.cumsum(-1) < MASS).sum(-1) + 1).clamp(max=MOST_CANDIDATES).tolist()
    beam = [(0.0, tuple(known[-2:]))]
    for size, ids, values in zip(sizes, tops.indices.tolist(), tops.values.tolist(), strict=True):
        grown = [
            (
                score
                + WEIGHT * math.log(p)
                + (1 - WEIGHT) * trigrams.log_probability(tokens[-2:], token_id),
                (*tokens, token_id),
            )
            for score, tokens in beam
            for token_id, p in zip(ids[:size], values[:size], strict=True)
        ]
        beam = sorted(grown, reverse=True)[:BEAM]
    return list(beam[0][1][2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-prompts", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODELS_DIR / "target")
    prompts = load_prompts(MODELS_DIR / "prompts.jsonl", tokenizer)
    prompts = prompts[:: max(1, len(prompts) // args.num_prompts)][: args.num_prompts]
    answers = target_answers(load_model(MODELS_DIR / "target"), tokenizer, prompts)
    drafter = IndependentDrafter(MODELS_DIR / "drafter", len(tokenizer))
    for num_masks in (10, 16):
        for name in ("best of each", "path search"):
            trigrams = Trigrams(len(tokenizer))
            rounds = tokens = 0
            seconds = 0.0
            for prompt, answer in zip(prompts, answers, strict=True):
                trigrams.see(prompt.ids)
                emitted = 0
                while emitted < len(answer):
                    known = prompt.ids + answer[:emitted]
                    logits = drafter.logits(known + [drafter.mask_token_id] * num_masks)
                    first = len(known) - drafter.logit_shift
                    logits = logits[first : first + num_masks, : len(tokenizer)].clone()
                    if drafter.mask_token_id < len(tokenizer):
                        logits[:, drafter.mask_token_id] = -torch.inf
                    probabilities = logits.softmax(-1)
                    began = time.perf_counter()
                    if name == "path search":
                        draft = path(probabilities, known, trigrams)
                    else:
                        draft = best_of_each(probabilities)
                    seconds += time.perf_counter() - began
                    right = [a == b for a, b in zip(draft, answer[emitted:], strict=False)]
                    accepted = (*right, False).index(False)
                    trigrams.see(known[-2:] + answer[emitted : emitted + accepted + 1])
                    emitted += accepted + 1
                    rounds += 1
                tokens += len(answer)
            print(
                f"{num_masks} masks, {name:12} {len(prompts)} prompts, {rounds} rounds: "
                f"{tokens / rounds:.2f} tokens per round, {seconds / rounds * 1e3:.2f} ms per round"
            )


if __name__ == "__main__":
    main()
