"""wgrad_adam in Triton: the tile of a weight gradient in registers, and Adam on that tile of the weight.

The gradient is a product of rank P, the batch's pixels; for the deep layers P is at most a few hundred and making the
tile anew costs less than writing it and reading it back: 24 bytes a weight (and 2 for the low-precision copy) against
32 for wgrad and adam apart. Each program owns its tile, so nothing is split and nothing is shared. Float32 throughout,
after the product of the activations.
"""

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from fastp2p.kernels import gemm
from fastp2p.kernels.adam import adam_update
from fastp2p.kernels.compile_check import Case
from fastp2p.kernels.layer_shapes import LAYERS
from fastp2p.kernels.wgrad import launch_arguments, layer_cases, outer_product, tiles, whole_blocks
from torch import Tensor


@triton.jit(do_not_specialize=gemm.GEOMETRY)
def _wgrad_adam_kernel(
    outer_ptr,  # (pixels, n_outer), rows outer_stride apart
    outer2_ptr,  # (pixels, n_outer2), rows outer2_stride apart
    inner_ptr,  # (images * height * width, n_inner), rows inner_stride apart
    pixels,  # of outer, over all images
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
    param_ptr,  # (n_outer + n_outer2, KH, KW, n_inner) float32, as the next three
    exp_avg_ptr,
    exp_avg_sq_ptr,
    low_precision_ptr,  # bfloat16 or float16; param_ptr again when there is none
    lr_ptr,  # () float32
    powers_ptr,  # (2,) float64
    beta1,
    beta2,
    one_minus_beta1,  # rounded once, from float64
    one_minus_beta2,
    eps,
    WRITE_LOW_PRECISION: tl.constexpr,
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
    grad, offset, inside = outer_product(
        tl.program_id(0), 0, outer_ptr, outer2_ptr, inner_ptr, pixels, height, width, outer_height,
        outer_width, n_outer, n_outer2, n_inner, outer_stride, outer2_stride, inner_stride,
        KH, KW, STRIDE, PADDING, TWO_INPUTS, WHOLE_BLOCKS, PRECISION, 1, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    adam_update(
        grad, offset, inside, param_ptr, exp_avg_ptr, exp_avg_sq_ptr, low_precision_ptr, lr_ptr, powers_ptr,
        beta1, beta2, one_minus_beta1, one_minus_beta2, eps, WRITE_LOW_PRECISION,
    )  # fmt: skip


LARGEST_TILE = 64 * 64  # beside the sums, Adam holds three numbers and a gradient per weight in registers
DEEP = ("e4", "e5", "e6", "e7", "e8", "d8", "d7", "d6", "d5", "d4")  # at batch size 1 at most 256 pixels each


def compile_cases() -> Iterator[Case]:
    """The deep layers of the generator, without and with a low-precision copy."""
    types = dict.fromkeys(("param_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "lr_ptr"), "*fp32") | {"powers_ptr": "*fp64"}
    types |= dict.fromkeys(("beta1", "beta2", "one_minus_beta1", "one_minus_beta2", "eps"), "fp32")
    pointers = ["outer_ptr", "outer2_ptr", "inner_ptr", "low_precision_ptr"]
    for layer in LAYERS:
        if layer.name in DEEP:
            yield from layer_cases(layer, _wgrad_adam_kernel, pointers, types, {"WRITE_LOW_PRECISION": 1}, LARGEST_TILE)
    deepest = next(layer for layer in LAYERS if layer.name == "e8")
    types["low_precision_ptr"] = "*fp32"
    yield from layer_cases(deepest, _wgrad_adam_kernel, pointers, types, {"WRITE_LOW_PRECISION": 0}, LARGEST_TILE)


def wgrad_adam(
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
    """Launch; see `fastp2p.ops.wgrad_adam`."""
    kh, kw = param.shape[2:]
    tensors, sizes, (m, n, k) = launch_arguments(outer, outer2, inner, (kh, kw))
    n_outer2, n_inner = sizes[6:8]
    config = {**(config or gemm.choose_config(m, n, k, inner, whole=gemm.is_whole(n_inner), largest=LARGEST_TILE))}
    config.pop("SPLIT", None)  # a program owns its weights
    _wgrad_adam_kernel[(tiles(m - n_outer2, n_outer2, n, config),)](
        *tensors,
        *sizes,
        param,
        exp_avg,
        exp_avg_sq,
        param if low_precision is None else low_precision,
        lr,
        powers.contiguous(),
        beta1,
        beta2,
        1 - beta1,
        1 - beta2,
        eps,
        WRITE_LOW_PRECISION=low_precision is not None,
        KH=kh,
        KW=kw,
        STRIDE=stride,
        PADDING=padding,
        TWO_INPUTS=n_outer2 > 0,
        WHOLE_BLOCKS=whole_blocks(n_inner, config),
        PRECISION=gemm.precision(inner.dtype),
        **config,
    )
