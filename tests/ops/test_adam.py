from collections.abc import Callable

import pytest
import torch
from helpers.on_device import generator

from fastp2p.errors import InputError
from fastp2p.ops import adam, adam_ref
from fastp2p.ops.library import INTERPRETED

HALVES = [torch.bfloat16, torch.float16]


def betas() -> torch.Tensor:
    return torch.tensor([0.5, 0.999], dtype=torch.float64)


def buffers(m: int, seed: int = 0) -> list[torch.Tensor]:
    """param, grad, exp_avg, exp_avg_sq with values over many orders of magnitude."""
    param, grad, exp_avg, exp_avg_sq = torch.randn(4, m, generator=generator(seed))
    scale = 10 ** torch.linspace(-12, 2, m)
    return [param, grad * scale, exp_avg * scale, (exp_avg_sq * scale) ** 2]


def assert_close(
    ours: list[torch.Tensor], expected: list[torch.Tensor], before: list[torch.Tensor], lr: float, powers: torch.Tensor
) -> None:
    """Within 4 roundings, each relative to the size of the terms that are added: they may cancel."""
    eps = torch.finfo(before[0].dtype).eps
    param, grad, exp_avg, exp_avg_sq = (tensor.double() for tensor in before)
    moment = 0.5 * (grad.abs() + exp_avg.abs())
    variance = 0.001 * grad**2 + 0.999 * exp_avg_sq
    correction1, correction2 = 1 - powers
    step = lr / correction1 * moment / ((variance / correction2).sqrt() + 1e-8)
    for one, other, size in zip(ours, expected, (param.abs() + step, grad.abs(), moment, variance), strict=True):
        bound = 4 * eps * size + 1e-37  # denormals are flushed, or not
        assert ((one.double() - other.double()).abs() <= bound).all()


def test_repeats_torch_adam():
    """Twenty steps against torch.optim.Adam in float64, from zero moments."""
    param, *_ = buffers(1000)
    exp_avg, exp_avg_sq = torch.zeros(1000), torch.zeros(1000)
    exact = param.double().requires_grad_()
    optimizer = torch.optim.Adam([exact], lr=2e-4, betas=(0.5, 0.999))
    powers = torch.ones(2, dtype=torch.float64)
    for step in range(20):
        grad = buffers(1000, seed=step)[1]
        powers *= betas()
        adam(param, grad, exp_avg, exp_avg_sq, lr=torch.tensor(2e-4), powers=powers)
        exact.grad = grad.double()
        optimizer.step()
    # A step moves a weight by about lr; float32 rounds that to 6e-8 of it, and the weight itself by half an ulp a step.
    torch.testing.assert_close(param.double(), exact.detach(), rtol=20 * 6e-8, atol=20 * 2e-4 * 1e-6)


