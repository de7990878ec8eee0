"""norm_dx: the gradient of a normalisation's input, from dz and its sums."""

import torch
from torch import Tensor

from fastp2p.errors import InputError
from fastp2p.ops import library
from fastp2p.ops.library import check_devices, describe
from fastp2p.ops.norm_act import check_norm_act
from fastp2p.ops.operands import Work


def norm_dx_ref(
    dz: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, sum_dz: Tensor, sum_dz_xhat: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The specification of `norm_dx`."""
    images = len(x) // len(mean)  # a group's
    values = images * x.shape[2] * x.shape[3]

    def spread(t: Tensor) -> Tensor:
        return t.repeat_interleave(images, 0)[:, :, None, None]

    rstd = 1 / (var + eps).sqrt()
    xhat = (x.to(mean.dtype) - spread(mean)) * spread(rstd)
    scale = rstd if weight is None else rstd * weight
    dx = (dz.to(mean.dtype) - spread(sum_dz / values) - xhat * spread(sum_dz_xhat / values)) * spread(scale)
    dx = dx.to(x.dtype).contiguous(memory_format=torch.channels_last)
    return dx, sum_dz_xhat.sum(0), sum_dz.sum(0)


def _fake(
    dz: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, sum_dz: Tensor, sum_dz_xhat: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return dx, mean.new_empty(mean.shape[1]), mean.new_empty(mean.shape[1])


library.define(
    "norm_dx",
    "(Tensor dz, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor sum_dz, Tensor sum_dz_xhat, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    reference=norm_dx_ref,
    fake=_fake,
    work=Work(maps=("dz", "x"), results=("maps", "vectors", "vectors")),
)
library.serve_by_triton("norm_dx")


def norm_dx(
    dz: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    *,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of z = (x - mean) / sqrt(var + eps) * weight + bias, where mean and var are x's own.

        dx = weight / sqrt(var + eps) * (dz - mean(dz) - xhat * mean(dz * xhat))

    with the means over a group of images (Ioffe and Szegedy 2015, section 3). Not differentiable. Arithmetic is in
    float32 (float64 for float64).

    Args:
        dz: (N, C, H, W) of x's dtype; a slice of the channels of a larger channels_last tensor is read as it is.
        x: (N, C, H, W), floating.
        mean, var: (G, C) float32 (float64 for float64), `norm_stats` of x.
        weight: (C,) of the statistics' dtype; 1 when left out.
        sum_dz, sum_dz_xhat: (G, C) of the statistics' dtype, over the pixels of each group.
        eps: added to var.

    Returns:
        dx: like x, channels_last.
        dweight, dbias: (C,) of the statistics' dtype.

    Raises:
        InputError: on shapes or dtypes that do not fit.
    """
    check_norm_act("norm_dx", x, mean, var, weight, None)
    fits = dz.shape == x.shape and dz.dtype == x.dtype
    for sums in (sum_dz, sum_dz_xhat):
        fits = fits and sums.shape == mean.shape and sums.dtype == mean.dtype
    if not fits:
        got = ", ".join(map(describe, (dz, sum_dz, sum_dz_xhat)))
        raise InputError(f"norm_dx: got dz, sum_dz, sum_dz_xhat {got}; expected dz like x, sums like the statistics")
    check_devices("norm_dx", dz, x, sum_dz, sum_dz_xhat)
    dx, dweight, dbias = torch.ops.fastp2p.norm_dx(dz, x, mean, var, weight, sum_dz, sum_dz_xhat, eps)
    return dx, dweight, dbias
