import pytest
import torch
from helpers.gemm_shapes import CONFIG_SHAPES, DTYPES, SHAPES, SUMS, assert_product, configurations, conv_shape, random
from torch.nn.grad import conv2d_weight

from fastp2p.conv_shape import ConvShape
from fastp2p.errors import InputError
from fastp2p.ops import conv_wgrad, conv_wgrad_ref, served_by


def operands(shape: ConvShape, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    outer = random(shape.images, shape.outer, *shape.small, dtype=dtype)
    return outer, random(shape.images, shape.inner, *shape.large, dtype=dtype)


def exact(outer: torch.Tensor, inner: torch.Tensor, shape: ConvShape) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in float64, and the sum of its terms' absolute values."""
    size = shape.weight
    outer, inner = outer.double(), inner.double()
    absolute = conv2d_weight(inner.abs(), size, outer.abs(), shape.stride, shape.padding)
    return conv2d_weight(inner, size, outer, shape.stride, shape.padding), absolute


def window(shape: ConvShape) -> dict[str, object]:
    return {"kernel_size": shape.kernel, "stride": shape.stride, "padding": shape.padding}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(shape: ConvShape, dtype: torch.dtype):
    outer, inner = operands(shape, dtype)
    terms = shape.pixels
    for result in (torch.float32, dtype):
        dweight = conv_wgrad(outer, inner, **window(shape), dtype=result)
        assert dweight.dtype == result
        assert dweight.is_contiguous(memory_format=torch.channels_last)
        if served_by("conv_wgrad", outer.device.type) == "C++" and dtype == torch.bfloat16:
            dweight = dweight.to(dtype)  # as it is already: rounded to the inputs' dtype before it was widened
        assert_product(dweight, *exact(outer, inner, shape), terms=terms)


@pytest.mark.parametrize("n_first", [1, 16, 20])
def test_two_outer_tensors_are_one_concatenated(n_first: int):
    shape = conv_shape(2, 6, 7, 5, 33, 4, 2, 1)
    outer, inner = operands(shape)
    parts = [part.contiguous(memory_format=torch.channels_last) for part in outer.split([n_first, 33 - n_first], 1)]
    dweight = conv_wgrad(parts[0], inner, outer2=parts[1], **window(shape))
    assert_product(dweight, *exact(outer, inner, shape), terms=shape.pixels)


def test_slices_of_larger_buffers_and_other_layouts():
    big, larger = random(3, 40, 3, 4), random(3, 20, 6, 8)
    for outer in (big[1:, 5:21], big[1:, ::3][:, :16].contiguous(), big[1:, :16].contiguous()):
        for inner in (larger[:2, 3:9], larger[:2, :6].contiguous()):
            expected = conv2d_weight(inner, (outer.shape[1], 6, 4, 4), outer, 2, 1)
            torch.testing.assert_close(conv_wgrad(outer[:, :14], inner), expected[:14], **SUMS)


def test_expanded_gradient():
    inner = random(2, 3, 6, 6)
    outer = torch.ones(()).expand(2, 5, 3, 3)
    torch.testing.assert_close(conv_wgrad(outer, inner), conv_wgrad(outer.contiguous(), inner))


def test_twice_the_same_bits():
    outer, inner = operands(conv_shape(2, 6, 34, 34, 20, 4, 2, 1))  # many pixels, few weights: the sum is split
    assert torch.equal(conv_wgrad(outer, inner), conv_wgrad(outer, inner))


def test_float64_is_computed_in_float64():
    """To within a few of its roundings: float32 anywhere on the way would show as 1e-7."""
    outer, inner = (tensor.double() for tensor in operands(SHAPES[1]))
    expected = conv_wgrad_ref(outer, None, inner, 4, 4, 2, 1, torch.float64)
    torch.testing.assert_close(conv_wgrad(outer, inner, dtype=torch.float64), expected, rtol=1e-13, atol=1e-13)


def test_it_has_no_gradient_and_says_so():
    outer, inner = operands(SHAPES[1])
    with pytest.raises(InputError, match="conv_wgrad: has no gradient"):
        conv_wgrad(outer.requires_grad_(), inner).sum().backward()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck(layout: torch.memory_format):
    outer, inner = (tensor.contiguous(memory_format=layout) for tensor in operands(conv_shape(2, 3, 5, 6, 4, 4, 2, 1)))
    torch.library.opcheck(torch.ops.fastp2p.conv_wgrad.default, (outer, outer, inner, 4, 4, 2, 1, torch.float32))
    torch.library.opcheck(torch.ops.fastp2p.conv_wgrad.default, (outer, None, inner, 4, 4, 2, 1, torch.bfloat16))


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole_blocks", [True, False])
def test_every_configuration(dtype: torch.dtype, whole_blocks: bool):
    from fastp2p.kernels import conv_wgrad as kernel

    shape = conv_shape(2, 64, 9, 12, 20, 2, 2, 1) if whole_blocks else CONFIG_SHAPES[1]
    outer, inner = operands(shape, dtype)
    parts = outer.split([7, shape.outer - 7], 1)
    for config in configurations(dtype):
        for split in (1, 2):
            args = (*shape.kernel, shape.stride, shape.padding, torch.float32)
            dweight = kernel.conv_wgrad(*parts, inner, *args, config=config | {"SPLIT": split})
            assert_product(dweight, *exact(outer, inner, shape), terms=shape.pixels)


def test_bad_input_is_told():
    outer, inner = random(2, 5, 3, 3), random(2, 3, 6, 6)
    with pytest.raises(
        InputError, match=r"conv_wgrad: got \(2, 5, 3, 3\) .*, \(2, 3, 8, 6\) .*\(H \+ 2 \* 1 - KH\) // 2"
    ):
        conv_wgrad(outer, random(2, 3, 8, 6))
    with pytest.raises(InputError, match="of one floating dtype"):
        conv_wgrad(outer.half(), inner)
    with pytest.raises(InputError, match="conv_wgrad: got"):
        conv_wgrad(outer, inner, outer2=random(2, 5, 3, 4))
    with pytest.raises(InputError, match="conv_wgrad: got"):
        conv_wgrad(outer, inner[:1])
