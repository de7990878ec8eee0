"""How kernels read image batches: as rows of pixels."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def within(position, size):
    """0 <= position < size by one comparison: as unsigned numbers the negative ones are large."""
    return position.to(tl.uint32) < size


def pixel_rows(x: Tensor) -> tuple[Tensor, int]:
    """An image batch (N, C, H, W) as rows of pixels: the tensor, and how many elements lie between two rows.

    channels_last is taken as it is, and so is a slice of its channels; any other layout is copied.
    """
    _, c, h, w = x.shape
    stride = next((x.stride(dim) for dim in (3, 2, 0) if x.shape[dim] > 1), c)
    steps = {3: stride, 2: w * stride, 0: h * w * stride}
    regular = all(x.shape[dim] == 1 or x.stride(dim) == step for dim, step in steps.items())
    if regular and stride >= c and (c == 1 or x.stride(1) == 1):
        return x, stride
    return x.contiguous(memory_format=torch.channels_last), c
