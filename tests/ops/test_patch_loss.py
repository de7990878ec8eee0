from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from helpers.on_device import generator, with_threads

from fastp2p.errors import InputError
from fastp2p.models.gan_losses import FORMULAS, GANLoss
from fastp2p.ops import patch_loss, patch_loss_ref
from fastp2p.ops.library import INTERPRETED
from fastp2p.ops.objectives import OBJECTIVES, GanMode
from fastp2p.ops.patch_loss import KINDS

TARGETS = {"bce": (1.0, 0.0), "square": (1.0, 0.0), "hinge": (1.0, -1.0), "linear": (1.0, -1.0), "l1": (0.3,)}
operator = torch.ops.fastp2p.patch_loss
CASES = [(kind, target) for kind, targets in TARGETS.items() for target in targets]


def values(*shape: int) -> torch.Tensor:
    """Logits from tiny to so large that a naive exp overflows."""
    return torch.randn(shape, generator=generator(sum(shape))) * 10 ** torch.linspace(-6, 2.3, max(1, shape[-1]))


def assert_close(ours: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], terms: float):
    """The loss: a sum of float32 terms of this mean size. The gradient: some float32 roundings, one to x's dtype, and
    3 roundings of the largest slope, since sigmoid(x) - t cancels.
    """
    (loss, dx, *_), (exact_loss, exact_dx, *_) = ours, exact
    assert abs(loss.double() - exact_loss) <= 1e-6 * terms
    eps = torch.finfo(dx.dtype).eps * (1 if INTERPRETED and dx.dtype != torch.float32 else 0.5)  # it truncates
    bound = (eps + 1e-6) * exact_dx.abs() + 2e-7 * exact_dx.abs().max() + torch.finfo(dx.dtype).tiny
    assert ((dx.double() - exact_dx).abs() <= bound).all()


@pytest.mark.parametrize(("kind", "target"), CASES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 30, 30), (2, 1, 3, 17), (3, 3, 17, 2), (1, 3, 33, 35)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradient_against_float64(kind: str, target: float, shape: tuple[int, ...], dtype: torch.dtype):
    x = values(*shape).to(dtype)
    exact = patch_loss_ref(x.double(), None, KINDS.index(kind), target, 2.5, False)
    loss, dx = patch_loss(x, kind, target=target, weight=2.5)
    assert loss.dtype == torch.float32
    assert dx.dtype == dtype
    assert dx.shape == x.shape
    assert_close((loss, dx), exact, terms=2.5 * (1 + x.double().abs().pow(2 if kind == "square" else 1).mean().item()))


