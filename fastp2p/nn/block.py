"""Convolution, normalisation, activation and dropout as one block; what the layers and fused models both compute."""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastp2p import ops
from fastp2p.errors import InputError
from fastp2p.ops import _library
from fastp2p.ops._activation import Activation

Convolution = nn.Conv2d | nn.ConvTranspose2d
Normalisation = nn.BatchNorm2d | nn.InstanceNorm2d


def run_block(
    x: Tensor,
    skip: Tensor | None,
    conv: Convolution,
    norm: Normalisation | None,
    cache: "FoldCache",
    *,
    activation: Activation = "none",
    slope: float = 0.2,
    dropout: float = 0.0,
) -> Tensor:
    """drop(act(norm(conv(x)))), or of cat([skip, x], 1), which is not written.

    conv and norm own the parameters, settings and running statistics and say by their `training` and
    `track_running_stats` what the norm does, as they would when called one by one; they are not called.

        norm             computed as
        none             one operator, activation in its epilogue
        running stats    likewise, norm folded into weight and bias
        batch, instance  convolution with statistics in its epilogue, then norm, activation and dropout in one pass

    In the first two cases dropout is torch's own; in the third its mask comes from two numbers drawn from torch's
    generator of x's device. Either way torch.manual_seed repeats it.

    Args:
        x, skip: (N, C, H, W) and (N, C2, H, W), one floating dtype; skip for transposed convolutions alone.
        cache: what keeps the folded weight between calls.
        dropout: the probability, 0 when it is off.

    Returns:
        (N, O, H', W') of the convolution's dtype, channels_last.

    Raises:
        InputError: on shapes or dtypes that do not fit, or a norm that would see one value per channel.
    """
    if norm is None or _uses_running_stats(norm):
        weight, bias = (conv.weight, conv.bias) if norm is None else cache.folded(conv, norm)
        out, _, _ = _convolve(x, skip, conv, weight, bias, activation, slope, stat_groups=0)
        return F.dropout(out, dropout) if dropout else out

    cache.clear()
    stat_groups = len(x) if isinstance(norm, nn.InstanceNorm2d) else 1
    out, mean, var = _convolve(x, skip, conv, conv.weight, conv.bias, "none", slope, stat_groups)
    n_values = out.shape[0] // stat_groups * out.shape[2] * out.shape[3]
    if n_values == 1:
        raise InputError(
            f"{type(norm).__name__}: got one value per channel, {tuple(out.shape)}; expected more to normalise, by "
            "larger images or, for batch norm, a larger batch"
        )
    if isinstance(norm, nn.BatchNorm2d) and norm.training and norm.track_running_stats:
        _track(norm, mean, var, n_values)
    gamma, beta = (None if t is None else t.to(mean.dtype) for t in (norm.weight, norm.bias))
    rng = torch.randint(0, 2**63 - 1, (2,), device=x.device) if dropout else None
    settings: dict[str, Any] = {"eps": norm.eps, "activation": activation, "slope": slope, "dropout": dropout}
    y, _ = ops.norm_act(out, mean, var, gamma, beta, rng=rng, **settings)
    return y


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
        return ops.down(x, weight, bias, stride=stride, padding=padding, **settings)
    first, second = (x, None) if skip is None else (skip, x)
    settings["output_padding"] = int(conv.output_padding[0])
    return ops.up(first, weight, bias, x2=second, stride=stride, padding=padding, **settings)


@torch.no_grad()
def _track(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, n_values: int) -> None:
    """Update the running statistics, as nn.BatchNorm2d does."""
    if norm.momentum is None:
        raise InputError("BatchNorm2d: got momentum None, a cumulative average; expected a number")
    if norm.running_mean is None or norm.running_var is None:
        return
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    # The buffers themselves, unless the model is in half precision.
    wide_mean, wide_var = (t.to(mean.dtype) for t in (norm.running_mean, norm.running_var))
    ops.running_stats(wide_mean, wide_var, mean, var, n_values=n_values, momentum=norm.momentum)
    if wide_mean is not norm.running_mean:
        norm.running_mean.copy_(wide_mean)
        norm.running_var.copy_(wide_var)


