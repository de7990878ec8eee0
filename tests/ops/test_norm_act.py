from typing import Any

import pytest
import torch
from helpers.on_device import generator, with_threads
from torch import Tensor

from fastp2p.ops import norm_act, norm_act_backward_ref, norm_act_ref, norm_stats, norm_stats_ref
from fastp2p.ops.activation import ACTIVATIONS
from fastp2p.ops.library import INTERPRETED

UNIT = torch.finfo(torch.float32).eps / 2  # one rounding
SHAPES = [  # with a number of statistics groups
    ((1, 1, 1, 1), 1),
    ((1, 3, 1, 2), 1),
    ((2, 5, 3, 17), 2),
    ((3, 33, 2, 3), 3),
    ((4, 64, 2, 1), 2),
    ((4, 1, 3, 3), 4),
    ((2, 3, 17, 17), 1),
    ((1, 64, 17, 3), 1),
]


def arguments(
    *shape: int,
    stat_groups: int = 1,
    dtype: torch.dtype = torch.float32,
    weight: bool = True,
    bias: bool = True,
    activation: str = "leaky_relu",
    second: str | None = "relu",
    fixed_stats: bool = False,
) -> tuple[Any, ...]:
    """The operator's arguments: channels of different mean and spread, and what the reference says are the former."""
    draws = generator(sum(shape))
    channels = shape[1]
    x = torch.randn(shape, generator=draws) * torch.linspace(0.1, 3, channels).view(-1, 1, 1)
    x = (x + torch.linspace(-2, 5, channels).view(-1, 1, 1)).to(dtype).contiguous(memory_format=torch.channels_last)
    affine = torch.randn(2, channels, generator=draws)
    mean, var = norm_stats_ref(x, stat_groups)
    parameters = (affine[0] if weight else None, affine[1] if bias else None)
    second_index = -1 if second is None else ACTIVATIONS.index(second)
    return x, mean, var, *parameters, None, 1e-5, ACTIVATIONS.index(activation), 0.2, second_index, 0.0, 0, fixed_stats


def with_dropout(args: tuple[Any, ...], dropout: float) -> tuple[Any, ...]:
    return *args[:5], torch.tensor([2**40 + 3, 8]), *args[6:10], dropout, 5, args[12]


