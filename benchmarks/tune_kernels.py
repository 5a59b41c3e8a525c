"""Find the launch configurations of the Triton kernels and write them to `launch_table.py`.

Needs a CUDA device and has not been run on one: the committed table is chosen by hand. Every
configuration must first agree with the reference; those that do not compile are left out. A class
gets the configuration with the least geometric mean over its shapes. Where the time is over, what
was not reached stays as it was, and the written table says so.

    python benchmarks/tune_kernels.py            # prints what it would write
    python benchmarks/tune_kernels.py --write
    python benchmarks/tune_kernels.py --quick --seconds 90     # bfloat16, heads of 128

No setting, and so to be tried by hand: the sequence of each tile, which every program of every
layer finds by a binary search over `query_start_loc`, could be computed once per pass. Compare the
64 short sequences of SPLIT_SHAPES before and after.
"""

import argparse
import contextlib
import itertools
import math
import pprint
import textwrap
import time
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
# where the number of splits is decided: few and many sequences, short and long prefixes
SPLIT_SHAPES = [(1, 512), (1, 2048), (1, 16384), (8, 2048), (32, 2048), (64, 256), (64, 2048)]
TARGET_PROGRAMS = (64, 128, 132, 256, 264, 528)  # an H100 or H200 has 132 multiprocessors
SPLITS = ((1, 4, 16), (1, 2, 4, 8, 16))  # more classes: more to compile, less to write and read
MAIN = [(128, 2, 64), (128, 2, 128), (128, 2, 16)]  # of Qwen2.5-1.5B, ten rows first
TOLERANCES = {2: 2e-2, 4: 1e-4}  # by bytes per element; outputs are of order 1
DTYPES = {2: torch.bfloat16, 4: torch.float32}


def attention_calls(head_dim, size, block_m, sequences=SEQUENCES):
    """[(callable of a copy's index, number of copies)] over the shapes of a class."""
    dtype = DTYPES[size]
    for num_seqs, prefix in sequences:
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


def tune(table, key, candidates, calls, agrees, until):
    """Leave the best of `candidates` that had time in `table[key]`; returns whether all had."""
    own, scores = table[key], {}
    left = [own, *(c for c in candidates if c != own)]
    while left and time.monotonic() < until:
        candidate = table[key] = left.pop(0)
        us = score(calls, agrees)
        print(f"  {key} {candidate}: {us}", flush=True)
        if us is not None:
            scores[candidate] = us
    table[key] = own
    if scores:
        table[key] = min(scores, key=scores.__getitem__)
        print(f"{key}: {table[key]}, {scores[table[key]]:.2f} us; before: {scores.get(own)}")
    elif not left:
        raise SystemExit(f"no configuration of {key} works")
    return not left


def tune_attention(keys, candidates, until):
    """Returns the keys for which all candidates had time."""
    done = []
    for key in keys:
        head_dim, size, block_m = key

        def agrees(call, size=size):
            expected = call(0, home=reference)
            error = (call(0).float() - expected.float()).abs().max()
            return float(error) <= TOLERANCES[size]

        launches = [AttentionLaunch(*c) for c in itertools.product(*candidates)]
        calls = list(attention_calls(head_dim, size, block_m))
        if tune(launch_table.ATTENTION, key, launches, calls, agrees, until):
            done.append(key)
    return done


@contextlib.contextmanager
def splitting(target_programs, splits):
    """The launchers shall split for so many programs, into one of so many pieces."""
    before = launch_table.TARGET_PROGRAMS, block_attention.SPLITS
    launch_table.TARGET_PROGRAMS, block_attention.SPLITS = target_programs, splits
    try:
        yield
    finally:
        launch_table.TARGET_PROGRAMS, block_attention.SPLITS = before


def tune_splits(until):
    """Leave the best `TARGET_PROGRAMS` for the committed splits; returns whether all had time.

    Other splits are measured and printed; they stand in `block_attention.py`, not in the table.
    """
    calls = list(attention_calls(*MAIN[0], SPLIT_SHAPES))
    scores = {}
    own = launch_table.TARGET_PROGRAMS, block_attention.SPLITS
    settings = itertools.product(TARGET_PROGRAMS, SPLITS)
    for setting in [own, *(s for s in settings if s != own)]:
        if time.monotonic() >= until:
            break
        with splitting(*setting):
            times = [interleaved_us({"": call}, copies, repeats=20)[""] for call, copies in calls]
        scores[setting] = math.exp(sum(map(math.log, times)) / len(times))
        shapes = ", ".join(
            f"{seqs} x {prefix}: {us:.2f}"
            for (seqs, prefix), us in zip(SPLIT_SHAPES, times, strict=True)
        )
        programs, splits = setting
        mean = scores[setting]
        print(f"  {programs} programs, splits {splits}: {mean:.2f} us ({shapes})", flush=True)
    else:
        committed = [setting for setting in scores if setting[1] == own[1]]
        launch_table.TARGET_PROGRAMS = min(committed, key=scores.__getitem__)[0]
        return True
    return False


def tune_confidence(until):
    """Returns the element sizes for which all candidates had time."""
    done = []
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
        if tune(launch_table.CONFIDENCE, size, candidates, calls, agrees, until):
            done.append(size)
    return done


def written(tuned):
    """The part of `launch_table.py` behind the mark; `tuned` lists what had time for all of it."""
    facts = provenance()
    origin = f"{facts['device']}, triton {facts['triton']}, {facts['date'][:10]}"
    origin = f"tuned on {origin}: {', '.join(tuned) or 'nothing to the end'}"
    if len(tuned) < len(launch_table.ATTENTION) + len(launch_table.CONFIDENCE) + 1:
        origin += f"; the rest: {launch_table.PROVENANCE}"

    def literal(name, comment, value):
        return f"# {comment}\n{name} = {pprint.pformat(value, width=90, sort_dicts=False)}\n"

    return "\n".join(
        [
            f"PROVENANCE = (\n{textwrap.indent(pprint.pformat(origin, width=80), '    ')}\n)\n",
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
    parser.add_argument("--quick", action="store_true", help="bfloat16 with heads of 128 only")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no candidate after these")
    args = parser.parse_args()
    require_cuda()
    torch.manual_seed(0)
    began = time.monotonic()
    keys, candidates = list(launch_table.ATTENTION), ((16, 32, 64, 128), (4, 8), (1, 2, 3, 4))
    if args.quick:
        keys, candidates = MAIN, ((32, 64, 128), (4, 8), (2, 3))
    # what is left of a limit goes to the splits, whose kernels are few
    tuned = [
        f"attention {key}" for key in tune_attention(keys, candidates, began + 0.7 * args.seconds)
    ]
    if tune_splits(began + args.seconds):
        tuned.append("TARGET_PROGRAMS")
    if not args.quick:
        tuned += [f"confidence {size}" for size in tune_confidence(began + args.seconds)]
    text = written(tuned)
    print(text)
    if args.write:
        path = Path(launch_table.__file__)
        head, _, _ = path.read_text(encoding="utf-8").partition(MARK)
        path.write_text(head + MARK + "\n" + text, encoding="utf-8")


if __name__ == "__main__":
    main()
