"""How far two right results may be apart, for what is compared before it is timed.

UNIT is one rounding of float32, relative. A bound counts the roundings on the way to a number, each relative to the
size of the terms that are added there, since those may cancel; where both results come from float32, for both of them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

UNIT = torch.finfo(torch.float32).eps / 2


def rounding(dtype: torch.dtype) -> float:
    """The relative error of one conversion to dtype."""
    return torch.finfo(dtype).eps / 2


def assert_within(what: str, ours: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """Every element within its bound; NaN is not."""
    excess = (ours.to(expected.dtype) - expected).abs_().div_(bound + torch.finfo(torch.float32).tiny)
    off = excess.max().item()
    assert off <= 1, f"{what} is off by {off:.3g} tolerances, so nothing is timed"


def assert_product(what: str, ours: Tensor, expected: Tensor, *, dtype: torch.dtype, terms: float, size: float) -> None:
    """Sums of so many products of a mean size, as fastp2p.tuner.operations.Trial judges them.

    Another order moves a sum of n terms by up to (4 + sqrt(n)) float32 roundings of the sum of their absolute values,
    each way. In half precision ATen rounds the product and what is added to it, matrix product each tap's share: four
    roundings of the largest value.
    """
    summing = 2 * (4 + math.sqrt(terms)) * UNIT * terms * size
    assert_within(what, ours, expected, summing + 4 * rounding(dtype) * expected.abs().max())


def assert_stats(ours: Sequence[Tensor], expected: Sequence[Tensor], x: Tensor) -> None:
    """Mean and variance: 16 roundings, a tree of additions, of the values and of the spread.

    The error of the mean that deviations are taken from enters the variance as itself times the spread, and squared.
    """
    mean, var = expected
    off = 16 * UNIT * x.abs().amax((0, 2, 3)).to(mean.dtype)
    assert_within("mean", ours[0], mean, off)
    assert_within("variance", ours[1], var, 16 * UNIT * var + off * (var.sqrt() + off))


def assert_normalised(y: Tensor, expected: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Batch norm and an activation of slopes up to 1: 32 roundings, 16 of the mean, for either result.

    Of the terms before they cancel: a channel of few pixels may have a spread far smaller than its values. And one
    rounding to y's dtype.
    """
    size = _in_spreads(x) * weight.abs() + bias.abs()
    bound = 64 * UNIT * size[:, None, None] + rounding(y.dtype) * expected.abs()
    assert_within("y", y, expected, bound)


def assert_norm_gradients(
    ours: Sequence[Tensor], expected: Sequence[Tensor], x: Tensor, weight: Tensor, dy: Tensor
) -> None:
    """dx, dweight and dbias of the same: 32 roundings of the terms of each sum, for either result.

    dx = weight / spread * (dz - mean(dz) - xhat * mean(dz * xhat)), where xhat is off by roundings of x in spreads, and
    stands twice.
    """
    in_spreads = 1 + _in_spreads(x)
    dy = dy.float().abs()
    largest = (weight.abs() * _per_spread(x) * in_spreads**2 * dy.amax((0, 2, 3)))[:, None, None]
    bound = 64 * UNIT * largest + rounding(ours[0].dtype) * expected[0].abs()
    assert_within("dx", ours[0], expected[0], bound)
    sums = dy.sum((0, 2, 3))
    assert_within("dweight", ours[1], expected[1], 64 * UNIT * sums * in_spreads)
    assert_within("dbias", ours[2], expected[2], 64 * UNIT * sums)


def assert_loss(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """A loss and its gradient.

    The loss is a mean of terms of one sign: 32 roundings, a tree of additions, for either result. The gradient: 16 of
    the steepest, since sigmoid(x) - t cancels, and one to its dtype.
    """
    (loss, dx), (expected_loss, expected_dx) = ours, expected
    assert_within("loss", loss, expected_loss, 64 * UNIT * expected_loss.abs())
    steepest = expected_dx.abs().max()
    assert_within("gradient", dx, expected_dx, 16 * UNIT * steepest + rounding(dx.dtype) * expected_dx.abs())


def assert_adam(ours: Sequence[Tensor], expected: Sequence[Tensor], low_precision: Tensor | None, lr: float) -> None:
    """Weights and both moments after two steps of Adam from zero moments, with the same gradient.

    So a moment sums terms of one sign: 8 roundings. In each step, for either result, a weight is itself rounded and
    moves by about lr, of which 32 roundings. Its copy of lower precision is the weight, rounded.
    """
    param, *moments = expected
    for name, one, other in zip(("exp_avg", "exp_avg_sq"), ours[1:], moments, strict=True):
        assert_within(name, one, other, 8 * UNIT * other.abs())
    assert_within("param", ours[0], param, UNIT * (4 * param.abs() + 4 * 32 * lr))
    if low_precision is not None:
        assert torch.equal(low_precision, ours[0].to(low_precision.dtype)), "low_precision is not param, rounded"


def _per_spread(x: Tensor, eps: float = 1e-5) -> Tensor:
    return (x.float().var((0, 2, 3), correction=0) + eps).rsqrt()


def _in_spreads(x: Tensor) -> Tensor:
    """The largest value of each channel, in its standard deviations."""
    return x.float().abs().amax((0, 2, 3)) * _per_spread(x)
