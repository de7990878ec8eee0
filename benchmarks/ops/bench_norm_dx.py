"""norm_dx on the U-Net's first normalised maps, against eager PyTorch's gradient of batch norm."""

from functools import partial

import torch
import torch.nn.functional as F
from bench_norm_act import operands
from harness.parity import assert_norm_gradients
from layers import each_batch_size, each_dtype
from torch import Tensor

from fastp2p.ops import norm_dx, norm_dx_ref, norm_stats

EPS = 1e-5


@each_batch_size
@each_dtype
def bench_norm_dx(compare, rehearse: bool, batch_size: int, dtype: torch.dtype):
    x, weight, bias, dz = operands(batch_size, dtype, rehearse)
    mean, var = norm_stats(x, stat_groups=1)
    xhat = (x.float() - mean[0][:, None, None]) / (var[0] + EPS).sqrt()[:, None, None]
    sums = [t.sum((0, 2, 3))[None] for t in (dz.float(), dz.float() * xhat)]
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    normed = F.batch_norm(*leaves[:1], None, None, *leaves[1:], training=True)

    def ours() -> tuple[Tensor, ...]:
        return norm_dx(dz, x, mean, var, weight, sum_dz=sums[0], sum_dz_xhat=sums[1], eps=EPS)

    def check() -> None:
        wide = [t.double() for t in (dz, x, mean, var, weight, *sums)]
        assert_norm_gradients(ours(), norm_dx_ref(*wide, EPS), x, weight, dz)

    compare(
        f"norm_dx, batch {batch_size}",
        dtype=dtype,
        eager=partial(torch.autograd.grad, normed, leaves, dz, retain_graph=True),
        ours=ours,
        check=check,
        n_bytes=3 * x.nbytes,  # x and dz read, dx written; eager reads them twice, for the sums
    )
