"""NaN and infinity pass through every operator, so that a diverging model looks like one.

One element of one operand is poisoned, or all of them are. Every result must then be NaN or infinite where the
reference, plain PyTorch in float64, is; and nowhere else. Kernels may differ in which of the two a sum of several
infinities is. They may also differ in whether a NaN that a convolution multiplies by its padding's zeros counts:
PyTorch's own do.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.on_device import generator, kernels_serve
from torch import Tensor

from fastp2p import ops
from fastp2p.conv_shape import conv_size
from fastp2p.ops import kernel_choices
from fastp2p.ops.kernel_choices import Measured
from fastp2p.ops.library import INTERPRETED
from fastp2p.ops.patch_loss import KINDS

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
POISON = [torch.nan, torch.inf, -torch.inf]
Function = Callable[..., Any]
pytestmark = [pytest.mark.slow] * INTERPRETED  # two minutes there


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values, images in channels_last."""
    x = torch.randn(*shape, generator=generator(seed)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def poisoned(args: list[Any], number: int) -> Iterator[list[Any]]:
    """The arguments with an element of args[number] poisoned: near its start and its end in memory, and all of it."""
    for value, place in itertools.product(POISON, (0, -1, None)):
        copies = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        operand = copies[number]
        if place is None:
            operand.fill_(value)
        else:
            operand[(place,) * operand.ndim] = value
        yield copies


def as_double(args: list[Any]) -> list[Any]:
    floats = [isinstance(arg, Tensor) and arg.is_floating_point() for arg in args]
    return [arg.double() if is_float else arg for arg, is_float in zip(args, floats, strict=True)]


def results(function: Function, args: list[Any], written: tuple[int, ...]) -> list[Tensor]:
    """What an operator returns, and the arguments that it writes to."""
    args = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    returned = function(*args)
    returned = returned if isinstance(returned, tuple) else () if returned is None else (returned,)
    return [*returned, *(args[number] for number in written)]


def check(ours: Function, reference: Function, args: list[Any], written: tuple[int, ...] = ()) -> None:
    """Poison each operand in turn."""
    for number, arg in enumerate(args):
        if not isinstance(arg, Tensor) or not arg.is_floating_point():
            continue
        for case in poisoned(args, number):
            found, expected = results(ours, case, written), results(reference, as_double(case), written)
            for output, (one, other) in enumerate(zip(found, expected, strict=True)):
                same = torch.equal(one.isfinite(), other.to(one.dtype).isfinite())  # float16 overflows
                assert same, f"operand {number}, result {output}: got {one}, expected {other}"


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest, _device: None) -> torch.dtype:
    if request.param == torch.float64 and kernels_serve():
        pytest.skip("Triton's kernels leave float64 to the references")
    return request.param


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