@pytest.mark.parametrize("through_tanh", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_l1_of_images_in_both_layouts(through_tanh: bool, layout: torch.memory_format):
    fake_B, real_B = torch.randn(2, 2, 3, 9, 13).tanh().unbind()
    real_B[0, 0, :2] = fake_B[0, 0, :2]  # where they agree the gradient is 0
    fake_B = fake_B.contiguous(memory_format=layout)
    loss, dx = patch_loss(fake_B, "l1", target=real_B, weight=100.0, through_tanh=through_tanh)
    exact = patch_loss_ref(fake_B.double(), real_B.double(), KINDS.index("l1"), 0.0, 100.0, through_tanh)
    assert_close((loss, dx), exact, terms=100)
    assert (dx[0, 0, :2] == 0).all()
    assert dx.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("gan_mode", OBJECTIVES)
def test_objectives_are_the_formulas(gan_mode: GanMode):
    logits, formula, objective = torch.randn(2, 1, 5, 7), GANLoss(gan_mode), OBJECTIVES[gan_mode]
    for target, expected in (
        (objective.D_real, formula(logits, True)),
        (objective.D_fake, formula(logits, False)),
        (objective.G, formula(logits, True, for_discriminator=False)),
    ):
        torch.testing.assert_close(patch_loss(logits, target.kind, target=target.value)[0], expected)


def test_every_objective_has_its_name_and_formula():
    assert list(OBJECTIVES) == list(FORMULAS) == list(get_args(GanMode))


def test_autograd_takes_the_gradient_through():
    x = torch.randn(2, 1, 4, 4, requires_grad=True)
    loss, dx = patch_loss(x, "bce", target=1.0, weight=3.0)
    (2 * loss).backward()
    torch.testing.assert_close(x.grad, 2 * dx.detach())
    torch.testing.assert_close(dx.detach(), (x.detach().sigmoid() - 1) * 3 / 32)


def test_target_keeps_its_own_precision():
    """Under autocast fake_B is bfloat16 and real_B float32: rounding real_B would flip signs."""
    x = torch.tensor([1.0], dtype=torch.bfloat16)
    loss, dx = patch_loss(x, "l1", target=torch.tensor([1.003]))
    assert loss.item() == pytest.approx(0.003, rel=1e-3)
    assert dx.item() == -1


@pytest.mark.parametrize("logit", [2.0, 8.0, 16.0, 40.0])
def test_the_loss_of_a_won_game_keeps_its_digits(logit: float):
    """log(1 + exp(-16)) is 1.1e-7, and 0 or 1.2e-7 when 1 + exp(-16) is rounded to float32."""
    exact = torch.tensor(-logit, dtype=torch.float64).exp().log1p().item()
    assert patch_loss(torch.tensor([logit]), "bce", target=1.0)[0].item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_not_swallowed(kind: str):
    loss, _ = patch_loss(torch.tensor([0.5, torch.nan, 3.0]), kind, target=1.0)
    assert loss.isnan()


def test_dx_has_x_s_strides_whatever_they_are():
    for x in (torch.randn(6, 8).t(), torch.randn(2, 3, 4, 5).permute(3, 1, 0, 2), torch.randn(2, 4, 6, 8)[:, ::2]):
        loss, dx = patch_loss(x, "square", target=0.3)
        assert dx.stride() == torch.empty_like(x).stride()
        torch.testing.assert_close(loss, ((x - 0.3) ** 2).mean())
        torch.testing.assert_close(dx, 2 * (x - 0.3) / x.numel())
        target = torch.randn(x.shape)
        torch.testing.assert_close(patch_loss(x, "l1", target=target)[1], (x - target).sign() / x.numel())


def test_the_gradient_is_a_constant():
    """There is no second derivative, and none is pretended."""
    x = torch.randn(5, requires_grad=True)
    loss, _ = patch_loss(x, "bce", target=1.0)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_slices_of_larger_buffers():
    big = torch.randn(4, 2, 10, 20)
    x, target = big[1:3, :1, 2:7, 3:11], big[1:3, 1:, 2:7, 3:11]
    loss, dx = patch_loss(x, "l1", target=target)
    torch.testing.assert_close(loss, (x - target).abs().mean())
    torch.testing.assert_close(dx, (x - target).sign() / x.numel())


def test_float64_is_computed_in_float64():
    """To within a few of its roundings: float32 anywhere on the way would show as 1e-7."""
    x = values(1, 1, 5, 7).double()
    expected = patch_loss_ref(x, None, 0, 1.0, 1.0, False)
    for ours, exact in zip(patch_loss(x, "bce", target=1.0), expected[:2], strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-15)  # dx is a share of the mean, about 1 / 35


@pytest.mark.usefixtures("cpp_serves")
def test_the_same_bits_with_any_number_of_threads():
    x = values(4, 3, 128, 128)
    results = with_threads(lambda: patch_loss(x, "square", target=1.0)[0])
    assert results[0] == results[1] == results[2]


def test_twice_the_same_bits():
    x = values(1, 3, 70, 70)
    (loss, dx), (again, dx_again) = (patch_loss(x, "bce", target=1.0) for _ in range(2))
    assert torch.equal(loss, again)
    assert torch.equal(dx, dx_again)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck(layout: torch.memory_format):
    for requires_grad in (False, True):
        x = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout).requires_grad_(requires_grad)
        torch.library.opcheck(torch.ops.fastp2p.patch_loss.default, (x, None, 0, 1.0, 2.0, False))
        torch.library.opcheck(torch.ops.fastp2p.patch_loss.default, (x, torch.randn(2, 3, 4, 5), 4, 0.0, 2.0, False))
        scale, addend = torch.tensor(4.0), torch.randn(2, 3, 4, 5)
        args = (x.detach(), None, 2, 1.0, 2.0, False, 0, 0.3, 0.5, scale, addend, True)
        torch.library.opcheck(torch.ops.fastp2p.patch_loss.default, args)


HALVES = [(kind, kind) for kind in range(len(KINDS))] + [(0, 2), (4, 1)]


