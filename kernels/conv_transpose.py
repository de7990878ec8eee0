"""conv_transpose in Triton: transposed convolution by sub-pixel phases, of one or two inputs.

Every STRIDE-th pixel of the result, in each direction, meets the same taps: a phase is a dense GEMM over those, of
pixels by output channels, and all STRIDE² phases run in one launch; of k4 and stride 2 each has 2 x 2 taps. No zeros
are inserted and multiplied, only taps outside the image are. A second input is a second part of the same sum, read from
where it lies: cat([x, x2]) is never written. In the weight's physical order (C + C2, KH, KW, O) each row of a tap's
matrix is contiguous.

Multiplies in x's dtype on the tensor cores, accumulates in float32; epilogue and split sums as in conv. Bytes: a pixel
of the inputs once for each tap that meets it, KH KW times over all phases for every block of output channels, from
memory once where the cache holds it; the weight once per row of tiles; out once.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastp2p.kernels import fold, gemm, tile_rule
from fastp2p.kernels.compile_check import Case, on_target
from fastp2p.kernels.dependent import begin, launched
from fastp2p.kernels.gemm import dot, finish, finish_steps
from fastp2p.kernels.launch_facts import Arguments, LaunchFacts
from fastp2p.kernels.layer_shapes import EPILOGUES, LAYERS, fitting, gemm_cases
from fastp2p.kernels.layout import pixel_rows, within
from fastp2p.kernels.norm_epilogue import GateArguments
from fastp2p.norm_gate import NormGate


@launched(do_not_specialize=gemm.GEOMETRY)
def _conv_transpose_kernel(
    x_ptr,  # (images * height * width, n_in), rows pixel_stride apart
    x2_ptr,  # (images * height * width, n_in2), rows pixel_stride2 apart
    weight_ptr,  # (n_in + n_in2, KH, KW, n_out)
    bias_ptr,  # (n_out,)
    gate_ptr,  # (pixels, n_out)
    out_ptr,  # (pixels, n_out)
    workspace_ptr,  # (SPLIT, pixels, n_out) float32
    partial_ptr,  # these four as in store_stats, of STRIDE² tiles; with counters of the splits before
    mean_ptr,
    var_ptr,
    counter_ptr,
    pixels,  # out's, over all images
    rows,  # those of a phase and a statistics group
    tiles,  # those of a phase and a statistics group
    share,
    images,  # a statistics group's
    height,
    width,
    out_height,
    out_width,
    n_in,
    n_in2,
    n_out,
    pixel_stride,
    pixel_stride2,
    slope,
    gate_mean_ptr,  # from here to keep_scale as in norm_epilogue
    gate_var_ptr,
    gate_weight_ptr,
    gate_bias_ptr,
    rng_ptr,
    addend_ptr,
    first,
    addend_stride,
    eps,
    layer,
    keep_scale,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TWO_INPUTS: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,  # n_in and n_in2 are multiples of BLOCK_K: a block of the sum has one tap
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_STATS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
    SECOND: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    begin()
    split = tl.program_id(0) % SPLIT
    phase = tl.program_id(0) // SPLIT % (STRIDE * STRIDE)
    channel_blocks = tl.cdiv(n_out, BLOCK_N)
    tile = tl.program_id(0) // (SPLIT * STRIDE * STRIDE) // channel_blocks  # over all groups
    channel_block = tl.program_id(0) // (SPLIT * STRIDE * STRIDE) % channel_blocks
    channel = channel_block * BLOCK_N + tl.arange(0, BLOCK_N)

    # A phase's pixels form an image of their own, of every STRIDE-th row and column
    phase_height = tl.cdiv(out_height, STRIDE)
    phase_width = tl.cdiv(out_width, STRIDE)
    row = tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    image = tile // tiles * images + row // (phase_width * phase_height)
    down_by = row // phase_width % phase_height
    right_by = row % phase_width
    out_y = down_by * STRIDE + phase // STRIDE
    out_x = right_by * STRIDE + phase % STRIDE
    row_inside = (row < rows) & (out_y < out_height) & (out_x < out_width)

    # Its taps are every STRIDE-th as well; the first reads x at (y, x), the next one pixel before
    first_tap_y = (phase // STRIDE + PADDING) % STRIDE
    first_tap_x = (phase % STRIDE + PADDING) % STRIDE
    y = down_by + (phase // STRIDE + PADDING) // STRIDE
    x = right_by + (phase % STRIDE + PADDING) // STRIDE

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _accumulate(
        acc, x_ptr, weight_ptr, image, y, x, row_inside, channel, first_tap_y, first_tap_x, split,
        height, width, n_in, n_out, pixel_stride, KH, KW, STRIDE, WHOLE_BLOCKS, PRECISION, SPLIT, BLOCK_K,
    )  # fmt: skip
    if TWO_INPUTS:
        weight2_ptr = weight_ptr + n_in * KH * KW * n_out
        acc = _accumulate(
            acc, x2_ptr, weight2_ptr, image, y, x, row_inside, channel, first_tap_y, first_tap_x, split,
            height, width, n_in2, n_out, pixel_stride2, KH, KW, STRIDE, WHOLE_BLOCKS, PRECISION, SPLIT, BLOCK_K,
        )  # fmt: skip

    pixel = (image.to(tl.int64) * out_height + out_y) * out_width + out_x
    count = tl.minimum(rows - tile % tiles * BLOCK_M, BLOCK_M)
    if (out_height % STRIDE != 0) | (out_width % STRIDE != 0):  # some phases have fewer rows or columns
        count = tl.sum(row_inside.to(tl.int32), axis=0)
    finish(
        acc, pixel, row_inside, count, channel, n_out, out_ptr, bias_ptr, gate_ptr, slope,
        split, pixels, workspace_ptr,
        tile // tiles, tile % tiles * (STRIDE * STRIDE) + phase, tiles * (STRIDE * STRIDE), share,
        channel_block, channel_blocks, partial_ptr, mean_ptr, var_ptr, counter_ptr,
        gate_mean_ptr, gate_var_ptr, gate_weight_ptr, gate_bias_ptr, rng_ptr, addend_ptr,
        first, addend_stride, eps, layer, keep_scale,
        ACTIVATION, HAS_BIAS, HAS_GATE, HAS_STATS, HAS_NORM, HAS_AFFINE, SECOND, DROP_BELOW, SPLIT, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _accumulate(
    acc, x_ptr, weight_ptr, image, y, x, row_inside, channel, first_tap_y, first_tap_x, split,
    height, width, n_in, n_out, pixel_stride,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + one input's sum over a phase's taps and its channels, or this split's share of it."""
    taps_x = tl.cdiv(KW - first_tap_x, STRIDE)
    n_sum = tl.cdiv(KH - first_tap_y, STRIDE) * taps_x * n_in
    taps_x = tl.maximum(taps_x, 1)  # a phase without taps has no blocks, but its divisions are moved out of the loop
    blocks = tl.cdiv(n_sum, BLOCK_K)
    per_split = tl.cdiv(blocks, SPLIT)
    at_ptr = x_ptr + ((image.to(tl.int64) * height + y) * width + x) * pixel_stride
    for block in range(split * per_split, tl.minimum(split * per_split + per_split, blocks)):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        if WHOLE_BLOCKS:
            tap = block * BLOCK_K // n_in
            up = tap // taps_x
            left = tap % taps_x
            visible = (row_inside & within(y - up, height) & within(x - left, width))[:, None]
        else:
            tap = k // n_in
            up = tap // taps_x
            left = tap % taps_x
            seen = within(y[:, None] - up[None, :], height) & within(x[:, None] - left[None, :], width)
            visible = row_inside[:, None] & seen & (k < n_sum)[None, :]
        c = k - tap * n_in
        a = tl.load(at_ptr[:, None] + (c - (up * width + left) * pixel_stride)[None, :], mask=visible, other=0.0)
        weight_row = (c * KH + first_tap_y + STRIDE * up) * KW + first_tap_x + STRIDE * left
        weight_inside = (k < n_sum)[:, None] & (channel < n_out)[None, :]
        b = tl.load(weight_ptr + weight_row[:, None] * n_out + channel[None, :], mask=weight_inside, other=0.0)
        acc = dot(a, b, acc, PRECISION)
    return acc


