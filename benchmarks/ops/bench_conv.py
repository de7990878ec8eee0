"""conv with the statistics for batch norm, against PyTorch's convolution alone."""

import torch
import torch.nn.functional as F
from layers import Layer, check, each_batch_size, each_dtype, each_layer, gflop

from fastp2p.ops import conv


@each_layer
@each_batch_size
@each_dtype
def bench_conv(compare, rehearse: bool, layer: Layer, batch_size: int, dtype: torch.dtype):
    layer = layer.tiny if rehearse else layer
    trial = layer.trial("conv", dtype, batch_size, stat_groups=1)
    x, weight, *_ = trial.args

    def ours() -> object:
        return conv(x, weight, stride=layer.shape.stride, stat_groups=1)

    compare(
        f"conv {layer.name}, batch {batch_size}",
        dtype=dtype,
        eager=lambda: F.conv2d(x, weight, None, layer.shape.stride, 1),
        ours=ours,
        check=lambda: check(trial, ours),
        gflop=gflop(trial),
    )
