import pytest
import torch
import torch.nn.functional as F
from helpers.gemm_shapes import (
    CONFIG_SHAPES,
    DTYPES,
    ROUNDED,
    SHAPES,
    SUMS,
    assert_half_product,
    assert_product,
    assert_stats,
    configurations,
    conv_shape,
    random,
)
from helpers.on_device import kernels_serve
from torch import Tensor

from fastp2p.conv_shape import ConvShape
from fastp2p.errors import InputError
from fastp2p.ops import conv, conv_ref
from fastp2p.ops.activation import ACTIVATIONS, derivative


def operands(shape: ConvShape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x = random(shape.images, shape.inner, *shape.large, dtype=dtype)
    weight = random(*shape.weight, dtype=dtype, scale=shape.columns**-0.5)
    return x, weight, random(shape.outer)


def exact(x: Tensor, weight: Tensor, bias: Tensor, shape: ConvShape) -> tuple[Tensor, Tensor]:
    """The product in float64, and the sum of its terms' absolute values."""
    window = (shape.stride, shape.padding)
    absolute = F.conv2d(x.double().abs(), weight.double().abs(), bias.double().abs(), *window)
    return F.conv2d(x.double(), weight.double(), bias.double(), *window), absolute


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(shape: ConvShape, dtype: torch.dtype):
    x, weight, bias = operands(shape, dtype)
    out, mean, var = conv(x, weight, bias, stride=shape.stride, padding=shape.padding, stat_groups=shape.images)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    check = assert_product if kernels_serve() or dtype == torch.float32 else assert_half_product
    check(out, *exact(x, weight, bias, shape), terms=shape.columns)
    assert_stats(mean, var, out, shape.images)


@pytest.mark.parametrize("stat_groups", [0, 1, 2, 4])
def test_statistics_groups(stat_groups: int):
    shape = conv_shape(4, 3, 6, 10, 5, 4, 2, 1)
    x, weight, bias = operands(shape)
    x = x + 100 * torch.arange(4).view(4, 1, 1, 1)  # each group another mean
    out, mean, var = conv(x, weight, bias, stat_groups=stat_groups)
    assert mean.shape == var.shape == (stat_groups, 5)
    if stat_groups:
        assert_stats(mean, var, out, stat_groups)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("stat_groups", [0, 1])
def test_activation(activation: str, stat_groups: int):
    shape = SHAPES[1]
    x, weight, bias = operands(shape)
    weight *= 4  # tanh far and near
    out, mean, var = conv(x, weight, bias, activation=activation, slope=0.3, stat_groups=stat_groups)
    act = {"none": lambda z: z, "relu": F.relu, "leaky_relu": lambda z: F.leaky_relu(z, 0.3), "tanh": torch.tanh}
    z, _ = exact(x, weight, bias, shape)
    torch.testing.assert_close(out.double(), act[activation](z), rtol=1e-5, atol=4e-6)  # tanh' <= 1: no larger than z's
    if stat_groups:
        assert_stats(mean, var, out, 1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_multiplies_by_the_derivative(activation: str):
    shape = SHAPES[2]
    x, weight, _ = operands(shape)
    gate = random(shape.images, shape.outer, *shape.small).tanh()
    gate[0, 0, 0, 0] = 0.0  # the derivative at 0 is the negative side's
    out, _, _ = conv(x, weight, gate=gate, activation=activation, slope=0.3)
    plain, _, _ = conv(x, weight)
    index = ACTIVATIONS.index(activation)
    torch.testing.assert_close(out, plain * derivative(gate, index, 0.3), **ROUNDED)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4], SHAPES[7], SHAPES[9]], ids=str)
@pytest.mark.parametrize("activation", ["none", "leaky_relu", "tanh"])
def test_gradients_by_name(shape: ConvShape, activation: str):
    act = {"none": lambda z: z, "leaky_relu": lambda z: F.leaky_relu(z, 0.2), "tanh": torch.tanh}[activation]
    tensors = dict(zip(("x", "weight", "bias"), operands(shape), strict=True))
    ours = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    theirs = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    out, _, _ = conv(*ours.values(), stride=shape.stride, padding=shape.padding, activation=activation)
    expected = act(F.conv2d(*theirs.values(), shape.stride, shape.padding))
    dout = random(*out.shape)
    out.backward(dout)
    expected.backward(dout.double())
    for name in ours:
        gradient = ours[name].grad
        torch.testing.assert_close(gradient.double(), theirs[name].grad, **SUMS, msg=lambda m, n=name: n + m)


def test_expanded_gradient():
    """sum() hands back one number for all elements, a tensor of strides 0."""
    x, weight, bias = (tensor.requires_grad_() for tensor in operands(SHAPES[1]))
    conv(x, weight, bias)[0].sum().backward()
    _, _, height, width = F.conv2d(x, weight, bias, 2, 1).shape
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 2.0 * height * width))


