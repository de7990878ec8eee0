"""norm_act: normalisation, affine, activation and dropout in one pass, for up to two readers."""

from typing import Any

import torch
from torch import Tensor

from fastp2p.errors import InputError
from fastp2p.ops import library
from fastp2p.ops.activation import Activation, activate, activation_index, derivative
from fastp2p.ops.library import check_devices, describe
from fastp2p.ops.operands import Work
from fastp2p.ops.philox import keep_mask


def norm_act_ref(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    eps: float,
    activation: int,
    slope: float,
    second: int,
    dropout: float,
    layer: int,
    fixed_stats: bool,
) -> tuple[Tensor, Tensor]:
    """The specification of `norm_act`; without a second activation the second result has no elements."""
    xhat, _ = _normalise(x, mean, var, eps)
    z = _affine(xhat, weight, bias)
    keep = _dropout_factor(x, rng, layer, dropout)
    y = _like(x, activate(z, activation, slope) * keep)
    return y, x.new_empty(0) if second < 0 else _like(x, activate(z, second, slope) * keep)


def norm_act_backward_ref(
    dy: Tensor,
    dy2: Tensor | None,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    eps: float,
    activation: int,
    slope: float,
    second: int,
    dropout: float,
    layer: int,
    fixed_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx of x's dtype, and dweight, dbias (C,) as wide as the statistics; dy2 None counts as 0."""
    xhat, rstd = _normalise(x, mean, var, eps)
    z = _affine(xhat, weight, bias)
    dz = dy * derivative(activate(z, activation, slope), activation, slope)
    if dy2 is not None:
        assert second >= 0, "a gradient of a second result that there is not"
        dz = dz + dy2 * derivative(activate(z, second, slope), second, slope)
    dz = dz * _dropout_factor(x, rng, layer, dropout)

    dxhat = dz if weight is None else dz * weight[:, None, None]
    if not fixed_stats:  # the way through mean and variance, within each group
        grouped_dxhat, grouped_xhat = (t.unflatten(0, (len(mean), -1)) for t in (dxhat, xhat))
        projection = (grouped_dxhat * grouped_xhat).mean((1, 3, 4), keepdim=True)
        dxhat = grouped_dxhat - grouped_dxhat.mean((1, 3, 4), keepdim=True) - grouped_xhat * projection
        dxhat = dxhat.flatten(0, 1)
    return _like(x, dxhat * rstd), (dz * xhat).sum((0, 2, 3)), dz.sum((0, 2, 3))


def _normalise(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean) / sqrt(var + eps) as wide as the statistics, and 1 / sqrt(var + eps) beside it."""
    images = len(x) // len(mean)  # a group's
    mean, rstd = (t.repeat_interleave(images, 0)[:, :, None, None] for t in (mean, 1 / (var + eps).sqrt()))
    return (x.to(mean.dtype) - mean) * rstd, rstd


def _affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    z = xhat if weight is None else xhat * weight[:, None, None]
    return z if bias is None else z + bias[:, None, None]


def _dropout_factor(x: Tensor, rng: Tensor | None, layer: int, dropout: float) -> Tensor | float:
    if rng is None or dropout == 0:
        return 1.0
    wide = torch.promote_types(x.dtype, torch.float32)
    return keep_mask(x, rng, layer, dropout).to(wide) / (1 - dropout)


def _like(x: Tensor, wide: Tensor) -> Tensor:
    return wide.to(x.dtype).contiguous(memory_format=torch.channels_last)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake(x: Tensor, mean: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    second = args[7]
    return _empty_like(x), x.new_empty(0) if second < 0 else _empty_like(x)


def _fake_backward(dy: Tensor, dy2: Tensor | None, x: Tensor, mean: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _empty_like(x), mean.new_empty(mean.shape[1]), mean.new_empty(mean.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, mean, var, weight, bias, rng, *ctx.settings = inputs
    ctx.has_second = ctx.settings[3] >= 0
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, var, weight, bias, rng)


@library.first_derivative_only
def _backward(ctx: Any, dy: Tensor | None, dy2: Tensor | None) -> tuple[Tensor | None, ...]:
    x, mean, var, weight, bias, rng = ctx.saved_tensors
    dy2 = dy2 if ctx.has_second else None
    dy = torch.zeros_like(x) if dy is None else dy
    saved = (x, mean, var, weight, bias, rng)
    dx, dweight, dbias = torch.ops.fastp2p.norm_act_backward(dy, dy2, *saved, *ctx.settings)
    dweight = None if weight is None else dweight.to(weight.dtype)
    dbias = None if bias is None else dbias.to(bias.dtype)
    return dx, None, None, dweight, dbias, *[None] * 8


SETTINGS = "float eps, int activation, float slope, int second, float dropout, int layer"
_SETTINGS = f"{SETTINGS}, bool fixed_stats"
_INPUTS = "Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? rng"
library.define(
    "norm_act",
    f"({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor)",
    reference=norm_act_ref,
    fake=_fake,
    work=Work(maps=("x",), results=("maps", "maps")),
    backward=_backward,
    setup_context=_setup_context,
)
library.define(
    "norm_act_backward",
    f"(Tensor dy, Tensor? dy2, {_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    reference=norm_act_backward_ref,
    fake=_fake_backward,
    work=Work(maps=("dy", "dy2", "x"), results=("maps", "vectors", "vectors")),
)
library.serve_by_triton("norm_act")
library.serve_by_triton("norm_act_backward")


def norm_act(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: Activation = "none",
    slope: float = 0.2,
    second: Activation | None = None,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    layer: int = 0,
    fixed_stats: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """drop(act((x - mean) / sqrt(var + eps) * weight + bias)), and the same with a second activation, from one reading.

    Differentiable once in x, weight and bias. Unless fixed_stats, mean and var must be `norm_stats` of x: the gradient
    includes the way through them (Ioffe and Szegedy 2015, section 3).

    Args:
        x: (N, C, H, W), floating. Arithmetic is in float32 (float64 for float64).
        mean, var: (stat_groups, C) float32 (float64 for float64); row g is for the g-th of as many groups of images.
        weight, bias: (C,), of the statistics' dtype; 1 and 0 when left out.
        eps: added to var.
        activation, slope: "none", "relu", "leaky_relu" of that slope, or "tanh".
        second: an activation of a second result, which another layer reads; same slope, same dropout.
        dropout: the probability with which an element is dropped, 0 to below 1; the others are scaled by
            1 / (1 - dropout).
        rng: (2,) int64 on x's device, (seed, step) of the dropout. The mask is a pure function of them, of layer and of
            the element's position (Philox4x32-10), so the backward pass makes it anew.
        layer: 0 to 2^32 - 1; gives layers masks of their own under one rng.
        fixed_stats: mean and var are constants, as in evaluation.

    Returns:
        y: like x, channels_last.
        y2: likewise under the second activation; None without one.

    Raises:
        InputError: on shapes or dtypes that do not fit, or a dropout without rng.
    """
    settings = check_settings("norm_act", x, mean, var, weight, bias, activation, slope, second, dropout, rng, layer)
    masked = rng if dropout else None
    y, y2 = torch.ops.fastp2p.norm_act(x, mean, var, weight, bias, masked, eps, *settings, fixed_stats)
    return y, None if second is None else y2


def check_settings(
    operator: str,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: Activation,
    slope: float,
    second: Activation | None,
    dropout: float,
    rng: Tensor | None,
    layer: int,
) -> tuple[int, float, int, float, int]:
    """(activation, slope, second, dropout, layer) as the operators take them. Raises InputError where nothing fits."""
    check_norm_act(operator, x, mean, var, weight, bias)
    index = activation_index(operator, activation, slope)
    second_index = -1 if second is None else activation_index(operator, second, slope)
    if not 0 <= dropout < 1 or not 0 <= layer < 2**32:
        raise InputError(
            f"{operator}: got dropout {dropout}, layer {layer}; expected 0 <= dropout < 1, 0 <= layer < 2^32"
        )
    if dropout and (rng is None or rng.shape != (2,) or rng.dtype != torch.int64 or rng.device != x.device):
        got = "none" if rng is None else f"{describe(rng)} on {rng.device}"
        raise InputError(f"{operator}: got rng {got}, expected (seed, step) as (2,) int64 on {x.device} for dropout")
    return index, slope, second_index, dropout, layer


def check_norm_act(
    operator: str, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
) -> None:
    """Raise InputError unless the statistics and parameters fit x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    fits = x.is_floating_point() and x.ndim == 4 and x.numel() > 0
    fits = fits and mean.ndim == 2 and mean.shape == var.shape == (mean.shape[0], x.shape[1])
    fits = fits and mean.shape[0] > 0 and x.shape[0] % mean.shape[0] == 0
    tensors = [tensor for tensor in (mean, var, weight, bias) if tensor is not None]
    fits = fits and all(tensor.dtype == wide for tensor in tensors)
    if not fits or any(tensor.shape != x.shape[1:2] for tensor in tensors[2:]):
        got = ", ".join(map(describe, (x, *tensors)))
        raise InputError(
            f"{operator}: got {got}; expected x (N, C, H, W), mean and var (G, C) with G a divisor of N, weight and "
            f"bias (C,), all but x {str(wide).removeprefix('torch.')}"
        )
    check_devices(operator, x, *tensors)
