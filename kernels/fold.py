"""conv_transpose to few channels in Triton: each pixel times all taps at once, then a sum over the taps.

To three channels, four phases of 16 columns read every pixel of x sixteen times for 3 useful columns: on an H200 the
outermost layer of unet_256 took 1.3 ms of a step of 64 images, where its bytes take 0.08. Here a program takes a square
of SIDE x SIDE pixels of x, its margin included, and multiplies it by the whole weight as it lies, (C, KH KW O): x is
read once, and once more at the margins. The products, float32, go to memory of the program's own; then it adds those
that meet in a pixel of the result, in a fixed order. With a kernel of 4, stride 2 and SIDE 16 a square has 14 x 14
pixels inside, so it multiplies 1.3 times what is needed.

Bytes beside x, weight and out: the products, 4 KH KW O for each pixel of a square, written and read. They seldom leave
the cache of the processor and the one behind it.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastp2p.kernels import gemm
from fastp2p.kernels.activation import activate, derivative
from fastp2p.kernels.compile_check import Case
from fastp2p.kernels.dependent import begin, launched
from fastp2p.kernels.gemm import dot
from fastp2p.kernels.launch_facts import Arguments, LaunchFacts
from fastp2p.kernels.layer_shapes import EPILOGUES, GEOMETRY, LAYERS, Layer
from fastp2p.kernels.layout import within

MOST_COLUMNS = 64  # KH KW O, of one block
# A square of BLOCK_M pixels; FOLD tells these from the tiles of conv_transpose's own kernel
_BOTH = {"SPLIT": 1, "FOLD": 1, "num_stages": 2}
CONFIG = {"BLOCK_M": 256, "BLOCK_K": 64, "num_warps": 16} | _BOTH
FLOAT32_CONFIG = {"BLOCK_M": 64, "BLOCK_K": 16, "num_warps": 8} | _BOTH


@launched(do_not_specialize=[*gemm.GEOMETRY, "squares_y", "squares_x"])
def _fold_kernel(
    x_ptr,  # (images * height * width, n_in), rows pixel_stride apart
    x2_ptr,  # (images * height * width, n_in2), rows pixel_stride2 apart
    weight_ptr,  # (n_in + n_in2, KH, KW, n_out), taps TAP_STRIDE apart
    bias_ptr,  # (n_out,)
    gate_ptr,  # (images * out_height * out_width, n_out), as out
    out_ptr,
    products_ptr,  # (programs, SIDE * SIDE, KH * KW * n_out) float32
    height,
    width,
    out_height,
    out_width,
    squares_y,  # an image's
    squares_x,
    n_in,
    n_in2,
    pixel_stride,
    pixel_stride2,
    slope,
    n_out: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TAP_STRIDE: tl.constexpr,
    TWO_INPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    SIDE: tl.constexpr,
    INSIDE_Y: tl.constexpr,  # pixels of x whose STRIDE rows of the result the square has whole
    INSIDE_X: tl.constexpr,
    ROWS: tl.constexpr,  # the result's, that are added at once
    BLOCK_M: tl.constexpr,  # SIDE * SIDE
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    begin()
    COLUMNS: tl.constexpr = KH * KW * n_out
    program = tl.program_id(0)
    first_y = program // squares_x % squares_y * INSIDE_Y  # the first pixel inside
    first_x = program % squares_x * INSIDE_X
    image = (program // (squares_x * squares_y)).to(tl.int64)
    top = first_y - (KH - 1 - PADDING) // STRIDE  # the square's
    left = first_x - (KW - 1 - PADDING) // STRIDE
    place = tl.arange(0, BLOCK_M)
    y = top + place // SIDE
    x = left + place % SIDE
    visible = within(y, height) & within(x, width)
    pixel = (image * height + y) * width + x
    column = tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    WEIGHT_STRIDE: tl.constexpr = KH * KW * TAP_STRIDE
    if n_out == TAP_STRIDE:  # the same, so that the compiler sees columns one after the other
        weight_ptr += column
    else:
        weight_ptr += column // n_out * TAP_STRIDE + column % n_out
    acc = _accumulate(
        acc, x_ptr, weight_ptr, pixel, visible, column, n_in, pixel_stride, WEIGHT_STRIDE, COLUMNS, PRECISION, BLOCK_K
    )
    if TWO_INPUTS:
        weight_ptr += n_in * WEIGHT_STRIDE
        acc = _accumulate(
            acc, x2_ptr, weight_ptr, pixel, visible, column, n_in2, pixel_stride2,
            WEIGHT_STRIDE, COLUMNS, PRECISION, BLOCK_K,
        )  # fmt: skip
    products_ptr += program.to(tl.int64) * (BLOCK_M * COLUMNS)
    tl.store(products_ptr + place[:, None] * COLUMNS + column[None, :], acc, mask=(column < COLUMNS)[None, :])
    tl.debug_barrier()  # now each thread may read what the others stored

    WIDTH: tl.constexpr = _power_of_two(STRIDE * INSIDE_X)
    DEPTH: tl.constexpr = _power_of_two(n_out)
    element = tl.arange(0, ROWS * WIDTH * DEPTH)
    channel = element % DEPTH
    across = element // DEPTH % WIDTH
    out_x = first_x * STRIDE + across
    there = (across < STRIDE * INSIDE_X) & (out_x < out_width) & (channel < n_out)
    tap_x = (out_x + PADDING) % STRIDE
    from_x = (out_x + PADDING) // STRIDE - left
    for first_row in range(0, STRIDE * INSIDE_Y, ROWS):
        down = first_row + element // (DEPTH * WIDTH)
        out_y = first_y * STRIDE + down
        inside = there & (down < STRIDE * INSIDE_Y) & (out_y < out_height)
        tap_y = (out_y + PADDING) % STRIDE
        from_y = (out_y + PADDING) // STRIDE - top
        value = tl.zeros((ROWS * WIDTH * DEPTH,), tl.float32)
        for up in tl.static_range((KH + STRIDE - 1) // STRIDE):
            for back in tl.static_range((KW + STRIDE - 1) // STRIDE):
                ky = tap_y + up * STRIDE
                kx = tap_x + back * STRIDE
                at = ((from_y - up) * SIDE + from_x - back) * COLUMNS + (ky * KW + kx) * n_out + channel
                value += tl.load(products_ptr + at, mask=inside & (ky < KH) & (kx < KW), other=0.0)
        if HAS_BIAS:
            value += tl.load(bias_ptr + channel, mask=channel < n_out, other=0.0).to(tl.float32)
        offset = ((image * out_height + out_y) * out_width + out_x) * n_out + channel
        if HAS_GATE:
            gate = tl.load(gate_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            value *= derivative(gate, slope, ACTIVATION)
        else:
            value = activate(value, slope, ACTIVATION)
        tl.store(out_ptr + offset, value, mask=inside)


@triton.jit
def _accumulate(
    acc, x_ptr, weight_ptr, pixel, visible, column, n_in, pixel_stride,
    WEIGHT_STRIDE: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + one input's pixels times all taps; weight_ptr: the columns of its first row."""
    for first in range(0, n_in, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a_at = x_ptr + pixel[:, None] * pixel_stride + k[None, :]
        a = tl.load(a_at, mask=visible[:, None] & (k < n_in)[None, :], other=0.0)
        b_inside = (k < n_in)[:, None] & (column < COLUMNS)[None, :]
        b = tl.load(weight_ptr[None, :] + k[:, None] * WEIGHT_STRIDE, mask=b_inside, other=0.0)
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.constexpr_function
def _power_of_two(n):
    """The least that is no less than n."""
    return triton.next_power_of_2(n)


def _iterations(args: Arguments) -> int:
    inputs = ("n_in", "n_in2") if args["TWO_INPUTS"] else ("n_in",)
    rows = triton.cdiv(args["STRIDE"] * args["INSIDE_Y"], args["ROWS"])
    return int(rows + sum(triton.cdiv(args[n], args["BLOCK_K"]) for n in inputs))


LAUNCH_FACTS = {"_fold_kernel": LaunchFacts(_iterations, updates=("products_ptr",), multiplies=True)}


def is_for(weight: Tensor, stride: int, padding: int, stat_groups: int, gate_mean: Tensor | None) -> bool:
    """Whether conv_transpose takes this kernel: few columns, a square with an inside, no statistics and no norm."""
    _, n_out, kh, kw = weight.shape
    if stat_groups or gate_mean is not None or n_out * kh * kw > MOST_COLUMNS:
        return False
    return min(_inside(8, k, stride, padding) for k in (kh, kw)) >= 4


def _inside(side: int, k: int, stride: int, padding: int) -> int:
    """Pixels along a square's side for whose part of the result it has all that it takes."""
    return side - 1 - (k - 1 - padding) // stride - (padding - 1) // stride


def config_for(x: Tensor, weight: Tensor) -> dict[str, int]:
    """The tile by dtype and columns."""
    columns: int = max(16, triton.next_power_of_2(weight[0].numel()))
    return (FLOAT32_CONFIG if x.dtype == torch.float32 else CONFIG) | {"BLOCK_N": columns}


def _constants(config: dict[str, int], window: dict[str, int], n_out: int) -> dict[str, int]:
    """The compile-time arguments that tile and layer give."""
    side = math.isqrt(config["BLOCK_M"])
    stride, padding = window["STRIDE"], window["PADDING"]
    inside = {f"INSIDE_{axis}": _inside(side, window[f"K{k}"], stride, padding) for axis, k in (("Y", "H"), ("X", "W"))}
    return window | inside | {"SIDE": side, "ROWS": config["BLOCK_M"] // 16, "n_out": n_out}


def _tile(config: dict[str, int]) -> dict[str, int]:
    """What the kernel and the compiler take of a configuration."""
    return {name: value for name, value in config.items() if name not in ("SPLIT", "FOLD")}


def fold(
    x: Tensor,
    x2: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    out: Tensor,
    strides: tuple[int, int],
    tap_stride: int,
    window: dict[str, int],
    activation: int,
    slope: float,
    config: dict[str, int],
    *,
    two_inputs: bool,
) -> None:
    """Launch; conv_transpose has made the tensors dense.

    Args:
        out: (N, n_out, H, W), channels_last; is written.
        strides: elements from pixel to pixel of x and of x2.
        tap_stride: elements from tap to tap of the weight: more than n_out in a slice of the output channels.
        window: KH, KW, STRIDE and PADDING.
    """
    (n, n_in, height, width), n_out = x.shape, out.shape[1]
    constants = _constants(config, window, n_out)
    squares = tuple(
        triton.cdiv(triton.cdiv(size, window["STRIDE"]), constants[f"INSIDE_{axis}"])
        for size, axis in zip(out.shape[2:], "YX", strict=True)
    )
    programs = n * squares[0] * squares[1]
    columns = window["KH"] * window["KW"] * n_out
    products = torch.empty(programs, config["BLOCK_M"], columns, dtype=torch.float32, device=x.device)
    _fold_kernel[(programs,)](
        x,
        x2,
        weight,
        x if bias is None else bias,
        x if gate is None else gate,
        out,
        products,
        height,
        width,
        *out.shape[2:],
        *squares,
        n_in,
        x2.shape[1],
        *strides,
        slope,
        TAP_STRIDE=tap_stride,
        TWO_INPUTS=two_inputs,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        HAS_GATE=gate is not None,
        PRECISION=gemm.precision(x.dtype),
        **constants,
        **_tile(config),
    )


def compile_cases() -> Iterator[Case]:
    """The generator's outermost layer, and the gradient of the discriminator's first by three of its channels."""
    of = {layer.name: layer for layer in LAYERS}
    for dtype in ("bf16", "fp16", "fp32"):
        for precision in ("ieee", "tf32") if dtype == "fp32" else ("ieee",):
            label = f"{dtype}{' tf32' * (precision == 'tf32')}"
            yield _case(of["d1"], f"fold d1 {label}", dtype, "bias tanh", precision)
            yield _case(of["D1"], f"fold D1 {label}", dtype, "gate tanh", precision)


def _case(layer: Layer, name: str, dtype: str, epilogue: str, precision: str) -> Case:
    shape = layer.shape
    types = dict.fromkeys(("x_ptr", "x2_ptr", "weight_ptr", "gate_ptr", "out_ptr"), f"*{dtype}")
    types |= {"bias_ptr": "*fp32", "products_ptr": "*fp32", "slope": "fp32"}
    sizes = {"n_in": shape.outer, "n_in2": shape.outer2 or shape.outer}
    sizes |= {"pixel_stride": shape.outer, "pixel_stride2": shape.outer2 or shape.outer}
    types |= dict.fromkeys((*GEOMETRY, "squares_y", "squares_x", *sizes), "i32")
    config = (FLOAT32_CONFIG if dtype == "fp32" else CONFIG) | {"BLOCK_N": MOST_COLUMNS}
    constants = _constants(config, layer.window, 3)
    flags = {key: EPILOGUES[epilogue][key] for key in ("ACTIVATION", "HAS_BIAS", "HAS_GATE")}
    constants |= flags | {"PRECISION": precision, "TAP_STRIDE": shape.inner, "TWO_INPUTS": int(shape.outer2 > 0)}
    return Case(name, _fold_kernel, types, constants, [_tile(config)], sizes, 4 if dtype == "fp32" else 2)