def test_no_second_derivative_is_pretended():
    x = random(1, 3, 4, 4).requires_grad_()
    out, _, _ = conv(x, random(2, 3, 4, 4))
    for score in (out.sum(), out.square().sum()):  # a gradient that requires none, and one that does
        (gradient,) = torch.autograd.grad(score, x, create_graph=True, retain_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()


def test_slices_of_larger_buffers_and_other_layouts():
    big = random(3, 40, 6, 8)
    weight = random(7, 16, 4, 4)
    views = [big[1:, 5:21], big[:, 24:], big[1:2, :16], big[:, :32:2], big[:, :16, 1:5, 2:7]]
    views += [random(2, 16, 5, 6, channels_last=False), random(2, 5, 6, 16).permute(0, 3, 1, 2)]
    for view in views:
        out, _, _ = conv(view, weight.contiguous())
        torch.testing.assert_close(out, F.conv2d(view, weight, None, 2, 1), **SUMS)


def test_it_is_the_data_gradient_of_a_transposed_convolution():
    x, weight = random(2, 5, 4, 3).requires_grad_(), random(5, 7, 4, 4)
    y = F.conv_transpose2d(x, weight, None, 2, 1)
    dy = random(*y.shape)
    y.backward(dy)
    torch.testing.assert_close(conv(dy, weight)[0], x.grad, **SUMS)


def test_nan_is_not_swallowed():
    x = random(1, 3, 4, 4)
    x[0, 1, 2, 2] = torch.nan
    for activation in ACTIVATIONS:
        assert conv(x, random(2, 3, 4, 4), activation=activation)[0].isnan().any()


def test_twice_the_same_bits():
    shape = conv_shape(1, 64, 4, 4, 64, 4, 2, 1)  # few tiles: the sum is split
    x, weight, bias = operands(shape)
    for first, second in zip(*(conv(x, weight, bias, stat_groups=1) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_autocast():
    x, weight, bias = operands(SHAPES[1])
    with torch.autocast(x.device.type, torch.bfloat16):
        out, mean, _ = conv(x, weight, bias, stat_groups=1)
    assert out.dtype == torch.bfloat16
    assert mean.dtype == torch.float32


def test_float64_is_the_reference():
    x, weight, bias = (tensor.double() for tensor in operands(SHAPES[1]))
    assert torch.equal(conv(x, weight, bias)[0], conv_ref(x, weight, bias, None, 2, 1, 0, 0.2, 0)[0])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(layout: torch.memory_format, requires_grad: bool):
    x, weight, bias = (tensor.requires_grad_(requires_grad) for tensor in operands(conv_shape(2, 3, 5, 6, 4, 4, 2, 1)))
    x = x.detach().contiguous(memory_format=layout).requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.fastp2p.conv.default, (x, weight, bias, None, 2, 1, 2, 0.2, 2))
    gate = random(2, 4, 2, 3)
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.fastp2p.conv.default, (x.detach(), weight.detach(), None, gate, 2, 1, 2, 0.2, 0)
        )


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", CONFIG_SHAPES, ids=str)
def test_every_configuration(dtype: torch.dtype, shape: ConvShape):
    from fastp2p.kernels import conv as kernel

    x, weight, bias = operands(shape, dtype)
    for config in configurations(dtype):
        for split in (1, 3):
            args = (x, weight, bias, None, shape.stride, shape.padding, 0, 0.2, shape.images)
            out, mean, var = kernel.conv(*args, config=config | {"SPLIT": split})
            assert_product(out, *exact(x, weight, bias, shape), terms=shape.columns)
            assert_stats(mean, var, out, shape.images)


def test_bad_input_is_told():
    x, weight = random(2, 3, 4, 4), random(5, 3, 4, 4)
    with pytest.raises(InputError, match=r"conv: got x \(2, 3, 4, 4\) float32 .*, weight \(5, 4, 4, 4\)"):
        conv(x, random(5, 4, 4, 4))
    with pytest.raises(InputError, match="of one floating dtype"):
        conv(x.half(), weight)
    with pytest.raises(InputError, match="nothing is left of the image"):
        conv(random(2, 3, 1, 1), weight)
    with pytest.raises(InputError, match=r"got bias \(4,\).*, expected \(5,\) floating"):
        conv(x, weight, random(4))
    with pytest.raises(InputError, match=r"got gate .*, expected \(2, 5, 2, 2\)"):
        conv(x, weight, gate=random(2, 5, 3, 3))
    with pytest.raises(InputError, match="got stat_groups 3, expected 0 or a divisor of 2 images"):
        conv(x, weight, stat_groups=3)
    with pytest.raises(InputError, match=r"got activation 'gelu', expected one of none, relu"):
        conv(x, weight, activation="gelu")
    with pytest.raises(InputError, match=r"got slope -0.1, expected 0 or more"):
        conv(x, weight, activation="leaky_relu", slope=-0.1)
    with pytest.raises(InputError, match="got stride 0, padding 1"):
        conv(x, weight, stride=0)


def test_two_devices_are_told():
    x, weight, bias = operands(SHAPES[1])
    with pytest.raises(InputError, match=r"conv: got tensors on .*meta.*; expected one device"):
        conv(x, weight.to("meta"), bias)


def test_strided_bias_and_integers():
    x, weight, _ = operands(SHAPES[1])
    bias = torch.arange(66.0)[::2]
    torch.testing.assert_close(conv(x, weight, bias)[0], conv(x, weight, bias.clone())[0], rtol=0, atol=0)
    one = torch.full((1,), 3.0).expand(33)
    torch.testing.assert_close(conv(x, weight, one)[0], conv(x, weight, one.contiguous())[0], rtol=0, atol=0)
    with pytest.raises(InputError, match="of one floating dtype"):
        conv(x.int(), weight.int())
    with pytest.raises(InputError, match=r"expected \(33,\) floating"):
        conv(x, weight, torch.arange(33))


def test_meta_tensors():
    x, weight, bias = (tensor.to("meta") for tensor in operands(SHAPES[1]))
    out, mean, _ = conv(x, weight, bias, stat_groups=2)
    assert (out.shape, mean.shape, out.device.type) == ((2, 33, 8, 1), (2, 33), "meta")
