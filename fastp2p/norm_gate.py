"""NormGate: a normalised layer that a data gradient flows on into, as the convolutions' operators take it."""

from typing import NamedTuple

from torch import Tensor


class NormGate(NamedTuple):
    """A normalised layer that the gradient comes to, as arguments of conv and conv_transpose in their order.

    The layer gave drop(act(z)), z = (gate - mean) / sqrt(var + eps) * weight + bias, and to other readers perhaps
    drop(second(z)). Its channels are the result's from `first` on; what comes before them is given on as it is.
    """

    gate_mean: Tensor | None = None  # (G, C) float32 (float64 for float64); None: the gate is of no norm
    gate_var: Tensor | None = None  # (G, C)
    gate_weight: Tensor | None = None  # (C,)
    gate_bias: Tensor | None = None  # (C,)
    rng: Tensor | None = None  # (2,) int64, as norm_act has it
    addend: Tensor | None = None  # (N, C, H, W), the gradient that came for the second result
    first: int = 0
    eps: float = 0.0
    second: int = -1
    dropout: float = 0.0
    layer: int = 0


NO_NORM = NormGate()