@pytest.mark.parametrize(("kind", "second_kind"), HALVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_two_halves_are_two_calls(kind: int, second_kind: int, dtype: torch.dtype):
    """The same gradients bit for bit, since each value has its own; losses are sums of as many terms."""
    x = values(6, 1, 23, 31).to(dtype)
    settings: dict[str, Any] = {"dx_weight": 0.5, "dx_scale": torch.tensor(8.0)}
    both = operator(x, None, kind, 0.7, 3.0, False, second_kind, -0.4, sums=True, **settings)
    first = operator(x[:3].clone(), None, kind, 0.7, 3.0, False, sums=True, **settings)
    second = operator(x[3:].clone(), None, second_kind, -0.4, 3.0, False, sums=True, **settings)
    assert both[0].shape == (2,)
    assert torch.equal(both[1], torch.cat([first[1], second[1]]))
    rtol = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(both[0], torch.stack([first[0], second[0]]), rtol=rtol, atol=0)
    size = both[1].abs().sum(dtype=torch.float64).item()
    torch.testing.assert_close(both[2], first[2] + second[2], rtol=0, atol=rtol * size)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("channels", [1, 3, 20])
def test_what_a_schedule_asks_beyond_the_loss(channels: int, dtype: torch.dtype, layout: torch.memory_format):
    """dx is weighted, scaled and added to another gradient; the channels' sums are those of what is returned."""
    shape = (2, channels, 19, 33)
    x, target, addend = (torch.randn(shape, generator=generator(seed)) for seed in range(3))
    x, addend = x.tanh().to(dtype).contiguous(memory_format=layout), addend.to(dtype)
    scale = torch.tensor(1024.0)
    args = (KINDS.index("l1"), 0.0, 100.0, True, -1, 0.0, 0.5, scale)
    loss, dx, sums = operator(x, target, *args, addend, True)
    exact_loss, exact_dx, _ = patch_loss_ref(x.double(), target.double(), *args, addend.double(), True)
    alone, _, nothing = operator(x, target, KINDS.index("l1"), 0.0, 100.0, False)
    assert torch.equal(loss, alone)
    assert dx.is_contiguous(memory_format=layout)
    assert nothing.shape == (0,)
    assert_close((loss, dx), (exact_loss, exact_dx), terms=100)
    size = dx.double().abs().sum().item() / channels  # a sum's roundings are of its terms
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(sums.double(), dx.double().sum((0, 2, 3)), rtol=0, atol=tolerance * size)


def test_a_scale_that_float16_alone_would_lose():
    """The scale counts before the gradient is rounded: 1e-4 / 10000 is below float16's least value."""
    x = torch.zeros(1, 1, 100, 100, dtype=torch.float16)
    _, dx, _ = operator(x, None, KINDS.index("linear"), 1e-4, 1.0, False, dx_scale=torch.tensor(2.0**16))
    torch.testing.assert_close(dx, torch.full_like(x, -1e-8 * 2**16), rtol=1e-3, atol=0)


@pytest.mark.kernels
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_every_configuration(kind: int):
    from fastp2p.kernels import patch_loss as kernel

    x = values(1, 3, 41, 43)
    exact = patch_loss_ref(x.double(), None, kind, 1.0, 1.0, False)
    for config in kernel.CONFIGS:
        ours = kernel.patch_loss(x, None, kind, 1.0, 1.0, False, config=config)
        assert_close(ours, exact, terms=1 + x.double().abs().pow(2).mean().item())


def test_bad_input_is_told():
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(InputError, match="got kind 'wgan', expected one of bce, square, hinge, linear, l1"):
        patch_loss(x, "wgan", target=1.0)
    with pytest.raises(InputError, match=r"got x \(0,\) torch.float32"):
        patch_loss(torch.zeros(0), "bce", target=1.0)
    with pytest.raises(InputError, match=r"got target \(1, 1, 2, 3\) on c.*, expected \(1, 1, 2, 2\) on c"):
        patch_loss(x, "l1", target=torch.zeros(1, 1, 2, 3))
    y = torch.zeros(1, requires_grad=True)
    loss, dx = patch_loss(y, "l1", target=1.0, through_tanh=True)
    assert not dx.requires_grad
    with pytest.raises(InputError, match="changes dx alone"):
        loss.backward()
    for more in ({"dx_weight": 0.5}, {"dx_scale": torch.ones(())}, {"addend": torch.zeros(1)}):
        with pytest.raises(InputError, match="changes dx alone"):
            operator(y, None, 0, 1.0, 1.0, False, **more)[0].backward()
