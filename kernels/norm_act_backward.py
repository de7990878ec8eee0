"""norm_act_backward in Triton: the gradient of norm_act in two passes.

Each reads x and the gradients, since the sums over a group must be whole before dx can be made, and the second writes
dx: in bfloat16 14 bytes an element with two gradients, where the separate kernels move 28. z, the activations'
derivatives and the dropout mask are made anew in registers; nothing is kept of them. With fixed statistics dx needs no
sums, and one pass makes both.

One program takes a tile of pixels by channels that lies within one statistics group; for the sums it takes every n-th
tile of the group. Arithmetic and sums are float32.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastp2p.kernels.activation import activate, derivative
from fastp2p.kernels.arrival import counters
from fastp2p.kernels.compile_check import Case
from fastp2p.kernels.dependent import begin, launched
from fastp2p.kernels.launch_facts import LaunchFacts, over
from fastp2p.kernels.layout import pixel_rows
from fastp2p.kernels.norm_tile import CONFIGS, TYPES, USES, columns, dropout_factor, flags_of, rows_of, tiling, vectors
from fastp2p.kernels.sums import SumsBuffers, store_sums, sum_steps, sums_of
from fastp2p.norm_gate import NormGate

SUM_PROGRAMS = 1024  # about so many at most leave partial sums: enough to fill a large GPU, few enough to add


@launched(do_not_specialize=["layer", "programs", "share"])
def _backward_kernel(
    dy_ptr,  # (G * rows, C), rows dy_stride apart
    dy2_ptr,  # (G * rows, C), rows dy2_stride apart; dy_ptr again when there is no second gradient
    x_ptr,  # (G * rows, C), rows x_stride apart
    dx_ptr,  # (G * rows, C), rows dx_stride apart
    partial_ptr,  # these six as in store_sums
    sum_dz_ptr,  # the second pass reads it
    sum_dz_xhat_ptr,  # and this
    dbias_ptr,
    dweight_ptr,
    counter_ptr,
    mean_ptr,  # these five as in _norm_act_kernel
    var_ptr,
    weight_ptr,
    bias_ptr,
    rng_ptr,
    rows,
    groups,
    programs,  # that share a group's tiles
    share,
    n_channels,
    dy_stride,
    dy2_stride,
    x_stride,
    dx_stride,
    inverse_rows,
    eps,
    slope,
    layer,
    keep_scale,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SECOND: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    WRITE_sums_ptrs: tl.constexpr,  # the first pass
    WRITE_DX: tl.constexpr,  # the second; with fixed statistics one pass is both
    DZ: tl.constexpr,  # what is written as dx is dz, whose sums are those of what is stored
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    begin()
    channel_blocks = tl.cdiv(n_channels, BLOCK_C)
    program = tl.program_id(0)
    if not WRITE_sums_ptrs:
        program = tl.num_programs(0) - 1 - program  # backwards: what the first pass read last is still in the cache
    channel_block = program % channel_blocks
    column = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = column[None, :]
    program = program // channel_blocks  # over all groups
    group = (program // programs).to(tl.int64)
    mean, rstd, scale, bias = columns(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, group, channel, n_channels, eps, HAS_WEIGHT, HAS_BIAS
    )
    if not WRITE_sums_ptrs:
        at = group * n_channels + channel
        there = channel < n_channels
        mean_dz = tl.load(sum_dz_ptr + at, mask=there, other=0.0) * inverse_rows
        projection = tl.load(sum_dz_xhat_ptr + at, mask=there, other=0.0) * inverse_rows * rstd
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_dz_centred = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)

    for tile in range(program % programs, tl.cdiv(rows, BLOCK_M), programs):
        row, inside = rows_of(group, tile, rows, channel, n_channels, BLOCK_M)
        x = tl.load(x_ptr + row * x_stride + channel, mask=inside, other=0.0).to(tl.float32)
        centred = x - mean  # xhat without its rstd: that goes into vectors, of which fewer stay in registers
        z = centred * scale + bias
        dz = tl.load(dy_ptr + row * dy_stride + channel, mask=inside, other=0.0).to(tl.float32)
        dz *= derivative(activate(z, slope, ACTIVATION), slope, ACTIVATION)
        if SECOND >= 0:
            dy2 = tl.load(dy2_ptr + row * dy2_stride + channel, mask=inside, other=0.0).to(tl.float32)
            dz += dy2 * derivative(activate(z, slope, SECOND), slope, SECOND)
        if DROP_BELOW > 0:
            dz *= dropout_factor(rng_ptr, row * n_channels + channel, layer, keep_scale, DROP_BELOW)
        if DZ:
            dz = dz.to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + row * dx_stride + channel, dz, mask=inside)
            dz = dz.to(tl.float32)
        elif WRITE_DX:
            dx = dz
            if not WRITE_sums_ptrs:
                dx = dz - mean_dz - centred * projection
            tl.store(dx_ptr + row * dx_stride + channel, dx * scale, mask=inside)
        if WRITE_sums_ptrs:
            sum_dz += tl.where(inside, dz, 0.0)
            sum_dz_centred += tl.where(inside, dz * centred, 0.0)

    if WRITE_sums_ptrs:
        dbias, dweight = sums_of(sum_dz, sum_dz_centred * rstd)
        store_sums(
            dbias, dweight, group, groups, program % programs, programs, share, column, channel_block, channel_blocks,
            n_channels, partial_ptr, sum_dz_ptr, sum_dz_xhat_ptr, dbias_ptr, dweight_ptr, counter_ptr, True, BLOCK_C,
        )  # fmt: skip


LAUNCH_FACTS = {
    "_backward_kernel": LaunchFacts(
        over("rows", "BLOCK_M", "programs"),
        lambda args: sum_steps(args, args["programs"], args["BLOCK_C"]) if args["WRITE_sums_ptrs"] else 0,
        only_with={"dx_ptr": "WRITE_DX", "partial_ptr": "WRITE_sums_ptrs"},
    )
}


def compile_cases() -> Iterator[Case]:
    """What a U-Net and its discriminator use, in each precision; the passes one by one."""
    sums_ptrs = ("partial_ptr", "sum_dz_ptr", "sum_dz_xhat_ptr", "dbias_ptr", "dweight_ptr")
    sums, dx, both = ({"WRITE_sums_ptrs": w, "WRITE_DX": d, "DZ": 0} for w, d in ((1, 0), (0, 1), (1, 1)))
    dz = both | {"DZ": 1}
    for dtype in ("fp32", "bf16", "fp16"):
        types = dict.fromkeys(("x_ptr", "dy_ptr", "dy2_ptr", "dx_ptr"), f"*{dtype}") | TYPES
        types |= dict.fromkeys(sums_ptrs, "*fp32")
        types |= {"counter_ptr": "*i32", "inverse_rows": "fp32"}
        types |= dict.fromkeys(("programs", "share", "dy_stride", "dy2_stride", "dx_stride"), "i32")
        for use, (activation, second, drop) in USES.items():
            flags = {"HAS_WEIGHT": 1, "HAS_BIAS": 1, "ACTIVATION": activation, "SECOND": second, "DROP_BELOW": drop}
            yield Case(f"norm_act sums {use} {dtype}", _backward_kernel, types, flags | sums, CONFIGS)
            yield Case(f"norm_act dx {use} {dtype}", _backward_kernel, types, flags | dx, CONFIGS)
            yield Case(f"norm_act dz {use} {dtype}", _backward_kernel, types, flags | dz, CONFIGS[:1])
        flags |= {"ACTIVATION": 2, "SECOND": 1, "DROP_BELOW": 0}
        yield Case(f"norm_act fixed {dtype}", _backward_kernel, types, flags | both, CONFIGS)


def norm_act_backward(
    dy: Tensor,
    dy2: Tensor | None,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    eps: float,
    activation: int,
    slope: float,
    second: int,
    dropout: float,
    layer: int,
    fixed_stats: bool,
    config: dict[str, Any] = CONFIGS[0],
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch; see `fastp2p.ops.norm_act_backward_ref`."""
    assert dy2 is None or second >= 0, "a gradient of a second output that there is not"
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    maps = (pixel_rows(dy), pixel_rows(dy if dy2 is None else dy2), pixel_rows(x), (dx, x.shape[1]))
    sums, totals, rows, tiles, programs = _buffers(mean, x, config)
    flags = flags_of(weight, bias, rng, activation, dropout) | {"SECOND": -1 if dy2 is None else second} | config
    launch = partial(
        _launch, maps, sums, totals, vectors(mean, var, weight, bias, rng), rows, (eps, slope, layer, dropout), DZ=0
    )
    launch(programs, WRITE_sums_ptrs=1, WRITE_DX=int(fixed_stats), **flags)
    if not fixed_stats:
        launch(tiles, WRITE_sums_ptrs=0, WRITE_DX=1, **flags)
    dbias, dweight = totals
    return dx, dweight, dbias


