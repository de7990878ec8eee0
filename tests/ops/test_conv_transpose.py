import math

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

from fastp2p.conv_shape import ConvShape
from fastp2p.errors import InputError
from fastp2p.ops import conv_transpose, conv_transpose_ref
from fastp2p.ops.activation import ACTIVATIONS, derivative

# The shapes' smaller map goes in; of its o channels the first are the skip connection's.


def operands(shape: ConvShape, n_skip: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor | None]:
    fan_in = shape.outer * math.prod(shape.kernel) / shape.stride**2
    weight = random(*shape.weight, dtype=dtype, scale=fan_in**-0.5)
    x = random(shape.images, shape.outer, *shape.small, dtype=dtype)
    tensors = {"x": x, "x2": None, "weight": weight, "bias": random(shape.inner)}
    if n_skip:  # two tensors of their own, as in a U-Net
        tensors |= {"x": random(shape.images, n_skip, *shape.small, dtype=dtype)}
        tensors |= {"x2": random(shape.images, shape.outer - n_skip, *shape.small, dtype=dtype)}
    return tensors


def exact(tensors: dict[str, torch.Tensor | None], window: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in float64, and the sum of its terms' absolute values."""
    x = torch.cat([tensor.double() for tensor in (tensors["x"], tensors["x2"]) if tensor is not None], 1)
    weight, bias = tensors["weight"].double(), tensors["bias"].double()
    absolute = F.conv_transpose2d(x.abs(), weight.abs(), bias.abs(), *window)
    return F.conv_transpose2d(x, weight, bias, *window), absolute


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("two_inputs", [False, True])
def test_against_float64(shape: ConvShape, dtype: torch.dtype, two_inputs: bool):
    if two_inputs and shape.outer == 1:
        pytest.skip("one channel cannot be two inputs")
    tensors = operands(shape, shape.outer // 2 if two_inputs else 0, dtype)
    for output_padding in {0, shape.stride - 1}:
        window = (shape.stride, shape.padding, output_padding)
        settings = dict(zip(("stride", "padding", "output_padding"), window, strict=True))
        if min(tensors["x"].shape[2:]) == 1 and shape.kernel[0] + output_padding <= 2 * shape.padding:
            continue  # nothing is left of the image
        out, mean, var = conv_transpose(**tensors, **settings, stat_groups=shape.images)
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=torch.channels_last)
        product, absolute = exact(tensors, window)
        assert out.shape == product.shape
        check = assert_product if kernels_serve() or dtype == torch.float32 else assert_half_product
        check(out, product, absolute, terms=shape.outer * math.ceil(shape.kernel[0] / shape.stride) ** 2)
        assert_stats(mean, var, out, shape.images)


@pytest.mark.parametrize("stat_groups", [0, 1, 2, 4])
def test_statistics_groups(stat_groups: int):
    tensors = operands(conv_shape(4, 3, 6, 10, 5, 4, 2, 1), 2)
    tensors["x"] = tensors["x"] + 100 * torch.arange(4).view(4, 1, 1, 1)  # each group another mean
    out, mean, var = conv_transpose(**tensors, stat_groups=stat_groups)
    assert mean.shape == var.shape == (stat_groups, 3)
    if stat_groups:
        assert_stats(mean, var, out, stat_groups)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_gate(activation: str):
    tensors = operands(SHAPES[1], 16)
    plain, _, _ = conv_transpose(**tensors)
    act = {"none": lambda z: z, "relu": F.relu, "leaky_relu": lambda z: F.leaky_relu(z, 0.3), "tanh": torch.tanh}
    out, _, _ = conv_transpose(**tensors, activation=activation, slope=0.3)
    torch.testing.assert_close(out, act[activation](plain), **ROUNDED)
    gate = random(*plain.shape).tanh()
    out, _, _ = conv_transpose(**tensors, activation=activation, slope=0.3, gate=gate)
    torch.testing.assert_close(out, plain * derivative(gate, ACTIVATIONS.index(activation), 0.3), **ROUNDED)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[6], SHAPES[7]], ids=str)
