"""What the passes of a normalisation share: tiles of pixels by channels of one statistics group, and dropout."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

CONFIGS = [  # 8 elements a thread, 16 bytes of bfloat16; with 16 elements some of the backward's variants spill
    {"BLOCK_M": 32, "BLOCK_C": 64, "num_warps": 8},
    {"BLOCK_M": 16, "BLOCK_C": 128, "num_warps": 8},
    {"BLOCK_M": 16, "BLOCK_C": 64, "num_warps": 4},
    {"BLOCK_M": 8, "BLOCK_C": 64, "num_warps": 2, "maxnreg": 128},  # small maps: more programs
    {"BLOCK_M": 64, "BLOCK_C": 16, "num_warps": 4},  # few channels
]

USES = {  # activation, second and dropout of a U-Net and its discriminator
    "lrelu+relu": (2, 1, 0),
    "relu": (1, -1, 0),
    "dropout": (0, -1, 2**31),
}
TYPES = {  # those of the arguments that the passes share, for compile_cases
    **dict.fromkeys(("mean_ptr", "var_ptr", "weight_ptr", "bias_ptr"), "*fp32"),
    "rng_ptr": "*i64",
    **dict.fromkeys(("eps", "slope", "keep_scale"), "fp32"),
    **dict.fromkeys(("rows", "groups", "n_channels", "x_stride", "layer"), "i32"),
}


@triton.jit
def rstd_of(var, eps):
    """1 / sqrt(var + eps), to about a rounding: the GPU's estimate and a step of Newton's method.

    Correctly rounded, a root and a division are a hundred instructions a channel in each thread of a GEMM's epilogue.
    """
    estimate = tl.rsqrt(var + eps)
    return estimate * (1.5 - 0.5 * (var + eps) * estimate * estimate)


@triton.jit
def columns(
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
    rstd = rstd_of(var, eps)
    scale = rstd
    if HAS_WEIGHT:
        scale = rstd * tl.load(weight_ptr + channel, mask=inside, other=0.0)
    bias = tl.zeros_like(mean)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=inside, other=0.0)
    return mean, rstd, scale, bias


@triton.jit
def rows_of(group, tile, rows, channel, n_channels, BLOCK_M: tl.constexpr):
    """A tile's rows among those of all groups, (BLOCK_M, 1) int64, and which elements of the tile there are."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    return group * rows + row, (row < rows) & (channel < n_channels)


@triton.jit
def dropout_factor(rng_ptr, element, layer, keep_scale, DROP_BELOW: tl.constexpr):
    """keep_scale where ops.philox.keep_mask keeps an element, else 0; element is its place in dense NHWC, int64."""
    seed = tl.load(rng_ptr)
    step = tl.load(rng_ptr + 1)
    low, high = element.to(tl.uint32), (element >> 32).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, low, high, step.to(tl.uint32), layer.to(tl.uint32))
    return tl.where(word > DROP_BELOW - 1, keep_scale, 0.0)  # not >=: DROP_BELOW may be 2^32, which no word can hold


def tiling(x: Tensor, groups: int, config: dict[str, Any]) -> tuple[int, int, int]:
    """Pixels and tiles of a statistics group, and blocks of channels."""
    n, n_channels, h, w = x.shape
    rows = n // groups * h * w
    return rows, triton.cdiv(rows, config["BLOCK_M"]), triton.cdiv(n_channels, config["BLOCK_C"])


def vectors(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, rng: Tensor | None) -> list[Tensor]:
    """The kernels' small arguments, dense; mean stands in for what there is not."""
    return [(mean if vector is None else vector).contiguous() for vector in (mean, var, weight, bias, rng)]


def flags_of(
    weight: Tensor | None, bias: Tensor | None, rng: Tensor | None, activation: int, dropout: float
) -> dict[str, int]:
    flags = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None, "ACTIVATION": activation}
    return flags | {"DROP_BELOW": 0 if rng is None else drop_below(dropout)}


def drop_below(dropout: float) -> int:
    """As ops.philox.drop_below has it."""
    return round(dropout * 2**32)
