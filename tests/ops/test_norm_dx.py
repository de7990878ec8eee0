from typing import Any

import pytest
import torch
from helpers.on_device import generator, with_threads
from torch import Tensor

from fastp2p.errors import InputError
from fastp2p.ops import norm_act_backward_ref, norm_dx, norm_dx_ref, norm_stats_ref

SHAPES = [((1, 3, 1, 2), 1), ((2, 5, 3, 17), 2), ((3, 33, 2, 3), 3), ((4, 64, 2, 1), 2), ((2, 3, 17, 17), 1)]


def arguments(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype = torch.float32, weight: bool = True
) -> list[Any]:
    """dz, x, mean, var, weight, both sums, eps."""
    draws = generator(sum(shape))
    dz, x = (
        t.to(dtype).contiguous(memory_format=torch.channels_last) for t in torch.randn(2, *shape, generator=draws) + 1
    )
    mean, var = norm_stats_ref(x, groups)
    images = len(x) // groups
    xhat = (x.float() - wide(mean, images)) * wide(1 / (var + 1e-5).sqrt(), images)
    sums = [t.unflatten(0, (groups, -1)).sum((1, 3, 4)) for t in (dz.float(), dz.float() * xhat)]
    return [dz, x, mean, var, torch.randn(shape[1], generator=draws) if weight else None, *sums, 1e-5]


def wide(stats: Tensor, images: int) -> Tensor:
    return stats.repeat_interleave(images, 0)[:, :, None, None]


def in_double(args: list[Any]) -> list[Any]:
    return [arg.double() if isinstance(arg, Tensor) else arg for arg in args]


def assert_close(ours: tuple[Tensor, ...], args: list[Any]) -> None:
    """dx to a dozen float32 roundings of its largest term and one of its dtype; the sums of a few groups to a few.

    In the interpreter a store truncates, which is two roundings.
    """
    dx, dweight, dbias = norm_dx_ref(*in_double(args))
    rounding = torch.finfo(args[0].dtype).eps
    largest = (args[0].double().abs().amax() + 1) * (1 / (args[3].double() + 1e-5).sqrt()).amax()
    if args[4] is not None:
        largest = largest * args[4].double().abs().amax()
    torch.testing.assert_close(ours[0].double(), dx, rtol=rounding, atol=12 * 6e-8 * float(largest) * 4)
    torch.testing.assert_close(ours[1].double(), dweight, rtol=1e-6, atol=1e-6 * float(args[6].abs().amax() + 1))
    torch.testing.assert_close(ours[2].double(), dbias, rtol=1e-6, atol=1e-6 * float(args[5].abs().amax() + 1))


def call(args: list[Any]) -> tuple[Tensor, ...]:
    dz, x, mean, var, weight, sum_dz, sum_dz_xhat, eps = args
    return norm_dx(dz, x, mean, var, weight, sum_dz=sum_dz, sum_dz_xhat=sum_dz_xhat, eps=eps)


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_against_float64(shape: tuple[int, ...], groups: int, dtype: torch.dtype, weight: bool):
    args = arguments(shape, groups, dtype, weight)
    assert_close(call(args), args)


@pytest.mark.parametrize("groups", [1, 2])
def test_is_the_second_half_of_norm_act_backward(groups: int):
    """Without an activation dz is the gradient that comes."""
    dz, x, mean, var, weight, *sums, eps = in_double(arguments((4, 7, 5, 3), groups))
    whole = norm_act_backward_ref(dz, None, x, mean, var, weight, None, None, eps, 0, 0.0, -1, 0.0, 0, False)
    for ours, theirs in zip(norm_dx_ref(dz, x, mean, var, weight, *sums, eps), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # the sums are of float32


def test_a_slice_of_channels_is_read_as_it_is():
    args = arguments((2, 5, 3, 7), 2)
    expected = call(args)
    for number in (0, 1):
        wider = torch.full((2, 3, 7, 12), torch.nan).permute(0, 3, 1, 2)[:, 4:9].copy_(args[number])
        for ours, theirs in zip(call([*args[:number], wider, *args[number + 1 :]]), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # dense rows are taken several at a time


@pytest.mark.usefixtures("cpp_serves")
def test_the_same_bits_with_any_number_of_threads():
    args = arguments((4, 64, 32, 32), 2)
    results = with_threads(lambda: call(args))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_float64_is_computed_in_float64():
    args = in_double(arguments((2, 5, 3, 7), 2))
    for ours, exact in zip(call(args), norm_dx_ref(*args), strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-13)


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.fastp2p.norm_dx.default, tuple(arguments((2, 3, 4, 5), 2, dtype)))


def test_has_no_gradient():
    args = arguments((2, 3, 4, 5), 1)
    args[0].requires_grad_()
    with pytest.raises(InputError, match="norm_dx: has no gradient"):
        call(args)[0].sum().backward()


def test_bad_input_is_told():
    dz, x, mean, var, weight, *sums, eps = arguments((2, 3, 4, 5), 2)
    named = {"sum_dz": sums[0], "sum_dz_xhat": sums[1], "eps": eps}
    with pytest.raises(InputError, match=r"norm_dx: got dz, .* expected dz like x, sums like the statistics"):
        norm_dx(dz[:, :2], x, mean, var, weight, **named)
    with pytest.raises(InputError, match=r"norm_dx: got dz, .*, sums like the statistics"):
        norm_dx(dz, x, mean, var, weight, **(named | {"sum_dz": sums[0][:1]}))
    with pytest.raises(InputError, match=r"norm_dx: got .*expected x \(N, C, H, W\), mean and var \(G, C\)"):
        norm_dx(dz, x, mean[:, :2], var, weight, **named)


@pytest.mark.kernels
def test_every_configuration():
    from fastp2p.kernels import norm_dx as kernel

    args = arguments((4, 65, 5, 7), 2)
    for config in kernel.CONFIGS:
        assert_close(kernel.norm_dx(*args, config=config), args)