@pytest.mark.parametrize("two_inputs", [False, True])
def test_gradients_by_name(shape: ConvShape, two_inputs: bool):
    tensors = operands(shape, shape.outer // 2 if two_inputs else 0)
    ours, theirs = (
        {name: None if t is None else t.to(dtype, copy=True).requires_grad_() for name, t in tensors.items()}
        for dtype in (torch.float32, torch.float64)
    )
    out, _, _ = conv_transpose(**ours, stride=shape.stride, padding=shape.padding, activation="leaky_relu")
    expected = F.leaky_relu(exact(theirs, (shape.stride, shape.padding))[0], 0.2)
    dout = random(*out.shape)
    out.backward(dout)
    expected.backward(dout.double())
    for name, tensor in ours.items():
        if tensor is not None:
            there = theirs[name].grad
            torch.testing.assert_close(tensor.grad.double(), there, **SUMS, msg=lambda m, n=name: n + m)


def test_slices_of_larger_buffers_and_other_layouts():
    big, weight = random(3, 40, 3, 4), random(24, 6, 4, 4)
    skips = [big[1:, 5:21], big[:2, ::2][:, :16], random(2, 16, 3, 4, channels_last=False)]
    for skip, x in zip(skips, [big[1:, :8], big[:2, 32:], big[1:, 3:11]], strict=True):
        out, _, _ = conv_transpose(skip, weight.contiguous(), x2=x)
        torch.testing.assert_close(out, F.conv_transpose2d(torch.cat([skip, x], 1), weight, None, 2, 1), **SUMS)


@pytest.mark.parametrize("size", [(6, 8), (7, 8), (7, 9)])
def test_it_is_the_data_gradient_of_a_convolution(size: tuple[int, int]):
    """The side may be odd: the convolution did not read its last row."""
    x, weight = random(2, 5, *size).requires_grad_(), random(7, 5, 4, 4)
    y = F.conv2d(x, weight, None, 2, 1)
    dy = random(*y.shape)
    y.backward(dy)
    dx, _, _ = torch.ops.fastp2p.conv_transpose(dy, None, weight, None, None, 2, 1, *size, 0, 0.0, 0)
    torch.testing.assert_close(dx, x.grad, **SUMS)


def test_twice_the_same_bits():
    tensors = operands(conv_shape(1, 32, 4, 4, 64, 4, 2, 1), 32)  # few tiles: the sum is split
    for first, second in zip(*(conv_transpose(**tensors, stat_groups=1) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_autocast():
    tensors = operands(SHAPES[1], 3)
    with torch.autocast(tensors["x"].device.type, torch.bfloat16):
        out, mean, _ = conv_transpose(**tensors, stat_groups=1)
    assert out.dtype == torch.bfloat16
    assert mean.dtype == torch.float32


def test_float64_is_computed_in_float64():
    """To within a few of its roundings: float32 anywhere on the way would show as 1e-7."""
    tensors = {name: tensor.double() for name, tensor in operands(SHAPES[1], 3).items()}
    expected, _, _ = conv_transpose_ref(*tensors.values(), None, 2, 1, 16, 2, 0, 0.2, 0)
    torch.testing.assert_close(conv_transpose(**tensors)[0], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(layout: torch.memory_format, requires_grad: bool):
    tensors = operands(conv_shape(2, 3, 4, 6, 5, 4, 2, 1), 2)
    tensors["x"] = tensors["x"].contiguous(memory_format=layout)
    x, x2, weight, bias = (tensor.requires_grad_(requires_grad) for tensor in tensors.values())
    torch.library.opcheck(torch.ops.fastp2p.conv_transpose.default, (x, x2, weight, bias, None, 2, 1, 4, 6, 2, 0.2, 2))
    torch.library.opcheck(
        torch.ops.fastp2p.conv_transpose.default, (x, None, weight[:2], None, None, 2, 1, 5, 7, 0, 0.2, 0)
    )


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole_blocks", [True, False])
def test_every_configuration(dtype: torch.dtype, whole_blocks: bool):
    from fastp2p.kernels import conv_transpose as kernel

    shape = conv_shape(1, 19, 6, 4, 128, 4, 2, 1) if whole_blocks else CONFIG_SHAPES[1]
    tensors = operands(shape, 64 if whole_blocks else 5, dtype)
    product, terms = exact(tensors, (2, 1)), shape.outer * math.ceil(shape.kernel[0] / shape.stride) ** 2
    args = (*tensors.values(), None, shape.stride, shape.padding, *product[0].shape[2:], 0, 0.2, shape.images)
    for config in configurations(dtype):
        for split in (1, 3):
            out, mean, var = kernel.conv_transpose(*args, config=config | {"SPLIT": split})
            assert_product(out, *product, terms=terms)
            assert_stats(mean, var, out, shape.images)


def test_bad_input_is_told():
    x, weight = random(2, 3, 4, 4), random(3, 5, 4, 4)
    with pytest.raises(InputError, match=r"conv_transpose: got .*expected x \(N, C, H, W\), x2"):
        conv_transpose(x, random(4, 5, 4, 4))
    with pytest.raises(InputError, match="of one floating dtype"):
        conv_transpose(x, random(6, 5, 4, 4), x2=x.half())
    with pytest.raises(InputError, match=r"conv_transpose: got .*\(2, 3, 4, 2\)"):
        conv_transpose(x, random(6, 5, 4, 4), x2=random(2, 3, 4, 2))
    with pytest.raises(InputError, match="got output_padding 2, expected 0 to 1, below the stride"):
        conv_transpose(x, weight, output_padding=2)
    with pytest.raises(InputError, match="nothing is left of the image"):
        conv_transpose(random(2, 3, 1, 1), weight, padding=2)
    with pytest.raises(InputError, match=r"got bias \(4,\).*, expected \(5,\)"):
        conv_transpose(x, weight, random(4))
