"""What it takes to look for copies in a step: `python benchmarks/copy_lane.py [--json FILE]`.

The texts are drawn token by token: of 50,000 ids (hardly anything repeats itself) or of 200 (every
sequence finds a match, and its copy is cut out, too). Nothing is kept between steps, so a step
costs the same whatever came before. Set OMP_NUM_THREADS=1 for one thread.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from failfast_vllm.drafting.copying import OwnText
from failfast_vllm.drafting.records import DraftStep
from failfast_vllm.tools.report import provenance

BATCHES, CONTEXTS, ALPHABETS = (1, 8, 64), (512, 8192), (50_000, 200)
REPEATS, LONGEST = 30, 60


def step(num_seqs: int, context: int, alphabet: int, device: torch.device) -> DraftStep:
    rng = np.random.default_rng(0)
    lens = np.full(num_seqs, context)
    table = torch.from_numpy(rng.integers(0, alphabet, (num_seqs, context), dtype=np.int32))
    return DraftStep(
        req_ids=[str(i) for i in range(num_seqs)],
        token_ids=table.to(device),
        slots=np.arange(num_seqs),
        block_table=torch.empty(num_seqs, 0, dtype=torch.int32, device=device),
        known_lens=lens,
        committed_lens=0 * lens,
        final_lens=0 * lens,
        max_draft_lens=0 * lens + LONGEST,
        draft_budget=512,
        stops_at_eos=lens > 0,
        min_confidences=np.zeros(num_seqs, dtype=np.float32),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lane, rows = OwnText(50_000, device), []
    for alphabet in ALPHABETS:
        for num_seqs in BATCHES:
            for context in CONTEXTS:
                asked, times = step(num_seqs, context, alphabet, device), []
                for _ in range(REPEATS):
                    began = time.perf_counter()
                    found = lane.find(asked)
                    times.append((time.perf_counter() - began) * 1e3)
                row = {
                    "sequences": num_seqs,
                    "context": context,
                    "matches": int((found.match_lens > 0).sum()),
                    "ms": round(statistics.median(times), 4),
                }
                rows.append(row)
                print(row, flush=True)
    if args.json:
        args.json.write_text(
            json.dumps({"provenance": provenance(), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
