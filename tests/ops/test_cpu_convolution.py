"""conv, conv_transpose and conv_wgrad by C++ on the CPU, both ways: the matrix product and ATen's convolution."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.gemm_shapes import (
    DTYPES,
    SHAPES,
    SUMS,
    assert_half_product,
    assert_product,
    convolution_on_the_cpu,
    random,
)
from torch.nn.grad import conv2d_weight

from fastp2p.conv_shape import ConvShape
from fastp2p.ops import conv, conv_transpose, conv_wgrad

ALGORITHMS = ["gemm", "direct"]


def operands(shape: ConvShape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The larger images, the smaller ones, and a weight (O, C, KH, KW) between them."""
    large = random(shape.images, shape.inner, *shape.large, dtype=dtype)
    return (
        large,
        random(shape.images, shape.outer, *shape.small, dtype=dtype),
        random(*shape.weight, dtype=dtype),
    )


def check(ours: torch.Tensor, product: torch.Tensor, absolute: torch.Tensor, terms: int) -> None:
    (assert_product if ours.dtype == torch.float32 else assert_half_product)(ours, product, absolute, terms)


def plain_is_finite(x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int) -> bool:
    """Whether conv2d leaves alone the NaN that freed memory holds."""
    for elements in (100, 1000, 4000, 10000, 50000):
        torch.full((elements,), torch.nan, dtype=x.dtype)
    return bool(F.conv2d(x, weight, None, stride, padding).isfinite().all())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(shape: ConvShape, dtype: torch.dtype, algorithm: str):
    large, small, weight = operands(shape, dtype)
    window, size = (shape.stride, shape.padding), shape.large
    if algorithm == "direct" and not all(plain_is_finite(large, weight, *window) for _ in range(3)):
        pytest.skip("PyTorch's own convolution reads memory that nothing wrote, on this CPU (2.13.0, with AMX)")
    first, second = small.split([(shape.outer + 1) // 2, shape.outer // 2], 1)
    with convolution_on_the_cpu(algorithm):
        out, _, _ = conv(large, weight, stride=shape.stride, padding=shape.padding)
        back, _, _ = torch.ops.fastp2p.conv_transpose(
            first, second if shape.outer > 1 else None, weight, None, None, *window, *size, 0, 0.0, 0
        )
        dweight = conv_wgrad(small, large, kernel_size=shape.kernel, stride=shape.stride, padding=shape.padding)
    wide_large, wide_small, wide_weight = large.double(), small.double(), weight.double()

    def convolve(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, w, None, *window)

    def deconvolve(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.nn.grad.conv2d_input(large.shape, w, x, *window)

    def gradient(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return conv2d_weight(x, weight.shape, dy, *window)

    for ours, exact, tensors, terms in (
        (out, convolve, (wide_large, wide_weight), shape.columns),
        (back, deconvolve, (wide_small, wide_weight), shape.outer * math.ceil(shape.kernel[0] / shape.stride) ** 2),
        (dweight.to(dtype), gradient, (wide_large, wide_small), shape.pixels),
    ):
        check(ours, exact(*tensors), exact(*(tensor.abs() for tensor in tensors)), terms)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_weights_that_are_not_channels_last(algorithm: str):
    """No matrix: a contiguous weight, a slice of its columns, a slice of its kernel."""
    x, weight = random(2, 8, 6, 6), random(12, 16, 6, 6)
    for w in (weight[:, :8, 1:5, 1:5], weight[:, 8:, :4, :4].contiguous(), weight.contiguous()[:, :8, 2:, 2:]):
        with convolution_on_the_cpu(algorithm):
            out, _, _ = conv(x, w)
            back, _, _ = conv_transpose(out, w)
        torch.testing.assert_close(out, F.conv2d(x, w, None, 2, 1), **SUMS)
        torch.testing.assert_close(back, F.conv_transpose2d(out, w, None, 2, 1), **SUMS)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_taps_that_meet_padding_alone(algorithm: str):
    """oneDNN leaves their bfloat16 gradients uninitialised: the matrix product takes over, and they are 0."""
    for (c, h, w), (kh, kw), stride in (((5, 2, 1), (4, 3), 2), ((33, 1, 1), (4, 3), 3), ((33, 17, 2), (4, 4), 3)):
        inner = random(2, c, h, w, dtype=torch.bfloat16)
        outer = random(2, 7, (h + 4 - kh) // stride + 1, (w + 4 - kw) // stride + 1, dtype=torch.bfloat16)
        with convolution_on_the_cpu(algorithm):
            dweight = conv_wgrad(outer, inner, kernel_size=(kh, kw), stride=stride, padding=2)
        exact = conv2d_weight(inner.double(), dweight.shape, outer.double(), stride, 2)
        torch.testing.assert_close(dweight.double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_autocast_does_not_reach_inside(algorithm: str):
    """torch.ops.fastp2p computes in the dtype it is given; the public functions cast."""
    large, small, weight = operands(SHAPES[1], torch.float32)
    args = (None, None, 2, 1)
    with convolution_on_the_cpu(algorithm), torch.autocast(large.device.type, torch.bfloat16):
        out, _, _ = torch.ops.fastp2p.conv(large, weight, *args, 0, 0.0, 0)
        back, _, _ = torch.ops.fastp2p.conv_transpose(small, None, weight, *args, 17, 3, 0, 0.0, 0)
        dweight = torch.ops.fastp2p.conv_wgrad(small, None, large, 4, 4, 2, 1, torch.float32)
    torch.testing.assert_close(out, F.conv2d(large, weight, None, 2, 1), **SUMS)
    torch.testing.assert_close(back, torch.nn.grad.conv2d_input(large.shape, weight, small, 2, 1), **SUMS)
    torch.testing.assert_close(dweight, conv2d_weight(large, weight.shape, small, 2, 1), **SUMS)


def test_an_unknown_algorithm_is_told():
    with (
        pytest.raises(ValueError, match="got 'fast', expected one of 'auto', 'gemm', 'direct'"),
        convolution_on_the_cpu("fast"),
    ):
        pass
