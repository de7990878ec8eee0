"""conv_transpose to few channels, by the kernel that folds products of whole pixels."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.gemm_shapes import DTYPES, assert_product, random
from torch import Tensor

from fastp2p.ops.activation import ACTIVATIONS

pytestmark = pytest.mark.kernels

# (images, channels, of a second input, to channels, height, width), (k, stride, padding, output padding); squares of 8
# (float32) and 16 pixels: one that is not full, several, and one pixel more
CASES = [
    ((1, 8, 0, 3, 5, 3), (4, 2, 1, 0)),
    ((2, 5, 8, 3, 29, 15), (4, 2, 1, 0)),
    ((1, 64, 64, 3, 14, 28), (4, 2, 1, 0)),
    ((1, 70, 3, 2, 7, 15), (3, 2, 1, 1)),
    ((2, 4, 0, 1, 17, 11), (4, 1, 1, 0)),
    ((1, 3, 0, 4, 9, 9), (2, 2, 0, 0)),
    ((1, 3, 2, 1, 9, 19), (5, 3, 2, 0)),
    ((1, 3, 0, 1, 6, 5), (1, 2, 0, 1)),
]


def operands(sizes: tuple[int, ...], k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
    images, n_in, n_in2, n_out, height, width = sizes
    x2 = random(images, n_in2, height, width, dtype=dtype) if n_in2 else None
    return random(images, n_in, height, width, dtype=dtype), x2, random(n_in + n_in2, n_out, k, k, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "window"), CASES)
def test_against_float64(sizes: tuple[int, ...], window: tuple[int, ...], dtype: torch.dtype):
    from fastp2p.kernels import conv_transpose as kernel
    from fastp2p.kernels import fold

    k, stride, padding, output_padding = window
    x, x2, weight = operands(sizes, k, dtype)
    assert fold.is_for(weight, stride, padding, 0, None)
    whole = torch.cat([x, x2], 1) if x2 is not None else x
    product, absolute = (
        F.conv_transpose2d(f(whole.double()), f(weight.double()), None, stride, padding, output_padding)
        for f in (torch.clone, torch.abs)
    )
    out, mean, var = kernel.conv_transpose(x, x2, weight, None, None, stride, padding, *product.shape[2:], 0, 0.0, 0)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert mean.shape == var.shape == (0, weight.shape[1])
    assert_product(out, product, absolute, terms=len(weight) * math.ceil(k / stride) ** 2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_follows(activation: str):
    """A bias and an activation, or its derivative at a gate: as by phases, to a few roundings."""
    from fastp2p.kernels import conv_transpose as kernel
    from fastp2p.kernels import tile_rule

    x, x2, weight = operands((2, 5, 3, 3, 10, 9), 4, torch.float32)
    bias, gate = random(3), random(2, 3, 20, 18)
    for extra in ((bias, None), (None, gate)):
        args = (x, x2, weight, *extra, 2, 1, 20, 18, ACTIVATIONS.index(activation), 0.2, 0)
        phases = tile_rule.FLOAT32_CONFIGS[-1] | {"SPLIT": 1}
        by_phases, _, _ = kernel.conv_transpose(*args, config=phases)
        torch.testing.assert_close(kernel.conv_transpose(*args)[0], by_phases, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slice_of_the_output_channels(dtype: torch.dtype):
    """As the gradient of a discriminator's first layer takes its weight: bit for bit what a dense copy gives."""
    from fastp2p.kernels import conv_transpose as kernel

    x, _, weight = operands((1, 70, 0, 6, 7, 15), 4, dtype)
    weight = weight.to(memory_format=torch.channels_last)
    window = (2, 1, 14, 30, 0, 0.0, 0)
    for part in (weight[:, 3:], weight[:, :1], weight[:, 2:4]):
        assert torch.equal(
            kernel.conv_transpose(x, None, part, None, None, *window)[0],
            kernel.conv_transpose(x, None, part.clone(), None, None, *window)[0],
        )


def test_any_strides():
    from fastp2p.kernels import conv_transpose as kernel

    x, x2, weight = operands((2, 6, 6, 3, 10, 9), 4, torch.float32)
    wide = torch.full((2, 18, 10, 9), torch.nan).contiguous(memory_format=torch.channels_last)
    first, second = wide[:, 1:7].copy_(x), wide[:, 9:15].copy_(x2)
    window = (2, 1, 20, 18, 0, 0.0, 0)
    expected, _, _ = kernel.conv_transpose(x, x2, weight, None, None, *window)
    for w in (weight, weight.contiguous()):
        assert torch.equal(kernel.conv_transpose(first, second, w, None, None, *window)[0], expected)


def test_a_choice_of_it_holds_only_where_it_can_serve():
    """The tuner's choice is by the product's shape: another call of that shape may have statistics after it."""
    from fastp2p.kernels import conv_transpose as kernel
    from fastp2p.kernels import fold

    x, _, weight = operands((2, 5, 0, 3, 6, 7), 4, torch.float32)
    args = (x, None, weight, None, None, 2, 1, 12, 14, 0, 0.0, 1)
    config = fold.config_for(x, weight)
    for ours, expected in zip(kernel.conv_transpose(*args, config=config), kernel.conv_transpose(*args), strict=True):
        assert torch.equal(ours, expected)


def test_what_it_is_not_for():
    """More than 64 columns, statistics, a norm, a kernel whose margin leaves a square of 8 no inside."""
    from fastp2p.kernels import fold

    few = torch.empty(8, 3, 4, 4)
    assert fold.is_for(few, 2, 1, 0, None)
    assert not fold.is_for(few, 2, 1, 1, None)
    assert not fold.is_for(few, 2, 1, 0, torch.empty(1, 3))
    assert not fold.is_for(torch.empty(8, 5, 4, 4), 2, 1, 0, None)
    assert not fold.is_for(torch.empty(8, 1, 7, 7), 1, 3, 0, None)


def test_candidates_are_the_fold_and_the_phases():
    from fastp2p.kernels import candidates, fold

    x, x2, weight = operands((2, 64, 64, 3, 10, 9), 4, torch.bfloat16)
    args = (x, x2, weight, None, None, 2, 1, 20, 18, 0, 0.0, 0)
    found = candidates.candidates(candidates.product_of("conv_transpose", args))
    assert found[0] == fold.config_for(x, weight)
    assert len(found) > 1
    assert all("FOLD" not in config for config in found[1:])
    args = (*args[:11], 1)
    assert all("FOLD" not in config for config in candidates.candidates(candidates.product_of("conv_transpose", args)))
