"""stack_pairs: what a conditional discriminator sees of a batch, fake pairs before real ones."""

import torch
from torch import Tensor

from fastp2p.errors import InputError
from fastp2p.ops import library
from fastp2p.ops.library import check_devices, describe
from fastp2p.ops.operands import Work

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def stack_pairs_ref(real_A: Tensor, fake_B: Tensor, real_B: Tensor) -> Tensor:
    """The specification of `stack_pairs`."""
    B = torch.cat([fake_B.to(real_A.dtype), real_B.to(real_A.dtype)])
    pairs = torch.cat([torch.cat([real_A, real_A]), B], dim=1)
    return pairs.contiguous(memory_format=torch.channels_last)


def _fake(real_A: Tensor, fake_B: Tensor, real_B: Tensor) -> Tensor:
    n, channels, height, width = real_A.shape
    shape = (2 * n, channels + real_B.shape[1], height, width)
    return torch.empty(shape, dtype=real_A.dtype, device=real_A.device, memory_format=torch.channels_last)


library.define(
    "stack_pairs",
    "(Tensor real_A, Tensor fake_B, Tensor real_B) -> Tensor",
    reference=stack_pairs_ref,
    fake=_fake,
    work=Work(maps=("real_A", "fake_B", "real_B"), results=("maps",)),
)
library.serve_by_triton("stack_pairs")


def stack_pairs(real_A: Tensor, fake_B: Tensor, real_B: Tensor) -> Tensor:
    """Join images with their translations in channels: a batch of fake pairs, then one of real pairs, in one pass.

        out[:N] = cat([real_A, fake_B], 1)        out[N:] = cat([real_A, real_B], 1)

    So one pass of a conditional discriminator sees both (Isola et al., section 3.1). Has no gradient.

    Args:
        real_A: (N, C, H, W) of float32, bfloat16, float16 or float64.
        fake_B, real_B: (N, C', H, W), each of any of these; they are rounded to real_A's.

    Returns:
        (2 N, C + C', H, W) of real_A's dtype, channels_last.

    Raises:
        InputError: on shapes, dtypes or devices that do not fit.
    """
    images = (real_A, fake_B, real_B)
    fit = all(x.ndim == 4 and x.dtype in DTYPES and x.numel() > 0 for x in images)
    fit = fit and fake_B.shape == real_B.shape == (len(real_A), real_B.shape[1], *real_A.shape[2:])
    if not fit:
        raise InputError(
            f"stack_pairs: got {', '.join(map(describe, images))}; expected real_A (N, C, H, W) and fake_B, "
            "real_B (N, C', H, W) of float32, bfloat16, float16 or float64, not empty"
        )
    check_devices("stack_pairs", *images)
    pairs: Tensor = torch.ops.fastp2p.stack_pairs(*images)
    return pairs
