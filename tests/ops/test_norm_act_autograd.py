"""norm_act as PyTorch sees it: its gradients beside autograd's, its schema, torch.compile, and what it refuses."""

from typing import Any

import pytest
import torch
from helpers.on_device import generator
from torch import Tensor, nn

from fastp2p.errors import InputError
from fastp2p.ops import norm_act, norm_stats
from fastp2p.ops.activation import ACTIVATIONS

SLOPE = 0.2


def plain(x: Tensor, weight: Tensor, bias: Tensor, stat_groups: int, activation: str) -> Tensor:
    """The textbook's formula in elementary operations, for autograd to differentiate."""
    groups = x.unflatten(0, (stat_groups, -1))
    mean = groups.mean((1, 3, 4), keepdim=True)
    var = ((groups - mean) ** 2).mean((1, 3, 4), keepdim=True)
    z = ((groups - mean) / (var + 1e-5).sqrt()).flatten(0, 1) * weight[:, None, None] + bias[:, None, None]
    act = {"none": nn.Identity(), "relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(SLOPE), "tanh": nn.Tanh()}[activation]
    return act(z)


def fused(x: Tensor, weight: Tensor | None, bias: Tensor | None, stat_groups: int, **settings: Any) -> Any:
    mean, var = norm_stats(x, stat_groups=stat_groups)
    return norm_act(x, mean, var, weight, bias, **settings)


def leaves(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draws = generator(seed)
    x = torch.randn(shape, generator=draws)
    weight, bias = torch.randn(2, shape[1], generator=draws)
    return tuple(t.to(dtype).requires_grad_() for t in (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("stat_groups", [1, 2, 4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_the_plain_formula(dtype: torch.dtype, stat_groups: int, activation: str):
    """Two outputs, each with a gradient; float32 within a hundred roundings of the largest gradient."""
    inputs = leaves(4, 3, 5, 5, dtype=dtype)
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    weights, weights2 = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64, generator=generator(1))

    y, y2 = fused(*inputs, stat_groups, activation=activation, second="relu")
    (y * weights + y2 * weights2).sum().backward()
    exact, exact2 = (plain(*exact_inputs, stat_groups, name) for name in (activation, "relu"))
    (exact * weights + exact2 * weights2).sum().backward()

    tolerance = 1e-12 if dtype == torch.float64 else 50 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=tolerance * 4)
    torch.testing.assert_close(y2.double(), exact2, rtol=0, atol=tolerance * 4)
    for name, ours, other in zip(("x", "weight", "bias"), inputs, exact_inputs, strict=True):
        assert ours.grad.dtype == dtype
        error = (ours.grad.double() - other.grad).abs().max() / other.grad.abs().max()
        assert error <= tolerance, name


@pytest.mark.parametrize("norm", ["batch", "instance", "evaluation"])
def test_is_the_layers_of_torch(norm: str):
    """BatchNorm2d or InstanceNorm2d, then LeakyReLU: values, every gradient and what they were made from."""
    x, weight, bias = leaves(3, 5, 4, 4)
    layer = nn.InstanceNorm2d(5) if norm == "instance" else nn.BatchNorm2d(5)
    if norm == "evaluation":
        layer.running_mean, layer.running_var = torch.randn(5), torch.rand(5) + 0.1
        layer.eval()
    parameters: tuple[Tensor | None, Tensor | None] = (None, None)
    if norm != "instance":
        parameters = (weight, bias)
        layer.weight, layer.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
    theirs = x.detach().clone().requires_grad_()
    expected = nn.LeakyReLU(SLOPE)(layer(theirs))
    if norm == "evaluation":
        stats = (layer.running_mean[None], layer.running_var[None])
        y, _ = norm_act(x, *stats, *parameters, activation="leaky_relu", fixed_stats=True)
    else:
        y, _ = fused(x, *parameters, 3 if norm == "instance" else 1, activation="leaky_relu")
    torch.testing.assert_close(y, expected)
    dy = torch.randn(3, 5, 4, 4, generator=generator(1))
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(x.grad, theirs.grad)
    if norm != "instance":
        torch.testing.assert_close(weight.grad, layer.weight.grad)
        torch.testing.assert_close(bias.grad, layer.bias.grad)


def test_groups_are_batches_of_their_own():
    """Two groups in one pass = batch norm of each half: real and fake images, as two passes would have them."""
    x, weight, bias = leaves(4, 3, 5, 5)
    halves = [fused(half, weight, bias, 1, activation="relu")[0] for half in x.chunk(2)]
    torch.testing.assert_close(fused(x, weight, bias, 2, activation="relu")[0], torch.cat(halves))


def test_only_what_asks_for_a_gradient_gets_one():
    x, weight, bias = leaves(2, 3, 4, 4)
    y, y2 = fused(x.detach(), weight, None, 1, second="relu")
    (y.sum() + y2.sum()).backward()
    assert weight.grad is not None
    assert x.grad is None
    mean, var = norm_stats(x, stat_groups=1)
    assert not mean.requires_grad
    assert not var.requires_grad
    y, none = norm_act(x.detach(), mean, var, None, bias.detach())
    assert none is None
    assert not y.requires_grad


def test_there_is_no_second_derivative():
    x, weight, bias = leaves(2, 3, 4, 4)
    y, _ = fused(x, weight, bias, 1, activation="tanh")
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def operator_arguments(layout: torch.memory_format, requires_grad: bool, second: int) -> tuple[Any, ...]:
    x, weight, bias = (t.detach() for t in leaves(2, 3, 4, 5))
    x = x.contiguous(memory_format=layout)
    mean, var = norm_stats(x, stat_groups=2)
    tensors = [t.requires_grad_(requires_grad) for t in (x, weight, bias)]
    settings = (1e-5, 2, SLOPE, second, 0.5, 3, False)
    return tensors[0], mean, var, *tensors[1:], torch.tensor([5, 6]), *settings


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("second", [-1, 1])
def test_opcheck(layout: torch.memory_format, second: int):
    for requires_grad in (False, True):
        args = operator_arguments(layout, requires_grad, second)
        torch.library.opcheck(torch.ops.fastp2p.norm_act.default, args)
    args = operator_arguments(layout, False, second)
    dy = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout)
    dy2 = None if second < 0 else dy.clone()
    torch.library.opcheck(torch.ops.fastp2p.norm_act_backward.default, (dy, dy2, *args))


def test_torch_compile():
    """One graph without a break, with the same values and gradients."""
    rng = torch.tensor([5, 6])

    def block(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, y2 = fused(x, weight, bias, 2, activation="leaky_relu", second="relu", dropout=0.5, rng=rng, layer=1)
        return (y * 2 + y2).tanh()

    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        inputs = leaves(4, 3, 5, 5)
        y = function(*inputs)
        y.square().sum().backward()
        results.append([y, *(t.grad for t in inputs)])
    for ours, compiled in zip(*results, strict=True):
        torch.testing.assert_close(ours, compiled)


def test_bad_input_is_told():
    x, stats, parameter = torch.zeros(2, 3, 4, 4), torch.ones(1, 3), torch.ones(3)
    with pytest.raises(InputError, match=r"got \(3, 4, 4\) float32 of strides .* expected x \(N, C, H, W\)"):
        norm_act(x[0], stats, stats)
    with pytest.raises(InputError, match=r"norm_act: got \(0, 3, 4, 4\) float32"):
        norm_act(x[:0], stats, stats)
    with pytest.raises(InputError, match=r"norm_act: got \(2, 3, 4, 4\) int32"):
        norm_act(x.int(), stats, stats)
    for mean in (torch.ones(3), torch.ones(1, 4), torch.ones(3, 3), torch.ones(0, 3), stats.double()):
        with pytest.raises(InputError, match=r"mean and var \(G, C\) with G a divisor of N"):
            norm_act(x, mean, mean)
    with pytest.raises(InputError, match="G a divisor of N"):
        norm_act(x, stats, torch.ones(2, 3))
    with pytest.raises(InputError, match=r"weight and bias \(C,\), all but x .*float32"):
        norm_act(x.bfloat16(), stats, stats, parameter.bfloat16())
    with pytest.raises(InputError, match=r"weight and bias \(C,\)"):
        norm_act(x, stats, stats, None, parameter[:2])
    for name in ("activation", "second"):
        with pytest.raises(InputError, match="got activation 'gelu', expected one of none, relu, leaky_relu, tanh"):
            norm_act(x, stats, stats, **{name: "gelu"})
    with pytest.raises(InputError, match=r"got slope -0\.1, expected 0 or more"):
        norm_act(x, stats, stats, slope=-0.1)
    for dropout, layer in ((1.0, 0), (-0.1, 0), (0.5, 2**32), (0.5, -1)):
        with pytest.raises(InputError, match=f"got dropout {dropout}, layer {layer}; expected 0 <= dropout < 1"):
            norm_act(x, stats, stats, dropout=dropout, layer=layer, rng=torch.tensor([0, 0]))
    for rng in (torch.zeros(2), torch.tensor([1]), torch.zeros(2, dtype=torch.int64, device="meta")):
        with pytest.raises(InputError, match=r"got rng .*, expected \(seed, step\) as \(2,\) int64 on c"):
            norm_act(x, stats, stats, dropout=0.5, rng=rng)
    with pytest.raises(InputError, match="got rng none"):
        norm_act(x, stats, stats, dropout=0.5)
