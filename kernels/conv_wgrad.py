"""conv_wgrad in Triton: dweight[o, (tap, c)] = sum over pixels of outer[pixel, o] inner[pixel(tap), c].

One program makes a tile of outer channels by (tap, inner channel), the weight's physical order (O, KH, KW, C), summing
over all pixels of the batch in blocks; inner is gathered as conv gathers it. Multiplies in the activations' dtype on
the tensor cores, accumulates in float32 and rounds once. Large maps have few weights and many pixels, so the sum is
split over SPLIT programs whose float32 partial sums `reduce_splits` adds in a fixed order: no atomics, the same bits
every time. A second outer tensor gives further rows of dweight: the gradient of a concatenation never written.

Bytes: outer once per block of columns, inner once per tap and block of rows, both from memory once where the cache
holds them; dweight once, and 8 SPLIT bytes an element more where the sum is split.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastp2p.kernels import gemm, tile_rule
from fastp2p.kernels.compile_check import Case
from fastp2p.kernels.dependent import begin, launched
from fastp2p.kernels.gemm import dot
from fastp2p.kernels.launch_facts import LaunchFacts, over
from fastp2p.kernels.layer_shapes import LAYERS, Layer, gemm_cases
from fastp2p.kernels.layout import pixel_rows, within


@launched(do_not_specialize=gemm.GEOMETRY)
def _conv_wgrad_kernel(
    outer_ptr,  # (pixels, n_outer), rows outer_stride apart
    outer2_ptr,  # (pixels, n_outer2), rows outer2_stride apart
    inner_ptr,  # (images * height * width, n_inner), rows inner_stride apart
    out_ptr,  # dweight, (n_outer + n_outer2, KH, KW, n_inner); float32 (SPLIT, ...) where the sum is split
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
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TWO_INPUTS: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,  # n_inner is a multiple of BLOCK_N: a tile has one tap
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    begin()
    split = tl.program_id(0) % SPLIT
    acc, row, column, inside = outer_product(
        tl.program_id(0) // SPLIT, split, outer_ptr, outer2_ptr, inner_ptr, pixels, height, width, outer_height,
        outer_width, n_outer, n_outer2, n_inner, outer_stride, outer2_stride, inner_stride,
        KH, KW, STRIDE, PADDING, TWO_INPUTS, WHOLE_BLOCKS, PRECISION, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    out_ptr += split.to(tl.int64) * (n_outer + n_outer2) * KH * KW * n_inner
    offset = row.to(tl.int64)[:, None] * (KH * KW * n_inner) + column[None, :]
    tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rows_of(row_block, n_outer, n_outer2, TWO_INPUTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """A block's first row in its outer tensor, its rows, and whether that is the second, whose blocks come last."""
    first_blocks = tl.cdiv(n_outer, BLOCK_M)
    second = row_block >= first_blocks
    if TWO_INPUTS:
        row_block = tl.where(second, row_block - first_blocks, row_block)
        n_outer = tl.where(second, n_outer2, n_outer)
    return row_block * BLOCK_M, n_outer, second