def dz_in_place(
    dy: Tensor, x: Tensor, norm: NormGate, activation: int, slope: float, config: dict[str, Any] = CONFIGS[0]
) -> tuple[Tensor, Tensor]:
    """What `gemm.norm_epilogue` leaves, of a gradient that is in memory already: dz in its place, and the norm's sums.

    Args:
        dy: (N, first + C, H, W), rows of pixels; its channels from norm.first on are written.
        x: (N, C, H, W), the norm's input.
    """
    assert norm.gate_mean is not None
    assert norm.gate_var is not None
    dy = dy[:, norm.first :]
    dz = pixel_rows(dy)
    assert dz[0] is dy, "a gradient whose pixels are no rows"
    maps = (dz, pixel_rows(dy if norm.addend is None else norm.addend), pixel_rows(x), dz)
    sums, totals, rows, _, programs = _buffers(norm.gate_mean, x, config)
    small = vectors(norm.gate_mean, norm.gate_var, norm.gate_weight, norm.gate_bias, norm.rng)
    flags = flags_of(norm.gate_weight, norm.gate_bias, norm.rng, activation, norm.dropout) | config
    flags |= {"SECOND": -1 if norm.addend is None else norm.second, "WRITE_sums_ptrs": 1, "WRITE_DX": 1, "DZ": 1}
    _launch(maps, sums, totals, small, rows, (norm.eps, slope, norm.layer, norm.dropout), programs, **flags)
    return sums.one, sums.other


