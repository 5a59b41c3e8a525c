"""A few launches of every kernel, each against its reference: what compute-sanitizer watches.

compute-sanitizer --tool memcheck python benchmarks/gpu/every_kernel.py
TRITON_INTERPRET=1 python benchmarks/gpu/every_kernel.py      # where there is no GPU
"""

import torch

from failfast_kernels import (
    block_attention,
    confidence,
    copy_match,
    copy_match_reference,
    launch_table,
    reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies the bit patterns of bfloat16 (triton-lang/triton#11584)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
ERROR = 3e-2  # outputs of order 1
# rows and prefixes of each sequence; a block and a bit, none, and a prefix of several pieces
CASES = [((10,), (96,)), ((5, 0, 34, 3), (64, 32, 0, 320))]
SPLITS = block_attention.SPLITS if DEVICE == "cuda" else (1, 4)  # the interpreter is slow
PADDING = 6  # rows behind the last sequence's, as in a captured graph


def attention(lens, prefixes, num_splits, pages=16):
    total, seqs = sum(lens), len(lens)
    rows = torch.randn(total + PADDING, 16, 128, device=DEVICE, dtype=DTYPE)
    query, key, value = rows.split([12, 2, 2], 1)
    cache = torch.randn(seqs * pages, 32, 2, 256, device=DEVICE, dtype=DTYPE).transpose(1, 2)
    table = torch.randperm(seqs * pages, device=DEVICE).int().view(seqs, pages)
    starts = torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], device=DEVICE)
    batch = cache, table, torch.tensor(prefixes, device=DEVICE), starts, 0.09, 32
    slots = torch.full((total + PADDING,), -1, device=DEVICE)
    slots[0] = 5
    expected_cache = cache.clone()
    reference.commit_kv(key, value, expected_cache, slots)
    block_attention.commit_kv(key, value, cache, slots)
    assert torch.equal(cache, expected_cache)
    output = torch.full(query.shape, torch.nan, device=DEVICE, dtype=DTYPE)
    block_attention.block_diffusion_attention(
        query, key, value, *batch, output=output, num_splits=num_splits
    )
    own = [x[:total] for x in (query, key, value)]
    # on the CPU: the sanitizers shall watch our kernels alone (racecheck reports cuDNN's attention)
    arguments = [x.cpu() if isinstance(x, torch.Tensor) else x for x in (*own, *batch)]
    expected = reference.block_diffusion_attention(*arguments)
    error = float((output[:total].cpu().float() - expected.float()).abs().max())
    assert error <= ERROR, f"differs by {error:.3g}"
    return error


def confident(num_rows):
    logits = torch.randn(num_rows, 20_000, device=DEVICE, dtype=DTYPE)
    ours = confidence.confidence_argmax(logits, 19_900, (17,))
    theirs = reference.confidence_argmax(logits, 19_900, (17,))
    assert torch.equal(ours.token_ids, theirs.token_ids)
    torch.testing.assert_close(ours.probabilities, theirs.probabilities, rtol=1e-4, atol=0)


def lookup(dtype):
    token_ids = torch.randint(-1, 6, (3, 2500), device=DEVICE, dtype=dtype)
    slots, lens = torch.tensor([[2, 0, 1, 1], [2500, 0, 1025, 1]], device=DEVICE)
    ours = copy_match.match_suffixes(token_ids, slots, lens, 2, 8, 2500)
    texts = token_ids.cpu(), slots.cpu(), lens.cpu()
    theirs = copy_match_reference.match_suffixes(*texts, 2, 8, 2500)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))
    ours = copy_match.continue_matches(token_ids, slots, lens, ours.starts, 200, 4, -2)
    theirs = copy_match_reference.continue_matches(*texts, theirs.starts, 200, 4, -2)
    assert torch.equal(ours.cpu(), theirs)


def main():
    torch.manual_seed(0)
    launch_table.MIN_SPLIT_KEYS = 64  # short prefixes shall be split, too
    for num_splits in SPLITS:
        for lens, prefixes in CASES:
            error = attention(lens, prefixes, num_splits)
            print(f"{num_splits} splits, rows {lens}: largest error {error:.3g}", flush=True)
    for num_rows in (3, 40) if DEVICE == "cuda" else (3,):
        confident(num_rows)
    for dtype in (torch.int32, torch.int64):
        lookup(dtype)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
