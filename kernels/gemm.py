"""What the three GEMMs share: the epilogue and the reduction of split sums."""

import math
from collections.abc import Iterator
from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastp2p.kernels.activation import activate, derivative
from fastp2p.kernels.arrival import counters, is_last
from fastp2p.kernels.compile_check import Case
from fastp2p.kernels.dependent import begin, launched
from fastp2p.kernels.launch_facts import Arguments, LaunchFacts
from fastp2p.kernels.layer_shapes import EPILOGUES, GATE_TYPES, GEOMETRY, STATS_TYPES
from fastp2p.kernels.norm_epilogue import GateArguments, norm_epilogue
from fastp2p.kernels.norm_stats import StatsBuffers, merge_steps, store_stats
from fastp2p.kernels.sums import SumsBuffers, sum_steps
from fastp2p.kernels.tile_rule import MAY_USE_ALL_REGISTERS
from fastp2p.norm_gate import NO_NORM, NormGate

# Triton's interpreter computes bfloat16 dots wrongly; it gets float32, of the same values.
WIDEN = tl.constexpr(triton.knobs.runtime.interpret)
REDUCE_CONFIGS = [
    {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8} | MAY_USE_ALL_REGISTERS,
    {"BLOCK_M": 8, "BLOCK_N": 32, "num_warps": 2} | MAY_USE_ALL_REGISTERS,  # small maps: more programs
]
FEW_PROGRAMS = 64  # by the first of them


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, accumulated in float32."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def epilogue(
    acc,  # (BLOCK_M, BLOCK_N) float32
    pixel,  # (BLOCK_M,) int64, rows of out
    row_inside,  # (BLOCK_M,)
    count,  # rows inside
    channel,  # (BLOCK_N,)
    n_out,
    out_ptr,  # (pixels, n_out)
    bias_ptr,  # (n_out,)
    gate_ptr,  # (pixels, n_out)
    slope,
    group,  # from here on as in store_stats
    tile,
    tiles,
    share,
    channel_block,
    channel_blocks,
    partial_ptr,
    mean_ptr,
    var_ptr,
    counter_ptr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_STATS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Bias, activation or its derivative at the gate, the rounded store, and the statistics of what was stored."""
    inside = row_inside[:, None] & (channel < n_out)[None, :]
    offset = pixel[:, None] * n_out + channel[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + channel, mask=channel < n_out, other=0.0).to(tl.float32)[None, :]
    if HAS_GATE:
        acc *= derivative(tl.load(gate_ptr + offset, mask=inside, other=0.0).to(tl.float32), slope, ACTIVATION)
    else:
        acc = activate(acc, slope, ACTIVATION)
    stored = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offset, stored, mask=inside)
    if HAS_STATS:
        store_stats(
            stored.to(tl.float32), row_inside, count, group, tile, tiles, share, channel, channel_block, channel_blocks,
            n_out, partial_ptr, mean_ptr, var_ptr, counter_ptr, out_ptr.dtype.element_ty == tl.float32, BLOCK_N,
        )  # fmt: skip


@triton.jit
def add_splits(
    acc,  # (BLOCK_M, BLOCK_N) float32, this split's
    split,
    pixel,  # (BLOCK_M,) int64, rows of out
    row_inside,  # (BLOCK_M,)
    channel,  # (BLOCK_N,)
    pixels,
    n_out,
    workspace_ptr,  # (SPLIT, pixels, n_out) float32
    counter_ptr,  # this tile's
    SPLIT: tl.constexpr,
):
    """The sum over all splits in their order, and whether it is whole: for the last split to arrive alone."""
    inside = row_inside[:, None] & (channel < n_out)[None, :]
    at = workspace_ptr + pixel[:, None] * n_out + channel[None, :]
    step = pixels.to(tl.int64) * n_out
    tl.store(at + split * step, acc, mask=inside)
    whole = is_last(counter_ptr, SPLIT)
    if whole:
        acc = tl.zeros_like(acc)
        for first in range(0, SPLIT, 4):
            for i in tl.static_range(4):  # four loads under way at once
                there = inside & (first + i < SPLIT)
                acc += tl.load(at + (first + i) * step, mask=there, other=0.0, cache_modifier=".cg")
    return acc, whole


@triton.jit
def close(
    acc, pixel, row_inside, count, channel, n_out, out_ptr, bias_ptr, gate_ptr, slope,
    group, tile, tiles, share, channel_block, channel_blocks, partial_ptr, mean_ptr, var_ptr, counter_ptr,
    gate_mean_ptr, gate_var_ptr, gate_weight_ptr, gate_bias_ptr, rng_ptr, addend_ptr,
    first, addend_stride, eps, layer, keep_scale,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_STATS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_AFFINE: tl.constexpr, SECOND: tl.constexpr, DROP_BELOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue of a whole sum: into a norm, or another."""
    if HAS_NORM:
        norm_epilogue(
            acc, pixel, row_inside, channel, n_out, out_ptr, gate_ptr, slope,
            group, tile, tiles, share, channel_block, channel_blocks, partial_ptr, mean_ptr, var_ptr, counter_ptr,
            gate_mean_ptr, gate_var_ptr, gate_weight_ptr, gate_bias_ptr, rng_ptr, addend_ptr,
            first, addend_stride, eps, layer, keep_scale,
            ACTIVATION, HAS_STATS, HAS_AFFINE, SECOND, DROP_BELOW, BLOCK_N,
        )  # fmt: skip
    else:
        epilogue(
            acc, pixel, row_inside, count, channel, n_out, out_ptr, bias_ptr, gate_ptr, slope,
            group, tile, tiles, share, channel_block, channel_blocks, partial_ptr, mean_ptr, var_ptr, counter_ptr,
            ACTIVATION, HAS_BIAS, HAS_GATE, HAS_STATS, BLOCK_N,
        )  # fmt: skip


