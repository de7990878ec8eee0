"""Padding by reflection to sides that a network can halve."""

import torch
from torch import Tensor


def reflect_pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad the last two dimensions of x by reflection, on both sides alike, up to the next multiple.

    Unlike F.pad this reflects as often as it takes, so the padding may be longer than the image. The centre crop of
    the result is x. Returns x itself when there is nothing to pad.
    """
    for dim in (-2, -1):
        size = x.shape[dim]
        padding = -size % multiple
        if padding:
            position = torch.arange(size + padding, device=x.device) - padding // 2
            period = max(1, 2 * (size - 1))  # 0 1 2 3 2 1 | 0 1 2 3 2 1 | ...
            position = position.remainder(period)
            x = x.index_select(dim, torch.minimum(position, period - position) if size > 1 else position)
    return x
