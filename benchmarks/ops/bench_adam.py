"""adam: one step over as many parameters as unet_256 has, and their copy in half precision, against torch.optim.Adam.

Upstream's Adam has them in many tensors, here all of a deep layer's size, and writes no copy: autocast makes it anew in
each pass.
"""

import torch
from harness.cases import UNET_256_PARAMETERS, adam_case
from layers import NOISE, each_dtype
from torch import nn

DEEP = 512 * 512 * 4 * 4  # elements of a weight; one tensor of all would spoil eager's caches


@each_dtype
def bench_adam(compare, quick: bool, rehearse: bool, dtype: torch.dtype):
    n = 10_000 if rehearse else 2**24 if quick else UNET_256_PARAMETERS  # caches hold neither of the latter
    weights, grads = (NOISE.images(1, n, 1, 1, dtype=torch.float32).flatten().split(DEEP) for _ in range(2))
    parameters = [nn.Parameter(weight) for weight in weights]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    compare(f"adam, {n:,} parameters", dtype=dtype, **vars(adam_case(parameters, dtype)))
