"""Prompt lookup in Triton; `copy_match_reference` is the meaning.

A program compares BLOCK_N places of one sequence with its end, token by token backwards, and
leaves the best as one integer: length of the match in the upper half, position in the lower. The
greatest of these is the longest match, of equally long ones the latest; `_select_kernel` finds it.
`_continue_kernel` copies what followed it.
"""

import torch
import triton
import triton.language as tl

from failfast_kernels.copy_match_reference import SuffixMatches

BLOCK_N = 1024  # positions per program
NUM_WARPS = 4
BLOCK_COPY = 128  # tokens of a copy per program


@triton.jit(
    do_not_specialize=["max_match", "stride_slot"],
    do_not_specialize_on_alignment=["chunk_keys", "token_ids", "slots", "known_lens"],
)
def _match_kernel(  # type: ignore[no-untyped-def]
    chunk_keys,  # [num_seqs, num_chunks] int64, written where the sequence reaches the chunk
    token_ids,  # [num_slots, max_len]
    slots,  # [num_seqs] int64
    known_lens,  # [num_seqs] int64
    max_match,
    stride_slot,
    stride_token,
    BLOCK_N: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    last = tl.load(known_lens + sequence) - 1
    begin = chunk.to(tl.int64) * BLOCK_N
    if begin >= last:
        return
    row = token_ids + tl.load(slots + sequence) * stride_slot
    positions = begin + tl.arange(0, BLOCK_N)  # [BLOCK_N] int64, of a match's last token
    equal = positions < last
    lens = tl.zeros([BLOCK_N], tl.int64)
    for i in range(max_match):
        token = tl.load(row + (last - i) * stride_token, mask=last >= i, other=-1)
        places = positions - i
        # reads only where all tokens so far agreed: few, after the first
        equal &= places >= 0
        earlier = tl.load(row + places * stride_token, mask=equal, other=-1)
        equal &= (earlier == token) & (earlier >= 0)
        lens += equal
    key = tl.max((lens << 32) | positions, 0)
    tl.store(chunk_keys + sequence * tl.num_programs(1) + chunk, key)


@triton.jit(
    do_not_specialize=["num_chunks", "min_match"],
    do_not_specialize_on_alignment=["match_lens", "starts", "chunk_keys", "known_lens"],
)
def _select_kernel(  # type: ignore[no-untyped-def]
    match_lens,  # [num_seqs] int64
    starts,  # [num_seqs] int64
    chunk_keys,  # as `_match_kernel` left them
    known_lens,
    num_chunks,
    min_match,
    BLOCK_N: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    known_len = tl.load(known_lens + sequence)
    keys = tl.zeros([BLOCK_CHUNKS], tl.int64)
    for begin in range(0, num_chunks, BLOCK_CHUNKS):
        chunks = begin + tl.arange(0, BLOCK_CHUNKS)
        written = (chunks < num_chunks) & (chunks.to(tl.int64) * BLOCK_N < known_len - 1)
        found = tl.load(chunk_keys + sequence * num_chunks + chunks, mask=written, other=0)
        keys = tl.maximum(keys, found)
    key = tl.max(keys, 0)
    length = key >> 32
    start = (key & 0xFFFFFFFF) + 1
    tl.store(match_lens + sequence, tl.where(length >= min_match, length, 0))
    tl.store(starts + sequence, tl.where(length >= min_match, start, known_len))


@triton.jit(
    do_not_specialize=["longest", "vocab_size", "no_token", "stride_slot"],
    do_not_specialize_on_alignment=["slots", "known_lens", "starts"],
)
def _continue_kernel(  # type: ignore[no-untyped-def]
    copied,  # [num_seqs, longest] int64
    token_ids,  # [num_slots, max_len]
    slots,  # [num_seqs] int64
    known_lens,
    starts,  # as `_select_kernel` left them
    longest,
    vocab_size,
    no_token,
    stride_slot,
    stride_token,
    BLOCK_COPY: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK_COPY + tl.arange(0, BLOCK_COPY)
    known_len, start = tl.load(known_lens + sequence), tl.load(starts + sequence)
    columns = start + places % tl.maximum(known_len - start, 1)
    matched = columns < known_len  # all or none
    row = token_ids + tl.load(slots + sequence) * stride_slot
    tokens = tl.load(row + columns * stride_token, mask=matched, other=0).to(tl.int64)
    tokens = tl.where(matched, tl.minimum(tl.maximum(tokens, 0), vocab_size - 1), no_token)
    tl.store(copied + sequence * longest + places, tokens, mask=places < longest)


def match_suffixes(
    token_ids: torch.Tensor,
    slots: torch.Tensor,
    known_lens: torch.Tensor,
    min_match: int,
    max_match: int,
    max_known_len: int,
) -> SuffixMatches:
    """See `copy_match_reference.match_suffixes`."""
    assert 1 <= min_match <= max_match
    num_seqs, num_chunks = len(slots), -(-max_known_len // BLOCK_N)
    chunk_keys = torch.empty(num_seqs, num_chunks, dtype=torch.int64, device=slots.device)
    match_lens, starts = torch.empty(2, num_seqs, dtype=torch.int64, device=slots.device)
    if num_seqs == 0:
        return SuffixMatches(match_lens, starts)
    _match_kernel[num_seqs, num_chunks](
        chunk_keys,
        token_ids,
        slots,
        known_lens,
        max_match,
        *token_ids.stride(),
        BLOCK_N=BLOCK_N,
        num_warps=NUM_WARPS,
    )
    _select_kernel[(num_seqs,)](
        match_lens,
        starts,
        chunk_keys,
        known_lens,
        num_chunks,
        min_match,
        BLOCK_N=BLOCK_N,
        BLOCK_CHUNKS=128,
        num_warps=1,
    )
    return SuffixMatches(match_lens, starts)


def continue_matches(
    token_ids: torch.Tensor,
    slots: torch.Tensor,
    known_lens: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    vocab_size: int,
    no_token: int,
) -> torch.Tensor:
    """See `copy_match_reference.continue_matches`."""
    copied = torch.empty(len(slots), longest, dtype=torch.int64, device=slots.device)
    if copied.numel():
        _continue_kernel[len(slots), triton.cdiv(longest, BLOCK_COPY)](
            copied,
            token_ids,
            slots,
            known_lens,
            starts,
            longest,
            vocab_size,
            no_token,
            *token_ids.stride(),
            BLOCK_COPY=BLOCK_COPY,
            num_warps=1,
        )
    return copied
