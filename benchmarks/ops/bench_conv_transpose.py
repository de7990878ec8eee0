"""conv_transpose of two inputs with the statistics for batch norm, against torch.cat and PyTorch's own alone."""

import pytest
import torch
import torch.nn.functional as F
from layers import LAYERS, Layer, check, each_batch_size, each_dtype, gflop

from fastp2p.ops import conv_transpose

# The layer of the decoder turns the smaller map of its level of the encoder, twice, into the larger one
DECODER = dict(zip(("d2", "d4", "d7"), LAYERS, strict=False))


@pytest.mark.parametrize(("name", "encoder"), DECODER.items(), ids=DECODER)
@each_batch_size
@each_dtype
def bench_conv_transpose(compare, rehearse: bool, name: str, encoder: Layer, batch_size: int, dtype: torch.dtype):
    trial = (encoder.tiny if rehearse else encoder).trial("conv_transpose", dtype, batch_size, stat_groups=1)
    skip, x, weight, *_ = trial.args

    def ours() -> object:
        return conv_transpose(skip, weight, x2=x, stat_groups=1)

    compare(
        f"conv_transpose {name}, batch {batch_size}",
        dtype=dtype,
        eager=lambda: F.conv_transpose2d(torch.cat([skip, x], 1), weight, None, 2, 1),
        ours=ours,
        check=lambda: check(trial, ours),
        gflop=gflop(trial),
    )
