"""What the causal path search (`drafting/path_search.py`) does for the small pair, and its cost.

One pass of masks, without a cache; the draft is the best token of each mask, or the best path
through their candidates. Drafts are checked against the target's greedy answers. 3-grams are
counted in all prompts and answers so far, as a server does, or in those of the request alone.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from evaluate import answered
from failfast_vllm.drafting.path_search import MAX_CANDIDATES, PathSearch
from failfast_vllm.drafting.records import UNKNOWN
from train import MODELS_DIR

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))
from independent import IndependentDrafter

METHODS = ("best of each", "path, all text", "path, own text")


def see(search: PathSearch, known: list[int], num_new: int) -> None:
    """Count the last `num_new` tokens."""
    padded = [UNKNOWN, UNKNOWN, *known]
    search.trigrams.see(
        np.array([padded[i : i + 3] for i in range(len(known) - num_new, len(known))])
    )


def draft(drafter: IndependentDrafter, known: list[int], num_masks: int) -> torch.Tensor:
    """The masks' probabilities, [num_masks, num_draftable_tokens]."""
    first = len(known) - drafter.logit_shift
    logits = drafter.logits(known + [drafter.mask_token_id] * num_masks)
    logits = logits[first : first + num_masks, : drafter.num_draftable_tokens].clone()
    if drafter.mask_token_id < drafter.num_draftable_tokens:
        logits[:, drafter.mask_token_id] = -torch.inf
    return logits.softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-prompts", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, prompts, answers = answered(args.num_prompts)
    drafter = IndependentDrafter(MODELS_DIR / "drafter", len(tokenizer))
    for num_masks in (10, 16):
        valid = np.ones((1, num_masks), dtype=bool)
        for method in METHODS:
            search, rounds, tokens, seconds = PathSearch(), 0, 0, 0.0
            for prompt, answer in zip(prompts, answers, strict=True):
                if method == "path, own text":
                    search = PathSearch()
                known, end = list(prompt.ids), len(prompt.ids) + len(answer)
                see(search, known, len(known))
                while len(known) < end:
                    probabilities = draft(drafter, known, num_masks)
                    drafted = probabilities.argmax(-1).tolist()
                    if method != "best of each":
                        began = time.perf_counter()
                        top = probabilities.topk(MAX_CANDIDATES)
                        before = np.array([known[-2:]])
                        path = search.best(before, *(x.numpy()[None] for x in top[::-1]), valid)
                        drafted = path.token_ids[0].tolist()
                        seconds += time.perf_counter() - began
                    rest = answer[len(known) - len(prompt.ids) :]
                    right = [a == b for a, b in zip(drafted, rest, strict=False)]
                    emitted = rest[: (*right, False).index(False) + 1]
                    known += emitted
                    see(search, known, len(emitted))
                    rounds += 1
                tokens += len(answer)
            print(
                f"{num_masks} masks, {method:14} {len(prompts)} prompts, {rounds} rounds: "
                f"{tokens / rounds:.2f} tokens per round, {seconds / rounds * 1e3:.2f} ms of search"
            )


if __name__ == "__main__":
    main()
