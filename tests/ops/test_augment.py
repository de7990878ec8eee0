import numpy as np
import pytest
import torch
from helpers.on_device import generator
from PIL import Image

from fastp2p.errors import InputError
from fastp2p.ops import augment, augment_ref
from fastp2p.ops.library import INTERPRETED


def arguments(n: int = 3, height: int = 9, width: int = 11, channels: int = 6, crop_size: int = 8):
    pairs = torch.randint(0, 256, (4, height, width, channels), dtype=torch.uint8, generator=generator(n))
    index = torch.randint(0, 4, (n,), generator=generator(n + 1))
    offset = torch.stack([torch.arange(n) % (height - crop_size + 1), torch.arange(n) % (width - crop_size + 1)], 1)
    return pairs, index, offset, torch.arange(n) % 2 == 1


def test_equals_pil_and_torchvision_s_formula_bit_for_bit():
    """Upstream: PIL crop, PIL flip, ToTensor (x / 255 in float32), Normalize(0.5, 0.5)."""
    pairs, index, offset, flip = arguments()
    real_A, real_B = augment(pairs, index, offset, flip, crop_size=8, input_nc=3)
    for i in range(3):
        for images, channels in ((real_A, slice(0, 3)), (real_B, slice(3, 6))):
            image = Image.fromarray(pairs[index[i], :, :, channels].contiguous().cpu().numpy())
            top, left = offset[i].tolist()
            image = image.crop((left, top, left + 8, top + 8))
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip[i] else image
            x = np.asarray(image).astype(np.float32) / np.float32(255)
            expected = (x - np.float32(0.5)) / np.float32(0.5)
            assert np.array_equal(images[i].permute(1, 2, 0).cpu().numpy(), expected)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(("input_nc", "channels"), [(3, 6), (1, 4), (3, 4), (1, 2)])
@pytest.mark.parametrize("crop_size", [1, 2, 8, 9])
def test_shapes_dtype_layout(n: int, input_nc: int, channels: int, crop_size: int):
    args = arguments(n, channels=channels, crop_size=crop_size)
    outputs = augment(*args, crop_size=crop_size, input_nc=input_nc)
    for x, nc in zip(outputs, (input_nc, channels - input_nc), strict=True):
        assert x.shape == (n, nc, crop_size, crop_size)
        assert x.dtype == torch.float32
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert x.abs().max() <= 1
    assert all(torch.equal(a, b) for a, b in zip(outputs, augment_ref(*args, crop_size, input_nc), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_A_in_lower_precision_is_rounded_from_float32(dtype: torch.dtype):
    args = arguments()
    (real_A, real_B), exact = augment(*args, crop_size=8, input_nc=3, A_dtype=dtype), augment_ref(*args, 8, 3)
    assert real_A.dtype == dtype
    # Half a unit in the last place at 1; Triton's interpreter truncates, which is up to a whole one.
    ulp = torch.finfo(dtype).eps / 2
    rounded = exact[0].to(dtype)
    assert (real_A.float() - exact[0]).abs().max() <= ulp if INTERPRETED else torch.equal(real_A, rounded)
    assert torch.equal(real_B, exact[1])


def test_views_of_larger_buffers():
    pairs, index, offset, flip = arguments()
    big = torch.randint(0, 256, (4, 20, 30, 9), dtype=torch.uint8)
    view = big[:, 5:14, 7:18, 2:8]
    view.copy_(pairs)
    for x, expected in zip(
        augment(view, index, offset, flip, crop_size=8, input_nc=3),
        augment_ref(pairs, index, offset, flip, 8, 3),
        strict=True,
    ):
        assert torch.equal(x, expected)


@pytest.mark.kernels
def test_every_configuration():
    from fastp2p.kernels import augment as kernel

    args = arguments(crop_size=7)
    for config in kernel.CONFIGS:
        outputs = kernel.augment(*args, 7, 3, config=config)
        assert all(torch.equal(x, y) for x, y in zip(outputs, augment_ref(*args, 7, 3), strict=True)), config


def test_all_256_values():
    pairs = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 2)
    A, B = augment(pairs, torch.tensor([0]), torch.zeros(1, 2, dtype=torch.int64), torch.tensor([False]),
                   crop_size=16, input_nc=1)  # fmt: skip
    expected = np.arange(256, dtype=np.float32) / np.float32(255) * 2 - 1
    assert np.array_equal(A.flatten().cpu().numpy(), expected)
    assert torch.equal(A, B)
    assert A.min() == -1
    assert A.max() == 1


def test_opcheck():
    args = (*arguments(), 8, 3)
    torch.library.opcheck(torch.ops.fastp2p.augment.default, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, i, o, f: (p.float(), i, o, f), r"float32.*expected pairs \(P, H, W, C\) uint8"),
        (lambda p, i, o, f: (p, i, o[:1], f), r"\(1, 2\) int64"),
        (lambda p, i, o, f: (p, i.int(), o, f), r"\(3,\) int32.*expected"),
        (lambda p, i, o, f: (p, i[:, None], o, f), r"\(3, 1\) int64.*expected"),
        (lambda p, i, o, f: (p, i, o, f.long()), r"\(3,\) int64; expected"),
        (lambda p, i, o, f: (p[:, :5], i, o, f), "a crop no larger than the images"),
        (lambda p, i, o, f: (p, i[:0], o[:0], f[:0]), "got 0 indices"),
        (lambda p, i, o, f: (p, i + 4, o, f), "index"),
        (lambda p, i, o, f: (p, i, o + 3, f), "offset"),
        (lambda p, i, o, f: (p, i, o - 1, f), "offset"),
    ],
)
def test_bad_input_is_told(change, message: str):
    with pytest.raises(InputError, match=message):
        augment(*change(*arguments()), crop_size=8, input_nc=3)
