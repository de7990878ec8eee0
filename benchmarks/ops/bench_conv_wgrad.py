"""conv_wgrad into float32, against the weight gradient of PyTorch's convolution, which is of the operands' dtype."""

import torch
from layers import Layer, check, each_batch_size, each_dtype, each_layer, gflop
from torch.nn.grad import conv2d_weight

from fastp2p.ops import conv_wgrad


@each_layer
@each_batch_size
@each_dtype
def bench_conv_wgrad(compare, rehearse: bool, layer: Layer, batch_size: int, dtype: torch.dtype):
    layer = layer.tiny if rehearse else layer
    trial = layer.trial("conv_wgrad", dtype, batch_size)
    dy, _, x, *_ = trial.args

    def ours() -> object:
        return conv_wgrad(dy, x, stride=layer.shape.stride)

    compare(
        f"conv_wgrad {layer.name}, batch {batch_size}",
        dtype=dtype,
        eager=lambda: conv2d_weight(x, layer.shape.weight, dy, layer.shape.stride, 1),
        ours=ours,
        check=lambda: check(trial, ours),
        gflop=gflop(trial),
    )
