"""conv: convolution with its epilogue, and the data gradient of a transposed convolution."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastp2p.conv_shape import conv_size
from fastp2p.errors import InputError
from fastp2p.norm_gate import NormGate
from fastp2p.ops import library
from fastp2p.ops.activation import Activation, activate, activation_index, derivative
from fastp2p.ops.library import check_devices, describe
from fastp2p.ops.norm_gate import SCHEMA, dz_and_sums, fake_sums
from fastp2p.ops.norm_stats import check_stat_groups, fake_stats, norm_stats_ref
from fastp2p.ops.operands import Work


def conv_ref(
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
    """The specification of `conv`."""
    out = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, padding)  # bias rounded as well
    gated = NormGate(*norm)
    if gated.gate_mean is not None:
        assert gate is not None
        return dz_and_sums(out, gate, gated, activation, slope, stat_groups)
    out = activate(out, activation, slope) if gate is None else out * derivative(gate, activation, slope)
    out = out.contiguous(memory_format=torch.channels_last)
    return out, *norm_stats_ref(out, stat_groups)


def _fake(
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
    height, width = (conv_size(x.shape[d], weight.shape[d], stride, padding) for d in (2, 3))
    shape = (x.shape[0], weight.shape[0], height, width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if NormGate(*norm).gate_mean is not None:
        assert gate is not None
        return out, *fake_sums(gate, stat_groups)
    return out, *fake_stats(out, stat_groups)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, gate, ctx.stride, ctx.padding, ctx.activation, ctx.slope, *_ = inputs
    out, mean, var = output
    ctx.gated, ctx.bias_dtype = gate is not None, None if bias is None else bias.dtype
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, weight, out if ctx.activation else None)


@library.first_derivative_only
def _backward(ctx: Any, dout: Tensor, _mean: Tensor, _var: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.gated:
        raise InputError("conv: a gate is for gradients; there is no second derivative")
    x, weight, out = ctx.saved_tensors
    dz = dout if out is None else dout * derivative(out, ctx.activation, ctx.slope)
    dx = dweight = dbias = None
    if ctx.needs_input_grad[0]:
        height, width = x.shape[2:]
        args = (None, None, ctx.stride, ctx.padding, height, width, 0, 0.0, 0)
        dx, _, _ = torch.ops.fastp2p.conv_transpose(dz, None, weight, *args)
    if ctx.needs_input_grad[1]:
        kernel_size = weight.shape[2:]
        dweight = torch.ops.fastp2p.conv_wgrad(dz, None, x, *kernel_size, ctx.stride, ctx.padding, weight.dtype)
    if ctx.needs_input_grad[2]:
        dbias = dz.sum((0, 2, 3), dtype=ctx.bias_dtype)
    return dx, dweight, dbias, *[None] * (6 + len(NormGate._fields))


library.define(
    "conv",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? gate, int stride, int padding, int activation, float slope, "
    "SymInt stat_groups, "
    f"{SCHEMA}) -> (Tensor, Tensor, Tensor)",
    reference=conv_ref,
    fake=_fake,
    work=Work(
        maps=("x", "gate", "addend"),
        weights=("weight",),
        results=("maps", "vectors", "vectors"),
        flop=lambda args, results: 2 * results[0].pixels * args["weight"].elements,
    ),
    backward=_backward,
    setup_context=_setup_context,
)
library.serve_by_triton("conv")


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 2,
    padding: int = 1,
    activation: Activation = "none",
    slope: float = 0.2,
    gate: Tensor | None = None,
    stat_groups: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution, bias and activation, and the statistics that a normalisation after it needs, in one operator.

        out[n, o, i] = act(bias[o] + sum over c, k of x[n, c, i * stride - padding + k] * weight[o, c, k])

    where i, k are (row, column). It is also the data gradient of a transposed convolution, on that one's own weight.
    Differentiable once in x, weight and bias. Under autocast it computes in autocast's dtype. On a GPU float32 is
    multiplied as PyTorch's convolutions do it, by default as TF32 (torch.backends.cudnn.allow_tf32).

    Args:
        x: (N, C, H, W), floating; channels_last is read as it is, also a slice of channels of a larger tensor; any
            other layout is copied first.
        weight: (O, C, KH, KW), x's dtype, best channels_last.
        bias: (O,), floating; added before the one rounding to x's dtype.
        stride, padding: of both dimensions, in pixels.
        activation, slope: "none", "relu", "leaky_relu" of that slope, or "tanh".
        gate: (N, O, H', W'), the activated values whose gradient this computes: the result is multiplied by the
            activation's derivative there instead of being activated. Not differentiable.
        stat_groups: as in `norm_stats`; 0 for none.

    Returns:
        out: (N, O, H', W') of x's dtype, channels_last, H' = (H + 2 padding - KH) // stride + 1.
        mean, var: (stat_groups, O) float32 (float64 for float64), of out as stored; constants to autograd.

    Raises:
        InputError: on shapes or dtypes that do not fit.
    """
    x, weight, gate = library.autocast(x, weight, gate)
    index = activation_index("conv", activation, slope)
    fits = x.ndim == 4 and weight.ndim == 4 and x.shape[1] == weight.shape[1]
    if not fits or x.dtype != weight.dtype or not x.is_floating_point():
        got = f"x {describe(x)}, weight {describe(weight)}"
        raise InputError(f"conv: got {got}; expected (N, C, H, W) and (O, C, KH, KW) of one floating dtype")
    check_window("conv", stride, padding)
    height, width = (conv_size(x.shape[d], weight.shape[d], stride, padding) for d in (2, 3))
    shape = (x.shape[0], weight.shape[0], height, width)
    if 0 in x.shape or min(shape) <= 0:
        raise InputError(f"conv: got x {tuple(x.shape)}, weight {tuple(weight.shape)}: nothing is left of the image")
    check_extras("conv", x, shape, bias, gate)
    check_devices("conv", x, weight, bias, gate)
    check_stat_groups("conv", stat_groups, x.shape[0])
    out, mean, var = torch.ops.fastp2p.conv(x, weight, bias, gate, stride, padding, index, slope, stat_groups)
    return out, mean, var


def check_window(operator: str, stride: int, padding: int) -> None:
    """Raise InputError unless stride and padding are possible."""
    if stride < 1 or padding < 0:
        raise InputError(f"{operator}: got stride {stride}, padding {padding}; expected at least 1 and 0")


def check_extras(operator: str, x: Tensor, shape: tuple[int, ...], bias: Tensor | None, gate: Tensor | None) -> None:
    """Raise InputError unless bias and gate fit an output of this shape."""
    if bias is not None and (bias.shape != shape[1:2] or not bias.is_floating_point()):
        raise InputError(f"{operator}: got bias {describe(bias)}, expected ({shape[1]},) floating")
    if gate is not None and (gate.shape != shape or gate.dtype != x.dtype):
        raise InputError(f"{operator}: got gate {describe(gate)}, expected {shape} {x.dtype}")
