"""Normalisation layers by name, and batch norm over each image alone."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastp2p.errors import InputError

Norm = Literal["batch", "instance", "none"]
Statistics = Literal["batch", "sample"]


def norm_layer(norm: Norm) -> Callable[[int], nn.Module]:
    """From channel count to normalisation layer: eps 1e-5, momentum 0.1; instance norm has no parameters."""
    layers: dict[Norm, Callable[[int], nn.Module]] = {
        "batch": nn.BatchNorm2d,
        "instance": nn.InstanceNorm2d,
        "none": lambda channels: nn.Identity(),
    }
    if norm not in layers:
        raise InputError(f"norm: got {norm!r}, expected one of {', '.join(get_args(Norm))}")
    return layers[norm]


class SampleNorm2d(nn.BatchNorm2d):
    """Batch norm over each image alone: at any batch size what nn.BatchNorm2d does at batch size 1, image by image.

    Same parameters, buffers and state_dict keys; the running averages move once for each image, in their order.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        return torch.cat([super(SampleNorm2d, self).forward(image) for image in x.split(1)])


def take_statistics_of_samples(net: nn.Module) -> None:
    """Replace every nn.BatchNorm2d in the network by a SampleNorm2d with the same parameters and buffers."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                norm = SampleNorm2d(child.num_features, child.eps, child.momentum, device="meta")
                norm.load_state_dict(child.state_dict(), assign=True)
                setattr(module, name, norm)


def statistics_groups(norm: nn.BatchNorm2d | nn.InstanceNorm2d, images: int, batches: int) -> int:
    """The number of groups of images that each have statistics of their own, in training."""
    return images if isinstance(norm, nn.InstanceNorm2d | SampleNorm2d) else batches