def _iterations(args: Arguments) -> int:
    """Those of a phase with the most taps."""
    taps = triton.cdiv(args["KH"], args["STRIDE"]) * triton.cdiv(args["KW"], args["STRIDE"])
    inputs = ("n_in", "n_in2") if args["TWO_INPUTS"] else ("n_in",)
    return sum(triton.cdiv(triton.cdiv(taps * args[n], args["BLOCK_K"]), args["SPLIT"]) for n in inputs)


def _merges(args: Arguments) -> int:
    steps: int = finish_steps(args, args["tiles"] * args["STRIDE"] ** 2, args["SPLIT"])
    return steps


LAUNCH_FACTS = {"_conv_transpose_kernel": LaunchFacts(_iterations, _merges, multiplies=True)}


def compile_cases() -> Iterator[Case]:
    """The forward pass of every transposed convolution of the networks, and the data gradient of every other."""
    for layer in LAYERS:
        shape, n_in, n_in2, n_out = layer.shape, layer.shape.outer, layer.shape.outer2, layer.shape.inner
        phase_pixels = math.prod(triton.cdiv(side, shape.stride) for side in shape.large)
        sizes = {"n_in": n_in, "n_in2": n_in2, "n_out": n_out}
        sizes |= {"pixel_stride": n_in, "pixel_stride2": n_in2 or n_in}
        sizes |= {"first": 0, "addend_stride": 2 * n_out}  # a skip's gradient is half of a concatenation's
        constants = layer.window | {"TWO_INPUTS": int(n_in2 > 0)}
        for after in layer.forward if layer.transposed else layer.gradients:
            yield from gemm_cases(
                layer,
                _conv_transpose_kernel,
                ["x_ptr", "x2_ptr", "weight_ptr", "gate_ptr", "out_ptr", "addend_ptr"],
                sizes,
                constants | EPILOGUES[after],
                tiles=partial(tile_rule.candidates, phase_pixels, n_out, whole=tile_rule.whole_block(n_in, n_in2)),
                whole_blocks=partial(_whole_blocks, n_in, n_in2),
            )