SHAPES = [(2, 5, 3, 3), (2, 40, 4, 5)] if INTERPRETED else [(2, 5, 3, 3), (2, 40, 9, 7), (1, 300, 5, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_stats(dtype: torch.dtype, shape: tuple[int, ...]):
    check(torch.ops.fastp2p.norm_stats, ops.norm_stats_ref, [draw(*shape, dtype=dtype), 1])


@pytest.mark.parametrize("activation", range(4))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_act_and_its_gradient(dtype: torch.dtype, shape: tuple[int, ...], activation: int):
    x = draw(*shape, dtype=dtype)
    vectors = [draw(shape[1], dtype=wide(dtype), seed=seed) for seed in range(1, 5)]
    mean, var = vectors[0][None], vectors[1].abs()[None] + 0.5
    rng = torch.tensor([3, 4])
    for second, dropout in ((-1, 0.0), (1, 0.5)):
        settings = (1e-5, activation, 0.2, second, dropout, 2, False)
        inputs = [x, mean, var, vectors[2], vectors[3], rng if dropout else None, *settings]
        check(torch.ops.fastp2p.norm_act, ops.norm_act_ref, inputs)
        gradients = [draw(*shape, dtype=dtype, seed=5), draw(*shape, dtype=dtype, seed=6) if second >= 0 else None]
        check(torch.ops.fastp2p.norm_act_backward, ops.norm_act_backward_ref, [*gradients, *inputs])


def test_running_stats(dtype: torch.dtype):
    vectors = [draw(40, dtype=wide(dtype), seed=seed) for seed in range(2)]
    groups = [draw(2, 40, dtype=wide(dtype), seed=seed) for seed in (2, 3)]
    check(torch.ops.fastp2p.running_stats, ops.running_stats_ref, [*vectors, *groups, 9, 0.1], written=(0, 1))


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_patch_loss(dtype: torch.dtype, kind: int):
    x, target = draw(2, 3, 9, 9, dtype=dtype), draw(2, 3, 9, 9, dtype=dtype, seed=1)
    targets = [(None, 0.9)] + ([(target, 0.0)] if KINDS[kind] == "l1" else [])
    for tensor, value in targets:
        check(torch.ops.fastp2p.patch_loss, ops.patch_loss_ref, [x, tensor, kind, value, 1.0, False])


@pytest.mark.parametrize("size", [5, 300])
def test_adam(dtype: torch.dtype, size: int):
    if dtype == torch.float64:
        pytest.skip("covered by float32: only the copy is in dtype")
    param, grad, exp_avg = (draw(size, seed=seed) for seed in range(3))
    tensors = [param, grad, exp_avg, draw(size, seed=3).abs()]
    numbers = [torch.tensor(1e-3), torch.tensor([0.5, 0.999], dtype=torch.float64)]
    low = None if dtype == torch.float32 else param.to(dtype)
    args = [*tensors, *numbers, 0.5, 0.999, 1e-8, low]

    def reference(*args: Any) -> None:
        ops.adam_ref(*args)

    check(torch.ops.fastp2p.adam, reference, args, written=(0, 2, 3, *([9] if low is not None else [])))


CONVOLUTIONS = [  # N, inner, height, width, outer, kernel, stride, padding
    (2, 5, 6, 6, 7, 4, 2, 1),
    (1, 3, 9, 9, 8, 3, 1, 1) if INTERPRETED else (2, 16, 16, 16, 40, 4, 2, 1),
]


@pytest.fixture(params=["gemm", "direct"])
def choice(request: pytest.FixtureRequest, _device: None) -> Iterator[str]:
    """The kernel that serves convolutions on a CPU; Triton's goes by rule."""
    if kernels_serve() and request.param == "direct":
        pytest.skip("Triton's kernel is one")
    yield request.param
    kernel_choices.forget()


def choose(choice: str, operator: str, args: list[Any]) -> None:
    place = kernel_choices.place_of(args[0].device)
    if not kernels_serve() and place.device_type == "cpu":
        kernel_choices.install(place, {kernel_choices.problem_of(operator, tuple(args)): Measured(choice)})


def check_convolution(
    operator: str, reference: Function, args: list[Any], operands: dict[int, Function], weight: int | None = None
) -> None:
    """As `check`, for the first result. An operand's function tells from ones where what is poisoned meets a pixel; a
    poisoned `weight` may spoil all of the channels that it reaches.
    """
    for number, meets in operands.items():
        for case in poisoned(args, number):
            found = results(getattr(torch.ops.fastp2p, operator), case, ())[0]
            expected = results(reference, as_double(case), ())[0]
            reached = meets((~case[number].isfinite()).double()) > 0
            spoiled = (
                reached.flatten(2).any(2).any(0)[None, :, None, None].expand_as(reached)
                if number == weight
                else reached
            )
            told = f"{operator}, operand {number}: got {found}, expected {expected}"
            assert not (found.isfinite() & ~expected.isfinite() & reached).any(), told
            assert found.isfinite()[expected.isfinite() & ~spoiled].all(), told


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("activation", range(4))
def test_conv(dtype: torch.dtype, choice: str, shape: tuple[int, ...], activation: int):
    n, inner, height, width, outer, k, stride, padding = shape
    x, weight = draw(n, inner, height, width, dtype=dtype), draw(outer, inner, k, k, dtype=dtype, seed=1)
    bias = draw(outer, dtype=wide(dtype), seed=2)
    args = [x, weight, bias, None, stride, padding, activation, 0.2, 0]
    choose(choice, "conv", args)
    ones_x, ones_weight = torch.ones_like(x, dtype=torch.float64), torch.ones_like(weight, dtype=torch.float64)
    check_convolution(
        "conv",
        ops.conv_ref,
        args,
        {
            0: lambda mask: F.conv2d(mask, ones_weight, None, stride, padding),
            1: lambda mask: F.conv2d(ones_x, mask, None, stride, padding),
            2: lambda mask: mask.view(1, -1, 1, 1) * F.conv2d(ones_x, ones_weight, None, stride, padding),
        },
    )


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("activation", range(4))
def test_conv_transpose(dtype: torch.dtype, choice: str, shape: tuple[int, ...], activation: int):
    n, inner, height, width, outer, k, stride, padding = shape
    sizes = [conv_size(side, k, stride, padding) for side in (height, width)]
    x, x2 = (draw(n, outer, *sizes, dtype=dtype, seed=seed) for seed in (0, 1))
    weight, bias = draw(2 * outer, inner, k, k, dtype=dtype, seed=2), draw(inner, dtype=wide(dtype), seed=3)
    args = [x, x2, weight, bias, None, stride, padding, height, width, activation, 0.2, 0]
    choose(choice, "conv_transpose", args)
    zeros, ones_weight = torch.zeros_like(x, dtype=torch.float64), torch.ones_like(weight, dtype=torch.float64)
    missing = [
        side - ((size - 1) * stride - 2 * padding + k) for side, size in zip((height, width), sizes, strict=True)
    ]

    def meets(left: Tensor, right: Tensor, filters: Tensor) -> Tensor:
        return F.conv_transpose2d(torch.cat([left, right], 1), filters, None, stride, padding, missing)

    check_convolution(
        "conv_transpose",
        ops.conv_transpose_ref,
        args,
        {
            0: lambda mask: meets(mask, zeros, ones_weight),
            1: lambda mask: meets(zeros, mask, ones_weight),
            2: lambda mask: meets(zeros + 1, zeros + 1, mask),
            3: lambda mask: mask.view(1, -1, 1, 1) + torch.zeros(n, inner, height, width, dtype=torch.float64),
        },
        weight=2,
    )


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_conv_wgrad(dtype: torch.dtype, choice: str, shape: tuple[int, ...]):
    """A gradient must not lose a NaN; PyTorch's own in bfloat16 spread one to more channels than it meets."""
    n, inner, height, width, outer, k, stride, padding = shape
    sizes = [conv_size(side, k, stride, padding) for side in (height, width)]
    x, dz = draw(n, inner, height, width, dtype=dtype), draw(n, outer, *sizes, dtype=dtype, seed=1)
    args = [dz, None, x, k, k, stride, padding, wide(dtype)]
    choose(choice, "conv_wgrad", args)

    def gradient(outer: Tensor, inner: Tensor) -> Tensor:
        return ops.conv_wgrad_ref(outer, None, inner, k, k, stride, padding, torch.float64)

    ones_dz, ones_x = torch.ones_like(dz, dtype=torch.float64), torch.ones_like(x, dtype=torch.float64)
    for number, meets in ((0, lambda mask: gradient(mask, ones_x)), (2, lambda mask: gradient(ones_dz, mask))):
        for case in poisoned(args, number):
            found = torch.ops.fastp2p.conv_wgrad(*case)
            reached = meets((~case[number].isfinite()).double()) > 0
            assert not found.isfinite()[reached].any(), f"operand {number}: got {found}"
