"""The activations that operators fuse, and their derivatives."""

from typing import Literal

import torch
from torch import Tensor

from fastp2p.errors import InputError

Activation = Literal["none", "relu", "leaky_relu", "tanh"]
ACTIVATIONS: tuple[Activation, ...] = ("none", "relu", "leaky_relu", "tanh")  # operators take the index


def activate(x: Tensor, activation: int, slope: float) -> Tensor:
    """act(x); slope is leaky_relu's."""
    match ACTIVATIONS[activation]:
        case "relu":
            return x.relu()
        case "leaky_relu":
            return torch.where(x > 0, x, x * slope)
        case "tanh":
            return x.tanh()
    return x


def derivative(y: Tensor, activation: int, slope: float) -> Tensor:
    """act'(x), told from y = act(x); at 0 that of the negative side, as PyTorch has it."""
    match ACTIVATIONS[activation]:
        case "relu":
            return (y > 0).to(y.dtype)
        case "leaky_relu":
            return torch.where(y > 0, torch.ones_like(y), slope)
        case "tanh":
            return 1 - y * y
    return torch.ones_like(y)


def activation_index(operator: str, activation: Activation, slope: float) -> int:
    """The number that stands for an activation in an operator's schema.

    Raises:
        InputError: on an unknown name, or a negative slope, from whose result the sign of x cannot be told.
    """
    if activation not in ACTIVATIONS:
        raise InputError(f"{operator}: got activation {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if slope < 0:
        raise InputError(f"{operator}: got slope {slope}, expected 0 or more")
    return ACTIVATIONS.index(activation)
