"""Block-diffusion attention and KV commits in Triton; `reference` says what they compute.

A program of the attention owns BLOCK_M packed rows of one sequence and one KV head: packed row p is
query row p // GROUP_SIZE with head p % GROUP_SIZE of the KV head's group, so each key is read once
for all heads. It walks over the committed prefix, then over the pass's own keys up to the end of
its last row's block, with an online softmax (Milakov and Gimelshein, arXiv 1805.02867).

Only the device knows the number of tiles of a sequence. Sequence s starts at tile
`query_start_loc[s] * GROUP_SIZE // BLOCK_M + s`, which leaves each enough tiles and bounds their
sum by shapes alone, so the launch needs no copy to the host. Rows after the last sequence's (the
padding of a captured graph) are one more sequence, whose output is zero. Where few programs would
face long prefixes, NUM_SPLITS of them share one, and `_merge_kernel` adds their results up.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from failfast_kernels import launch_table
from failfast_kernels.launch_table import ATTENTION
from failfast_kernels.reference import PaddedGroup

LOG2_E = math.log2(math.e)
HEAD_DIMS = (16, 32, 64, 128)
SPLITS = (1, 4, 16)  # classes: each is compiled once


@triton.jit
def _load_rows(pointers, dims, valid):  # type: ignore[no-untyped-def]
    """One row of HEAD_DIM values from each pointer; 0 where not `valid`."""
    return tl.load(pointers[:, None] + dims[None, :], mask=valid[:, None], other=0.0)


@triton.jit
def _softmax_step(  # type: ignore[no-untyped-def]
    q, k, v, sees, scores_scale, best, mass, attended
):
    """Add the keys of one tile; `best` is in units of log2."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scores_scale  # [BLOCK_M, BLOCK_N]
    scores = tl.where(sees, scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1))  # [BLOCK_M]
    weights = tl.exp2(scores - new_best[:, None])
    shrink = tl.exp2(best - new_best)
    mass = mass * shrink + tl.sum(weights, 1)
    attended = tl.dot(
        weights.to(v.dtype), v, attended * shrink[:, None], input_precision="ieee"
    )  # [BLOCK_M, HEAD_DIM]
    return new_best, mass, attended


