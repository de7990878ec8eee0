"""conv_wgrad_adam in Triton: the tile of a weight gradient in registers, and Adam on that tile of the weight.

The gradient is a product of rank P, the batch's pixels; for the deep layers P is at most a few hundred and making the
tile anew costs less than writing it and reading it back: 24 bytes a weight (and 2 for the low-precision copy) against
32 for conv_wgrad and adam apart. Each program owns its tile. Of a slice of the taps, whose rows have gaps, the weight
and its moments are addressed by strides. Layers of many pixels and few weights have too few tiles for that: there the
sum is split, as conv_wgrad splits it, and the last program to arrive adds a tile's partial sums in a fixed order, for
8 SPLIT bytes a weight more. Of many splits it adds those of shares, which the last program of each share has added.
Adam holds three numbers and a gradient per weight in registers; a large tile goes to memory, and Adam takes it back in
pieces. Float32 throughout, after the product of the activations.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastp2p.kernels import gemm, tile_rule
from fastp2p.kernels.adam import adam_update, load_state
from fastp2p.kernels.arrival import counters, is_last
from fastp2p.kernels.compile_check import Case
from fastp2p.kernels.conv_wgrad import (
    fitting,
    launch_arguments,
    layer_cases,
    outer_product,
    rows_of,
    tiles,
    whole_blocks,
)
from fastp2p.kernels.dependent import begin, launched
from fastp2p.kernels.launch_facts import Arguments, LaunchFacts, over
from fastp2p.kernels.layer_shapes import LAYERS, Layer

ONE_SHARE = 16  # splits whose sums one program adds; of more, programs add shares, and the last one those
TOGETHER = tl.constexpr(4)  # loads under way at once


@launched(do_not_specialize=gemm.GEOMETRY)
def _conv_wgrad_adam_kernel(
    outer_ptr,  # (pixels, n_outer), rows outer_stride apart
    outer2_ptr,  # (pixels, n_outer2), rows outer2_stride apart
    inner_ptr,  # (images * height * width, n_inner), rows inner_stride apart
    pixels,  # outer's, over all images
    height,
    width,
    outer_height,
    outer_width,
    n_outer,
    n_outer2,
    n_inner,
    outer_stride,
    outer2_stride,
    inner_stride,
    workspace_ptr,  # (SPLIT, n_outer + n_outer2, KH, KW, n_inner) float32, of split sums and of large tiles
    counter_ptr,  # (tiles, shares + 1) int32, likewise
    param_ptr,  # (n_outer + n_outer2, KH, KW, n_inner) float32, as the next two
    exp_avg_ptr,
    exp_avg_sq_ptr,
    row_stride,  # these three's, with gaps where SLICED: so many elements between two kernel rows
    kernel_row_gap,
    low_precision_ptr,  # bfloat16 or float16, of the same shape, dense; param_ptr again when there is none
    lr_ptr,  # () float32
    powers_ptr,  # (2,) float64
    beta1,
    beta2,
    one_minus_beta1,  # rounded once, from float64
    one_minus_beta2,
    eps,
    WRITE_LOW_PRECISION: tl.constexpr,
    SLICED: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TWO_INPUTS: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    SHARE: tl.constexpr,  # splits whose sums one program adds
    ROWS: tl.constexpr,  # the tile's, that Adam takes at once
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    begin()
    tile = tl.program_id(0) // SPLIT
    split = tl.program_id(0) % SPLIT
    columns = KH * KW * n_inner
    column_blocks = tl.cdiv(columns, BLOCK_N)
    first_row, rows, second = rows_of(tile // column_blocks, n_outer, n_outer2, TWO_INPUTS, BLOCK_M)
    before = tl.where(second, n_outer, 0)  # rows of the weight
    first_column = tile % column_blocks * BLOCK_N
    grad, row, column, inside = outer_product(
        tile, split, outer_ptr, outer2_ptr, inner_ptr, pixels, height, width, outer_height,
        outer_width, n_outer, n_outer2, n_inner, outer_stride, outer2_stride, inner_stride,
        KH, KW, STRIDE, PADDING, TWO_INPUTS, WHOLE_BLOCKS, PRECISION, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if SPLIT == 1 and ROWS == BLOCK_M:
        # In one row, which has a layout of its own: else the compiler brings all three into the product's, and back
        at, there, param_at = piece_of(
            first_row, rows, before, first_column, columns, row_stride, kernel_row_gap, KW * n_inner, SLICED, BLOCK_M,
            BLOCK_N,
        )  # fmt: skip
        param, exp_avg, exp_avg_sq = load_state(param_at, there, param_ptr, exp_avg_ptr, exp_avg_sq_ptr)
        adam_update(
            tl.reshape(grad, (BLOCK_M * BLOCK_N,)), param, exp_avg, exp_avg_sq, param_at, at, there, param_ptr,
            exp_avg_ptr, exp_avg_sq_ptr, low_precision_ptr, lr_ptr, powers_ptr,
            beta1, beta2, one_minus_beta1, one_minus_beta2, eps, WRITE_LOW_PRECISION,
        )  # fmt: skip
    else:
        SHARES: tl.constexpr = (SPLIT + SHARE - 1) // SHARE
        weights = (n_outer + n_outer2).to(tl.int64) * columns
        low_offset = row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(workspace_ptr + split * weights + low_offset, grad, mask=inside)
        counter_ptr += tile * (SHARES + 1)
        mine = split // SHARE
        first = mine * SHARE
        end = tl.minimum(first + SHARE, SPLIT)
        done = is_last(counter_ptr + mine, end - first)
        step = weights
        if SHARES > 1:
            if done:
                for piece in range(0, BLOCK_M, ROWS):
                    at, there, _ = piece_of(
                        first_row + piece, rows, before, first_column, columns, row_stride, kernel_row_gap,
                        KW * n_inner, False, ROWS, BLOCK_N,
                    )  # fmt: skip
                    share_sums = sum_splits(workspace_ptr + at, weights, first, end, there)
                    tl.debug_barrier()  # all threads have read what this replaces
                    tl.store(workspace_ptr + at + first * weights, share_sums, mask=there)
                done = is_last(counter_ptr + SHARES, SHARES)
            step = SHARE * weights
            first = 0
            end = SHARES
        if done:
            for piece in range(0, BLOCK_M, ROWS):
                at, there, param_at = piece_of(
                    first_row + piece, rows, before, first_column, columns, row_stride, kernel_row_gap, KW * n_inner,
                    SLICED, ROWS, BLOCK_N,
                )  # fmt: skip
                param, exp_avg, exp_avg_sq = load_state(param_at, there, param_ptr, exp_avg_ptr, exp_avg_sq_ptr)
                adam_update(
                    sum_splits(workspace_ptr + at, step, first, end, there), param, exp_avg, exp_avg_sq, param_at, at,
                    there, param_ptr, exp_avg_ptr, exp_avg_sq_ptr, low_precision_ptr, lr_ptr, powers_ptr,
                    beta1, beta2, one_minus_beta1, one_minus_beta2, eps, WRITE_LOW_PRECISION,
                )  # fmt: skip


@triton.jit
def piece_of(
    first_row, rows, before, first_column, columns, row_stride, kernel_row_gap, kernel_row_columns,
    SLICED: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Some rows of a tile, (ROWS * BLOCK_N,): where they lie in the dense weight, which exist, and where in param.

    `before` rows of the weight come before those of this outer tensor, which has `rows`.
    """
    i = tl.arange(0, ROWS * BLOCK_N)
    row = first_row + i // BLOCK_N
    column = first_column + i % BLOCK_N
    inside = (row < rows) & (column < columns)
    row = (before + row).to(tl.int64)
    at = row * columns + column
    if SLICED:
        return at, inside, row * row_stride + (column + column // kernel_row_columns * kernel_row_gap)
    return at, inside, at


@triton.jit
def sum_splits(at, step, first, end, inside):
    """The partial sums from first up to end at these pointers, step elements apart, in their order."""
    sums = tl.zeros(at.shape, tl.float32)
    for some in range(first, end, TOGETHER):
        for i in tl.static_range(TOGETHER):
            there = inside & (some + i < end)
            sums += tl.load(at + (some + i) * step, mask=there, other=0.0, cache_modifier=".cg")
    return sums


def share_of(split: int) -> int:
    """How many splits' sums one program adds: all, or of many about their square root."""
    share: int = split if split <= ONE_SHARE else triton.next_power_of_2(math.isqrt(split - 1) + 1)
    return share


def adam_rows(config: Mapping[str, int]) -> int:
    """How many rows of a tile Adam takes at once."""
    rows: int = min(config["BLOCK_M"], ADAM_TILE // config["BLOCK_N"])
    return rows


def merge_steps(args: Arguments) -> int:
    """The iterations of the program that finishes a tile last, over pieces and over the sums of others."""
    split, share = args["SPLIT"], args["SHARE"]
    pieces: int = args["BLOCK_M"] // args["ROWS"]
    if split == 1:  # a large tile alone
        return pieces if pieces > 1 else 0
    shares = triton.cdiv(split, share)
    steps: int = triton.cdiv(share, TOGETHER) + (triton.cdiv(shares, TOGETHER) if shares > 1 else 0)
    return pieces * steps


LAUNCH_FACTS = {
    "_conv_wgrad_adam_kernel": LaunchFacts(
        over("pixels", "BLOCK_K", "SPLIT"),
        merge_steps,
        updates=("param_ptr", "exp_avg_ptr", "exp_avg_sq_ptr"),
        multiplies=True,
    )
}
MANY_PIXELS = 512  # from here on the rule splits sums
ADAM_TILE = 64 * 64  # elements of a tile that Adam takes at once, and of the rule's where it does not split
LARGEST_TILE = 128 * 128
SLICED_TILE = 32 * 64
DEEP = ("e4", "e5", "e6", "e7", "e8", "d8", "d7", "d6", "d5", "d4")  # at batch size 1 at most 256 pixels each
SHALLOW = ("D1", "d2")  # many pixels, with and without whole blocks


def compile_cases() -> Iterator[Case]:
    """The generator's deep layers and two others, with and without a low-precision copy, and a slice of the taps."""
    types = dict.fromkeys(("param_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "lr_ptr"), "*fp32")
    types |= {"powers_ptr": "*fp64", "workspace_ptr": "*fp32", "counter_ptr": "*i32"}
    types |= dict.fromkeys(("beta1", "beta2", "one_minus_beta1", "one_minus_beta2", "eps"), "fp32")
    types |= dict.fromkeys(("row_stride", "kernel_row_gap"), "i32")
    pointers = ["outer_ptr", "outer2_ptr", "inner_ptr", "low_precision_ptr"]
    for layer in LAYERS:
        if layer.name in (*DEEP, *SHALLOW):
            yield from _layer_cases(layer, pointers, types, {"WRITE_LOW_PRECISION": 1, "SLICED": 0})
    deepest = next(layer for layer in LAYERS if layer.name == "e8")
    middle = {"WRITE_LOW_PRECISION": 1, "SLICED": 1, "KH": 2, "KW": 2, "PADDING": 0}
    for case in _layer_cases(deepest, pointers, types, middle):
        strides = {"row_stride": deepest.shape.columns, "kernel_row_gap": 2 * deepest.shape.inner}
        yield replace(case, name=f"{case.name} sliced", sizes=case.sizes | strides)
    types["low_precision_ptr"] = "*fp32"
    yield from _layer_cases(deepest, pointers, types, {"WRITE_LOW_PRECISION": 0, "SLICED": 0})


def _layer_cases(layer: Layer, pointers: list[str], types: dict[str, str], constants: dict[str, int]) -> Iterator[Case]:
    of_any: list[dict[str, Any]] = []
    largest = SLICED_TILE if constants["SLICED"] else LARGEST_TILE
    for case in layer_cases(layer, _conv_wgrad_adam_kernel, pointers, types, constants, largest):
        split = case.constants["SPLIT"]
        of_any = of_any if split > 1 else case.configs  # a split is of large tiles as well
        if split > 1 and constants["SLICED"]:
            continue
        shared = case.constants | {"SHARE": max(1, split // 2)}  # in two levels where it is split
        configs = [config | {"ROWS": adam_rows(config)} for config in of_any]
        yield replace(
            case, sizes={"row_stride": 0, "kernel_row_gap": 0} | case.sizes, constants=shared, configs=configs
        )


def _gaps(param: Tensor) -> tuple[int, int]:
    """Elements from row to row of a weight, and those between two kernel rows that are not its own."""
    n_rows, n_inner, kh, kw = param.shape  # the stride of a one-element dimension means nothing
    return param.stride(0) if n_rows > 1 else kh * kw * n_inner, param.stride(2) - kw * n_inner if kh > 1 else 0


def is_sliced(param: Tensor) -> bool:
    """Whether its rows or kernel rows have gaps: a slice of the taps."""
    row_stride, gap = _gaps(param)
    return gap > 0 or row_stride > param[0].numel()


def largest_tile(param: Tensor) -> int:
    """Elements of a tile; of a slice each has an address of its own, and 64 x 64 spill."""
    return SLICED_TILE if is_sliced(param) else LARGEST_TILE


def choose_config(m: int, n: int, k: int, param: Tensor, like: Tensor) -> dict[str, int]:
    """As tile_rule.choose_config, for an (m, k) x (k, n) product; SPLIT is 1 where the weight has no dense rows."""
    whole = tile_rule.whole_block(param.shape[1], most=64)
    long = k >= MANY_PIXELS and not is_sliced(param)
    config: dict[str, int] = tile_rule.choose_config(
        m,
        n,
        k,
        like,
        whole=whole,
        largest=min(largest_tile(param), LARGEST_TILE if long else ADAM_TILE),
        always_splits=long,
    )
    return config if long else config | {"SPLIT": 1}


def conv_wgrad_adam(
    outer: Tensor,
    outer2: Tensor | None,
    inner: Tensor,
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    powers: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    stride: int,
    padding: int,
    low_precision: Tensor | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """Launch; see `fastp2p.ops.conv_wgrad_adam`."""
    kh, kw = param.shape[2:]
    tensors, sizes, (m, n, k) = launch_arguments(outer, outer2, inner, (kh, kw))
    n_outer2, n_inner = sizes[6:8]
    config = fitting(n_inner, config or choose_config(m, n, k, param, inner))
    low = param if low_precision is None else low_precision
    numbers = (beta1, beta2, 1 - beta1, 1 - beta2, eps)
    adam = (param, exp_avg, exp_avg_sq)
    writes_low = low_precision is not None
    row_stride, gap = _gaps(param)
    sliced, split, rows = is_sliced(param), config["SPLIT"], adam_rows(config)
    assert split == 1 or not sliced, "a slice of the taps whose sums are split"
    n_tiles, share = tiles(m - n_outer2, n_outer2, n, config), share_of(split)
    workspace, count = param, param  # neither is touched
    if split > 1 or rows < config["BLOCK_M"]:
        workspace = torch.empty(split, m, n, dtype=torch.float32, device=param.device)
        count = counters(n_tiles * (triton.cdiv(split, share) + 1), param)
    _conv_wgrad_adam_kernel[(n_tiles * split,)](
        *tensors,
        *sizes,
        workspace,
        count,
        *adam,
        row_stride if sliced else 0,
        gap,
        low,
        lr,
        powers.contiguous(),
        *numbers,
        WRITE_LOW_PRECISION=writes_low,
        SLICED=sliced,
        KH=kh,
        KW=kw,
        STRIDE=stride,
        PADDING=padding,
        TWO_INPUTS=n_outer2 > 0,
        WHOLE_BLOCKS=whole_blocks(n_inner, config),
        PRECISION=gemm.precision(inner.dtype),
        SHARE=share,
        ROWS=rows,
        **config,
    )
