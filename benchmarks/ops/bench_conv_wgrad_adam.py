"""conv_wgrad_adam of a deep layer at batch size 1, against PyTorch's gradient and Adam of float32 weights."""

import torch
from layers import LAYERS, check, each_dtype
from torch import nn
from torch.nn.grad import conv2d_weight

from fastp2p.ops import conv_wgrad_adam
from fastp2p.tuner.operations import BETA1, BETA2, LR


@each_dtype
def bench_conv_wgrad_adam(compare, rehearse: bool, dtype: torch.dtype):
    layer = LAYERS[2].tiny if rehearse else LAYERS[2]
    trial = layer.trial("conv_wgrad_adam", dtype, 1)
    dy, _, x, param, exp_avg, exp_avg_sq, lr, powers, *_, low = trial.args
    weight = nn.Parameter(param.clone(memory_format=torch.preserve_format))
    optimizer = torch.optim.Adam([weight], lr=LR, betas=(BETA1, BETA2))

    def eager() -> None:
        weight.grad = conv2d_weight(x, weight.shape, dy, 2, 1).to(torch.float32)
        optimizer.step()

    def ours() -> None:
        conv_wgrad_adam(dy, x, param, exp_avg, exp_avg_sq, lr=lr, powers=powers, low_precision=low)

    moved = param.numel() * (24 + (0 if low is None else low.itemsize))  # weight and moments read and written
    compare(
        f"conv_wgrad_adam {layer.name}, batch 1",
        dtype=dtype,
        eager=eager,
        ours=ours,
        check=lambda: check(trial, ours),
        n_bytes=moved + (dy.numel() + x.numel()) * dtype.itemsize,
    )
