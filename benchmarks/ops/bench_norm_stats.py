"""norm_stats: mean and variance of the first normalised maps of the U-Net, against torch.var_mean."""

import torch
from harness.parity import assert_stats
from layers import NOISE, each_batch_size, each_dtype

from fastp2p.ops import norm_stats, norm_stats_ref


@each_batch_size
@each_dtype
def bench_norm_stats(compare, rehearse: bool, batch_size: int, dtype: torch.dtype):
    x = NOISE.images(batch_size, *((16, 8, 8) if rehearse else (128, 64, 64)), dtype=dtype)
    compare(
        f"norm_stats, batch {batch_size}",
        dtype=dtype,
        eager=lambda: torch.var_mean(x.float(), dim=(0, 2, 3), correction=0),
        ours=lambda: norm_stats(x, stat_groups=1),
        check=lambda: assert_stats(norm_stats(x, stat_groups=1), norm_stats_ref(x.double(), 1), x),
        n_bytes=x.nbytes,  # read once
    )
