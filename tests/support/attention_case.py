"""A ragged batch over a paged cache for tests of the attention, with its answer in float64."""

import torch


def dense_attention(query, keys, values, first_position, block_size):
    """[rows, heads, dim] against all keys of one sequence, float64, mask spelled out."""
    group_size = query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group_size, 1) for x in (keys, values))
    query_blocks = (first_position + torch.arange(query.shape[0])) // block_size
    key_blocks = torch.arange(keys.shape[0]) // block_size
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * query.shape[2] ** -0.5
    scores.masked_fill_(key_blocks > query_blocks[:, None], -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)


def empty_cache(layout, num_pages, kv_heads, page_size, width, dtype):
    """NaN in [num_pages, kv_heads, page_size, width], laid out in one of several ways."""

    def garbage(*shape):
        return torch.full(shape, torch.nan, dtype=dtype)

    if layout == "slots outside heads":  # as vLLM hands it over by default
        return garbage(num_pages, page_size, kv_heads, width).transpose(1, 2)
    if layout == "contiguous":
        return garbage(num_pages, kv_heads, page_size, width)
    if layout == "one layer of many":  # gaps between pages, as in vLLM's block-compact layouts
        return garbage(num_pages, 3, kv_heads, page_size, width)[:, 1]
    assert layout == "strided dims"
    return garbage(num_pages, kv_heads, width, page_size).transpose(2, 3)


def on_device(view, device):
    """`view` on another device with its strides kept; `Tensor.to` would close the gaps."""
    base = view if view._base is None else view._base
    return base.to(device).as_strided(view.size(), view.stride(), view.storage_offset())


LAYOUTS = ("slots outside heads", "contiguous", "one layer of many", "strided dims")


class Case:
    """A ragged batch with a paged cache whose unused slots hold garbage (NaN).

    Args:
        sequences: (committed blocks, rows) of each.
        padding: rows of NaN after the last sequence's.
    """

    def __init__(
        self,
        sequences,
        page_size,
        kv_heads,
        group_size,
        block_size=32,
        seed=0,
        head_dim=16,
        dtype=torch.float32,
        layout="slots outside heads",
        padding=0,
    ):
        generator = torch.Generator().manual_seed(seed)
        num_pages = [-(-blocks * block_size // page_size) for blocks, _ in sequences]
        order = (torch.randperm(sum(num_pages), generator=generator) + 1).tolist()
        # page 0 belongs to nobody; unused columns of the table point to a page of NaN
        self.block_table = torch.zeros(len(sequences), max([*num_pages, 1]), dtype=torch.int32)
        self.kv_cache = empty_cache(
            layout, sum(num_pages) + 1, kv_heads, page_size, 2 * head_dim, dtype
        )
        self.committed = torch.tensor([b * block_size for b, _ in sequences], dtype=torch.int64)
        lens = torch.tensor([rows for _, rows in sequences], dtype=torch.int64)
        self.query_start_loc = torch.cat([torch.zeros(1, dtype=torch.int64), lens.cumsum(0)])
        # query, key and value are views of one tensor, as a fused projection leaves them
        heads = kv_heads * group_size
        rows = torch.randn(int(lens.sum()), heads + 2 * kv_heads, head_dim, generator=generator).to(
            dtype
        )
        rows = torch.cat([rows, torch.full((padding, *rows.shape[1:]), torch.nan, dtype=dtype)])
        self.padding = padding
        self.query, self.key, self.value = rows.split([heads, kv_heads, kv_heads], dim=1)
        self.scale, self.block_size = head_dim**-0.5, block_size
        self.keys, self.values = [], []
        for s, (blocks, num_rows) in enumerate(sequences):
            self.block_table[s, : num_pages[s]] = torch.tensor(
                [order.pop() for _ in range(num_pages[s])], dtype=torch.int32
            )
            num_tokens = blocks * block_size
            prefix = torch.randn(num_tokens, kv_heads, 2 * head_dim, generator=generator).to(dtype)
            positions = torch.arange(num_tokens)
            pages = self.block_table[s, positions // page_size].long()
            self.kv_cache[pages, :, positions % page_size] = prefix
            own = slice(int(self.query_start_loc[s]), int(self.query_start_loc[s]) + num_rows)
            self.keys.append(torch.cat([prefix[..., :head_dim], self.key[own]]))
            self.values.append(torch.cat([prefix[..., head_dim:], self.value[own]]))

    def run(self, attention, device="cpu", **overrides):
        """`attention` over the batch, written into an output full of NaN."""
        output = torch.full(self.query.shape, torch.nan, dtype=self.query.dtype, device=device)
        tensors = (
            self.query,
            self.key,
            self.value,
            self.kv_cache,
            self.block_table,
            self.committed,
            self.query_start_loc,
        )
        found = attention(
            *(on_device(tensor, device) for tensor in tensors),
            self.scale,
            self.block_size,
            output=output,
            **overrides,
        )
        assert found is output
        return found.cpu()

    def expected(self):
        """[num_rows, num_heads, head_dim] float64."""
        parts = []
        for s, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            own = slice(int(self.query_start_loc[s]), int(self.query_start_loc[s + 1]))
            first = int(self.committed[s])
            parts.append(dense_attention(self.query[own], keys, values, first, self.block_size))
        zeros = torch.zeros(self.padding, *self.query.shape[1:], dtype=torch.float64)
        return torch.cat([*parts, zeros])