@triton.jit
def outer_product(
    tile, split, outer_ptr, outer2_ptr, inner_ptr, pixels, height, width, outer_height, outer_width,
    n_outer, n_outer2, n_inner, outer_stride, outer2_stride, inner_stride,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, TWO_INPUTS: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of dweight, or this split's share: the float32 sums, and where in the weight they belong.

    That is the rows (BLOCK_M,), the columns (BLOCK_N,), and which exist.
    """
    columns = KH * KW * n_inner
    column_blocks = tl.cdiv(columns, BLOCK_N)
    column = tile % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    first_row, rows, second = rows_of(tile // column_blocks, n_outer, n_outer2, TWO_INPUTS, BLOCK_M)
    row = first_row + tl.arange(0, BLOCK_M)
    rows_inside = row < rows
    weight_row = row
    if TWO_INPUTS:
        weight_row = tl.where(second, n_outer + row, row)
        outer_ptr = tl.where(second, outer2_ptr, outer_ptr)
        outer_stride = tl.where(second, outer2_stride, outer_stride)

    if WHOLE_BLOCKS:
        tap = tile % column_blocks * BLOCK_N // n_inner
        tap_y = tap // KW
        tap_x = tap % KW
    else:
        tap = column // n_inner
        tap_y = (tap // KW)[None, :]
        tap_x = (tap % KW)[None, :]
    # From a block of pixels to the next, positions move by BLOCK_K in x, y and images, with a carry at most: a division
    # takes some twenty instructions, and the loop would make four of them for each pixel
    blocks = tl.cdiv(pixels, BLOCK_K)
    per_split = tl.cdiv(blocks, SPLIT)
    first = split * per_split
    lane = tl.arange(0, BLOCK_K)
    pixel = first * BLOCK_K + lane
    x = pixel % outer_width * STRIDE - PADDING  # in inner, at tap 0
    y = pixel // outer_width % outer_height * STRIDE - PADDING
    image = (pixel // (outer_width * outer_height)).to(tl.int64)
    right = outer_width * STRIDE
    bottom = outer_height * STRIDE
    step_x = BLOCK_K % outer_width * STRIDE
    step_y = BLOCK_K // outer_width % outer_height * STRIDE
    step_image = BLOCK_K // (outer_width * outer_height)
    # A pixel's place in inner, from its start, and what moves it: elements
    row_step = width.to(tl.int64) * inner_stride
    image_step = height * row_step
    place = image * image_step + y * row_step + x * inner_stride
    step = step_image * image_step + step_y * row_step + step_x * inner_stride
    next_row = STRIDE * row_step - right * inner_stride
    next_image = image_step - bottom * row_step

    tap_offset = (tap_y * width + tap_x) * inner_stride + (column - tap * n_inner)[None, :]
    inside = rows_inside[:, None] & (column < columns)[None, :]
    a_offset = lane[None, :] * outer_stride + row[:, None]
    outer_ptr += first.to(tl.int64) * BLOCK_K * outer_stride
    left = pixels - first * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(first, tl.minimum(first + per_split, blocks)):
        a = tl.load(outer_ptr + a_offset, mask=rows_inside[:, None] & (lane < left)[None, :], other=0.0)
        visible = within(y[:, None] + tap_y, height) & within(x[:, None] + tap_x, width) & (column < columns)[None, :]
        b_offset = place[:, None] + tap_offset
        b = tl.load(inner_ptr + b_offset, mask=visible & (lane < left)[:, None], other=0.0)
        acc = dot(a, b, acc, PRECISION)

        outer_ptr += BLOCK_K * outer_stride
        left -= BLOCK_K
        x += step_x
        past_right = x >= right - PADDING
        x = tl.where(past_right, x - right, x)
        y += tl.where(past_right, step_y + STRIDE, step_y)
        past_bottom = y >= bottom - PADDING
        y = tl.where(past_bottom, y - bottom, y)
        place += tl.where(past_right, step + next_row, step) + tl.where(past_bottom, next_image, 0)
    return acc, weight_row, column, inside


LAUNCH_FACTS = {"_conv_wgrad_kernel": LaunchFacts(over("pixels", "BLOCK_K", "SPLIT"), multiplies=True)}


def compile_cases() -> Iterator[Case]:
    """Every layer of the networks."""
    for layer in LAYERS:
        yield from layer_cases(
            layer, _conv_wgrad_kernel, ["outer_ptr", "outer2_ptr", "inner_ptr"], {"out_ptr": "*fp32"}
        )
    same_dtype = ["outer_ptr", "outer2_ptr", "inner_ptr", "out_ptr"]
    yield from layer_cases(LAYERS[3], _conv_wgrad_kernel, same_dtype)


def layer_cases(
    layer: Layer,
    kernel: Any,
    pointers: list[str],
    more_types: dict[str, str] | None = None,
    more_constants: dict[str, int] | None = None,
    largest_tile: int = 128 * 128,
) -> Iterator[Case]:
    """A layer's product by a kernel that is built on `outer_product`."""
    shape, n_outer, n_outer2, n_inner = layer.shape, layer.shape.outer, layer.shape.outer2, layer.shape.inner
    sizes = {"n_outer": n_outer, "n_outer2": n_outer2, "n_inner": n_inner}
    sizes |= {"outer_stride": n_outer, "outer2_stride": n_outer2 or n_outer, "inner_stride": n_inner}
    constants = layer.window | {"TWO_INPUTS": int(n_outer2 > 0)}
    whole = tile_rule.whole_block(n_inner, most=64)
    candidates = partial(tile_rule.candidates, shape.rows, shape.columns, whole=whole, largest=largest_tile)
    yield from gemm_cases(
        layer,
        kernel,
        pointers,
        sizes,
        constants | (more_constants or {}),
        tiles=lambda itemsize: [fitting(n_inner, config) for config in candidates(itemsize)],
        whole_blocks=partial(whole_blocks, n_inner),
        more_types=more_types,
    )


def fitting(n_inner: int, config: dict[str, int]) -> dict[str, int]:
    """A tile whose registers hold its gathered elements and their places: of 64 x 64 with four warps some spill."""
    gathers = not whole_blocks(n_inner, config)
    return config | {"num_warps": 8} if gathers and config["BLOCK_M"] == config["BLOCK_N"] == 64 else config


def whole_blocks(n_inner: int, config: dict[str, int]) -> bool:
    """Whether a tile has one tap."""
    return n_inner % config["BLOCK_N"] == 0


def launch_arguments(
    outer: Tensor, outer2: Tensor | None, inner: Tensor, kernel_size: tuple[int, int]
) -> tuple[list[Any], list[int], tuple[int, int, int]]:
    """What both kernels of this product take: the tensors, the sizes, and the (m, n, k) of the GEMM."""
    outer, outer_stride = pixel_rows(outer)
    n_outer2 = 0 if outer2 is None else outer2.shape[1]
    outer2, outer2_stride = (outer, outer_stride) if outer2 is None else pixel_rows(outer2)
    inner, inner_stride = pixel_rows(inner)
    n, n_outer, outer_height, outer_width = outer.shape
    _, n_inner, height, width = inner.shape
    pixels = n * outer_height * outer_width
    sizes = [pixels, height, width, outer_height, outer_width, n_outer, n_outer2, n_inner]
    sizes += [outer_stride, outer2_stride, inner_stride]
    return [outer, outer2, inner], sizes, (n_outer + n_outer2, kernel_size[0] * kernel_size[1] * n_inner, pixels)


def tiles(n_outer: int, n_outer2: int, columns: int, config: dict[str, int]) -> int:
    """How many tiles of BLOCK_M x BLOCK_N the weight takes; none holds rows of both outer tensors."""
    row_blocks: int = triton.cdiv(n_outer, config["BLOCK_M"]) + triton.cdiv(n_outer2, config["BLOCK_M"])
    column_blocks: int = triton.cdiv(columns, config["BLOCK_N"])
    return row_blocks * column_blocks


def partial_sums(
    tensors: list[Any],
    sizes: list[int],
    kernel_size: tuple[int, int],
    stride: int,
    padding: int,
    config: dict[str, int],
    out: Tensor | None = None,
) -> Tensor:
    """Launch the product of `launch_arguments` into out where SPLIT is 1, else into (SPLIT, rows, columns) float32."""
    n_outer, n_outer2, n_inner = sizes[5:8]
    columns = kernel_size[0] * kernel_size[1] * n_inner
    if out is None:
        shape = (config["SPLIT"], n_outer + n_outer2, columns)
        out = torch.empty(shape, dtype=torch.float32, device=tensors[0].device)
    _conv_wgrad_kernel[(tiles(n_outer, n_outer2, columns, config) * config["SPLIT"],)](
        *tensors,
        out,
        *sizes,
        KH=kernel_size[0],
        KW=kernel_size[1],
        STRIDE=stride,
        PADDING=padding,
        TWO_INPUTS=n_outer2 > 0,
        WHOLE_BLOCKS=whole_blocks(n_inner, config),
        PRECISION=gemm.precision(tensors[2].dtype),
        **config,
    )
    return out


def conv_wgrad(
    outer: Tensor,
    outer2: Tensor | None,
    inner: Tensor,
    kernel_height: int,
    kernel_width: int,
    stride: int,
    padding: int,
    dtype: torch.dtype,
    config: dict[str, Any] | None = None,
) -> Tensor:
    """Launch; see `fastp2p.ops.conv_wgrad`."""
    kernel_size = (kernel_height, kernel_width)
    tensors, sizes, (m, n, k) = launch_arguments(outer, outer2, inner, kernel_size)
    n_inner = sizes[7]
    whole = tile_rule.whole_block(n_inner, most=64)
    config = fitting(n_inner, config or tile_rule.choose_config(m, n, k, inner, whole=whole))
    shape = (m, n_inner, kernel_height, kernel_width)
    dweight = torch.empty(shape, dtype=dtype, device=inner.device, memory_format=torch.channels_last)
    if config["SPLIT"] > 1:
        gemm.reduce_splits(partial_sums(tensors, sizes, kernel_size, stride, padding, config), dweight)
    else:
        partial_sums(tensors, sizes, kernel_size, stride, padding, config, dweight)
    return dweight