def _buffers(
    mean: Tensor, x: Tensor, config: dict[str, Any]
) -> tuple[SumsBuffers, tuple[Tensor, Tensor], int, int, int]:
    """Room for the sums and their totals over all groups; a group's pixels, tiles, and programs that make its sums."""
    groups, n_channels = mean.shape
    rows, tiles, channel_blocks = tiling(x, groups, config)
    programs = min(tiles, max(1, SUM_PROGRAMS // (groups * channel_blocks)))
    dbias, dweight = (torch.empty(n_channels, dtype=torch.float32, device=x.device) for _ in range(2))
    sums = SumsBuffers.new(groups, programs, n_channels, channel_blocks, x.device)
    return sums, (dbias, dweight), rows, tiles, programs


def _launch(
    maps: Sequence[tuple[Tensor, int]],
    sums: SumsBuffers,
    totals: tuple[Tensor, Tensor],
    small: Sequence[Tensor],
    rows: int,
    numbers: tuple[float, float, int, float],
    programs: int,
    **constants: int,
) -> None:
    """Launch the kernel.

    Args:
        maps: dy, dy2, x and dx, each with the elements from pixel to pixel.
        numbers: eps, slope, layer and dropout.
        programs: that share a group's tiles.
    """
    (dy, dy_stride), (dy2, dy2_stride), (x, x_stride), (dx, dx_stride) = maps
    eps, slope, layer, dropout = numbers
    groups, n_channels = sums.one.shape
    _backward_kernel[(groups * programs * triton.cdiv(n_channels, constants["BLOCK_C"]),)](
        dy,
        dy2,
        x,
        dx,
        sums.partial,
        sums.one,
        sums.other,
        *totals,
        counters(sums.n_counters, x),
        *small,
        rows,
        groups,
        programs,
        sums.share,
        n_channels,
        dy_stride,
        dy2_stride,
        x_stride,
        dx_stride,
        1 / rows,
        eps,
        slope,
        layer,
        1 / (1 - dropout),
        **constants,
    )
