"""KV commits in Triton: one program writes a row's key and value of one head into its slot."""

import torch
import triton
import triton.language as tl


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
    _commit_kernel[num_rows, num_kv_heads](
        key,
        value,
        kv_cache,
        slot_mapping,
        kv_cache.shape[2],
        key.stride(),
        value.stride(),
        kv_cache.stride(),
        HEAD_DIM=head_dim,
        num_warps=1,
    )
