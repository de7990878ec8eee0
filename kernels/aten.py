"""Our convolutions by ATen's (on a GPU cuDNN's), with our passes for what follows them.

The tuner's other candidate: a fused convolution that is slower than cuDNN by more than a pass over its result loses in
spite of its fusion. What follows it is one pass in place, or none: bias, activation or gate, with statistics; or the
way into a norm, with its sums. In bfloat16 that reads 2 bytes an element and writes 2; statistics alone write none.
Unlike in our own kernels the product is rounded to the activations' dtype before that, and a weight gradient before
Adam, as PyTorch rounds them.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastp2p.conv_shape import conv_transpose_size
from fastp2p.kernels import gemm
from fastp2p.kernels.adam import adam
from fastp2p.kernels.norm_act_backward import dz_in_place
from fastp2p.kernels.norm_stats import norm_stats
from fastp2p.norm_gate import NormGate


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Operators compute in the dtype that they are given."""

    def wrapper(*args: Any) -> Any:
        device_type = args[0].device.type
        on = device_type != "meta" and torch.is_autocast_enabled(device_type)
        with torch.autocast(device_type, enabled=False) if on else contextlib.nullcontext():
            return function(*args)

    return wrapper


@_without_autocast
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    stride: int,
    padding: int,
    activation: int,
    slope: float,
    stat_groups: int,
    *norm: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastp2p.ops.conv`."""
    out = _convolve(x, weight, stride, padding)
    return _finish(out, bias, gate, activation, slope, stat_groups, NormGate(*norm))


@_without_autocast
def conv_transpose(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    stride: int,
    padding: int,
    height: int,
    width: int,
    activation: int,
    slope: float,
    stat_groups: int,
    *norm: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastp2p.ops.conv_transpose`."""
    both = _concatenate(x, x2)
    sizes = zip((height, width), both.shape[2:], weight.shape[2:], strict=True)
    output_padding = [side - conv_transpose_size(in_side, k, stride, padding) for side, in_side, k in sizes]
    out = _convolve(both, weight, stride, padding, output_padding)
    return _finish(out, bias, gate, activation, slope, stat_groups, NormGate(*norm))


@_without_autocast
def conv_wgrad(
    outer: Tensor,
    outer2: Tensor | None,
    inner: Tensor,
    kernel_height: int,
    kernel_width: int,
    stride: int,
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    """See `fastp2p.ops.conv_wgrad`."""
    both = _concatenate(outer, outer2)
    if inner.dtype == torch.float16:  # whose range a weight gradient may leave
        both, inner = both.float(), inner.float()
    shape = (both.shape[1], inner.shape[1], kernel_height, kernel_width)
    like = torch.empty(shape, dtype=inner.dtype, device=inner.device, memory_format=torch.channels_last)
    window = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1)
    _, dweight, _ = torch.ops.aten.convolution_backward(
        _channels_last(both), _channels_last(inner), like, None, *window, [False, True, False]
    )
    return _channels_last(dweight).to(dtype)


@_without_autocast
def conv_wgrad_adam(
    outer: Tensor,
    outer2: Tensor | None,
    inner: Tensor,
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    powers: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    stride: int,
    padding: int,
    low_precision: Tensor | None = None,
) -> None:
    """See `fastp2p.ops.conv_wgrad_adam`."""
    low = None if low_precision is None else _flat(low_precision)
    as_it_is = low is not None and low.dtype == inner.dtype == torch.bfloat16  # Adam reads it so
    dtype = torch.bfloat16 if as_it_is else torch.float32
    grad = conv_wgrad(outer, outer2, inner, *param.shape[2:], stride, padding, dtype)
    buffers = [param, exp_avg, exp_avg_sq]
    dense = [_channels_last(buffer) for buffer in buffers]  # a copy of a slice of the taps
    adam(_flat(dense[0]), _flat(grad), *map(_flat, dense[1:]), lr, powers, beta1, beta2, eps, low)
    for buffer, updated in zip(buffers, dense, strict=True):
        if updated is not buffer:
            buffer.copy_(updated)


def _convolve(x: Tensor, weight: Tensor, stride: int, padding: int, output_padding: list[int] | None = None) -> Tensor:
    """The product alone; transposed where there is an output padding."""
    window = ([stride] * 2, [padding] * 2, [1, 1])
    transposed = (output_padding is not None, output_padding or [0, 0], 1)
    out = torch.ops.aten.convolution(_channels_last(x), _channels_last(weight), None, *window, *transposed)
    return _channels_last(out)


def _finish(
    out: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    activation: int,
    slope: float,
    stat_groups: int,
    norm: NormGate,
) -> tuple[Tensor, Tensor, Tensor]:
    """Bias, activation or gate in place, and the statistics: one pass, or none."""
    channels = out.shape[1]
    if norm.gate_mean is not None and stat_groups:
        assert gate is not None
        return out, *dz_in_place(out, gate, norm, activation, slope)
    if bias is None and activation == 0 and norm.gate_mean is None:
        return out, *norm_stats(out, stat_groups)
    mean, var = gemm.reduce_splits(
        _flat(out).view(1, -1, channels),
        out,
        bias=None if bias is None else bias.contiguous(),
        gate=None if gate is None else _channels_last(gate),
        slope=slope,
        activation=activation,
        stat_groups=stat_groups,
        norm=norm,
    )
    return out, mean, var


def _concatenate(x: Tensor, x2: Tensor | None) -> Tensor:
    return x if x2 is None else torch.cat([x, x2], dim=1)


def _channels_last(t: Tensor) -> Tensor:
    """Also where there is one channel or one pixel, of which PyTorch takes other strides for channels_last, too."""
    if t.permute(0, 2, 3, 1).is_contiguous():
        return t
    return t.contiguous(memory_format=torch.channels_last)


def _flat(t: Tensor) -> Tensor:
    """The elements as they lie in memory."""
    return t.permute(0, 2, 3, 1).reshape(-1)
