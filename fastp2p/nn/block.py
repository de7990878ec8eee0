"""Convolution, normalisation, activation and dropout as one block; what the layers and fused models both compute."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastp2p import ops
from fastp2p.errors import InputError
from fastp2p.ops import library
from fastp2p.ops.activation import Activation

Convolution = nn.Conv2d | nn.ConvTranspose2d
Normalisation = nn.BatchNorm2d | nn.InstanceNorm2d


def run_block(
    x: Tensor,
    skip: Tensor | None,
    conv: Convolution,
    norm: Normalisation | None,
    *,
    activation: Activation = "none",
    slope: float = 0.2,
    dropout: float = 0.0,
) -> Tensor:
    """drop(act(norm(conv(x)))), or of cat([skip, x], 1), which is not written.

    conv and norm own the parameters, settings and running statistics. Their `training` and `track_running_stats` say
    what the norm does, as when they are called one by one; nobody calls them.

        norm             computed as
        none             one operator, activation in its epilogue
        running stats    likewise, norm folded into weight and bias, where that costs less than a pass over the result
        otherwise        convolution with statistics in its epilogue, then norm, activation and dropout in one pass

    In the first two cases dropout is torch's own; in the third its mask comes from two numbers drawn from torch's
    generator of x's device. Either way torch.manual_seed repeats it. Nothing is kept from call to call: whoever edits
    a weight, by whatever means, finds the edit in the next result.

    Args:
        x, skip: (N, C, H, W) and (N, C2, H, W), one floating dtype; skip for transposed convolutions alone.
        dropout: the probability, 0 when it is off.

    Returns:
        (N, O, H', W') of the convolution's dtype, channels_last.

    Raises:
        InputError: on shapes or dtypes that do not fit, or a norm that would see one value per channel.
    """
    fixed = norm is not None and _uses_running_stats(norm)
    if norm is None or (fixed and _folding_is_cheaper(x, conv)):
        weight, bias = (conv.weight, conv.bias) if norm is None else fold(conv, norm, _compute_dtype(conv.weight))
        out, _, _ = _convolve(x, skip, conv, weight, bias, activation, slope, stat_groups=0)
        return F.dropout(out, dropout) if dropout else out

    stat_groups = 0 if fixed else x.shape[0] if isinstance(norm, nn.InstanceNorm2d) else 1
    out, mean, var = _convolve(x, skip, conv, conv.weight, conv.bias, "none", slope, stat_groups)
    if fixed:
        mean, var = (t.to(mean.dtype)[None] for t in _running_stats(norm))
    else:
        _check_and_track(norm, out, mean, var)
    gamma, beta = (None if t is None else t.to(mean.dtype) for t in (norm.weight, norm.bias))
    rng = torch.randint(0, 2**63 - 1, (2,), device=x.device) if dropout else None
    settings: dict[str, Any] = {"eps": norm.eps, "activation": activation, "slope": slope, "dropout": dropout}
    y, _ = ops.norm_act(out, mean, var, gamma, beta, rng=rng, fixed_stats=fixed, **settings)
    return y


def _folding_is_cheaper(x: Tensor, conv: Convolution) -> bool:
    """Whether the weight has fewer elements than the result; a compiler has the sizes as symbols and always folds."""
    if torch.compiler.is_compiling():
        return True
    stride = conv.stride[0] ** (-2 if isinstance(conv, nn.Conv2d) else 2)
    return conv.weight.numel() < x.shape[0] * x.shape[2] * x.shape[3] * stride * conv.out_channels


def _uses_running_stats(norm: Normalisation) -> bool:
    return isinstance(norm, nn.BatchNorm2d) and not norm.training and norm.running_mean is not None


def _convolve(
    x: Tensor,
    skip: Tensor | None,
    conv: Convolution,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    slope: float,
    stat_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution's operator with conv's settings and this weight: (out, mean, var)."""
    stride, padding = int(conv.stride[0]), int(conv.padding[0])
    settings: dict[str, Any] = {"activation": activation, "slope": slope, "stat_groups": stat_groups}
    if isinstance(conv, nn.Conv2d):
        return ops.conv(x, weight, bias, stride=stride, padding=padding, **settings)
    first, second = (x, None) if skip is None else (skip, x)
    settings["output_padding"] = int(conv.output_padding[0])
    return ops.conv_transpose(first, weight, bias, x2=second, stride=stride, padding=padding, **settings)


def _check_and_track(norm: Normalisation, out: Tensor, mean: Tensor, var: Tensor) -> None:
    """Refuse statistics of one value; update the running ones where nn.BatchNorm2d does."""
    n_values = out.shape[2] * out.shape[3] * (out.shape[0] if isinstance(norm, nn.BatchNorm2d) else 1)
    if n_values == 1:
        raise InputError(
            f"{type(norm).__name__}: got one value per channel, {tuple(out.shape)}; expected more to normalise, by "
            "larger images or, for batch norm, a larger batch"
        )
    if isinstance(norm, nn.BatchNorm2d) and norm.training and norm.track_running_stats:
        _track(norm, mean, var, n_values)


@torch.no_grad()
def _track(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, n_values: int) -> None:
    """Update the running statistics, as nn.BatchNorm2d does."""
    if norm.momentum is None:
        raise InputError("BatchNorm2d: got momentum None, a cumulative average; expected a number")
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if norm.running_mean is None or norm.running_var is None:
        return
    buffers = norm.running_mean, norm.running_var
    if not torch.compiler.is_compiling():
        # F.batch_norm keeps them for its backward where it served another call. It changes no version, so neither here.
        buffers = norm.running_mean.data, norm.running_var.data
    wide_mean, wide_var = (t.to(mean.dtype) for t in buffers)  # the buffers themselves, unless in half precision
    ops.running_stats(wide_mean, wide_var, mean, var, n_values=n_values, momentum=norm.momentum)
    if wide_mean is not buffers[0]:
        buffers[0].copy_(wide_mean)
        buffers[1].copy_(wide_var)


def _running_stats(norm: Normalisation) -> tuple[Tensor, Tensor]:
    if norm.running_mean is None or norm.running_var is None:
        raise InputError(f"{type(norm).__name__}: got no running statistics to fold")
    return norm.running_mean, norm.running_var


def fold(conv: Convolution, norm: Normalisation, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """norm(conv(x)) with running statistics as one convolution: (weight, bias), differentiable in all parameters.

        weight' = weight * s, bias' = (bias - mean) * s + beta, with s = gamma / sqrt(var + eps)

    Arithmetic in float32 (float64 for float64); weight' is of the dtype asked for, bias' stays wide.
    """
    running_mean, running_var = _running_stats(norm)
    wide = torch.promote_types(conv.weight.dtype, torch.float32)
    scale = (running_var.to(wide) + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -running_mean.to(wide) if conv.bias is None else conv.bias.to(wide) - running_mean
    bias = shift * scale if norm.bias is None else shift * scale + norm.bias
    per_filter = (-1, 1, 1, 1) if isinstance(conv, nn.Conv2d) else (1, -1, 1, 1)
    return (conv.weight.to(wide) * scale.view(per_filter)).to(dtype), bias


def _compute_dtype(weight: Tensor) -> torch.dtype:
    autocast = library.autocast_dtype(weight.device.type)
    return weight.dtype if autocast is None or weight.dtype == torch.float64 else autocast
