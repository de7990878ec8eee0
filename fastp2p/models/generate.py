"""A trained generator's images, for looking at."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastp2p.errors import InputError

NormStats = Literal["image", "batch", "running"]


@torch.no_grad()
def generate(netG: nn.Module, real_A: Tensor, *, norm_stats: NormStats = "image", dropout: bool = False) -> Tensor:
    """fake_B = netG(real_A) for looking at, not for training; leaves the net's mode and its statistics untouched.

    Args:
        netG: a generator.
        real_A: (N, C, H, W) in [-1, 1].
        norm_stats: what batch norm normalises with. "image": the statistics of each image alone, what upstream's
            test does at batch 1, independent of how images are batched; "batch": those of this batch together;
            "running": the averages gathered in training (eval mode). Instance norm always uses each image.
        dropout: keep the decoder's dropout on, as the paper does at test time; draws from torch's global generator.

    Returns:
        (N, output_nc, H, W) in [-1, 1].
    """
    if norm_stats not in get_args(NormStats):
        raise InputError(f"norm_stats: got {norm_stats!r}, expected one of {', '.join(get_args(NormStats))}")
    if norm_stats == "image" and len(real_A) > 1:
        images = [generate(netG, image[None], norm_stats="image", dropout=dropout) for image in real_A]
        return torch.cat(images)

    was = {module: module.training for module in netG.modules()}
    batch_norms = {module: module.track_running_stats for module in was if isinstance(module, nn.BatchNorm2d)}
    try:
        for module in was:
            module.training = dropout if isinstance(module, nn.Dropout) else False
        for module in batch_norms:
            module.training = norm_stats != "running"
            module.track_running_stats = norm_stats == "running"  # off: statistics are used but not recorded
        dtype = next(netG.parameters(), real_A).dtype  # float64 in proofs
        fake_B: Tensor = netG(real_A.to(dtype)).to(real_A.dtype)
        return fake_B
    finally:
        for module, training in was.items():
            module.training = training
        for module, tracks in batch_norms.items():
            module.track_running_stats = tracks
