"""conv_wgrad_adam in Triton: the tile of a weight gradient in registers, and Adam on that tile of the weight.

The gradient is a product of rank P, the batch's pixels; for the deep layers P is at most a few hundred and making the
tile anew costs less than writing it and reading it back: 24 bytes a weight (and 2 for the low-precision copy) against
32 for conv_wgrad and adam apart. Each program owns its tile. Of a slice of the taps, whose rows have gaps, the weight
and its moments are addressed by strides. Layers of many pixels and few weights have too few tiles for that: there the
sum is split, as conv_wgrad splits it, and the kernel that adds the partial sums in a fixed order does Adam's step on
them, for 8 SPLIT bytes a weight more. Float32 throughout, after the product of the activations.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastp2p.kernels import gemm, tile_rule
from fastp2p.kernels.adam import adam_update
from fastp2p.kernels.compile_check import Case
from fastp2p.kernels.conv_wgrad import launch_arguments, layer_cases, outer_product, partial_sums, tiles, whole_blocks
from fastp2p.kernels.launch_facts import LaunchFacts, over
from fastp2p.kernels.layer_shapes import LAYERS, Layer


@triton.jit(do_not_specialize=gemm.GEOMETRY)
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    grad, row, column, kernel_row, inside = outer_product(
        tl.program_id(0), 0, outer_ptr, outer2_ptr, inner_ptr, pixels, height, width, outer_height,
        outer_width, n_outer, n_outer2, n_inner, outer_stride, outer2_stride, inner_stride,
        KH, KW, STRIDE, PADDING, TWO_INPUTS, WHOLE_BLOCKS, PRECISION, 1, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    low_offset = row.to(tl.int64)[:, None] * (KH * KW * n_inner) + column[None, :]
    offset = low_offset
    if SLICED:
        offset = row.to(tl.int64)[:, None] * row_stride + (column[None, :] + kernel_row * kernel_row_gap)
    adam_update(
        grad, offset, low_offset, inside, param_ptr, exp_avg_ptr, exp_avg_sq_ptr, low_precision_ptr, lr_ptr, powers_ptr,
        beta1, beta2, one_minus_beta1, one_minus_beta2, eps, WRITE_LOW_PRECISION,
    )  # fmt: skip


@triton.jit
def _reduce_adam_kernel(
    workspace_ptr,  # (splits, weights) float32
    param_ptr,  # (weights,) float32, as the next two
    exp_avg_ptr,
    exp_avg_sq_ptr,
    low_precision_ptr,  # (weights,) bfloat16 or float16; param_ptr again when there is none
    lr_ptr,  # () float32
    powers_ptr,  # (2,) float64
    weights,
    splits,
    beta1,
    beta2,
    one_minus_beta1,  # rounded once, from float64
    one_minus_beta2,
    eps,
    WRITE_LOW_PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of a split weight gradient in a fixed order, and Adam on the spot."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < weights
    sums = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        at = workspace_ptr + split.to(tl.int64)[:, None] * weights + i[None, :]
        sums += tl.load(at, mask=(split < splits)[:, None] & inside[None, :], other=0.0)
    adam_update(
        tl.sum(sums, axis=0), i, i, inside, param_ptr, exp_avg_ptr, exp_avg_sq_ptr, low_precision_ptr, lr_ptr,
        powers_ptr, beta1, beta2, one_minus_beta1, one_minus_beta2, eps, WRITE_LOW_PRECISION,
    )  # fmt: skip


_ADAM = ("param_ptr", "exp_avg_ptr", "exp_avg_sq_ptr")  # what both update
LAUNCH_FACTS = {
    "_conv_wgrad_adam_kernel": LaunchFacts(over("pixels", "BLOCK_K"), updates=_ADAM, multiplies=True),
    "_reduce_adam_kernel": LaunchFacts(over("splits", "BLOCK_S"), updates=_ADAM),
}


REDUCE_CONFIG = {"BLOCK_S": 16, "BLOCK": 64, "num_warps": 4}
MANY_PIXELS = 512  # from here on the rule splits sums
LARGEST_TILE = 64 * 64  # beside the sums, Adam holds three numbers and a gradient per weight in registers
DEEP = ("e4", "e5", "e6", "e7", "e8", "d8", "d7", "d6", "d5", "d4")  # at batch size 1 at most 256 pixels each


def compile_cases() -> Iterator[Case]:
    """The deep layers of the generator, without and with a low-precision copy, and of the deepest the middle taps."""
    types = dict.fromkeys(("param_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "lr_ptr"), "*fp32") | {"powers_ptr": "*fp64"}
    types |= dict.fromkeys(("beta1", "beta2", "one_minus_beta1", "one_minus_beta2", "eps"), "fp32")
    types |= dict.fromkeys(("row_stride", "kernel_row_gap"), "i32")
    pointers = ["outer_ptr", "outer2_ptr", "inner_ptr", "low_precision_ptr"]
    for layer in LAYERS:
        if layer.name in DEEP:
            yield from _layer_cases(layer, pointers, types, {"WRITE_LOW_PRECISION": 1, "SLICED": 0})
    deepest = next(layer for layer in LAYERS if layer.name == "e8")
    middle = {"WRITE_LOW_PRECISION": 1, "SLICED": 1, "KH": 2, "KW": 2, "PADDING": 0}
    for case in _layer_cases(deepest, pointers, types, middle):
        strides = {"row_stride": deepest.shape.columns, "kernel_row_gap": 2 * deepest.shape.inner}
        yield replace(case, name=f"{case.name} sliced", sizes=case.sizes | strides)
    types["low_precision_ptr"] = "*fp32"
    yield from _layer_cases(deepest, pointers, types, {"WRITE_LOW_PRECISION": 0, "SLICED": 0})
    types = types | dict.fromkeys(("workspace_ptr",), "*fp32") | dict.fromkeys(("weights", "splits"), "i32")
    for low_precision in ("bf16", "fp16", "fp32"):
        constants = {"WRITE_LOW_PRECISION": int(low_precision != "fp32")}
        types["low_precision_ptr"] = f"*{low_precision}"
        yield Case(f"conv_wgrad_adam reduce {low_precision}", _reduce_adam_kernel, types, constants, [REDUCE_CONFIG])


def _layer_cases(layer: Layer, pointers: list[str], types: dict[str, str], constants: dict[str, int]) -> Iterator[Case]:
    for case in layer_cases(layer, _conv_wgrad_adam_kernel, pointers, types, constants, LARGEST_TILE):
        yield replace(case, sizes={"row_stride": 0, "kernel_row_gap": 0} | case.sizes)


def _gaps(param: Tensor) -> tuple[int, int]:
    """Elements from row to row of a weight, and those between two kernel rows that are not its own."""
    n_rows, n_inner, kh, kw = param.shape  # the stride of a one-element dimension means nothing
    return param.stride(0) if n_rows > 1 else kh * kw * n_inner, param.stride(2) - kw * n_inner if kh > 1 else 0


def is_sliced(param: Tensor) -> bool:
    """Whether its rows or kernel rows have gaps: a slice of the taps."""
    row_stride, gap = _gaps(param)
    return gap > 0 or row_stride > param[0].numel()


def largest_tile(param: Tensor) -> int:
    """Elements of a tile; where neither rows nor taps are aligned each has an address of its own, and 64 x 64 spill."""
    return LARGEST_TILE // 2 if is_sliced(param) and param.shape[1] % 16 else LARGEST_TILE


def choose_config(m: int, n: int, k: int, param: Tensor, like: Tensor) -> dict[str, int]:
    """As tile_rule.choose_config, for an (m, k) x (k, n) product; SPLIT is 1 where the weight has no dense rows."""
    whole = tile_rule.is_whole(param.shape[1])
    long = k >= MANY_PIXELS and not is_sliced(param)
    config: dict[str, int] = tile_rule.choose_config(
        m, n, k, like, whole=whole, largest=largest_tile(param), always_splits=long
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
    config = config or choose_config(m, n, k, param, inner)
    low = param if low_precision is None else low_precision
    numbers = (beta1, beta2, 1 - beta1, 1 - beta2, eps)
    adam = (param, exp_avg, exp_avg_sq)
    writes_low = low_precision is not None
    if config["SPLIT"] > 1:
        assert not is_sliced(param), "a slice of the taps whose sums are split"
        workspace = partial_sums(tensors, sizes, (kh, kw), stride, padding, config)
        _reduce_adam_kernel[(triton.cdiv(m * n, REDUCE_CONFIG["BLOCK"]),)](
            *(workspace, *adam, low, lr, powers.contiguous(), m * n, config["SPLIT"], *numbers),
            WRITE_LOW_PRECISION=writes_low,
            **REDUCE_CONFIG,
        )
        return
    row_stride, gap = _gaps(param)
    sliced = is_sliced(param)
    _conv_wgrad_adam_kernel[(tiles(m - n_outer2, n_outer2, n, config),)](
        *tensors,
        *sizes,
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
        **{name: value for name, value in config.items() if name != "SPLIT"},
    )
