"""conv_transpose: transposed convolution of one or two inputs, with its epilogue; a convolution's data gradient."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastp2p.conv_shape import conv_transpose_size
from fastp2p.errors import InputError
from fastp2p.norm_gate import NormGate
from fastp2p.ops import library
from fastp2p.ops.activation import Activation, activate, activation_index, derivative
from fastp2p.ops.conv import check_extras, check_window
from fastp2p.ops.library import check_devices, describe
from fastp2p.ops.norm_gate import SCHEMA, dz_and_sums, fake_sums
from fastp2p.ops.norm_stats import check_stat_groups, fake_stats, norm_stats_ref
from fastp2p.ops.operands import Work


def conv_transpose_ref(
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
    """The specification of `conv_transpose`."""
    both = x if x2 is None else torch.cat([x, x2], dim=1)
    smallest = [conv_transpose_size(both.shape[d], weight.shape[d], stride, padding) for d in (2, 3)]
    output_padding = (height - smallest[0], width - smallest[1])
    bias = None if bias is None else bias.to(x.dtype)
    out = F.conv_transpose2d(both, weight, bias, stride, padding, output_padding)
    gated = NormGate(*norm)
    if gated.gate_mean is not None:
        assert gate is not None
        return dz_and_sums(out, gate, gated, activation, slope, stat_groups)
    out = activate(out, activation, slope) if gate is None else out * derivative(gate, activation, slope)
    out = out.contiguous(memory_format=torch.channels_last)
    return out, *norm_stats_ref(out, stat_groups)


def _fake(
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
    shape = (x.shape[0], weight.shape[1], height, width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if NormGate(*norm).gate_mean is not None:
        assert gate is not None
        return out, *fake_sums(gate, stat_groups)
    return out, *fake_stats(out, stat_groups)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, x2, weight, bias, gate, ctx.stride, ctx.padding, _, _, ctx.activation, ctx.slope, *_ = inputs
    out, mean, var = output
    ctx.gated, ctx.bias_dtype = gate is not None, None if bias is None else bias.dtype
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, x2, weight, out if ctx.activation else None)


@library.first_derivative_only
def _backward(ctx: Any, dout: Tensor, _mean: Tensor, _var: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.gated:
        raise InputError("conv_transpose: a gate is for gradients; there is no second derivative")
    x, x2, weight, out = ctx.saved_tensors
    dz = dout if out is None else dout * derivative(out, ctx.activation, ctx.slope)
    dx = dx2 = dweight = dbias = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        args = (None, None, ctx.stride, ctx.padding, 0, 0.0, 0)
        parts = weight.split([x.shape[1], 0 if x2 is None else x2.shape[1]])  # rows of weight, none of them copied
        if ctx.needs_input_grad[0]:
            dx, _, _ = torch.ops.fastp2p.conv(dz, parts[0], *args)
        if ctx.needs_input_grad[1]:
            dx2, _, _ = torch.ops.fastp2p.conv(dz, parts[1], *args)
    if ctx.needs_input_grad[2]:
        kernel_size = weight.shape[2:]
        dweight = torch.ops.fastp2p.conv_wgrad(x, x2, dz, *kernel_size, ctx.stride, ctx.padding, weight.dtype)
    if ctx.needs_input_grad[3]:
        dbias = dz.sum((0, 2, 3), dtype=ctx.bias_dtype)
    return dx, dx2, dweight, dbias, *[None] * (8 + len(NormGate._fields))


library.define(
    "conv_transpose",
    "(Tensor x, Tensor? x2, Tensor weight, Tensor? bias, Tensor? gate, int stride, int padding, SymInt height, "
    "SymInt width, int activation, float slope, SymInt stat_groups, "
    f"{SCHEMA}) -> (Tensor, Tensor, Tensor)",
    reference=conv_transpose_ref,
    fake=_fake,
    work=Work(
        maps=("x", "x2", "gate", "addend"),
        weights=("weight",),
        results=("maps", "vectors", "vectors"),
        flop=lambda args, results: 2 * args["x"].pixels * args["weight"].elements,
    ),
    backward=_backward,
    setup_context=_setup_context,
)
library.serve_by_triton("conv_transpose")


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    x2: Tensor | None = None,
    stride: int = 2,
    padding: int = 1,
    output_padding: int = 0,
    activation: Activation = "none",
    slope: float = 0.2,
    gate: Tensor | None = None,
    stat_groups: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Transposed convolution of x, or of cat([x, x2], 1) that is never written, with bias, activation and statistics.

        out[n, o, q] = act(bias[o] + sum over c and all i * stride - padding + k = q of x[n, c, i] * weight[c, o, k])

    where i, k, q are (row, column). It is also the data gradient of a convolution, on that one's own weight.
    Differentiable once in x, x2, weight and bias. Under autocast it computes in autocast's dtype; float32 on a GPU as
    in `conv`.

    Args:
        x, x2: (N, C, H, W) and (N, C2, H, W), floating; channels_last is read as it is, also a slice of channels of a
            larger tensor; any other layout is copied first.
        weight: (C + C2, O, KH, KW), x's dtype, best channels_last.
        bias: (O,), floating; added before the one rounding to x's dtype.
        stride, padding: of both dimensions, in pixels.
        output_padding: pixels that the output has more, at the bottom and on the right; below stride.
        activation, slope, gate, stat_groups: as for `conv`.

    Returns:
        out: (N, O, H', W') of x's dtype, channels_last, H' = (H - 1) stride - 2 padding + KH + output_padding.
        mean, var: (stat_groups, O) float32 (float64 for float64), of out as stored; constants to autograd.

    Raises:
        InputError: on shapes or dtypes that do not fit.
    """
    x, x2, weight, gate = library.autocast(x, x2, weight, gate)
    index = activation_index("conv_transpose", activation, slope)
    inputs = [x] if x2 is None else [x, x2]
    fits = all(tensor.ndim == 4 for tensor in (*inputs, weight))
    fits = fits and weight.shape[0] == sum(tensor.shape[1] for tensor in inputs)
    fits = fits and (x2 is None or (x2.numel() > 0 and x.shape[0] == x2.shape[0] and x.shape[2:] == x2.shape[2:]))
    if not fits or len({t.dtype for t in (*inputs, weight)}) > 1 or not x.is_floating_point():
        got = ", ".join(map(describe, (*inputs, weight)))
        raise InputError(
            f"conv_transpose: got {got}; expected x (N, C, H, W), x2 (N, C2, H, W), weight (C + C2, O, KH, KW) of one "
            "floating dtype, C2 > 0"
        )
    check_window("conv_transpose", stride, padding)
    if not 0 <= output_padding < stride:
        raise InputError(
            f"conv_transpose: got output_padding {output_padding}, expected 0 to {stride - 1}, below the stride"
        )
    height, width = (conv_transpose_size(x.shape[d], weight.shape[d], stride, padding) + output_padding for d in (2, 3))
    shape = (x.shape[0], weight.shape[1], height, width)
    if 0 in x.shape or min(shape) <= 0:
        raise InputError(
            f"conv_transpose: got x {tuple(x.shape)}, weight {tuple(weight.shape)}: nothing is left of the image"
        )
    check_extras("conv_transpose", x, shape, bias, gate)
    check_devices("conv_transpose", x, x2, weight, bias, gate)
    check_stat_groups("conv_transpose", stat_groups, x.shape[0])
    out, mean, var = torch.ops.fastp2p.conv_transpose(
        x, x2, weight, bias, gate, stride, padding, height, width, index, slope, stat_groups
    )
    return out, mean, var