class FoldCache:
    """A convolution's weight and bias with a norm's running statistics folded in, kept while nothing changes.

    Kept only when no gradient is wanted; otherwise, while torch.compile or torch.jit traces or a CUDA graph is
    captured, and for tensors of inference mode, which have no version, the folding is done at every call and is part
    of it.

    What was folded is recognised by address, version, dtype, layout and device of every source, so in-place optimizer
    steps, load_state_dict and .to() are seen; the sources are kept alive, so an address is never given out anew. An
    edit through `.data`, or by a kernel of one's own, bumps no version: it is seen after the next train(), eval() or
    training step. A copy or a pickle starts empty.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._kept: tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def clear(self) -> None:
        if not torch.compiler.is_compiling() and self._key is not None:
            self._key = self._kept = None

    def folded(self, conv: Convolution, norm: Normalisation) -> tuple[Tensor, Tensor]:
        """(weight, bias) with norm's running statistics folded in: weight in the dtype of computing, bias wide."""
        dtype = _compute_dtype(conv.weight)
        sources = [t for t in (conv.weight, conv.bias, norm.weight, norm.bias) if t is not None]
        wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in sources)
        if wants_grad or _is_recording(conv.weight):
            return fold(conv, norm, dtype)
        sources += [t for t in (norm.running_mean, norm.running_var, norm.num_batches_tracked) if t is not None]
        try:
            key = (norm.eps, dtype, *(_fingerprint(t) for t in sources))
        except RuntimeError:  # no version (inference mode) or no address (torch.func)
            return fold(conv, norm, dtype)
        if self._kept is None or key != self._key:
            with torch.inference_mode(False), torch.no_grad():  # so that autograd may save it later
                self._key, self._kept = key, (tuple(t.detach() for t in sources), fold(conv, norm, dtype))
        return self._kept[1]


def fold(conv: Convolution, norm: Normalisation, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """norm(conv(x)) with running statistics as one convolution: (weight, bias), differentiable in all parameters.

        weight' = weight * s, bias' = (bias - mean) * s + beta, with s = gamma / sqrt(var + eps)

    Arithmetic in float32 (float64 for float64); weight' is of the dtype asked for, bias' stays wide.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise InputError(f"{type(norm).__name__}: got no running statistics to fold")
    wide = torch.promote_types(conv.weight.dtype, torch.float32)
    scale = (norm.running_var.to(wide) + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean.to(wide) if conv.bias is None else conv.bias.to(wide) - norm.running_mean
    bias = shift * scale if norm.bias is None else shift * scale + norm.bias
    per_filter = (-1, 1, 1, 1) if isinstance(conv, nn.Conv2d) else (1, -1, 1, 1)
    return (conv.weight.to(wide) * scale.view(per_filter)).to(dtype), bias


def _compute_dtype(weight: Tensor) -> torch.dtype:
    autocast = _library.autocast_dtype(weight.device.type)
    return weight.dtype if autocast is None or weight.dtype == torch.float64 else autocast


def _is_recording(weight: Tensor) -> bool:
    """What is computed now will be replayed, perhaps with other weights: the folding must be part of it."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    return tracing or (weight.is_cuda and torch.cuda.is_current_stream_capturing())


def _fingerprint(t: Tensor) -> tuple[Any, ...]:
    return t.data_ptr(), t._version, t.dtype, t.device, t.shape, t.stride()


class FoldingModule(nn.Module):
    """A module with a FoldCache that train(), eval(), .to() and the like empty."""

    _cache: FoldCache

    def train(self, mode: bool = True) -> Self:
        self._cache.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._cache.clear()
        super()._apply(fn, recurse)
        return self
