"""What the tests of convolutions share: awkward shapes, and how far a product may be off."""

import contextlib
import importlib
import math
from collections.abc import Iterator

import pytest
import torch
from helpers.on_device import generator
from torch import Tensor

from fastp2p.conv_shape import ConvShape
from fastp2p.ops.extension import WHY_ABSENT
from fastp2p.ops.library import INTERPRETED

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def conv_shape(
    images: int, inner: int, height: int, width: int, outer: int, k: int, stride: int, padding: int
) -> ConvShape:
    """A convolution of k x k taps from `inner` channels of height x width to `outer` channels."""
    return ConvShape.between(inner, (height, width), outer, k=k, stride=stride, padding=padding, images=images)


# k4 at stride 2 and 1 as in pix2pix, then what other models have; sides 1, 2, 3, 17; channels that are no power of two
SHAPES = [
    conv_shape(1, 3, 2, 2, 5, 4, 2, 1),
    conv_shape(2, 6, 17, 3, 33, 4, 2, 1),
    conv_shape(3, 64, 4, 6, 17, 4, 2, 1),
    conv_shape(1, 128, 2, 2, 19, 4, 2, 1),
    conv_shape(2, 17, 4, 5, 1, 4, 1, 1),
    conv_shape(1, 32, 3, 4, 64, 4, 1, 1),
    conv_shape(2, 5, 3, 17, 7, 3, 1, 1),
    conv_shape(2, 5, 9, 8, 3, 3, 2, 1),
    conv_shape(1, 32, 1, 3, 19, 1, 1, 0),
    conv_shape(2, 3, 4, 5, 4, 1, 2, 0),
    conv_shape(1, 4, 11, 7, 6, 7, 2, 3),
    conv_shape(1, 20, 4, 4, 9, 4, 1, 0),
    conv_shape(2, 6, 4, 6, 5, 2, 2, 0),
    conv_shape(1, 3, 9, 9, 4, 2, 3, 0),
]

# For every configuration: blocks of one tap at every BLOCK_K, and of several; results larger than the small tiles
CONFIG_SHAPES = [conv_shape(2, 128, 4, 5, 19, 2, 2, 1), conv_shape(3, 5, 3, 8, 33, 4, 2, 1)]


def configurations(dtype: torch.dtype) -> list[dict[str, int]]:
    """Every tile that a launcher may use for a dtype; imported here, since Triton may be missing."""
    from fastp2p.kernels import tile_rule

    return tile_rule.FLOAT32_CONFIGS if dtype == torch.float32 else tile_rule.CONFIGS + tile_rule.GATHERED_CONFIGS


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, channels_last: bool = True) -> Tensor:
    """Normal values, the same for the same shape."""
    seed = sum(i * side for i, side in enumerate(shape, 1))
    x = (torch.randn(shape, generator=generator(seed)) * scale).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last and x.ndim == 4 else x


# Two float32 results of up to some hundred products of normal values, whose absolute values sum to some hundred: in
# another order each is off by up to a dozen roundings of 6e-8 of that. A value computed twice the same way and then
# multiplied once is off by one rounding of its own.
SUMS = {"rtol": 1e-5, "atol": 1e-4}
ROUNDED = {"rtol": 1e-5, "atol": 1e-6}


def assert_product(ours: Tensor, exact: Tensor, absolute: Tensor, terms: int) -> None:
    """A float32 sum of `terms` products whose absolute values sum to `absolute`, rounded once to ours' dtype.

    A sum of n terms in float32, in any order, is off by some sqrt(n) roundings of the sum of absolute values at the
    worst seen, and by n at the worst possible; 4 + sqrt(n) is asked. Where float32 rounds to less, half an ulp is
    added, or a whole one in the interpreter, which truncates.
    """
    rounding = 0.0 if ours.dtype == torch.float32 else torch.finfo(ours.dtype).eps * (1 if INTERPRETED else 0.5)
    tiny = torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
    bound = (4 + math.sqrt(terms)) * 6e-8 * absolute + rounding * exact.abs() + tiny
    excess = (ours.double() - exact).abs() / bound
    assert not ours.isnan().any()
    assert excess.max() <= 1, f"off by {excess.max():.2f} bounds"


def assert_half_product(ours: Tensor, exact: Tensor, absolute: Tensor, terms: int) -> None:
    """A product on a CPU in half precision: to four roundings of the largest value.

    PyTorch's convolutions round the product, the bias, and their sum. By matrix products `conv_transpose` rounds each
    tap's share instead, and their sum.
    """
    assert not ours.isnan().any()
    bound = (4 + math.sqrt(terms)) * 6e-8 * absolute + 4 * torch.finfo(ours.dtype).eps / 2 * exact.abs().max()
    excess = (ours.double() - exact).abs() / bound
    assert excess.max() <= 1, f"off by {excess.max():.2f} bounds"


@contextlib.contextmanager
def convolution_on_the_cpu(algorithm: str) -> Iterator[None]:
    """Convolutions by "gemm" or "direct", whatever the shape; skips where C++ does not serve them."""
    if WHY_ABSENT is not None or torch.get_default_device().type != "cpu":
        pytest.skip("C++ does not serve the convolutions here")
    extension = importlib.import_module("fastp2p._C")
    extension.force_convolution(algorithm)
    try:
        yield
    finally:
        extension.force_convolution("auto")


def assert_stats(mean: Tensor, var: Tensor, out: Tensor, stat_groups: int) -> None:
    """Statistics are those of the values as stored.

    The mean to a dozen roundings of the largest value. The variance is a sum of squares of differences from a rounded
    mean: 2e-5 leaves room for a mean of some hundred times the spread, 6e-8 of which is 1e-5 of the spread.
    """
    exact_var, exact_mean = torch.var_mean(out.double().unflatten(0, (stat_groups, -1)), (1, 3, 4), correction=0)
    scale = out.double().abs().max() + 1e-30
    torch.testing.assert_close(mean.double(), exact_mean, rtol=0, atol=1e-6 * scale.item())
    torch.testing.assert_close(var.double(), exact_var, rtol=2e-5, atol=1e-12 * scale.item() ** 2)
