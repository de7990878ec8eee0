"""What conv and conv_transpose do after a data gradient that flows on into a normalised layer: dz, and its sums."""

import torch
from torch import Tensor

from fastp2p.norm_gate import NormGate
from fastp2p.ops.activation import activate, derivative
from fastp2p.ops.philox import keep_mask

SCHEMA = (
    "Tensor? gate_mean=None, Tensor? gate_var=None, Tensor? gate_weight=None, Tensor? gate_bias=None, "
    "Tensor? rng=None, Tensor? addend=None, int first=0, float eps=0.0, int second=-1, float dropout=0.0, int layer=0"
)


def dz_and_sums(
    dy: Tensor, gate: Tensor, norm: NormGate, activation: int, slope: float, stat_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dz of gate's dtype in place of the channels from `first` on, its sum and that of dz * xhat, (stat_groups, C)."""
    mean, var = norm.gate_mean, norm.gate_var
    assert mean is not None
    assert var is not None
    images = len(gate) // len(mean)  # a group's
    mean, rstd = (t.repeat_interleave(images, 0)[:, :, None, None] for t in (mean, 1 / (var + norm.eps).sqrt()))
    xhat = (gate.to(mean.dtype) - mean) * rstd
    z = xhat if norm.gate_weight is None else xhat * norm.gate_weight[:, None, None]
    z = z if norm.gate_bias is None else z + norm.gate_bias[:, None, None]
    dz = dy[:, norm.first :].to(mean.dtype) * derivative(activate(z, activation, slope), activation, slope)
    if norm.addend is not None:
        dz = dz + norm.addend.to(mean.dtype) * derivative(activate(z, norm.second, slope), norm.second, slope)
    if norm.rng is not None and norm.dropout > 0:
        dz = dz * keep_mask(gate, norm.rng, norm.layer, norm.dropout).to(mean.dtype) / (1 - norm.dropout)
    dz = dz.to(gate.dtype)
    out = torch.cat([dy[:, : norm.first].to(gate.dtype), dz], dim=1).contiguous(memory_format=torch.channels_last)
    if stat_groups == 0:
        return out, mean.new_empty(0, gate.shape[1]), mean.new_empty(0, gate.shape[1])
    wide = dz.to(mean.dtype)
    sums = (t.unflatten(0, (stat_groups, -1)).sum((1, 3, 4)) for t in (wide, wide * xhat))
    return out, *sums


def fake_sums(gate: Tensor, stat_groups: int) -> tuple[Tensor, Tensor]:
    """Shape and dtype of the sums."""
    dtype = torch.promote_types(gate.dtype, torch.float32)
    shape = (stat_groups, gate.shape[1])
    return gate.new_empty(shape, dtype=dtype), gate.new_empty(shape, dtype=dtype)
