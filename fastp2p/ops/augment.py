"""augment: resident uint8 pairs -> a normalised batch (real_A, real_B)."""

import torch
from torch import Tensor

from fastp2p.errors import InputError
from fastp2p.ops import library
from fastp2p.ops.operands import Work


def augment_ref(
    pairs: Tensor,
    index: Tensor,
    offset: Tensor,
    flip: Tensor,
    crop_size: int,
    input_nc: int,
    A_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification of `augment`."""
    rows, columns = (start[:, None] + torch.arange(crop_size, device=pairs.device) for start in offset.unbind(1))
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    crops = pairs[index[:, None, None], rows[:, :, None], columns[:, None, :]]  # (N, crop_size, crop_size, C)
    x = crops.permute(0, 3, 1, 2).float()
    x = x / x.new_full((), 255.0) * 2 - 1  # a tensor divisor: CUDA would multiply by the reciprocal of a Python number
    real_A, real_B = x[:, :input_nc].to(A_dtype or torch.float32), x[:, input_nc:]
    return real_A.clone(memory_format=torch.channels_last), real_B.clone(memory_format=torch.channels_last)


def _fake(
    pairs: Tensor,
    index: Tensor,
    offset: Tensor,
    flip: Tensor,
    crop_size: int,
    input_nc: int,
    A_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    def batch(channels: int, dtype: torch.dtype) -> Tensor:
        shape = (index.shape[0], channels, crop_size, crop_size)
        return torch.empty(shape, dtype=dtype, device=pairs.device, memory_format=torch.channels_last)

    return batch(input_nc, A_dtype or torch.float32), batch(pairs.shape[3] - input_nc, torch.float32)


library.define(
    "augment",
    "(Tensor pairs, Tensor index, Tensor offset, Tensor flip, int crop_size, int input_nc, ScalarType? A_dtype=None)"
    " -> (Tensor, Tensor)",
    reference=augment_ref,
    fake=_fake,
    work=Work(
        maps=("pairs",),
        samples={"pairs": lambda results: sum(result.elements for result in results)},  # what is cropped alone is read
        results=("maps", "maps"),
    ),
)
library.serve_by_triton("augment")


def augment(
    pairs: Tensor,
    index: Tensor,
    offset: Tensor,
    flip: Tensor,
    *,
    crop_size: int,
    input_nc: int,
    A_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Crop, mirror and normalise one batch: x / 255 * 2 - 1 on pairs[index, top:top+crop_size, left:left+crop_size].

    Both images of a pair get the same crop and the same flip: the recipe's random jitter (Isola et al., appendix 6.2).
    Equal bit for bit to upstream's PIL crop and flip followed by ToTensor and Normalize(0.5, 0.5).

    Args:
        pairs: (P, H, W, C) uint8, contiguous; the first input_nc channels are A, the rest B.
        index: (N,) int64, which pairs.
        offset: (N, 2) int64, (top, left) of the crop in pixels.
        flip: (N,) bool, mirror left-right after cropping.
        crop_size: side of the result in pixels.
        input_nc: channels of A.
        A_dtype: of real_A; a lower one is rounded from float32. A network reads A in it; a loss reads B in float32.

    Returns:
        real_A (N, input_nc, crop_size, crop_size), A_dtype, and real_B (N, C - input_nc, crop_size, crop_size),
        float32; in [-1, 1], channels_last.

    Raises:
        InputError: on a wrong dtype, rank or size, or a crop that leaves its image. Checking that reads index and
            offset, so on a GPU it synchronises; torch.ops.fastp2p.augment does not check.
    """
    n, expected = index.numel(), "pairs (P, H, W, C) uint8, index (N,) int64, offset (N, 2) int64, flip (N,) bool"
    dtypes = (pairs.dtype, index.dtype, offset.dtype, flip.dtype)
    shapes_fit = pairs.ndim == 4 and index.shape == (n,) and offset.shape == (n, 2) and flip.shape == (n,)
    if not shapes_fit or dtypes != (torch.uint8, torch.int64, torch.int64, torch.bool):
        got = ", ".join(f"{tuple(t.shape)} {t.dtype}".replace("torch.", "") for t in (pairs, index, offset, flip))
        raise InputError(f"augment: got {got}; expected {expected}")
    height, width, channels = pairs.shape[1:]
    if n == 0 or not 0 < crop_size <= min(height, width) or not 0 < input_nc < channels:
        raise InputError(
            f"augment: got {n} indices, crop_size {crop_size}, input_nc {input_nc} for pairs {tuple(pairs.shape)}; "
            "expected at least one index, a crop no larger than the images, and channels left for both A and B"
        )
    if index.min() < 0 or index.max() >= len(pairs):
        raise InputError(f"augment: got index {index.min()} to {index.max()}, expected 0 to {len(pairs) - 1}")
    largest = offset.new_tensor([height - crop_size, width - crop_size])
    if (offset < 0).any() or (offset > largest).any():
        raise InputError(f"augment: got offset {offset.tolist()}, expected (0, 0) to {tuple(largest.tolist())}")
    real_A, real_B = torch.ops.fastp2p.augment(pairs, index, offset, flip, crop_size, input_nc, A_dtype)
    return real_A, real_B
