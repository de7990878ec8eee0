"""adam: one step over as many parameters as unet_256 has, and their copy in half precision, against torch.optim.Adam.

Upstream's Adam has them in many tensors, here all of a deep layer's size, and writes no copy: autocast makes it anew in
each pass.
"""

import torch
from jobs import UNET_256_PARAMETERS
from layers import DEVICE, NOISE, each_dtype
from parity import assert_adam
from torch import nn

from fastp2p.ops import adam

LR, BETAS = 2e-4, (0.5, 0.999)
DEEP = 512 * 512 * 4 * 4  # elements of a weight; one tensor of all would spoil eager's caches


@each_dtype
def bench_adam(compare, quick: bool, rehearse: bool, dtype: torch.dtype):
    n = 10_000 if rehearse else 2**24 if quick else UNET_256_PARAMETERS  # caches hold neither of the latter
    param, grad = (NOISE.images(1, n, 1, 1, dtype=torch.float32).flatten() for _ in range(2))
    exp_avg, exp_avg_sq = torch.zeros_like(param), torch.zeros_like(param)
    low = None if dtype == torch.float32 else torch.empty_like(param, dtype=dtype)
    lr, powers = torch.tensor(LR, device=DEVICE), torch.ones(2, dtype=torch.float64, device=DEVICE)
    parameters = [nn.Parameter(weight) for weight in param.clone().split(DEEP)]
    for parameter, its_grad in zip(parameters, grad.split(DEEP), strict=True):
        parameter.grad = its_grad
    optimizer = torch.optim.Adam(parameters, lr=LR, betas=BETAS)

    def ours() -> None:
        adam(param, grad, exp_avg, exp_avg_sq, lr=lr, powers=powers, low_precision=low)

    def check() -> None:
        for _ in range(2):
            powers.mul_(powers.new_tensor(BETAS))
            ours()
            optimizer.step()
        moments = [[optimizer.state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq")]
        expected = [torch.cat(tensors).detach() for tensors in (parameters, *moments)]
        assert_adam((param, exp_avg, exp_avg_sq), expected, low, LR)

    n_bytes = n * (28 + (0 if low is None else low.itemsize))  # 16 read, 12 written, and the copy
    case = f"adam, {n:,} parameters"
    compare(case, dtype=dtype, eager=optimizer.step, ours=ours, check=check, n_bytes=n_bytes)
