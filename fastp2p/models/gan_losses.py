"""The objective in the paper's words: arg min_G max_D L_cGAN(G, D) + lambda_L1 * L_L1(G) (Isola et al., eq. 4)."""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar, get_args

import torch.nn.functional as F
from torch import Tensor

from fastp2p.config import GanMode
from fastp2p.errors import InputError

Scalar = TypeVar("Scalar", Tensor, float)


class Losses(NamedTuple, Generic[Scalar]):
    """The four losses of one step, as tensors () or as floats."""

    loss_G_GAN: Scalar
    loss_G_L1: Scalar  # times lambda_L1
    loss_D_real: Scalar
    loss_D_fake: Scalar


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
        pointwise: Callable[..., Tensor] = (
            F.binary_cross_entropy_with_logits if self.gan_mode == "vanilla" else F.mse_loss
        )
        return pointwise(logits, target)


# The value of loss_D_real and loss_D_fake (and, but for hinge, of loss_G_GAN) where D can only guess.
BALANCE: dict[GanMode, float] = {"vanilla": 0.693, "lsgan": 0.25, "hinge": 1.0}


def read_losses(losses: Losses[float], gan_mode: GanMode) -> tuple[str, bool]:
    """One line that says who is winning, and whether it should be a warning.

    Near balance D can only guess. When D's loss (the mean of real and fake) or G's is under a tenth of balance, that
    player has won and the other one learns little from it any more. Hinge's loss_G_GAN has no lower end; there G has
    won when loss_D_fake is over three times balance. Losses far above balance, without a winner who may explain them,
    are those of a training that runs away.
    """
    balance = BALANCE[gan_mode]
    loss_D = (losses.loss_D_real + losses.loss_D_fake) / 2
    G_has_won = losses.loss_D_fake > 3 * balance if gan_mode == "hinge" else losses.loss_G_GAN < balance / 10
    runs_away = loss_D > (10 if G_has_won else 3) * balance or abs(losses.loss_G_GAN) > 100 * balance
    text = f"loss_D {loss_D:.2f}, balance is {balance:.2g}: "
    if loss_D < balance / 10:
        return text + "D has won, G learns from L1 alone. Try a smaller --ndf or --n-layers-D, or more data.", True
    if runs_away:
        return text + "the losses are far above it, training runs away. Start again with a lower --lr.", True
    if G_has_won:
        return text + "G has won, D no longer tells fake from real. Try a larger --ndf, or check the pairs.", True
    if loss_D < balance / 2:
        return text + "D is ahead, which is usual.", False
    return text + "both players are in the game.", False