@triton.jit
def finish(
    acc, pixel, row_inside, count, channel, n_out, out_ptr, bias_ptr, gate_ptr, slope,
    split, pixels, workspace_ptr,
    group, tile, tiles, share, channel_block, channel_blocks, partial_ptr, mean_ptr, var_ptr, counter_ptr,
    gate_mean_ptr, gate_var_ptr, gate_weight_ptr, gate_bias_ptr, rng_ptr, addend_ptr,
    first, addend_stride, eps, layer, keep_scale,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_STATS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_AFFINE: tl.constexpr, SECOND: tl.constexpr, DROP_BELOW: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile's sum, where it is split by the last split to arrive.

    Each of the tl.num_programs(0) // SPLIT tiles has a counter for its splits, before those of the statistics.
    """
    if SPLIT > 1:
        tile_counter_ptr = counter_ptr + tl.program_id(0) // SPLIT
        counter_ptr += tl.num_programs(0) // SPLIT
        acc, whole = add_splits(
            acc, split, pixel, row_inside, channel, pixels, n_out, workspace_ptr, tile_counter_ptr, SPLIT
        )
        if whole:
            close(
                acc, pixel, row_inside, count, channel, n_out, out_ptr, bias_ptr, gate_ptr, slope,
                group, tile, tiles, share, channel_block, channel_blocks, partial_ptr, mean_ptr, var_ptr, counter_ptr,
                gate_mean_ptr, gate_var_ptr, gate_weight_ptr, gate_bias_ptr, rng_ptr, addend_ptr,
                first, addend_stride, eps, layer, keep_scale,
                ACTIVATION, HAS_BIAS, HAS_GATE, HAS_STATS, HAS_NORM, HAS_AFFINE, SECOND, DROP_BELOW, BLOCK_N,
            )  # fmt: skip
    else:
        close(
            acc, pixel, row_inside, count, channel, n_out, out_ptr, bias_ptr, gate_ptr, slope,
            group, tile, tiles, share, channel_block, channel_blocks, partial_ptr, mean_ptr, var_ptr, counter_ptr,
            gate_mean_ptr, gate_var_ptr, gate_weight_ptr, gate_bias_ptr, rng_ptr, addend_ptr,
            first, addend_stride, eps, layer, keep_scale,
            ACTIVATION, HAS_BIAS, HAS_GATE, HAS_STATS, HAS_NORM, HAS_AFFINE, SECOND, DROP_BELOW, BLOCK_N,
        )  # fmt: skip


@launched(do_not_specialize=GEOMETRY)
def _reduce_kernel(
    workspace_ptr,  # (splits, pixels, n_out) float32; of a weight gradient, its rows and columns
    out_ptr,  # (pixels, n_out)
    bias_ptr,  # (n_out,)
    gate_ptr,  # (pixels, n_out)
    partial_ptr,  # these four as in store_stats
    mean_ptr,
    var_ptr,
    counter_ptr,
    pixels,
    rows,  # a group's
    tiles,  # a group's
    share,
    n_out,
    splits,
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
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_STATS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
    SECOND: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sums of a split GEMM in a fixed order, then its epilogue. Reads 4 bytes a partial sum, once."""
    begin()
    channel_blocks = tl.cdiv(n_out, BLOCK_N)
    tile = tl.program_id(0) // channel_blocks  # over all groups
    channel_block = tl.program_id(0) % channel_blocks
    channel = channel_block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = row < rows
    count = tl.minimum(rows - tile % tiles * BLOCK_M, BLOCK_M)
    group = tile // tiles
    pixel = group.to(tl.int64) * rows + row
    offset = pixel[:, None] * n_out + channel[None, :]
    inside = row_inside[:, None] & (channel < n_out)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, splits, 4):
        for split in tl.static_range(4):  # four loads under way at once; of few tiles, so that int32 holds every offset
            at = workspace_ptr + (start + split) * pixels * n_out + offset
            acc += tl.load(at, mask=inside & (start + split < splits), other=0.0)
    close(
        acc, pixel, row_inside, count, channel, n_out, out_ptr, bias_ptr, gate_ptr, slope,
        group, tile % tiles, tiles, share, channel_block, channel_blocks, partial_ptr, mean_ptr, var_ptr, counter_ptr,
        gate_mean_ptr, gate_var_ptr, gate_weight_ptr, gate_bias_ptr, rng_ptr, addend_ptr,
        first, addend_stride, eps, layer, keep_scale,
        ACTIVATION, HAS_BIAS, HAS_GATE, HAS_STATS, HAS_NORM, HAS_AFFINE, SECOND, DROP_BELOW, BLOCK_N,
    )  # fmt: skip


