"""Adversarial losses of a map of logits as formulas: vanilla, lsgan, hinge."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fastp2p.errors import InputError
from fastp2p.ops.objectives import GanMode


def _vanilla(logits: Tensor, real: bool, for_discriminator: bool) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, _like(logits, real))


def _lsgan(logits: Tensor, real: bool, for_discriminator: bool) -> Tensor:
    return F.mse_loss(logits, _like(logits, real))


def _hinge(logits: Tensor, real: bool, for_discriminator: bool) -> Tensor:
    if not for_discriminator:
        return -logits.mean() if real else logits.mean()
    return F.relu(1 - logits if real else 1 + logits).mean()


def _like(logits: Tensor, real: bool) -> Tensor:
    return logits.new_full((), float(real)).expand_as(logits)


FORMULAS: dict[GanMode, Callable[[Tensor, bool, bool], Tensor]] = {
    "vanilla": _vanilla,
    "lsgan": _lsgan,
    "hinge": _hinge,
}


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
        if gan_mode not in list(FORMULAS):
            raise InputError(f"gan_mode: got {gan_mode!r}, expected one of {', '.join(FORMULAS)}")
        self.gan_mode = gan_mode

    def __call__(self, logits: Tensor, target_is_real: bool, *, for_discriminator: bool = True) -> Tensor:
        return FORMULAS[self.gan_mode](logits, target_is_real, for_discriminator)
