"""adam: one Adam step over a flat buffer, in place, that also writes the low-precision weights."""

import torch
from torch import Tensor

from fastp2p.errors import InputError
from fastp2p.ops import library
from fastp2p.ops.library import check_devices, describe
from fastp2p.ops.operands import Work


def adam_ref(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    powers: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    low_precision: Tensor | None = None,
    unscale: Tensor | None = None,
) -> None:
    """The specification of `adam`."""
    grad = grad.to(param.dtype)
    if unscale is not None:  # not `if unscale == 0`: that would wait for the device, and CUDA graphs cannot hold it
        buffers = [t for t in (param, exp_avg, exp_avg_sq, low_precision) if t is not None]
        param, exp_avg, exp_avg_sq, *low = after = [t.clone() for t in buffers]
        adam_ref(param, grad * unscale, exp_avg, exp_avg_sq, lr, powers, beta1, beta2, eps, *low)
        for buffer, new in zip(buffers, after, strict=True):
            buffer.copy_(torch.where(unscale == 0, buffer, new))
        return
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    correction1, correction2 = (1 - powers).to(param.dtype)  # in float64: 1 - 0.999 loses three digits in float32
    denominator = exp_avg_sq.sqrt() / correction2.sqrt() + eps
    param.sub_(exp_avg / denominator * (lr / correction1))
    if low_precision is not None:
        low_precision.copy_(param)


def _fake(*args: object) -> None:
    return None


library.define(
    "adam",
    "(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor lr, Tensor powers, "
    "float beta1, float beta2, float eps, Tensor(d!)? low_precision=None, Tensor? unscale=None) -> ()",
    reference=adam_ref,
    fake=_fake,
    work=Work(adam=("param", "grad", "exp_avg", "exp_avg_sq", "low_precision"), overwritten=("low_precision",)),
)
library.serve_by_triton("adam")


def adam(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: Tensor,
    powers: Tensor,
    beta1: float = 0.5,
    beta2: float = 0.999,
    eps: float = 1e-8,
    low_precision: Tensor | None = None,
    unscale: Tensor | None = None,
) -> None:
    """One step of Adam (Kingma and Ba 2015, algorithm 1) in place over flat buffers of M elements.

        g = unscale * grad
        m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g²
        param <- param - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    The same update as torch.optim.Adam without weight decay. Everything that changes from step to step lives in device
    memory, so the call can be captured in a CUDA graph: multiply `powers` by (beta1, beta2) before each step.

    Args:
        param, exp_avg, exp_avg_sq: (M,) float32, contiguous; updated.
        grad: (M,) float32, bfloat16 or float16, contiguous; the arithmetic is float32.
        lr: () float32, the learning rate.
        powers: (2,) float64, (beta1^t, beta2^t) of this step t = 1, 2, ...
        beta1, beta2, eps: the defaults are pix2pix's.
        low_precision: (M,) bfloat16 or float16, contiguous; gets the updated weights, rounded.
        unscale: () float32, by which each gradient is multiplied first: one over the factor of a scaled loss. Where it
            holds 0 nothing is changed, whatever the gradients hold: how dynamic loss scaling leaves out a step of
            which a gradient overflowed, without waiting for the device.

    Raises:
        InputError: on a wrong dtype, shape, stride or device.
    """
    scalars = {"lr": lr, "powers": powers} | ({} if unscale is None else {"unscale": unscale})
    for name, scalar in scalars.items():
        if not isinstance(scalar, Tensor):
            raise InputError(f"adam: got {name} {scalar!r}, expected a tensor: it lives on param's device")
    m = param.numel()
    buffers = {"param": param, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, tensor in buffers.items():
        dtypes = (torch.float32, torch.bfloat16, torch.float16) if name == "grad" else (torch.float32,)
        if tensor.dtype not in dtypes or tensor.shape != (m,) or not tensor.is_contiguous():
            expected = "float32, bfloat16 or float16" if name == "grad" else "float32"
            raise InputError(f"adam: got {name} {describe(tensor)}, expected contiguous ({m},) {expected}")
    if low_precision is not None:
        buffers["low_precision"] = low_precision
        half = low_precision.dtype in (torch.bfloat16, torch.float16)
        if not half or low_precision.shape != (m,) or not low_precision.is_contiguous():
            raise InputError(
                f"adam: got low_precision {describe(low_precision)}, expected contiguous ({m},) bfloat16 or float16"
            )
    if lr.shape != () or lr.dtype != torch.float32 or powers.shape != (2,) or powers.dtype != torch.float64:
        raise InputError(f"adam: got lr {describe(lr)}, powers {describe(powers)}; expected () float32, (2,) float64")
    if unscale is not None and (unscale.shape != () or unscale.dtype != torch.float32):
        raise InputError(f"adam: got unscale {describe(unscale)}, expected () float32")
    check_devices("adam", *buffers.values(), *scalars.values())
    torch.ops.fastp2p.adam(param, grad, exp_avg, exp_avg_sq, lr, powers, beta1, beta2, eps, low_precision, unscale)