def test_the_first_step_is_the_learning_rate():
    """At a weight of 0 nothing hides the step's own error; 1 - 0.999 in float32 would make one of 6e-6."""
    param, exp_avg, exp_avg_sq = (torch.zeros(100) for _ in range(3))
    adam(param, 1 + torch.rand(100), exp_avg, exp_avg_sq, lr=torch.tensor(1e-3), powers=betas())
    torch.testing.assert_close(param, torch.full((100,), -1e-3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("m", [1, 2, 3, 17, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("low_precision", [None, torch.bfloat16, torch.float16])
def test_equals_the_reference(m: int, low_precision: torch.dtype | None):
    ours, expected = buffers(m), buffers(m)
    copies = [None if low_precision is None else torch.empty(m, dtype=low_precision) for _ in range(2)]
    powers = betas() ** 3
    adam(*ours, lr=torch.tensor(2e-4), powers=powers, low_precision=copies[0])
    adam_ref(*expected, torch.tensor(2e-4), powers, 0.5, 0.999, 1e-8, copies[1])
    assert_close(ours, expected, buffers(m), 2e-4, powers)
    if low_precision is not None:
        ulps = 2 if INTERPRETED else 1  # the interpreter truncates where hardware rounds
        torch.testing.assert_close(copies[0], copies[1], rtol=ulps * torch.finfo(low_precision).eps, atol=1e-7)


def test_slices_of_a_larger_buffer_are_all_that_changes():
    big = [torch.cat([torch.full((7,), 9.0), tensor, torch.full((5,), 9.0)]) for tensor in buffers(100)]
    adam(*(tensor[7:107] for tensor in big), lr=torch.tensor(1e-3), powers=betas())
    for tensor in big:
        assert (tensor[:7] == 9).all()
        assert (tensor[107:] == 9).all()
    assert not torch.equal(big[0][7:107], buffers(100)[0])


@pytest.mark.parametrize("m", [1, 3, 1027])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("low_precision", [None, *HALVES])
@pytest.mark.parametrize("unscale", [None, 1 / 768])
def test_gradients_in_half_precision(
    m: int, dtype: torch.dtype, low_precision: torch.dtype | None, unscale: float | None
):
    """They are widened first: what float32 gradients of the same values give."""
    before = buffers(m)
    before[1] = before[1].to(dtype)
    copies = [None if low_precision is None else torch.empty(m, dtype=low_precision) for _ in range(2)]
    factor = None if unscale is None else torch.tensor(unscale)
    ours, expected = ([tensor.clone() for tensor in before] for _ in range(2))
    adam(*ours, lr=torch.tensor(2e-4), powers=betas(), low_precision=copies[0], unscale=factor)
    expected[1] = expected[1].float() * (1 if unscale is None else factor)
    widened = [tensor.clone() for tensor in expected]
    adam_ref(*expected, torch.tensor(2e-4), betas(), 0.5, 0.999, 1e-8, copies[1])
    assert torch.equal(ours[1], before[1])
    assert_close([ours[0], widened[1], *ours[2:]], expected, widened, 2e-4, betas())
    if low_precision is not None:
        ulps = 2 if INTERPRETED else 1  # the interpreter truncates where hardware rounds
        torch.testing.assert_close(copies[0], copies[1], rtol=ulps * torch.finfo(low_precision).eps, atol=1e-7)


@pytest.mark.parametrize("step", [adam, adam_ref])
def test_unscale_by_a_power_of_two_is_exact(step: Callable[..., None]):
    """The bits of a step without it, but for how a compiler joins the products: one rounding of the terms."""
    ours, expected = buffers(1000), buffers(1000)
    scaled = ours[1] * 1024
    settings = {"lr": torch.tensor(2e-4), "powers": betas(), "beta1": 0.5, "beta2": 0.999, "eps": 1e-8}
    step(ours[0], scaled, *ours[2:], **settings, unscale=torch.tensor(1 / 1024))
    step(*expected, **settings)
    assert_close(ours, expected, buffers(1000), 2e-4, betas())


@pytest.mark.parametrize("step", [adam, adam_ref])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("low_precision", [None, torch.bfloat16])
def test_unscale_of_zero_leaves_the_step_out(
    step: Callable[..., None], dtype: torch.dtype, low_precision: torch.dtype | None
):
    """Whatever the gradients hold: they are not used because they overflowed."""
    ours, m = buffers(2051), 2051
    ours[1] = torch.tensor([torch.inf, torch.nan, 1.0, -torch.inf]).repeat(m)[:m].to(dtype)
    low = None if low_precision is None else torch.full((m,), 7.0, dtype=low_precision)
    settings = {"lr": torch.tensor(1e-3), "powers": betas(), "beta1": 0.5, "beta2": 0.999, "eps": 1e-8}
    step(*ours, **settings, low_precision=low, unscale=torch.tensor(0.0))
    for i in (0, 2, 3):
        assert torch.equal(ours[i], buffers(m)[i])
    if low is not None:
        assert (low == 7).all()


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 1027])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "offsets", [(4, 8, 12, 16, 4), (1, 1, 1, 1, 1), (0, 0, 4, 2, 0), (0, 0, 0, 0, 2), (4, 3, 2, 1, 0)]
)
def test_slices_of_any_alignment(m: int, offsets: tuple[int, ...], dtype: torch.dtype):
    """Four elements at a time suit a kernel that moves 16 bytes at once; whether it may depends on every buffer."""
    low_precision = torch.full((m + 20,), 9.0, dtype=torch.bfloat16)
    big = [*(torch.full((m + 20,), 9.0, dtype=dtype if i == 1 else torch.float32) for i in range(4)), low_precision]
    slices = [whole[offset : offset + m] for whole, offset in zip(big, offsets, strict=True)]
    expected = buffers(m)
    expected[1] = expected[1].to(dtype).float()
    before = [tensor.clone() for tensor in expected]
    for view, values in zip(slices, expected, strict=False):
        view.copy_(values)
    powers = betas() ** 2
    adam(*slices[:4], lr=torch.tensor(1e-3), powers=powers, low_precision=slices[4])
    adam_ref(*expected, torch.tensor(1e-3), powers, 0.5, 0.999, 1e-8)
    assert_close(slices[:4], expected, before, 1e-3, powers)
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(slices[4].float(), slices[0], rtol=eps if INTERPRETED else eps / 2, atol=0)
    for whole, offset in zip(big, offsets, strict=True):
        assert (whole[:offset] == 9).all()
        assert (whole[offset + m :] == 9).all()


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unscale", [None, torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("low_precision", [None, torch.bfloat16, torch.float16])
def test_float64(lr_dtype: torch.dtype, low_precision: torch.dtype | None, unscale: torch.Tensor | None):
    """For proofs: the operator takes it, the function for users does not."""
    before = [tensor.double() for tensor in buffers(37)]
    ours, expected = ([tensor.clone() for tensor in before] for _ in range(2))
    copies = [None if low_precision is None else torch.empty(37, dtype=low_precision) for _ in range(2)]
    settings = (torch.tensor(2e-4, dtype=lr_dtype), betas() ** 3, 0.5, 0.999, 1e-8)
    unscale = None if unscale is None else unscale.to(ours[0].device)  # made before the tests chose a device
    torch.ops.fastp2p.adam(*ours, *settings, copies[0], unscale)
    adam_ref(*expected, *settings, copies[1], unscale)
    assert_close(ours, expected, before, 2e-4, betas() ** 3)
    if low_precision is not None:
        assert torch.equal(copies[0], ours[0].to(low_precision))


def test_zero_gradient_from_zero_moments_moves_nothing():
    param = torch.randn(50)
    before, zeros = param.clone(), [torch.zeros(50) for _ in range(3)]
    adam(param, *zeros, lr=torch.tensor(1e-3), powers=betas())
    assert torch.equal(param, before)


def test_twice_the_same_bits():
    one, other = buffers(3000), buffers(3000)
    for tensors in (one, other):
        adam(*tensors, lr=torch.tensor(1e-3), powers=betas() ** 2)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_autograd_notices_the_update():
    param, *rest = (torch.ones(4) for _ in range(4))
    param.requires_grad_()
    y = (param * param).sum()
    with torch.no_grad():
        adam(param, *rest, lr=torch.tensor(1e-3), powers=betas())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_opcheck():
    args = (*buffers(40), torch.tensor(1e-3), betas(), 0.5, 0.999, 1e-8)
    torch.library.opcheck(torch.ops.fastp2p.adam.default, args)
    low_precision = torch.zeros(40, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.fastp2p.adam.default, (*args, low_precision))
    args = (args[0], args[1].bfloat16(), *args[2:], low_precision, torch.tensor(0.5))
    torch.library.opcheck(torch.ops.fastp2p.adam.default, args)


@pytest.mark.kernels
def test_every_configuration():
    from fastp2p.kernels import adam as kernel

    for config in kernel.CONFIGS:
        ours, expected = buffers(2500), buffers(2500)
        kernel.adam(*ours, torch.tensor(1e-3), betas(), 0.5, 0.999, 1e-8, config=config)
        adam_ref(*expected, torch.tensor(1e-3), betas(), 0.5, 0.999, 1e-8)
        assert_close(ours, expected, buffers(2500), 1e-3, betas())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("param", torch.zeros(10, dtype=torch.float64), r"got param \(10,\) float64"),
        ("grad", torch.zeros(9), r"got grad \(9,\) float32 of strides \(1,\), expected contiguous \(10,\) float32"),
        ("grad", torch.zeros(10, dtype=torch.float64), r"got grad .*, expected .* float32, bfloat16 or float16"),
        ("exp_avg", torch.zeros(10, dtype=torch.bfloat16), r"got exp_avg \(10,\) bfloat16"),
        ("unscale", 1.0, "got unscale 1.0, expected a tensor"),
        ("unscale", torch.ones(1), r"got unscale \(1,\) float32 of strides \(1,\), expected \(\) float32"),
        ("unscale", torch.ones((), dtype=torch.float64), r"got unscale \(\) float64"),
        ("unscale", torch.ones((), device="meta"), "got tensors on .*, meta; expected one device"),
        ("exp_avg", torch.zeros(20)[::2], r"strides \(2,\)"),
        ("param", torch.zeros(()), r"got param \(\) float32"),
        ("lr", torch.zeros(1), r"got lr \(1,\) float32"),
        ("lr", 1e-3, "got lr 0.001, expected a tensor"),
        ("powers", torch.zeros(2), r"powers \(2,\) float32"),
        ("low_precision", torch.zeros(10), "expected contiguous .* bfloat16 or float16"),
        ("exp_avg_sq", torch.zeros(10, device="meta"), "got tensors on .*, meta; expected one device"),
    ],
)
def test_bad_input_is_told(name: str, value: torch.Tensor, message: str):
    tensors = dict(zip(("param", "grad", "exp_avg", "exp_avg_sq"), torch.zeros(4, 10).unbind(), strict=True))
    tensors |= {"lr": torch.tensor(1e-3), "powers": betas()}
    with pytest.raises(InputError, match=message):
        adam(**tensors | {name: value})
