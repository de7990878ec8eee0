"""conv in Triton: an implicit GEMM that gathers, out[m, o] = sum over tap, c of x[pixel(m, tap), c] weight[o, tap, c].

One program makes a tile of pixels by output channels; the sum runs over taps and input channels as one index, which is
also the weight's physical order (O, KH, KW, C). x is gathered as it is: no im2col buffer, no padded copy. Multiplies in
x's dtype on the tensor cores, accumulates in float32. The epilogue adds the bias, activates (or multiplies by an
activation's derivative) and leaves the tile's (mean, M2), which the last tile to arrive merges, so that what follows
need not read the tensor for that.

Where there are too few tiles for the GPU the sum is split over SPLIT programs that leave float32 partial sums. The last
one to arrive adds them in a fixed order: the same bits every time, for 8 SPLIT bytes an element of out more. Bytes: a
pixel of x once for each tap that meets it, KH KW / stride² times for every block of output channels, from memory once
where the cache holds it; the weight once per row of tiles; out once.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastp2p.conv_shape import conv_size
from fastp2p.kernels import gemm, tile_rule
from fastp2p.kernels.compile_check import Case, on_target
from fastp2p.kernels.dependent import begin, launched
from fastp2p.kernels.gemm import dot, finish, finish_steps
from fastp2p.kernels.launch_facts import Arguments, LaunchFacts
from fastp2p.kernels.layer_shapes import EPILOGUES, LAYERS, fitting, gemm_cases
from fastp2p.kernels.layout import pixel_rows, within
from fastp2p.kernels.norm_epilogue import GateArguments
from fastp2p.norm_gate import NormGate


@launched(do_not_specialize=gemm.GEOMETRY)
def _conv_kernel(
    x_ptr,  # (images * height * width, n_in), rows pixel_stride apart
    weight_ptr,  # (n_out, KH, KW, n_in)
    bias_ptr,  # (n_out,)
    gate_ptr,  # (pixels, n_out)
    out_ptr,  # (pixels, n_out)
    workspace_ptr,  # (SPLIT, pixels, n_out) float32
    partial_ptr,  # these four as in store_stats, with counters of the splits before
    mean_ptr,
    var_ptr,
    counter_ptr,
    pixels,  # out's, over all images
    rows,  # a statistics group's
    tiles,  # a statistics group's
    share,
    height,
    width,
    out_height,
    out_width,
    n_in,
    n_out,
    pixel_stride,
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
    WHOLE_BLOCKS: tl.constexpr,  # n_in is a multiple of BLOCK_K: a block of the sum has one tap
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
    channel_blocks = tl.cdiv(n_out, BLOCK_N)
    tile = tl.program_id(0) // SPLIT // channel_blocks  # over all groups
    channel_block = tl.program_id(0) // SPLIT % channel_blocks
    channel = channel_block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = row < rows
    pixel = (tile // tiles) * rows + row
    top = pixel // out_width % out_height * STRIDE - PADDING
    left = pixel % out_width * STRIDE - PADDING
    image = pixel // (out_width * out_height)
    corner_ptr = x_ptr + ((image.to(tl.int64) * height + top) * width + left) * pixel_stride

    n_sum = KH * KW * n_in
    blocks = tl.cdiv(n_sum, BLOCK_K)
    per_split = tl.cdiv(blocks, SPLIT)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(split * per_split, tl.minimum(split * per_split + per_split, blocks)):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        if WHOLE_BLOCKS:
            tap = block * BLOCK_K // n_in
            visible = (row_inside & within(top + tap // KW, height) & within(left + tap % KW, width))[:, None]
            offset = (tap // KW * width + tap % KW) * pixel_stride + (k - tap * n_in)
        else:
            tap = k // n_in
            seen = within(top[:, None] + (tap // KW)[None, :], height) & within(
                left[:, None] + (tap % KW)[None, :], width
            )
            visible = row_inside[:, None] & seen & (k < n_sum)[None, :]
            offset = (tap // KW * width + tap % KW) * pixel_stride + k % n_in
        a = tl.load(corner_ptr[:, None] + offset[None, :], mask=visible, other=0.0)
        weight_inside = (channel < n_out)[None, :] & (k < n_sum)[:, None]
        b = tl.load(weight_ptr + channel[None, :] * n_sum + k[:, None], mask=weight_inside, other=0.0)
        acc = dot(a, b, acc, PRECISION)

    count = tl.minimum(rows - tile % tiles * BLOCK_M, BLOCK_M)
    finish(
        acc, pixel.to(tl.int64), row_inside, count, channel, n_out, out_ptr, bias_ptr, gate_ptr, slope,
        split, pixels, workspace_ptr,
        tile // tiles, tile % tiles, tiles, share, channel_block, channel_blocks,
        partial_ptr, mean_ptr, var_ptr, counter_ptr,
        gate_mean_ptr, gate_var_ptr, gate_weight_ptr, gate_bias_ptr, rng_ptr, addend_ptr,
        first, addend_stride, eps, layer, keep_scale,
        ACTIVATION, HAS_BIAS, HAS_GATE, HAS_STATS, HAS_NORM, HAS_AFFINE, SECOND, DROP_BELOW, SPLIT, BLOCK_N,
    )  # fmt: skip


def _iterations(args: Arguments) -> int:
    blocks = triton.cdiv(args["KH"] * args["KW"] * args["n_in"], args["BLOCK_K"])
    return int(triton.cdiv(blocks, args["SPLIT"]))


LAUNCH_FACTS = {
    "_conv_kernel": LaunchFacts(
        _iterations, lambda args: finish_steps(args, args["tiles"], args["SPLIT"]), multiplies=True
    )
}


def compile_cases() -> Iterator[Case]:
    """The forward pass of every convolution of the networks, and the data gradient of every transposed one."""
    for layer in LAYERS:
        n_in, n_out, pixels = layer.shape.inner, layer.shape.rows, layer.shape.pixels
        first = layer.shape.outer if layer.shape.outer2 else 0  # the skip's channels come before those of a norm
        for after in layer.gradients if layer.transposed else layer.forward:
            yield from gemm_cases(
                layer,
                _conv_kernel,
                ["x_ptr", "weight_ptr", "gate_ptr", "out_ptr", "addend_ptr"],
                {"n_in": n_in, "n_out": n_out, "pixel_stride": n_in, "first": first, "addend_stride": 0},
                layer.window | EPILOGUES[after],
                tiles=partial(
                    tile_rule.candidates, pixels, n_out, whole=tile_rule.whole_block(n_in), largest=tile_rule.LARGEST
                ),
                whole_blocks=partial(_whole_blocks, n_in),
            )


def _whole_blocks(n_in: int, config: dict[str, int]) -> bool:
    return n_in % config["BLOCK_K"] == 0


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    stride: int,
    padding: int,
    activation: int,
    slope: float,
    stat_groups: int,
    *norm: Any,
    config: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch; see `fastp2p.ops.conv`."""
    (n, n_in, height, width), (n_out, _, kh, kw) = x.shape, weight.shape
    out_height, out_width = (conv_size(size, k, stride, padding) for size, k in ((height, kh), (width, kw)))
    x, pixel_stride = pixel_rows(x)
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()
    gate = None if gate is None else gate.contiguous(memory_format=torch.channels_last)
    out = torch.empty(
        (n, n_out, out_height, out_width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    pixels, groups = n * out_height * out_width, max(1, stat_groups)
    rows = pixels // groups
    whole = tile_rule.whole_block(n_in)
    config = config or tile_rule.choose_config(rows, n_out, kh * kw * n_in, x, whole=whole, products=groups)
    gate_norm = NormGate(*norm)
    gated = GateArguments.new(gate_norm, x)
    flags = gemm.epilogue_flags(activation, bias, gate, stat_groups, gated)
    config = on_target(fitting(config, flags, transposed=False), tile_rule.capability_of(x))
    tiles, channel_blocks = triton.cdiv(rows, config["BLOCK_M"]), triton.cdiv(n_out, config["BLOCK_N"])
    buffers = gemm.Buffers.new(out, config["SPLIT"], stat_groups, tiles, channel_blocks, gate_norm)
    _conv_kernel[(groups * tiles * channel_blocks * config["SPLIT"],)](
        x,
        weight,
        x if bias is None else bias,
        x if gate is None else gate,
        out,
        *buffers.pointers,
        pixels,
        rows,
        tiles,
        buffers.share,
        height,
        width,
        out_height,
        out_width,
        n_in,
        n_out,
        pixel_stride,
        slope,
        *gated.tensors,
        *gated.numbers,
        KH=kh,
        KW=kw,
        STRIDE=stride,
        PADDING=padding,
        WHOLE_BLOCKS=_whole_blocks(n_in, config),
        **flags,
        PRECISION=gemm.precision(x.dtype),
        **config,
    )
    return out, buffers.mean, buffers.var