def _whole_blocks(n_in: int, n_in2: int, config: dict[str, int]) -> bool:
    return n_in % config["BLOCK_K"] == 0 and n_in2 % config["BLOCK_K"] == 0


def conv_transpose(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    stride: int,
    padding: int,
    height: int,
    width: int,
    activation: int,
    slope: float,
    stat_groups: int,
    *norm: Any,
    config: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch; see `fastp2p.ops.conv_transpose`. height and width are the result's."""
    n, n_in, in_height, in_width = x.shape
    _, n_out, kh, kw = weight.shape
    n_in2 = 0 if x2 is None else x2.shape[1]
    x, pixel_stride = pixel_rows(x)
    x2, pixel_stride2 = (x, pixel_stride) if x2 is None else pixel_rows(x2)
    bias = None if bias is None else bias.contiguous()
    gate = None if gate is None else gate.contiguous(memory_format=torch.channels_last)
    out = torch.empty((n, n_out, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    pixels, phases, groups = n * height * width, stride * stride, max(1, stat_groups)
    sum_of_a_phase = triton.cdiv(kh, stride) * triton.cdiv(kw, stride) * (n_in + n_in2)
    rows = n // groups * triton.cdiv(height, stride) * triton.cdiv(width, stride)
    gate_norm = NormGate(*norm)
    window = {"KH": kh, "KW": kw, "STRIDE": stride, "PADDING": padding}
    few = fold.is_for(weight, stride, padding, stat_groups, gate_norm.gate_mean)
    if config is None and few:
        config = fold.config_for(x, weight)
    elif config and "FOLD" in config and not few:
        config = None  # the tuner chose it for the same product, with nothing after it that fold lacks
    if config and "FOLD" in config:
        weight, tap_stride = pixel_rows(weight)
        strides = (pixel_stride, pixel_stride2)
        settings = (window, activation, slope, config)
        fold.fold(x, x2, weight, bias, gate, out, strides, tap_stride, *settings, two_inputs=n_in2 > 0)
        nothing = torch.empty(0, n_out, dtype=torch.float32, device=x.device)
        return out, nothing, nothing.clone()
    weight = weight.contiguous(memory_format=torch.channels_last)
    whole = tile_rule.whole_block(n_in, n_in2)
    config = config or tile_rule.choose_config(rows, n_out, sum_of_a_phase, x, whole=whole, products=phases * groups)
    gated = GateArguments.new(gate_norm, x)
    flags = gemm.epilogue_flags(activation, bias, gate, stat_groups, gated)
    config = on_target(fitting(config, flags, transposed=True), tile_rule.capability_of(x))
    tiles, channel_blocks = triton.cdiv(rows, config["BLOCK_M"]), triton.cdiv(n_out, config["BLOCK_N"])
    buffers = gemm.Buffers.new(out, config["SPLIT"], stat_groups, tiles * phases, channel_blocks, gate_norm)
    _conv_transpose_kernel[(groups * tiles * phases * channel_blocks * config["SPLIT"],)](
        x,
        x2,
        weight,
        x if bias is None else bias,
        x if gate is None else gate,
        out,
        *buffers.pointers,
        pixels,
        rows,
        tiles,
        buffers.share,
        n // groups,
        in_height,
        in_width,
        height,
        width,
        n_in,
        n_in2,
        n_out,
        pixel_stride,
        pixel_stride2,
        slope,
        *gated.tensors,
        *gated.numbers,
        **window,
        TWO_INPUTS=n_in2 > 0,
        WHOLE_BLOCKS=_whole_blocks(n_in, n_in2, config),
        **flags,
        PRECISION=gemm.precision(x.dtype),
        **config,
    )
    return out, buffers.mean, buffers.var
