"""norm_act in Triton: normalisation, affine, activation and dropout in one pass, and its gradient in two.

In bfloat16 the forward reads x once, 2 bytes an element, and writes 2 for each of its readers: 6 where the separate
kernels of normalisation, leaky_relu and relu move 12. The backward reads x and the gradients twice, since the sums over
a group must be whole before dx can be made, and writes dx: 14 bytes an element with two gradients, where the separate
kernels move 28. z, the activations' derivatives and the dropout mask are made anew in registers; nothing is kept of
them. With fixed statistics dx needs no sums, and one pass makes both.

One program takes a tile of pixels by channels that lies within one statistics group, so that mean and rstd are vectors
over channels; for the sums it takes every n-th tile of the group. Partial sums are merged in a fixed order, without
atomics: the same input gives the same bits. Arithmetic and sums are float32.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastp2p.kernels.activation import activate, derivative
from fastp2p.kernels.compile_check import Case
from fastp2p.kernels.layout import pixel_rows

CONFIGS = [  # 8 elements a thread, 16 bytes of bfloat16; with 16 elements some of the backward's variants spill
    {"BLOCK_M": 32, "BLOCK_C": 64, "num_warps": 8},
    {"BLOCK_M": 16, "BLOCK_C": 128, "num_warps": 8},
    {"BLOCK_M": 16, "BLOCK_C": 64, "num_warps": 4},
    {"BLOCK_M": 8, "BLOCK_C": 64, "num_warps": 2},  # small maps: more programs
    {"BLOCK_M": 64, "BLOCK_C": 16, "num_warps": 4},  # few channels
]
MERGE_CONFIG = {"BLOCK_T": 256, "BLOCK_C": 8, "num_warps": 8}  # few steps, one after the other
SUM_PROGRAMS = 1024  # about so many at most leave partial sums: enough to fill a large GPU, few enough to merge


@triton.jit(do_not_specialize=["layer"])
def _norm_act_kernel(
    x_ptr,  # (G * rows, C), rows x_stride apart
    y_ptr,  # (G * rows, C)
    y2_ptr,  # (G * rows, C); y_ptr again when there is no second activation
    mean_ptr,  # (G, C) float32
    var_ptr,  # (G, C) float32
    weight_ptr,  # (C,) float32; mean_ptr again when there is none
    bias_ptr,  # (C,) float32; mean_ptr again when there is none
    rng_ptr,  # (2,) int64; mean_ptr again without dropout
    rows,  # a group's
    n_channels,
    x_stride,
    eps,
    slope,
    layer,
    keep_scale,  # 1 / (1 - dropout), rounded once, from float64
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SECOND: tl.constexpr,  # below 0 for none
    DROP_BELOW: tl.constexpr,  # 0 without dropout
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel_blocks = tl.cdiv(n_channels, BLOCK_C)
    tiles = tl.cdiv(rows, BLOCK_M)  # a group's
    tile = tl.program_id(0) // channel_blocks  # over all groups
    channel = (tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    group = (tile // tiles).to(tl.int64)
    mean, _, scale, bias = _columns(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, group, channel, n_channels, eps, HAS_WEIGHT, HAS_BIAS
    )
    row, inside = _rows(group, tile % tiles, rows, channel, n_channels, BLOCK_M)
    element = row * n_channels + channel
    x = tl.load(x_ptr + row * x_stride + channel, mask=inside, other=0.0).to(tl.float32)
    z = (x - mean) * scale + bias
    factor = 1.0
    if DROP_BELOW > 0:
        factor = _dropout_factor(rng_ptr, element, layer, keep_scale, DROP_BELOW)
    tl.store(y_ptr + element, activate(z, slope, ACTIVATION) * factor, mask=inside)
    if SECOND >= 0:
        tl.store(y2_ptr + element, activate(z, slope, SECOND) * factor, mask=inside)


@triton.jit(do_not_specialize=["layer"])
def _backward_kernel(
    dy_ptr,  # (G * rows, C), rows dy_stride apart
    dy2_ptr,  # (G * rows, C), rows dy2_stride apart; dy_ptr again when there is no second gradient
    x_ptr,  # (G * rows, C), rows x_stride apart
    dx_ptr,  # (G * rows, C)
    partial_ptr,  # (G * programs, 2, C) float32, sums of dz and of dz * xhat: what the first pass leaves
    sums_ptr,  # (G, 2, C) float32: those sums, merged; the second pass reads them
    mean_ptr,  # from here on as in _norm_act_kernel
    var_ptr,
    weight_ptr,
    bias_ptr,
    rng_ptr,
    rows,
    programs,  # that share a group's tiles
    n_channels,
    dy_stride,
    dy2_stride,
    x_stride,
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
    WRITE_SUMS: tl.constexpr,  # the first pass
    WRITE_DX: tl.constexpr,  # the second; with fixed statistics one pass is both
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel_blocks = tl.cdiv(n_channels, BLOCK_C)
    program = tl.program_id(0)
    if not WRITE_SUMS:
        program = tl.num_programs(0) - 1 - program  # backwards: what the first pass read last is still in the cache
    channel = (program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    program = program // channel_blocks  # over all groups
    group = (program // programs).to(tl.int64)
    mean, rstd, scale, bias = _columns(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, group, channel, n_channels, eps, HAS_WEIGHT, HAS_BIAS
    )
    if not WRITE_SUMS:
        at = sums_ptr + group * 2 * n_channels + channel
        mean_dz = tl.load(at, mask=channel < n_channels, other=0.0) * inverse_rows
        projection = tl.load(at + n_channels, mask=channel < n_channels, other=0.0) * inverse_rows * rstd
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_dz_centred = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)

    for tile in range(program % programs, tl.cdiv(rows, BLOCK_M), programs):
        row, inside = _rows(group, tile, rows, channel, n_channels, BLOCK_M)
        x = tl.load(x_ptr + row * x_stride + channel, mask=inside, other=0.0).to(tl.float32)
        centred = x - mean  # xhat without its rstd: that goes into vectors, of which fewer stay in registers
        z = centred * scale + bias
        dz = tl.load(dy_ptr + row * dy_stride + channel, mask=inside, other=0.0).to(tl.float32)
        dz *= derivative(activate(z, slope, ACTIVATION), slope, ACTIVATION)
        if SECOND >= 0:
            dy2 = tl.load(dy2_ptr + row * dy2_stride + channel, mask=inside, other=0.0).to(tl.float32)
            dz += dy2 * derivative(activate(z, slope, SECOND), slope, SECOND)
        if DROP_BELOW > 0:
            dz *= _dropout_factor(rng_ptr, row * n_channels + channel, layer, keep_scale, DROP_BELOW)
        if WRITE_DX:
            dx = dz
            if not WRITE_SUMS:
                dx = dz - mean_dz - centred * projection
            tl.store(dx_ptr + row * n_channels + channel, dx * scale, mask=inside)
        if WRITE_SUMS:
            sum_dz += tl.where(inside, dz, 0.0)
            sum_dz_centred += tl.where(inside, dz * centred, 0.0)

    if WRITE_SUMS:
        at = partial_ptr + program.to(tl.int64) * 2 * n_channels + channel
        tl.store(at, tl.sum(sum_dz, axis=0)[None, :], mask=channel < n_channels)
        tl.store(at + n_channels, tl.sum(sum_dz_centred, axis=0)[None, :] * rstd, mask=channel < n_channels)


@triton.jit(do_not_specialize=["programs"])
def _merge_kernel(
    partial_ptr,  # (G * programs, 2, C) float32
    sums_ptr,  # (G, 2, C) float32
    dweight_ptr,  # (C,) float32: the sum of dz * xhat over all groups
    dbias_ptr,  # (C,) float32: the sum of dz
    groups,
    programs,  # partial sums of a group
    n_channels,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel_blocks = tl.cdiv(n_channels, BLOCK_C)
    group = groups - tl.program_id(0) // channel_blocks  # first, the longest way: `groups` stands for all together
    channel = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < n_channels
    first = tl.where(group == groups, 0, group * programs)
    last = tl.where(group == groups, groups * programs, first + programs)
    sum_dz = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    sum_dz_xhat = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_T):
        partial = (start + tl.arange(0, BLOCK_T))[:, None]
        at = partial_ptr + partial.to(tl.int64) * 2 * n_channels + channel[None, :]
        mask = (partial < last) & inside[None, :]
        sum_dz += tl.load(at, mask=mask, other=0.0)
        sum_dz_xhat += tl.load(at + n_channels, mask=mask, other=0.0)
    if group == groups:
        tl.store(dbias_ptr + channel, tl.sum(sum_dz, axis=0), mask=inside)
        tl.store(dweight_ptr + channel, tl.sum(sum_dz_xhat, axis=0), mask=inside)
    else:
        at = sums_ptr + group.to(tl.int64) * 2 * n_channels + channel
        tl.store(at, tl.sum(sum_dz, axis=0), mask=inside)
        tl.store(at + n_channels, tl.sum(sum_dz_xhat, axis=0), mask=inside)


@triton.jit
def _columns(
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    group,
    channel,
    n_channels,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """What a group's tile needs of its channels, (1, BLOCK_C) float32 each: mean, rstd, rstd * weight, bias."""
    inside = channel < n_channels
    mean = tl.load(mean_ptr + group * n_channels + channel, mask=inside, other=0.0)
    var = tl.load(var_ptr + group * n_channels + channel, mask=inside, other=1.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    scale = rstd
    if HAS_WEIGHT:
        scale = rstd * tl.load(weight_ptr + channel, mask=inside, other=0.0)
    bias = tl.zeros_like(mean)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=inside, other=0.0)
    return mean, rstd, scale, bias


