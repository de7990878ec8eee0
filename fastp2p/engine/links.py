"""What stands between layers: additions, concatenations, padding, pooling, upsampling, on PyTorch's own kernels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class Kind(NamedTuple):
    """A kind of link: its result, and from the result's gradient the gradient of each operand."""

    forward: Callable[..., Tensor]  # (settings, *operands)
    backward: Callable[..., tuple[Tensor, ...]]  # (settings, gradient, *operands)


def _split(settings: Any, dy: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = torch.split(dy, [x.shape[1] for x in operands], dim=1)
    return parts


def _pool(window: Any, x: Tensor) -> Tensor:
    kernel, stride, padding, counts = window
    return F.avg_pool2d(x, kernel, stride, padding, count_include_pad=counts)


def _pool_backward(window: Any, dy: Tensor, x: Tensor) -> tuple[Tensor]:
    kernel, stride, padding, counts = window
    # where it pads, PyTorch's CUDA kernel for channels_last gives wrong numbers (pytorch/pytorch#188344)
    operands = dy.contiguous(), x.contiguous()
    return (aten.avg_pool2d_backward(*operands, kernel, stride, padding, False, counts, None),)


KINDS: dict[str, Kind] = {
    "add": Kind(lambda _, a, b: a + b, lambda _, dy, a, b: (dy, dy)),
    "cat": Kind(lambda _, *operands: torch.cat(operands, dim=1), _split),
    "pad": Kind(
        lambda padding, x: F.pad(x, padding, mode="reflect"),
        lambda padding, dy, x: (aten.reflection_pad2d_backward(dy, x, padding),),
    ),
    "pool": Kind(_pool, _pool_backward),
    "upsample": Kind(
        lambda size, x: F.interpolate(x, size, mode="nearest"),
        lambda size, dy, x: (aten.upsample_nearest2d_backward(dy, size, x.shape),),
    ),
}


@dataclass(frozen=True, eq=False)
class Link:
    """A node without parameters."""

    name: str
    kind: str  # in KINDS
    sources: Sequence[Any]  # as of a layer
    settings: Any  # its kind's, as `Operation.settings`

    def forward(self, *operands: Tensor) -> Tensor:
        """The result, channels_last."""
        return KINDS[self.kind].forward(self.settings, *operands).contiguous(memory_format=torch.channels_last)

    def backward(self, dy: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        """The gradient of each operand."""
        parts = KINDS[self.kind].backward(self.settings, dy, *operands)
        return (
            parts if self.kind == "cat" else tuple(part.contiguous(memory_format=torch.channels_last) for part in parts)
        )
