"""conv_wgrad_adam: the weight gradient and the Adam step that uses it, in one; the gradient is never written."""

import torch
from torch import Tensor

from fastp2p.errors import InputError
from fastp2p.ops import library
from fastp2p.ops.adam import adam_ref
from fastp2p.ops.conv_wgrad import check_outer_inner, conv_wgrad_ref
from fastp2p.ops.library import check_devices, describe
from fastp2p.ops.operands import Work


def conv_wgrad_adam_ref(
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
    """The specification of `conv_wgrad_adam`."""
    grad = conv_wgrad_ref(outer, outer2, inner, param.shape[2], param.shape[3], stride, padding, param.dtype)
    adam_ref(param, grad, exp_avg, exp_avg_sq, lr, powers, beta1, beta2, eps, low_precision)


def _fake(*args: object) -> None:
    return None


library.define(
    "conv_wgrad_adam",
    "(Tensor outer, Tensor? outer2, Tensor inner, Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
    "Tensor lr, Tensor powers, float beta1, float beta2, float eps, int stride, int padding, "
    "Tensor(d!)? low_precision=None) -> ()",
    reference=conv_wgrad_adam_ref,
    fake=_fake,
    work=Work(
        maps=("outer", "outer2", "inner"),
        adam=("param", "exp_avg", "exp_avg_sq", "low_precision"),
        overwritten=("low_precision",),
        flop=lambda args, results: 2 * args["outer"].pixels * args["param"].elements,
    ),
)
library.serve_by_triton("conv_wgrad_adam")


def conv_wgrad_adam(
    outer: Tensor,
    inner: Tensor,
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: Tensor,
    powers: Tensor,
    beta1: float = 0.5,
    beta2: float = 0.999,
    eps: float = 1e-8,
    stride: int = 2,
    padding: int = 1,
    outer2: Tensor | None = None,
    low_precision: Tensor | None = None,
) -> None:
    """`adam` of a convolution's weight, in place, with the gradient that `conv_wgrad` would give.

    For layers of few pixels: with up to a few hundred the gradient's outer product is cheaper to compute than to write
    and read back. Whatever still needs the old weight must have read it before.

    Args:
        outer, outer2, inner, stride, padding: as for `conv_wgrad`.
        param, exp_avg, exp_avg_sq: (O + O2, C, KH, KW) float32, channels_last, or the same slice of the taps of
            three that are, weight[:, :, a:b, c:d]; updated. On maps so small that the outer taps meet padding alone,
            the slice of the others, with less padding, is the whole step: without gradients and moments none moves.
        lr, powers, beta1, beta2, eps: as for `adam`.
        low_precision: param's shape, bfloat16 or float16, channels_last, no slice; gets the new param, rounded.

    Raises:
        InputError: on shapes, dtypes, layouts or devices that do not fit; nothing is changed then.
    """
    if param.ndim != 4:
        raise InputError(f"conv_wgrad_adam: got param {describe(param)}, expected (O + O2, C, KH, KW)")
    check_outer_inner("conv_wgrad_adam", outer, outer2, inner, (param.shape[-2], param.shape[-1]), stride, padding)
    rows = outer.shape[1] + (0 if outer2 is None else outer2.shape[1])
    buffers = [param, exp_avg, exp_avg_sq] + ([] if low_precision is None else [low_precision])
    shape = (rows, inner.shape[1], *param.shape[2:])
    fits = all(t.shape == shape for t in buffers) and all(t.dtype == torch.float32 for t in buffers[:3])
    fits = fits and all(_strides(t) == _strides(param) is not None for t in buffers[:3])
    fits = fits and all(t.is_contiguous(memory_format=torch.channels_last) for t in buffers[3:])
    if not fits or any(t.dtype not in (torch.bfloat16, torch.float16) for t in buffers[3:]):
        got = ", ".join(map(describe, buffers))
        raise InputError(
            f"conv_wgrad_adam: got param, exp_avg, exp_avg_sq, low_precision {got}; expected {shape} channels_last, "
            "the first three float32 (or the same slice of their taps), low_precision bfloat16 or float16"
        )
    if lr.shape != () or lr.dtype != torch.float32 or powers.shape != (2,) or powers.dtype != torch.float64:
        got = f"lr {describe(lr)}, powers {describe(powers)}"
        raise InputError(f"conv_wgrad_adam: got {got}; expected () float32, (2,) float64")
    check_devices("conv_wgrad_adam", outer, *buffers, lr, powers)
    torch.ops.fastp2p.conv_wgrad_adam(
        outer, outer2, inner, param, exp_avg, exp_avg_sq, lr, powers, beta1, beta2, eps, stride, padding, low_precision
    )


def _strides(weight: Tensor) -> tuple[int, int] | None:
    """Strides of rows and of kernel rows, dense (KW, C) runs in order; None where memory does not lie so."""
    (rows, channels, kh, kw), (row, channel, kernel_row, tap) = weight.shape, weight.stride()
    run = kw * channels
    kernel_row = kernel_row if kh > 1 else run  # a stride over one element means nothing
    row = row if rows > 1 else kh * kernel_row
    dense = (channels == 1 or channel == 1) and (kw == 1 or tap == channels)
    return (row, kernel_row) if dense and kernel_row >= run and row >= (kh - 1) * kernel_row + run else None