@triton.jit
def _rows(group, tile, rows, channel, n_channels, BLOCK_M: tl.constexpr):
    """A tile's rows among those of all groups, (BLOCK_M, 1) int64, and which elements of the tile there are."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    return group * rows + row, (row < rows) & (channel < n_channels)


@triton.jit
def _dropout_factor(rng_ptr, element, layer, keep_scale, DROP_BELOW: tl.constexpr):
    """keep_scale where ops.philox.keep_mask keeps an element, else 0; element is its place in dense NHWC, int64."""
    seed = tl.load(rng_ptr)
    step = tl.load(rng_ptr + 1)
    low, high = element.to(tl.uint32), (element >> 32).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, low, high, step.to(tl.uint32), layer.to(tl.uint32))
    return tl.where(word > DROP_BELOW - 1, keep_scale, 0.0)  # not >=: DROP_BELOW may be 2^32, which no word can hold


def compile_cases() -> Iterator[Case]:
    """What a U-Net and its discriminator use, in each precision; the passes of the backward one by one."""
    uses = {"lrelu+relu": (2, 1, 0), "relu": (1, -1, 0), "dropout": (0, -1, _drop_below(0.5))}
    sums, dx, both = ({"WRITE_SUMS": w, "WRITE_DX": d} for w, d in ((1, 0), (0, 1), (1, 1)))
    for dtype in ("fp32", "bf16", "fp16"):
        types = dict.fromkeys(("x_ptr", "y_ptr", "y2_ptr", "dy_ptr", "dy2_ptr", "dx_ptr"), f"*{dtype}")
        types |= dict.fromkeys(("mean_ptr", "var_ptr", "weight_ptr", "bias_ptr", "partial_ptr", "sums_ptr"), "*fp32")
        types |= {"rng_ptr": "*i64"} | dict.fromkeys(("eps", "slope", "keep_scale", "inverse_rows"), "fp32")
        types |= dict.fromkeys(
            ("rows", "programs", "n_channels", "x_stride", "dy_stride", "dy2_stride", "layer"), "i32"
        )
        for use, (activation, second, drop) in uses.items():
            flags = {"HAS_WEIGHT": 1, "HAS_BIAS": 1, "ACTIVATION": activation, "SECOND": second, "DROP_BELOW": drop}
            yield Case(f"norm_act {use} {dtype}", _norm_act_kernel, types, flags, CONFIGS)
            yield Case(f"norm_act sums {use} {dtype}", _backward_kernel, types, flags | sums, CONFIGS)
            yield Case(f"norm_act dx {use} {dtype}", _backward_kernel, types, flags | dx, CONFIGS)
        flags |= {"ACTIVATION": 2, "SECOND": 1, "DROP_BELOW": 0}
        yield Case(f"norm_act fixed {dtype}", _backward_kernel, types, flags | both, CONFIGS)
    types = dict.fromkeys(("partial_ptr", "sums_ptr", "dbias_ptr", "dweight_ptr"), "*fp32")
    types |= dict.fromkeys(("groups", "programs", "n_channels"), "i32")
    yield Case("norm_act merge", _merge_kernel, types, {}, [MERGE_CONFIG])


def norm_act(
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
) -> tuple[Tensor, Tensor]:
    """Launch; see `fastp2p.ops.norm_act`."""
    x, x_stride = pixel_rows(x)
    groups, n_channels = mean.shape
    rows, tiles, channel_blocks = _tiling(x, groups, config)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    y2 = torch.empty_like(y) if second >= 0 else x.new_empty(0)
    _norm_act_kernel[(groups * tiles * channel_blocks,)](
        x,
        y,
        y2 if second >= 0 else y,
        *_vectors(mean, var, weight, bias, rng),
        rows,
        n_channels,
        x_stride,
        eps,
        slope,
        layer,
        1 / (1 - dropout),
        SECOND=second,
        **_flags(weight, bias, rng, activation, dropout),
        **config,
    )
    return y, y2


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
    (x, x_stride), (dy, dy_stride) = pixel_rows(x), pixel_rows(dy)
    dy_other, dy_other_stride = (dy, dy_stride) if dy2 is None else pixel_rows(dy2)
    groups, n_channels = mean.shape
    rows, tiles, channel_blocks = _tiling(x, groups, config)
    sharing = min(tiles, max(1, SUM_PROGRAMS // (groups * channel_blocks)))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    partial = torch.empty(groups * sharing, 2, n_channels, dtype=torch.float32, device=x.device)
    sums = torch.empty(groups, 2, n_channels, dtype=torch.float32, device=x.device)
    dweight, dbias = (torch.empty(n_channels, dtype=torch.float32, device=x.device) for _ in range(2))
    vectors = _vectors(mean, var, weight, bias, rng)
    flags = _flags(weight, bias, rng, activation, dropout) | {"SECOND": -1 if dy2 is None else second} | config

    def launch(programs: int, write_sums: bool, write_dx: bool) -> None:
        _backward_kernel[(groups * programs * channel_blocks,)](
            dy,
            dy_other,
            x,
            dx,
            partial,
            sums,
            *vectors,
            rows,
            programs,
            n_channels,
            dy_stride,
            dy_other_stride,
            x_stride,
            1 / rows,
            eps,
            slope,
            layer,
            1 / (1 - dropout),
            WRITE_SUMS=write_sums,
            WRITE_DX=write_dx,
            **flags,
        )

    launch(sharing, write_sums=True, write_dx=fixed_stats)
    merges = (1 if fixed_stats else 1 + groups) * triton.cdiv(n_channels, MERGE_CONFIG["BLOCK_C"])
    _merge_kernel[(merges,)](partial, sums, dweight, dbias, groups, sharing, n_channels, **MERGE_CONFIG)
    if not fixed_stats:
        launch(tiles, write_sums=False, write_dx=True)
    return dx, dweight, dbias


def _tiling(x: Tensor, groups: int, config: dict[str, Any]) -> tuple[int, int, int]:
    """Pixels and tiles of a statistics group, and blocks of channels."""
    n, n_channels, h, w = x.shape
    rows = n // groups * h * w
    return rows, triton.cdiv(rows, config["BLOCK_M"]), triton.cdiv(n_channels, config["BLOCK_C"])


def _vectors(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, rng: Tensor | None) -> list[Tensor]:
    """The kernels' small arguments, dense; mean stands in for what there is not."""
    return [(mean if vector is None else vector).contiguous() for vector in (mean, var, weight, bias, rng)]


def _flags(
    weight: Tensor | None, bias: Tensor | None, rng: Tensor | None, activation: int, dropout: float
) -> dict[str, int]:
    flags = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None, "ACTIVATION": activation}
    return flags | {"DROP_BELOW": 0 if rng is None else _drop_below(dropout)}


def _drop_below(dropout: float) -> int:
    """As ops.philox.drop_below has it."""
    return round(dropout * 2**32)
