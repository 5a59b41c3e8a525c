"""Find the launch configurations of the Triton kernels and write them to `launch_table.py`.

Needs a CUDA device and has not been run on one: the committed table is chosen by hand. Every
configuration must first agree with the reference; those that do not compile are left out. A class
gets the configuration with the least geometric mean over its shapes.

    python benchmarks/tune_kernels.py            # prints what it would write
    python benchmarks/tune_kernels.py --write
"""

import argparse
import itertools
import math
import pprint
from pathlib import Path

import torch

from cuda_timing import interleaved_us, num_copies, provenance, require_cuda
from failfast_kernels import block_attention, confidence, launch_table, reference
from failfast_kernels.launch_table import AttentionLaunch, ConfidenceLaunch

MARK = "# Below this line `benchmarks/tune_kernels.py` writes.\n"
GROUP_SIZE, NUM_KV_HEADS, PAGE_SIZE, BLOCK = 6, 2, 128, 32
# packed rows per tile -> rows of a sequence that fill it, in heads of a group of 6
ROWS = {16: 2, 32: 5, 64: 10, 128: 42}
SEQUENCES = [(1, 1024), (8, 2048), (32, 2048)]  # (number of them, prefix)
TOLERANCES = {2: 2e-2, 4: 1e-4}  # by bytes per element; outputs are of order 1
DTYPES = {2: torch.bfloat16, 4: torch.float32}


def attention_calls(head_dim, size, block_m):
    """[(callable of a copy's index, number of copies)] over the shapes of a class."""
    dtype = DTYPES[size]
    for num_seqs, prefix in SEQUENCES:
        num_rows = num_seqs * ROWS[block_m]

        def random(*shape, dtype=dtype):
            return torch.randn(*shape, device="cuda", dtype=dtype)

        pages = prefix // PAGE_SIZE
        num_bytes = num_seqs * prefix * NUM_KV_HEADS * 2 * head_dim * size
        copies = num_copies(num_bytes)
        caches = random(copies, num_seqs * pages, PAGE_SIZE, NUM_KV_HEADS, 2 * head_dim)
        caches = caches.transpose(2, 3)
        query = random(num_rows, NUM_KV_HEADS * GROUP_SIZE, head_dim)
        key, value = random(2, num_rows, NUM_KV_HEADS, head_dim)
        table = torch.randperm(num_seqs * pages, device="cuda").int().view(num_seqs, pages)
        committed = torch.full((num_seqs,), prefix, device="cuda")
        starts = torch.arange(num_seqs + 1, device="cuda") * ROWS[block_m]

        def call(
            i,
            home=block_attention,
            rows=(query, key, value),
            caches=caches,
            batch=(table, committed, starts),
        ):
            return home.block_diffusion_attention(*rows, caches[i], *batch, head_dim**-0.5, BLOCK)

        yield call, copies


def score(calls, agrees):
    """Geometric mean of microseconds, or None where the configuration fails."""
    logs = []
    for call, copies in calls:
        try:
            if not agrees(call):
                return None
            us = interleaved_us({"": call}, copies, repeats=20)[""]
        except Exception as error:  # too much shared memory, too many registers: no candidate
            print(f"    {type(error).__name__}")
            return None
        logs.append(math.log(us))
    return math.exp(sum(logs) / len(logs))


def tune(table, key, candidates, calls, agrees):
    """Leave the best of `candidates` in `table[key]`."""
    scores = {}
    for candidate in candidates:
        table[key] = candidate
        us = score(calls, agrees)
        print(f"  {key} {candidate}: {us}", flush=True)
        if us is not None:
            scores[candidate] = us
    if not scores:
        raise SystemExit(f"no configuration of {key} works")
    table[key] = min(scores, key=scores.__getitem__)


def tune_attention():
    for key in list(launch_table.ATTENTION):
        head_dim, size, block_m = key

        def agrees(call, size=size):
            expected = call(0, home=reference)
            error = (call(0).float() - expected.float()).abs().max()
            return float(error) <= TOLERANCES[size]

        candidates = [
            AttentionLaunch(*c) for c in itertools.product((16, 32, 64, 128), (4, 8), (1, 2, 3, 4))
        ]
        calls = list(attention_calls(head_dim, size, block_m))
        tune(launch_table.ATTENTION, key, candidates, calls, agrees)


def tune_confidence():
    for size in list(launch_table.CONFIDENCE):
        calls = []
        for num_rows in (10, 64, 320):
            copies = num_copies(num_rows * 151_936 * size)
            logits = torch.randn(copies, num_rows, 151_936, device="cuda", dtype=DTYPES[size])

            def call(i, home=confidence, logits=logits):
                return home.confidence_argmax(logits[i], 151_665)

            calls.append((call, copies))

        def agrees(call):
            return torch.equal(call(0).token_ids, call(0, home=reference).token_ids)

        candidates = [
            ConfidenceLaunch(*c) for c in itertools.product((1024, 2048, 4096, 8192), (4, 8, 16))
        ]
        tune(launch_table.CONFIDENCE, size, candidates, calls, agrees)


def written():
    """The part of `launch_table.py` behind the mark."""
    facts = provenance()
    origin = f"tuned on {facts['device']}, triton {facts['triton']}, {facts['date']}"

    def literal(name, comment, value):
        return f"# {comment}\n{name} = {pprint.pformat(value, width=90, sort_dicts=False)}\n"

    return "\n".join(
        [
            f'PROVENANCE = "{origin}"\n',
            literal(
                "ATTENTION",
                "(head_dim class, bytes per element, packed rows per program)",
                launch_table.ATTENTION,
            ),
            literal("CONFIDENCE", "bytes per element", launch_table.CONFIDENCE),
            "# Programs that a launch should have before it stops splitting prefixes or columns.",
            f"TARGET_PROGRAMS = {launch_table.TARGET_PROGRAMS}",
            "# A shorter piece of a prefix is not worth a merge.",
            f"MIN_SPLIT_KEYS = {launch_table.MIN_SPLIT_KEYS}",
            "",
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="change launch_table.py")
    args = parser.parse_args()
    require_cuda()
    torch.manual_seed(0)
    tune_attention()
    tune_confidence()
    print(written())
    if args.write:
        path = Path(launch_table.__file__)
        head, _, _ = path.read_text(encoding="utf-8").partition(MARK)
        path.write_text(head + MARK + "\n" + written(), encoding="utf-8")


if __name__ == "__main__":
    main()
