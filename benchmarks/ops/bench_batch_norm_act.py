"""batch_norm_act with its statistics on the U-Net's first normalised maps, against eager PyTorch's batch norm."""

import torch
import torch.nn.functional as F
from bench_norm_act import in_float64, operands
from harness.parity import assert_normalised
from layers import DEVICE, each_batch_size, each_dtype
from torch import Tensor

from fastp2p.ops import batch_norm_act, norm_act_ref, norm_stats


@each_batch_size
@each_dtype
def bench_batch_norm_act(compare, rehearse: bool, batch_size: int, dtype: torch.dtype):
    x, weight, bias, _ = operands(batch_size, dtype, rehearse)
    running_mean, running_var = torch.zeros(x.shape[1], device=DEVICE), torch.ones(x.shape[1], device=DEVICE)

    def eager() -> Tensor:
        return F.leaky_relu(F.batch_norm(x, running_mean, running_var, weight, bias, training=True), 0.2)

    def ours() -> Tensor:
        averages = {"running_mean": running_mean, "running_var": running_var}
        return batch_norm_act(x, *norm_stats(x, stat_groups=1), weight, bias, **averages, activation="leaky_relu")[0]

    def check() -> None:
        expected, _ = norm_act_ref(*in_float64(x, weight, bias))
        assert_normalised(ours(), expected, x, weight, bias)

    compare(
        f"batch_norm_act, batch {batch_size}",
        dtype=dtype,
        eager=eager,
        ours=ours,
        check=check,
        n_bytes=3 * x.nbytes,  # read twice, written once
    )