@triton.jit(
    do_not_specialize=["num_seqs", "num_rows", "page_size", "min_split_keys", "stride_table"],
    do_not_specialize_on_alignment=["block_table", "committed_lens", "query_start_loc"],
)
def _attention_kernel(  # type: ignore[no-untyped-def]
    output,  # [num_rows, num_heads, HEAD_DIM]; float32 with NUM_SPLITS in front when split
    log_mass,  # [NUM_SPLITS, num_rows, num_heads] float32, in units of log2; unused without splits
    query,  # [num_rows, num_heads, HEAD_DIM]
    key,  # [num_rows, num_kv_heads, HEAD_DIM]
    value,
    kv_cache,  # [num_pages, num_kv_heads, page_size, 2 * HEAD_DIM]
    block_table,  # [num_seqs, max_pages]
    committed_lens,  # [num_seqs]
    query_start_loc,  # [num_seqs + 1]
    num_seqs,
    num_rows,
    page_size,
    min_split_keys,
    scores_scale,
    output_strides,
    query_strides,
    key_strides,
    value_strides,
    cache_strides,
    stride_table,
    HEAD_DIM: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    DIFFUSION_BLOCK: tl.constexpr,
    TILE_IN_PAGE: tl.constexpr,  # a tile of keys never crosses the end of a page
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)

    # the last sequence whose first tile is not after this one; `num_seqs` is the padding
    seq = 0
    behind = num_seqs + 1
    while behind - seq > 1:
        middle = (seq + behind) // 2
        first = tl.load(query_start_loc + middle).to(tl.int32) * GROUP_SIZE // BLOCK_M + middle
        if first <= tile:
            seq = middle
        else:
            behind = middle
    seq_begin = tl.load(query_start_loc + seq).to(tl.int32)
    is_padding = seq == num_seqs
    seq_end = tl.load(query_start_loc + seq + 1, mask=seq < num_seqs, other=0).to(tl.int32)
    seq_rows = tl.where(is_padding, num_rows, seq_end) - seq_begin
    packed_begin = (tile - seq_begin * GROUP_SIZE // BLOCK_M - seq) * BLOCK_M
    if packed_begin >= seq_rows * GROUP_SIZE:
        return
    prefix_len = tl.load(committed_lens + seq, mask=seq < num_seqs, other=0).to(tl.int32)

    packed = packed_begin + tl.arange(0, BLOCK_M)
    row = packed // GROUP_SIZE  # [BLOCK_M], within the sequence
    row_valid = row < seq_rows
    row_index = (seq_begin + row).to(tl.int64)
    head = (kv_head * GROUP_SIZE + packed % GROUP_SIZE).to(tl.int64)
    dims = tl.arange(0, HEAD_DIM)
    keys = tl.arange(0, BLOCK_N)

    begin = 0
    end = prefix_len
    own_end = tl.minimum(packed_begin + BLOCK_M - 1, seq_rows * GROUP_SIZE - 1) // GROUP_SIZE
    own_end = tl.minimum((own_end // DIFFUSION_BLOCK + 1) * DIFFUSION_BLOCK, seq_rows)
    # index of each packed row in a [NUM_SPLITS, num_rows, num_heads] tensor
    piece = (split * num_rows.to(tl.int64) + row_index) * (tl.num_programs(1) * GROUP_SIZE) + head
    if NUM_SPLITS > 1:
        share = tl.maximum(tl.cdiv(prefix_len, NUM_SPLITS), min_split_keys)
        share = tl.cdiv(share, BLOCK_N) * BLOCK_N
        begin = split * share
        end = tl.minimum(begin + share, prefix_len)
        if split > 0:
            own_end = 0
            if begin >= end:
                tl.store(log_mass + piece, float("-inf"), mask=row_valid)
                return

    if is_padding:
        own_end = 0

    rows = query + row_index * query_strides[0] + head * query_strides[1]
    q = _load_rows(rows, dims * query_strides[2], row_valid)  # [BLOCK_M, HEAD_DIM]
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    attended = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)

    # every tile below has a key that every row sees, so `best` is finite after it
    table = block_table + seq * stride_table.to(tl.int64)
    cache = kv_cache + kv_head * cache_strides[1]
    for start in range(begin, end, BLOCK_N):
        committed = start + keys < end
        if TILE_IN_PAGE:
            page = tl.load(table + start // page_size).to(tl.int64)
            slot = (start % page_size + keys).to(tl.int64)
        else:
            page = tl.load(table + (start + keys) // page_size, mask=committed, other=0)
            page = page.to(tl.int64)
            slot = ((start + keys) % page_size).to(tl.int64)
        slots = cache + page * cache_strides[0] + slot * cache_strides[2]
        k = _load_rows(slots, dims * cache_strides[3], committed)  # [BLOCK_N, HEAD_DIM]
        v = _load_rows(slots, (HEAD_DIM + dims) * cache_strides[3], committed)
        best, mass, attended = _softmax_step(
            q, k, v, committed[None, :], scores_scale, best, mass, attended
        )

    row_block = row // DIFFUSION_BLOCK
    for start in range(0, own_end, BLOCK_N):
        own = start + keys
        fresh = own < own_end
        own_index = (seq_begin + own).to(tl.int64)
        k_rows = key + own_index * key_strides[0] + kv_head * key_strides[1]
        k = _load_rows(k_rows, dims * key_strides[2], fresh)  # [BLOCK_N, HEAD_DIM]
        v_rows = value + own_index * value_strides[0] + kv_head * value_strides[1]
        v = _load_rows(v_rows, dims * value_strides[2], fresh)
        sees = ((own // DIFFUSION_BLOCK)[None, :] <= row_block[:, None]) & fresh[None, :]
        best, mass, attended = _softmax_step(q, k, v, sees, scores_scale, best, mass, attended)

    if is_padding:
        best = tl.zeros([BLOCK_M], tl.float32)
        mass = tl.full([BLOCK_M], 1.0, tl.float32)
    attended = attended / mass[:, None]
    if NUM_SPLITS > 1:
        tl.store(log_mass + piece, best + tl.log2(mass), mask=row_valid)
        out = output + piece * HEAD_DIM
    else:
        out = output + row_index * output_strides[0] + head * output_strides[1]
    attended = attended.to(output.dtype.element_ty)
    tl.store(out[:, None] + dims[None, :], attended, mask=row_valid[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def _merge_kernel(  # type: ignore[no-untyped-def]
    output,  # [num_rows, num_heads, HEAD_DIM]
    pieces,  # [NUM_SPLITS, num_rows, num_heads, HEAD_DIM] float32; undefined where no mass is
    log_mass,  # [NUM_SPLITS, num_rows, num_heads] float32, in units of log2
    num_rows,
    output_strides,
    HEAD_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, HEAD_DIM)
    piece = (tl.arange(0, NUM_SPLITS) * num_rows.to(tl.int64) + row) * tl.num_programs(1) + head
    masses = tl.load(log_mass + piece)  # [NUM_SPLITS]
    weights = tl.exp2(masses - tl.max(masses, 0))
    parts = _load_rows(pieces + piece * HEAD_DIM, dims, weights > 0)  # [NUM_SPLITS, HEAD_DIM]
    attended = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    out = output + row * output_strides[0] + head * output_strides[1]
    tl.store(out + dims, attended.to(output.dtype.element_ty))


def block_diffusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    committed_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    diffusion_block_size: int = 32,
    groups: Sequence[PaddedGroup] | None = None,
    output: torch.Tensor | None = None,
    *,
    num_splits: int | None = None,
) -> torch.Tensor:
    """See `reference.block_diffusion_attention`; `groups` is ignored.

    `num_splits`, one of `SPLITS`, programs share a prefix; None chooses by shapes.

    Raises:
        ValueError: a head_dim that the kernel was not written for.
    """
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, page_size = kv_cache.shape[1], kv_cache.shape[2]
    if output is None:
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _check(diffusion_block_size, kv_cache, query, key, value, output)
    num_seqs, max_pages = block_table.shape
    if num_rows == 0 or num_seqs == 0:
        return output
    group_size = num_heads // num_kv_heads
    block_m = _tile_rows(query, group_size, num_seqs)
    launch = ATTENTION[64 if head_dim <= 64 else 128, query.element_size(), block_m]
    num_tiles = num_rows * group_size // block_m + num_seqs + 1  # see the module's docstring
    if num_splits is None:  # prefixes must be long enough for two pieces
        most = SPLITS[-1] if max_pages * page_size >= 2 * launch_table.MIN_SPLIT_KEYS else 1
        num_splits = launch_table.num_splits(SPLITS, num_tiles * num_kv_heads, most)
    pieces, log_mass = output, output  # neither is touched without splits
    if num_splits > 1:
        shape = (num_splits, num_rows, num_heads)
        pieces = torch.empty(*shape, head_dim, dtype=torch.float32, device=query.device)
        log_mass = torch.empty(shape, dtype=torch.float32, device=query.device)
    batch = (query, key, value, kv_cache, block_table, committed_lens, query_start_loc)
    sizes = (num_seqs, num_rows, page_size, launch_table.MIN_SPLIT_KEYS)
    _attention_kernel[num_tiles, num_kv_heads, num_splits](
        pieces,
        log_mass,
        *batch,
        *sizes,
        scale * LOG2_E,
        *(tensor.stride() for tensor in (output, query, key, value, kv_cache)),
        block_table.stride(0),
        HEAD_DIM=head_dim,
        GROUP_SIZE=group_size,
        DIFFUSION_BLOCK=diffusion_block_size,
        TILE_IN_PAGE=page_size % launch.block_n == 0,
        NUM_SPLITS=num_splits,
        BLOCK_M=block_m,
        BLOCK_N=launch.block_n,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    if num_splits > 1:
        _merge_kernel[num_rows, num_heads](
            output,
            pieces,
            log_mass,
            num_rows,
            output.stride(),
            HEAD_DIM=head_dim,
            NUM_SPLITS=num_splits,
            num_warps=1,
        )
    return output


@triton.jit(do_not_specialize=["page_size"], do_not_specialize_on_alignment=["slot_mapping"])
def _commit_kernel(  # type: ignore[no-untyped-def]
    key,  # [num_rows, num_kv_heads, HEAD_DIM]
    value,
    kv_cache,  # [num_pages, num_kv_heads, page_size, 2 * HEAD_DIM]
    slot_mapping,  # [num_rows]
    page_size,
    key_strides,
    value_strides,
    cache_strides,
    HEAD_DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_mapping + row).to(tl.int64)
    if slot < 0:
        return
    dims = tl.arange(0, HEAD_DIM)
    k = tl.load(key + row * key_strides[0] + head * key_strides[1] + dims * key_strides[2])
    v = tl.load(value + row * value_strides[0] + head * value_strides[1] + dims * value_strides[2])
    cache = kv_cache + slot // page_size * cache_strides[0] + head * cache_strides[1]
    cache += slot % page_size * cache_strides[2]
    tl.store(cache + dims * cache_strides[3], k)
    tl.store(cache + (HEAD_DIM + dims) * cache_strides[3], v)


def commit_kv(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """See `reference.commit_kv`."""
    num_rows, num_kv_heads, head_dim = key.shape
    assert key.dtype == value.dtype == kv_cache.dtype
    if num_rows == 0:
        return
    tensors = (key, value, kv_cache)
    strides = (tensor.stride() for tensor in tensors)
    _commit_kernel[num_rows, num_kv_heads](
        *tensors, slot_mapping, kv_cache.shape[2], *strides, HEAD_DIM=head_dim, num_warps=1
    )


def launch_every_class(num_heads: int, kv_cache: torch.Tensor, diffusion_block_size: int) -> None:
    """Compile each class of the kernels for queries of `num_heads` over `kv_cache`: launch it.

    Nothing is read from or written to the cache.
    """
    num_kv_heads, head_dim = kv_cache.shape[1], kv_cache.shape[3] // 2
    zero = torch.zeros(1, dtype=torch.int64, device=kv_cache.device)
    table = zero.view(1, 1).int()
    for _, element_size, height in ATTENTION:
        if element_size != kv_cache.element_size():
            continue
        num_rows = max(1, height * num_kv_heads // num_heads)
        query = kv_cache.new_zeros(num_rows, num_heads, head_dim)
        key = kv_cache.new_zeros(num_rows, num_kv_heads, head_dim)
        inputs = (query, key, key, kv_cache, table, zero, torch.cat((zero, zero + num_rows)))
        for num_splits in SPLITS:
            block_diffusion_attention(*inputs, 1.0, diffusion_block_size, num_splits=num_splits)
        commit_kv(key, key, kv_cache, zero.new_full((num_rows,), -1))


def _check(diffusion_block_size: int, kv_cache: torch.Tensor, *rows: torch.Tensor) -> None:
    query, key, value, output = rows
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, page_size, width = kv_cache.shape[1:]
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"failfast: head_dim must be one of {HEAD_DIMS}; got {head_dim}.")
    assert {tensor.dtype for tensor in rows} == {kv_cache.dtype}
    assert page_size % diffusion_block_size == 0
    assert width == 2 * head_dim
    assert key.shape == value.shape == (num_rows, num_kv_heads, head_dim)
    assert num_heads % num_kv_heads == 0
    assert output.shape == query.shape
    assert output.stride(2) == 1


def _tile_rows(query: torch.Tensor, group_size: int, num_seqs: int) -> int:
    """The smallest tile that holds the packed rows of an average sequence."""
    average = -(-query.shape[0] // num_seqs) * group_size
    classes = sorted({m for _, size, m in ATTENTION if size == query.element_size()})
    return next((m for m in classes if m >= average), classes[-1])
