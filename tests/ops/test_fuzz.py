"""Operators on random shapes, layouts, dtypes and settings, against their references in float64.

Seeds are fixed: a failure repeats, and its case is named below the traceback.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.on_device import generator, kernels_serve
from ops.test_norm_act import (
    UNIT,
    arguments,
    assert_backward,
    assert_forward,
    gradients,
    in_double,
    rounding,
    with_dropout,
)
from ops.test_norm_stats import assert_close as assert_stats
from ops.test_norm_stats import values as channels_of_all_kinds
from torch import Tensor

from fastp2p.ops import adam_ref, augment_ref, norm_act_backward_ref, norm_act_ref, norm_stats_ref, patch_loss_ref
from fastp2p.ops.activation import ACTIVATIONS
from fastp2p.ops.library import INTERPRETED
from fastp2p.ops.patch_loss import KINDS

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CHANNELS = [1, 2, 3, 4, 5, 6, 8, 13, 16, 31, 32, 33, 64, 100, 128, 255, 256, 257, 300, 513]
SIDES = [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 64, 70]
LARGEST = 40_000  # elements: some three tasks of the CPU's kernels


@pytest.fixture
def cases(_device: None) -> int:
    """Cases of each operator: few for Triton, which interprets in Python or compiles for new alignments."""
    return 8 if kernels_serve() else 150


def draw_shape(draws: random.Random) -> tuple[int, int, int, int]:
    while True:
        shape = (draws.choice([1, 1, 2, 3, 4, 6]), draws.choice(CHANNELS), draws.choice(SIDES), draws.choice(SIDES))
        if torch.Size(shape).numel() <= (2_000 if INTERPRETED else LARGEST):
            return shape


def draw_layout(draws: random.Random, x: Tensor) -> Tensor:
    """The same values, perhaps as a view among NaN: of channels, rows, every other pixel, or in another order."""
    n, c, h, w = x.shape

    def among_nan(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=x.dtype)

    match draws.randrange(6):
        case 0:
            return x.contiguous()
        case 1:
            first, more = draws.randint(0, 9), draws.randint(0, 9)
            view = among_nan(n, h, w, first + c + more).permute(0, 3, 1, 2)[:, first : first + c]
        case 2:
            view = among_nan(n, h + 2, w, c).permute(0, 3, 1, 2)[:, :, 1 : 1 + h]
        case 3:
            view = among_nan(n, c, h, 2 * w)[..., ::2]
        case 4:
            view = among_nan(w, h, n, c).permute(2, 3, 1, 0)
        case _:
            return x.contiguous(memory_format=torch.channels_last)
    return view.copy_(x)


def divisor(draws: random.Random, n: int) -> int:
    return draws.choice([d for d in range(1, n + 1) if n % d == 0])


@contextmanager
def named(**case: Any) -> Iterator[None]:
    """Add what was drawn to a failure."""
    try:
        yield
    except Exception as error:  # pytest gets it, with a note of the case
        error.add_note(", ".join(f"{name} {value}" for name, value in case.items()))
        raise


def assert_as_double(ours: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    """Both were computed in float64, in orders of their own; float32 anywhere on the way would show as 1e-7."""
    for one, other in zip(ours, exact, strict=True):
        assert one.dtype == torch.float64
        largest = other.abs().max().item() if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11 * (1 + largest))


def test_norm_stats(cases: int):
    draws = random.Random("norm_stats")
    for case in range(cases):
        shape, dtype = draw_shape(draws), draws.choice(DTYPES)
        x = draw_layout(draws, channels_of_all_kinds(*shape, dtype=dtype))
        groups = divisor(draws, shape[0])
        with named(case=case, shape=shape, strides=x.stride(), dtype=dtype, groups=groups):
            ours = torch.ops.fastp2p.norm_stats(x, groups)
            if dtype == torch.float64:
                assert_as_double(ours, norm_stats_ref(x, groups))
            else:
                assert_stats(ours, x, groups)


def draw_norm_act(draws: random.Random) -> tuple[Any, ...]:
    """Arguments of norm_act, contiguous."""
    shape, dtype = draw_shape(draws), draws.choice(DTYPES)
    args = arguments(
        *shape,
        stat_groups=divisor(draws, shape[0]),
        dtype=torch.float32 if dtype == torch.float64 else dtype,
        weight=draws.random() < 0.8,
        bias=draws.random() < 0.8,
        activation=draws.choice(ACTIVATIONS),
        second=draws.choice([None, *ACTIVATIONS]),
        fixed_stats=draws.random() < 0.3,
    )
    args = with_dropout(args, draws.choice([0.1, 0.5])) if draws.random() < 0.3 else args
    return in_double(args) if dtype == torch.float64 else args


def test_norm_act(cases: int):
    draws = random.Random("norm_act")
    for case in range(cases):
        args = draw_norm_act(draws)
        x = draw_layout(draws, args[0])
        with named(case=case, shape=x.shape, strides=x.stride(), dtype=x.dtype, settings=args[6:]):
            ours = torch.ops.fastp2p.norm_act(x, *args[1:])
            if x.dtype == torch.float64:
                assert_as_double(ours, norm_act_ref(*args))
            else:
                assert_forward(args, ours)


def test_norm_act_backward(cases: int):
    draws = random.Random("norm_act_backward")
    for case in range(cases):
        args = draw_norm_act(draws)
        x = draw_layout(draws, args[0])
        dy, dy2 = gradients(args)
        if draws.random() < 0.1:
            dy = torch.ones((), dtype=x.dtype).expand(x.shape)  # that of a sum
        views = [dy if dy.stride(3) == 0 else draw_layout(draws, dy), None if dy2 is None else draw_layout(draws, dy2)]
        strides = [None if t is None else t.stride() for t in (x, *views)]
        with named(case=case, shape=x.shape, strides=strides, dtype=x.dtype, settings=args[6:]):
            ours = torch.ops.fastp2p.norm_act_backward(*views, x, *args[1:])
            if x.dtype == torch.float64:
                assert_as_double(ours, norm_act_backward_ref(dy, dy2, *args))
            else:
                assert_backward(args, dy, dy2, ours)


def draw_target(draws: random.Random, kind: str, x: Tensor) -> tuple[Tensor | None, float]:
    """As a tensor or a number: what a loss of this kind is asked for."""
    allowed = {"bce": [0.0, 0.1, 0.9, 1.0], "hinge": [-1.0, 1.0]}.get(kind, [-1.0, 0.0, 0.3, 1.0])
    if draws.random() < 0.5:
        return None, draws.choice(allowed)
    target = torch.tensor(allowed)[torch.randint(len(allowed), x.shape, generator=generator(x.numel()))]
    if kind in ("square", "linear", "l1"):
        target = target + torch.randn(x.shape, generator=generator(1 + x.numel()))
    target = target.to(draws.choice([x.dtype, torch.float32]))
    return draw_layout(draws, target) if target.ndim == 4 else target, 0.0


def assert_loss(ours: tuple[Tensor, Tensor], x: Tensor, target: Tensor | float, kind: str, *settings: Any) -> None:
    """The loss: 16 roundings of the mean term. dx: 16 of itself, 4 of the largest slope's terms, one to x's dtype."""
    weight, _ = settings
    wide = torch.promote_types(x.dtype, torch.float32)
    unit, x64 = torch.finfo(wide).eps / 2, x.double()
    t = target.double() if isinstance(target, Tensor) else torch.tensor(target, dtype=torch.float64)
    value = 0.0 if isinstance(target, Tensor) else target
    tensor = t if isinstance(target, Tensor) else None
    exact_loss, exact_dx, _ = patch_loss_ref(x64, tensor, KINDS.index(kind), value, *settings)
    size, both = x64.abs() + t.abs(), (t * x64).abs()
    term = {"bce": 1 + size + both, "square": size**2, "hinge": 1 + both, "linear": both, "l1": size}[kind]
    slope = {"bce": 1 + t.abs(), "square": 2 * size, "hinge": t.abs(), "linear": t.abs(), "l1": torch.ones(())}[kind]
    loss, dx, _ = ours
    assert loss.dtype == wide
    assert dx.dtype == x.dtype
    assert dx.stride() == torch.empty_like(x).stride()
    assert abs(loss.double() - exact_loss) <= 16 * unit * weight * term.mean()
    largest = slope.double().max() * weight / x.numel()
    narrow = 0.0 if x.dtype == wide else rounding(x.dtype)
    bound = (narrow + 16 * unit) * exact_dx.abs() + 4 * unit * largest + torch.finfo(x.dtype).tiny
    assert ((dx.double() - exact_dx).abs() <= bound).all()


def test_patch_loss(cases: int):
    draws = random.Random("patch_loss")
    for case in range(cases):
        shape = draw_shape(draws)[draws.choice([0, 0, 0, 1, 2, 3]) :]
        dtype, kind = draws.choice(DTYPES), draws.choice(KINDS)
        x = torch.randn(shape, generator=generator(case)) * 10 ** torch.linspace(-6, 2.3, shape[-1])
        through_tanh = draws.random() < 0.3
        x = (x.tanh() if through_tanh else x).to(dtype)
        x = draw_layout(draws, x) if x.ndim == 4 else x
        target, value = draw_target(draws, kind, x)
        settings = (draws.choice([1.0, 0.5, 100.0]), through_tanh)
        layout = (x.stride(), None if target is None else (target.stride(), target.dtype))
        with named(case=case, kind=kind, shape=shape, layout=layout, dtype=dtype, value=value, settings=settings):
            ours = torch.ops.fastp2p.patch_loss(x, target, KINDS.index(kind), value, *settings)
            assert_loss(ours, x, value if target is None else target, kind, *settings)


def assert_adam(ours: list[Tensor], before: list[Tensor], lr: Tensor, powers: Tensor, *settings: float) -> None:
    """Before holds the gradient that was used, already multiplied.

    8 float32 roundings of the terms that are added, and which may cancel; denormals are flushed, or not.
    """
    beta1, beta2, eps = settings
    exact = [tensor.double() for tensor in before]
    adam_ref(*exact, lr, powers, *settings)
    param, grad, exp_avg, exp_avg_sq = (tensor.double() for tensor in before)
    moment = beta1 * exp_avg.abs() + (1 - beta1) * grad.abs()
    variance = beta2 * exp_avg_sq + (1 - beta2) * grad**2
    correction1, correction2 = 1 - powers
    step = lr / correction1 * moment / ((variance / correction2).sqrt() + eps)
    for one, other, size in zip(ours, exact, (param.abs() + step, grad.abs(), moment, variance), strict=True):
        assert ((one.double() - other).abs() <= 8 * UNIT * size + 1e-37).all()


def test_adam(cases: int):
    draws = random.Random("adam")
    for case in range(cases):
        m = draws.choice([draws.randint(1, 40), draws.randint(41, 5_000), draws.randint(1, LARGEST)])
        start = draws.randint(0, 17)  # slices' start, so that they lie at any multiple of 4 bytes
        scale = 10 ** torch.linspace(-12, 2, start + m + draws.choice([0, 5]))
        big = torch.randn(4, len(scale), generator=generator(case))
        big[1:3] *= scale
        big[3] = (big[3] * scale) ** 2
        around, buffers = big.clone(), [buffer[start : start + m] for buffer in big]
        buffers[1] = big[1].to(draws.choice(DTYPES[:3]))[start : start + m]
        unscale = draws.choice([None, None, 1.0, 1 / 700, 0.0])
        factor = None if unscale is None else torch.tensor(unscale)
        before = [buffer.clone() for buffer in buffers]
        settings = (draws.choice([0.0, 0.5, 0.9]), draws.choice([0.99, 0.999]), draws.choice([1e-8, 1e-6]))
        lr = torch.tensor(draws.choice([2e-4, 1e-2]))
        powers = torch.tensor(settings[:2], dtype=torch.float64) ** draws.choice([1, 2, 1000])
        low_dtype = draws.choice([None, torch.bfloat16, torch.float16])
        low = None if low_dtype is None else torch.empty(start + m, dtype=low_dtype)[start:]
        named_settings = {"settings": settings, "lr": lr.item(), "powers": powers.tolist(), "unscale": unscale}
        with named(case=case, m=m, start=start, **named_settings, grad=buffers[1].dtype, low=low_dtype):
            torch.ops.fastp2p.adam(*buffers, lr, powers, *settings, low, factor)
            if unscale == 0:
                assert torch.equal(big, around)
                assert low is None or low.isnan().all()  # as the memory was
                continue
            unscaled = before[1].double() * (1 if factor is None else factor.double())
            before[1] = buffers[1] = unscaled
            assert_adam(buffers, before, lr, powers, *settings)
            assert torch.equal(big[:, :start], around[:, :start])
            assert torch.equal(big[:, start + m :], around[:, start + m :])
            if low is not None:
                assert ((low.float() - buffers[0]).abs() <= rounding(low.dtype) * buffers[0].abs() + 6e-8).all()


def test_augment(cases: int):
    """Bit for bit: the reference's float32 is upstream's."""
    draws = random.Random("augment")
    for case in range(cases):
        count, height, width = draws.randint(1, 4), draws.choice(SIDES), draws.choice(SIDES)
        channels = draws.choice([2, 4, 6, 6, 7])
        pairs = torch.randint(0, 256, (count, height, width, channels), dtype=torch.uint8, generator=generator(case))
        if draws.random() < 0.3:
            pairs = torch.zeros(count, height + 3, width, channels + 2, dtype=torch.uint8)[:, 2:-1, :, 1:-1].copy_(
                pairs
            )
        n, crop_size, input_nc = (
            draws.randint(1, 3),
            draws.randint(1, min(height, width)),
            draws.randint(1, channels - 1),
        )
        index = torch.tensor([draws.randrange(count) for _ in range(n)])
        corners = [[draws.randint(0, height - crop_size), draws.randint(0, width - crop_size)] for _ in range(n)]
        flip = torch.tensor([draws.random() < 0.5 for _ in range(n)])
        dtype = torch.float32 if INTERPRETED else draws.choice([None, *DTYPES])  # it truncates
        args = (pairs, index, torch.tensor(corners), flip, crop_size, input_nc, dtype)
        with named(case=case, pairs=pairs.shape, strides=pairs.stride(), settings=args[1:]):
            ours, exact = torch.ops.fastp2p.augment(*args), augment_ref(*args)
            assert all(torch.equal(one, other) for one, other in zip(ours, exact, strict=True))
