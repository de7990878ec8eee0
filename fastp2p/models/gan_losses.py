"""Adversarial losses of a map of logits: vanilla, lsgan, hinge."""

from collections.abc import Callable
from typing import get_args

import torch.nn.functional as F
from torch import Tensor

from fastp2p.errors import InputError
from fastp2p.ops.patch_loss import GanMode


class GANLoss:
    """The adversarial loss of a map of logits, averaged over the map, for either player.

        vanilla   BCE with logits against 1 (real) or 0 (fake)                        Goodfellow et al. 2014
        lsgan     squared distance of the logit to 1 or 0                             Mao et al. 2017
        hinge     D: max(0, 1 - logit) on real, max(0, 1 + logit) on fake; G: -logit  Lim and Ye 2017

    Args of a call:
        logits: (N, 1, H, W), any floating dtype.
        target_is_real: what the player wants D to say of these patches.
        for_discriminator: which player; matters to hinge alone.
    """

    def __init__(self, gan_mode: GanMode = "vanilla"):
        if gan_mode not in get_args(GanMode):
            raise InputError(f"gan_mode: got {gan_mode!r}, expected one of {', '.join(get_args(GanMode))}")
        self.gan_mode = gan_mode

    def __call__(self, logits: Tensor, target_is_real: bool, *, for_discriminator: bool = True) -> Tensor:
        if self.gan_mode == "hinge":
            if not for_discriminator:
                return -logits.mean() if target_is_real else logits.mean()
            return F.relu(1 - logits if target_is_real else 1 + logits).mean()
        target = logits.new_full((), float(target_is_real)).expand_as(logits)
        pointwise: dict[GanMode, Callable[..., Tensor]] = {
            "vanilla": F.binary_cross_entropy_with_logits,
            "lsgan": F.mse_loss,
        }
        return pointwise[self.gan_mode](logits, target)


# The value of loss_D_real and loss_D_fake (and, but for hinge, of loss_G_GAN) where D can only guess.
BALANCE: dict[GanMode, float] = {"vanilla": 0.693, "lsgan": 0.25, "hinge": 1.0}