def gradients(args: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
    x, second = args[0], args[9]
    dy, dy2 = torch.randn(2, *x.shape, generator=generator(x.numel())).to(x.dtype)
    return dy, None if second < 0 else dy2


def in_double(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def wide(stats: Tensor, x: Tensor) -> Tensor:
    """Statistics of groups, for each image and pixel."""
    return stats.repeat_interleave(len(x) // len(stats), 0)[:, :, None, None]


def terms(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In float64: xhat; the factor rstd * weight; z; and the size of the terms that make z, which may cancel."""
    x, mean, var, weight, bias, _, eps, *_ = in_double(args)
    rstd = wide(1 / (var + eps).sqrt(), x)
    weight, bias = (torch.zeros(x.shape[1]) + other if p is None else p for p, other in ((weight, 1), (bias, 0)))
    xhat = (x - wide(mean, x)) * rstd
    scaled, shift = xhat * weight[:, None, None], bias[:, None, None].expand_as(xhat)
    return xhat, rstd * weight[:, None, None], scaled + shift, scaled.abs() + shift.abs()


def rounding(dtype: torch.dtype) -> float:
    """The relative error of one conversion from float32; the interpreter truncates where hardware rounds."""
    return 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps * (1 if INTERPRETED else 0.5)


def assert_forward(args: tuple[Any, ...], ours: tuple[Tensor, Tensor]) -> None:
    """12 float32 roundings of the terms of z: five of rstd's way, two products, a difference, a sum, three of tanh.

    No activation is steeper than 1, and dropout scales the error as it does y. Then one rounding to x's dtype.
    """
    x, second, dropout = args[0], args[9], args[10]
    *_, size = terms(args)
    for y, exact in zip(ours, norm_act_ref(*in_double(args)), strict=True):
        assert y.dtype == x.dtype
        assert y.shape == exact.shape
        if y is ours[0] or second >= 0:
            assert y.is_contiguous(memory_format=torch.channels_last)
            bound = 12 * UNIT * size / (1 - dropout) + rounding(x.dtype) * exact.abs() + torch.finfo(x.dtype).tiny
            assert ((y.double() - exact).abs() <= bound).all()


def assert_backward(args: tuple[Any, ...], dy: Tensor, dy2: Tensor | None, ours: tuple[Tensor, Tensor, Tensor]) -> None:
    """32 float32 roundings of the terms of each sum: those of z and of the derivative, and a tree of additions.

    Where z is 0 but for its own rounding, the derivative of either side is right.
    """
    x, dropout, fixed_stats = args[0], args[10], args[12]
    unit = 32 * UNIT
    xhat, factor, z, size = terms(args)
    dy_size = (dy.double().abs() + (0 if dy2 is None else dy2.double().abs())) / (1 - dropout)
    dz_size = dy_size * (1 + size + (z.abs() <= 12 * UNIT * size) / unit)
    sizes = [dz_size * factor.abs(), (dz_size * xhat.abs()).sum((0, 2, 3)), dz_size.sum((0, 2, 3))]
    if not fixed_stats:
        in_groups = [size.unflatten(0, (len(args[1]), -1)) for size in (dz_size, dz_size * xhat.abs())]
        mean, projection = (size.mean((1, 3, 4), keepdim=True).expand_as(size).flatten(0, 1) for size in in_groups)
        sizes[0] = (dz_size + mean + xhat.abs() * projection) * factor.abs()
    exact = norm_act_backward_ref(dy.double(), None if dy2 is None else dy2.double(), *in_double(args))
    for one, other, size in zip(ours, exact, sizes, strict=True):
        assert one.shape == other.shape
        bound = unit * size + rounding(one.dtype) * other.abs() + torch.finfo(one.dtype).tiny
        assert ((one.double() - other).abs() <= bound).all()
    assert [tensor.dtype for tensor in ours] == [x.dtype, torch.float32, torch.float32]
    assert ours[0].is_contiguous(memory_format=torch.channels_last)


def check(args: tuple[Any, ...], **config: Any) -> None:
    """Operator and gradient against the float64 reference; with a configuration, the kernels themselves."""
    if config:
        from fastp2p.kernels import norm_act as operators
    else:
        operators = torch.ops.fastp2p
    dy, dy2 = gradients(args)
    assert_forward(args, operators.norm_act(*args, **config))
    assert_backward(args, dy, dy2, operators.norm_act_backward(dy, dy2, *args, **config))


@pytest.mark.parametrize(("shape", "stat_groups"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradient_against_float64(shape: tuple[int, ...], stat_groups: int, dtype: torch.dtype):
    check(arguments(*shape, stat_groups=stat_groups, dtype=dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("second", [None, *ACTIVATIONS])
def test_every_pair_of_activations(activation: str, second: str | None):
    check(arguments(2, 5, 3, 3, activation=activation, second=second))


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fixed_stats", [False, True])
def test_without_weight_or_bias_and_with_fixed_statistics(weight: bool, bias: bool, fixed_stats: bool):
    check(arguments(4, 33, 3, 2, stat_groups=2, weight=weight, bias=bias, fixed_stats=fixed_stats, second=None))
    check(arguments(3, 5, 2, 2, stat_groups=1, weight=weight, bias=bias, fixed_stats=fixed_stats))


@pytest.mark.kernels
@pytest.mark.parametrize("fixed_stats", [False, True])
def test_every_configuration(fixed_stats: bool, monkeypatch: pytest.MonkeyPatch):
    """With few programs for the sums, so that some take several tiles of their group."""
    from fastp2p.kernels import norm_act_backward, norm_tile

    monkeypatch.setattr(norm_act_backward, "SUM_PROGRAMS", 8)
    args = arguments(2, 65, 5, 7, stat_groups=2, fixed_stats=fixed_stats)
    for config in norm_tile.CONFIGS:
        check(args, config=config)


@pytest.mark.kernels
@pytest.mark.parametrize("one_share", [64, 2])
@pytest.mark.parametrize("stat_groups", [1, 2])
def test_more_partial_sums_than_one_step_adds(stat_groups: int, one_share: int, monkeypatch: pytest.MonkeyPatch):
    """In one level, and in two with a last share that is not full."""
    from fastp2p.kernels import norm_stats, norm_tile

    monkeypatch.setattr(norm_stats, "ONE_SHARE", one_share)
    config = next(config for config in norm_tile.CONFIGS if config["BLOCK_C"] == 128)  # 16 parts a step
    check(arguments(2, 3, 16, 17, stat_groups=stat_groups), config=config)


def layouts(t: Tensor) -> list[Tensor]:
    """The same values among NaN: channels and rows of channels_last buffers, then what no kernel reads as it is."""
    n, c, h, w = t.shape
    views = [
        torch.full((n, h, w, c + 7), torch.nan).permute(0, 3, 1, 2)[:, 4 : 4 + c],
        torch.full((n, h + 2, w, c), torch.nan).permute(0, 3, 1, 2)[:, :, 1 : 1 + h],
        torch.full((n, c, h, 2 * w), torch.nan)[..., ::2],
        torch.full((w, h, n, c), torch.nan).permute(2, 3, 1, 0),
    ]
    return [t.contiguous(), *(view.copy_(t) for view in views)]


def test_x_and_gradients_of_any_strides():
    args = with_dropout(arguments(2, 5, 3, 7, stat_groups=2), 0.5)
    dy, dy2 = gradients(args)
    for x, grad, grad2 in zip(layouts(args[0]), layouts(dy), reversed(layouts(dy2)), strict=True):
        assert_forward(args, torch.ops.fastp2p.norm_act(x, *args[1:]))
        ours = torch.ops.fastp2p.norm_act_backward(grad, grad2, x, *args[1:])
        assert_backward(args, dy, dy2, ours)


def test_expanded_gradients():
    """The gradient of y.sum() has stride 0 everywhere, that of y.mean((2, 3)) along the pixels."""
    args = arguments(2, 5, 3, 7)
    for dy in (torch.ones(()).expand(2, 5, 3, 7), torch.randn(2, 5, 1, 1).expand(2, 5, 3, 7)):
        assert_backward(args, dy, dy, torch.ops.fastp2p.norm_act_backward(dy, dy, *args))


def test_statistics_and_parameters_of_any_strides():
    args = list(arguments(2, 5, 3, 7, stat_groups=2))
    args[1:5] = [torch.stack([t, t + 1], dim=-1)[..., 0] for t in args[1:5]]
    assert not any(t.is_contiguous() for t in args[1:5])
    check(tuple(args))


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_with_dropout(dropout: float):
    """In value and gradient; the mask itself has a file of its own."""
    check(with_dropout(arguments(2, 5, 3, 17, stat_groups=2), dropout))
    check(with_dropout(arguments(3, 33, 2, 3, dtype=torch.bfloat16, fixed_stats=True), dropout))


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_unused(used: int):
    """Autograd gives it no gradient, which counts as 0."""
    args = arguments(2, 5, 3, 7)
    x, weight, bias = (args[i].clone().requires_grad_() for i in (0, 3, 4))
    outputs = torch.ops.fastp2p.norm_act(x, *args[1:3], weight, bias, *args[5:])
    given = [torch.zeros(2, 5, 3, 7), torch.zeros(2, 5, 3, 7)]
    given[used] = gradients(args)[used]
    assert_backward(args, *given, torch.autograd.grad(outputs[used], (x, weight, bias), given[used]))


def test_derivative_at_zero_is_that_of_the_negative_side():
    """As PyTorch has it."""
    x, zero, one = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1), torch.ones(1, 1)
    for activation, slope in (("none", 1.0), ("relu", 0.0), ("leaky_relu", 0.2), ("tanh", 1.0)):
        settings = (1e-5, ACTIVATIONS.index(activation), 0.2, -1, 0.0, 0, True)
        dx, *_ = torch.ops.fastp2p.norm_act_backward(x + 1, None, x, zero, one, None, None, None, *settings)
        torch.testing.assert_close(dx, x + slope / (1 + 1e-5) ** 0.5)


def test_a_constant_image_is_shifted_and_has_no_gradient():
    """xhat is 0 and rstd 316: y is act(bias), and the way through the mean takes away what the gradients share."""
    x = torch.full((2, 5, 3, 7), 1000.0)
    mean, var = norm_stats(x, stat_groups=1)
    assert (var == 0).all()
    bias = torch.linspace(-1, 1, 4).repeat(2)[:5]
    y, _ = norm_act(x, mean, var, None, bias, activation="relu")
    assert torch.equal(y, bias.relu().view(1, 5, 1, 1).expand_as(y))
    dy = torch.ones(2, 5, 3, 7)
    settings = (1e-5, 1, 0.2, -1, 0.0, 0, False)
    dx, dweight, dbias = torch.ops.fastp2p.norm_act_backward(dy, None, x, mean, var, None, bias, None, *settings)
    assert dx.abs().max() <= 42 * UNIT / 1e-5**0.5  # 1 / 42 is rounded, and the sum of 42 of them is 1
    assert (dweight == 0).all()
    assert torch.equal(dbias, 42.0 * (bias > 0))


def test_a_small_spread_around_a_large_mean():
    """(x - mean) * rstd keeps the digits that x * scale + shift would lose: 1000 / 0.01 roundings of them."""
    args = list(arguments(2, 3, 8, 8, activation="none", second=None))
    args[0] = 1000 + 0.01 * torch.randn(2, 3, 8, 8, generator=generator(1))
    args[1:3] = norm_stats_ref(args[0].double(), 1)
    args[1:3] = [t.float() for t in args[1:3]]
    check(tuple(args))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_is_not_swallowed(activation: str):
    args = list(arguments(1, 5, 3, 7, activation=activation, second=activation))
    x = args[0].clone()
    x[0, 1, 2, 3] = torch.nan
    y, y2 = torch.ops.fastp2p.norm_act(x, *args[1:])
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y2.isnan(), x.isnan())
    dy, dy2 = gradients(tuple(args))
    for gradient in (dy, dy2):
        gradient[0, 4, 0, 0] = torch.nan
        dx, dweight, dbias = torch.ops.fastp2p.norm_act_backward(dy, dy2, *args)
        assert dx[0, 4].isnan().all()
        assert dweight[4].isnan()
        assert dbias[4].isnan()
        assert not dx[0, :4].isnan().any()
        assert not (dweight[:4].isnan() | dbias[:4].isnan()).any()
        gradient[0, 4, 0, 0] = 0


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, in the interpreter, at 1e30
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_tanh_to_its_last_digits():
    """Near 0, where 1 - exp(-2 |x|) cancels, where the two formulas meet, and where exp(2 x) would overflow."""
    size = 10 ** torch.linspace(-30, 30, 481)
    x = torch.cat([size, -size, torch.linspace(-1, 1, 1001), torch.tensor([0.0, torch.inf, -torch.inf])])
    one = torch.ones(1, 1)
    y, _ = norm_act(x.view(1, 1, 1, -1), 0 * one, one, eps=0.0, activation="tanh")
    torch.testing.assert_close(y.flatten().double(), x.double().tanh(), rtol=8 * UNIT, atol=0)


def test_twice_the_same_bits():
    args = arguments(2, 65, 9, 9)
    dy, dy2 = gradients(args)
    (one, other) = (
        [*torch.ops.fastp2p.norm_act(*args), *torch.ops.fastp2p.norm_act_backward(dy, dy2, *args)] for _ in "12"
    )
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_fixed_statistics_keep_an_infinite_pixel_to_itself():
    args = list(arguments(2, 3, 4, 4, weight=False, bias=False, second=None, fixed_stats=True))
    args[0][0, 1, 2, 3] = torch.inf
    dy = torch.ones_like(args[0])
    dx, *_ = torch.ops.fastp2p.norm_act_backward(dy, None, *args)
    torch.testing.assert_close(dx, norm_act_backward_ref(dy, None, *args)[0])
    assert dx.isfinite().all()


@pytest.mark.usefixtures("cpp_serves")
def test_gradients_of_the_same_bits_with_any_number_of_threads():
    args = arguments(4, 64, 32, 32, stat_groups=2)
    dy, dy2 = gradients(args)
    results = with_threads(lambda: torch.ops.fastp2p.norm_act_backward(dy, dy2, *args))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_float64_is_computed_in_float64():
    """To within a few of its roundings: float32 anywhere on the way would show as 1e-7."""
    args = in_double(arguments(2, 5, 3, 7, stat_groups=2))
    dy, dy2 = gradients(args)
    ours = [*torch.ops.fastp2p.norm_act(*args), *torch.ops.fastp2p.norm_act_backward(dy, dy2, *args)]
    exact = [*norm_act_ref(*args), *norm_act_backward_ref(dy, dy2, *args)]
    torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-13)
