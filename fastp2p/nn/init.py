"""The initial weights of networks, and their number."""

import torch
from torch import nn


def init_weights(net: nn.Module, gain: float = 0.02, generator: torch.Generator | None = None) -> None:
    """Draw convolutions from N(0, gain), batch-norm weights from N(1, gain); biases are 0.

    Source: paper, appendix 6.2, for the convolutions; upstream for batch norm.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, gain, generator=generator)
        elif isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight, 1.0, gain, generator=generator)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def count_parameters(net: nn.Module) -> int:
    """The number of trainable scalars."""
    return sum(parameter.numel() for parameter in net.parameters())