def finish_steps(args: Arguments, tiles: int, split: int = 1) -> int:
    """The iterations of the program that finishes last, after its product: of other splits and of statistics.

    Args:
        tiles: a group's.
    """
    steps: int = triton.cdiv(split, 4) if split > 1 else 0
    if args["HAS_STATS"] and args["HAS_NORM"]:
        steps += sum_steps(args, tiles, args["BLOCK_N"], totals=False)
        return steps
    return steps + (merge_steps(args, tiles, args["BLOCK_N"]) if args["HAS_STATS"] else 0)


LAUNCH_FACTS = {
    "_reduce_kernel": LaunchFacts(
        lambda args: triton.cdiv(args["splits"], 4), lambda args: finish_steps(args, args["tiles"])
    )
}


def epilogue_flags(
    activation: int, bias: Tensor | None, gate: Tensor | None, stat_groups: int, norm: GateArguments
) -> dict[str, int]:
    """The compile-time arguments of `close`."""
    gated = gate is not None and not norm.constants["HAS_NORM"]
    flags = {"HAS_BIAS": bias is not None, "HAS_GATE": gated, "HAS_STATS": stat_groups > 0}
    all_flags: dict[str, int] = {"ACTIVATION": activation, **flags, **norm.constants}
    return all_flags


class Buffers(NamedTuple):
    """What a product's programs leave for one another, and its statistics."""

    workspace: Tensor  # (SPLIT, pixels, n_out) float32; where nothing is split it has no elements
    partial: Tensor  # the tiles' statistics, or a norm's sums
    mean: Tensor  # (stat_groups, C) float32, or the sums of dz
    var: Tensor  # or the sums of dz * xhat
    counters: Tensor
    share: int  # tiles whose parts one program merges

    @classmethod
    def new(
        cls, out: Tensor, split: int, stat_groups: int, tiles: int, channel_blocks: int, norm: NormGate = NO_NORM
    ) -> Self:
        """For a result.

        Args:
            out: (N, n_out, H, W).
            tiles: of rows, in each group; a group without statistics is all images.
            norm: that the result flows on into.
        """
        n_out = out.shape[1]
        shape = (split, out.numel() // n_out, n_out) if split > 1 else (0,)
        workspace = torch.empty(shape, dtype=torch.float32, device=out.device)
        n_splits = max(1, stat_groups) * tiles * channel_blocks if split > 1 else 0
        if norm.gate_mean is not None:
            sums = SumsBuffers.new(stat_groups, tiles, n_out - norm.first, channel_blocks, out.device)
            counted = counters(n_splits + sums.n_counters, out)
            return cls(workspace, sums.partial, sums.one, sums.other, counted, sums.share)
        stats = StatsBuffers.new(stat_groups, tiles, n_out, channel_blocks, out.device)
        counted = counters(n_splits + stats.n_counters, out)
        return cls(workspace, stats.partial, stats.mean, stats.var, counted, stats.share)

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        """In the order of the kernels' arguments."""
        return self.workspace, self.partial, self.mean, self.var, self.counters


def reduce_splits(
    workspace: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    slope: float = 0.0,
    activation: int = 0,
    stat_groups: int = 0,
    norm: NormGate = NO_NORM,
) -> tuple[Tensor, Tensor]:
    """Launch the reduction of (splits, pixels, n_out) into out; returns out's mean and variance, or a norm's sums.

    Of one split, workspace may be out itself, in its dtype: each element is read before the same program writes it.
    """
    splits, pixels, n_out = workspace.shape
    groups = max(1, stat_groups)
    rows = pixels // groups

    def tiling(config: dict[str, int]) -> tuple[int, int]:
        """Tiles of a group, and blocks of channels."""
        return triton.cdiv(rows, config["BLOCK_M"]), triton.cdiv(n_out, config["BLOCK_N"])

    config = REDUCE_CONFIGS[groups * math.prod(tiling(REDUCE_CONFIGS[0])) < FEW_PROGRAMS]
    tiles, channel_blocks = tiling(config)
    buffers = Buffers.new(out, 1, stat_groups, tiles, channel_blocks, norm)
    gated = GateArguments.new(norm, out)
    _reduce_kernel[(groups * tiles * channel_blocks,)](
        workspace,
        out,
        out if bias is None else bias,
        out if gate is None else gate,
        *buffers.pointers[1:],
        pixels,
        rows,
        tiles,
        buffers.share,
        n_out,
        splits,
        slope,
        *gated.tensors,
        *gated.numbers,
        **epilogue_flags(activation, bias, gate, stat_groups, gated),
        **config,
    )
    return buffers.mean, buffers.var


def precision(dtype: torch.dtype) -> str:
    """How tl.dot treats float32: in full, unless PyTorch's convolutions may round it to TF32 as well."""
    convolutions: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if dtype == torch.float32 and convolutions == "tf32" else "ieee"


def compile_cases() -> Iterator[Case]:
    """The reduction, plain for weight gradients and with the epilogues of the networks' layers; in place after ATen.

    Those into a norm with sums have kernels of their own.
    """
    for dtype in ("fp32", "bf16", "fp16"):
        types = STATS_TYPES | GATE_TYPES | {"workspace_ptr": "*fp32", "slope": "fp32"}
        types |= dict.fromkeys(("out_ptr", "gate_ptr", "addend_ptr"), f"*{dtype}") | {"bias_ptr": "*fp32"}
        types |= dict.fromkeys(("pixels", "rows", "tiles", "share", "n_out", "splits"), "i32")
        for name, flags in EPILOGUES.items():
            if flags["HAS_NORM"] and flags["HAS_STATS"]:
                continue
            yield Case(f"reduce {name} {dtype}", _reduce_kernel, types, flags, REDUCE_CONFIGS)
            if dtype != "fp32":
                types_in_place = types | {"workspace_ptr": f"*{dtype}"}
                yield Case(f"reduce {name} {dtype} in place", _reduce_kernel, types_in_place, flags, REDUCE_CONFIGS)
