"""Best token and confidence of each row in one read of the logits; `reference` is the meaning.

A program walks over the columns of one row in tiles of BLOCK_N with an online softmax (Milakov
and Gimelshein, arXiv 1805.02867). Its state is three scalars:

    best     max z
    mass     sum of exp(z - best)
    token    lowest column that holds `best`

so that probability = 1 / mass. Where rows are few, several programs share a row's columns and
`_merge_kernel` combines their states.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from failfast_kernels import launch_table
from failfast_kernels.reference import LEAST, TokenConfidence, lowest_allowed_id

SPLITS = (1, 4, 16, 32)  # classes: each is compiled once
OUTPUTS = ["token_ids", "probabilities", "states", "split_tokens"]


@triton.jit
def _store_confidence(  # type: ignore[no-untyped-def]
    token_ids, probabilities, row, mass, token, fallback
):
    defined = mass > 0  # false for NaN
    tl.store(token_ids + row, tl.where(defined, token, fallback).to(tl.int64))
    tl.store(probabilities + row, tl.where(defined, 1.0 / mass, 0.0))


@triton.jit(
    do_not_specialize=["num_rows", "num_forbidden", "num_valid_tokens", "fallback"],
    do_not_specialize_on_alignment=[*OUTPUTS, "forbidden_ids"],
)
def _confidence_kernel(  # type: ignore[no-untyped-def]
    token_ids,  # [num_rows] int64; as the next, written without splits only
    probabilities,  # [num_rows] float32
    states,  # [2, NUM_SPLITS, num_rows] float32: best, mass; with splits only
    split_tokens,  # [NUM_SPLITS, num_rows] int32; with splits only
    logits,  # [num_rows, num_columns]
    forbidden_ids,  # [num_forbidden] int32
    num_rows,
    num_forbidden,
    num_valid_tokens,
    fallback,
    num_columns,  # specialised, as the strides: the mask must not narrow the loads
    strides,
    LEAST_FLOAT: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(num_valid_tokens, BLOCK_N), NUM_SPLITS) * BLOCK_N
    begin = split * share
    end = tl.minimum(begin + share, num_valid_tokens)

    offsets = tl.arange(0, BLOCK_N)
    best = tl.full([], LEAST_FLOAT, tl.float32)
    mass = tl.zeros([], tl.float32)
    token = tl.zeros([], tl.int32) + fallback
    for start in range(begin, end, BLOCK_N):
        columns = start + offsets
        z = tl.load(
            logits + row * strides[0] + columns.to(tl.int64) * strides[1],
            mask=columns < num_columns,
            other=float("-inf"),
        ).to(tl.float32)  # [BLOCK_N]
        z = tl.where(columns < end, z, float("-inf"))
        for i in range(num_forbidden):
            z = tl.where(columns == tl.load(forbidden_ids + i), float("-inf"), z)
        tile_best = tl.max(z, 0)
        new_best = tl.maximum(best, tile_best)
        mass = mass * tl.exp(best - new_best) + tl.sum(tl.exp(z - new_best), 0)
        if tile_best > best:  # rare after the first tiles
            token = tl.min(tl.where(z == tile_best, columns, 2147483647), 0)
        best = new_best

    if NUM_SPLITS > 1:
        state = states + split * num_rows.to(tl.int64) + row
        tl.store(state, best)
        tl.store(state + NUM_SPLITS * num_rows.to(tl.int64), mass)
        tl.store(split_tokens + split * num_rows.to(tl.int64) + row, token)
    else:
        _store_confidence(token_ids, probabilities, row, mass, token, fallback)


@triton.jit(do_not_specialize=["num_rows", "fallback"], do_not_specialize_on_alignment=OUTPUTS)
def _merge_kernel(  # type: ignore[no-untyped-def]
    token_ids,
    probabilities,
    states,  # as `_confidence_kernel` left them
    split_tokens,
    num_rows,
    fallback,
    NUM_SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, NUM_SPLITS)
    state = states + splits * num_rows.to(tl.int64) + row  # [NUM_SPLITS]
    bests = tl.load(state)
    masses = tl.load(state + NUM_SPLITS * num_rows.to(tl.int64))
    tokens = tl.load(split_tokens + splits * num_rows.to(tl.int64) + row)
    best = tl.max(bests, 0)
    mass = tl.sum(masses * tl.exp(bests - best), 0)
    # columns rise with the split: the first that holds `best` holds its lowest id
    winner = tl.min(tl.where(bests == best, splits, NUM_SPLITS), 0)
    token = tl.sum(tl.where(splits == winner, tokens, 0), 0)
    _store_confidence(token_ids, probabilities, row, mass, token, fallback)


def confidence_argmax(
    logits: torch.Tensor,
    num_valid_tokens: int,
    forbidden_ids: Sequence[int] = (),
    *,
    num_splits: int | None = None,
) -> TokenConfidence:
    """See `reference.confidence_argmax`.

    `num_splits`, one of `SPLITS`, programs share a row; None chooses by shapes.
    """
    num_rows, num_columns = logits.shape
    fallback = lowest_allowed_id(num_columns, num_valid_tokens, forbidden_ids)
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    probabilities = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    result = TokenConfidence(token_ids, probabilities)
    if num_rows == 0:
        return result
    launch = launch_table.CONFIDENCE[logits.element_size()]
    if num_splits is None:
        num_tiles = -(-num_valid_tokens // launch.block_n)
        num_splits = launch_table.num_splits(SPLITS, num_rows, num_tiles)
    states, split_tokens = probabilities, probabilities  # neither is touched without splits
    if num_splits > 1:
        planes = torch.empty(3, num_splits, num_rows, device=logits.device, dtype=torch.float32)
        states, split_tokens = planes[:2], planes[2].view(torch.int32)
    outputs = (token_ids, probabilities, states, split_tokens)
    forbidden = _on_device(tuple(forbidden_ids), logits.device)
    sizes = (num_rows, forbidden.numel(), num_valid_tokens, fallback, num_columns)
    _confidence_kernel[num_rows, num_splits](
        *outputs,
        logits,
        forbidden,
        *sizes,
        logits.stride(),
        LEAST_FLOAT=LEAST,
        NUM_SPLITS=num_splits,
        BLOCK_N=launch.block_n,
        num_warps=launch.num_warps,
    )
    if num_splits > 1:
        _merge_kernel[(num_rows,)](*outputs, num_rows, fallback, NUM_SPLITS=num_splits, num_warps=1)
    return result


def launch_every_class(
    logits: torch.Tensor, num_valid_tokens: int, forbidden_ids: Sequence[int]
) -> None:
    """Compile each class of the kernels for logits like these: launch it."""
    num_tiles = -(-num_valid_tokens // launch_table.CONFIDENCE[logits.element_size()].block_n)
    for num_splits in SPLITS:
        if num_splits <= num_tiles:
            confidence_argmax(logits, num_valid_tokens, forbidden_ids, num_splits=num_splits)


@lru_cache(maxsize=16)
def _on_device(ids: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """[num_ids] int32. Cached, so that only a server's first pass copies to the device."""
    return torch.tensor(ids, dtype=torch.int32, device=device)
