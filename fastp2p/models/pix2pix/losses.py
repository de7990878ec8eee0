"""The objective in the paper's words: arg min_G max_D L_cGAN(G, D) + lambda_L1 * L_L1(G) (Isola et al., eq. 4)."""

from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

from fastp2p.models.reading import Reading
from fastp2p.ops.objectives import OBJECTIVES, GanMode

Scalar = TypeVar("Scalar", Tensor, float)


class Losses(NamedTuple, Generic[Scalar]):
    """The four losses of one step, as tensors () or as floats."""

    loss_G_GAN: Scalar
    loss_G_L1: Scalar  # times lambda_L1
    loss_D_real: Scalar
    loss_D_fake: Scalar


def read_losses(losses: Losses[float], gan_mode: GanMode) -> Reading:
    """One line that says who is winning, and whether it should be a warning.

    Near balance D can only guess. D's loss is the mean of real and fake. When it, or G's, is under a tenth of balance,
    that player has won, and the other one learns little from it any more. Hinge's loss_G_GAN has no lower end; there G
    has won when loss_D_fake is over three times balance. Losses far above balance, without a winner who may explain
    them, are those of a training that runs away.
    """
    objective = OBJECTIVES[gan_mode]
    balance = objective.balance
    loss_D = (losses.loss_D_real + losses.loss_D_fake) / 2
    G_has_won = losses.loss_G_GAN < balance / 10 if objective.G_is_bounded else losses.loss_D_fake > 3 * balance
    runs_away = loss_D > (10 if G_has_won else 3) * balance or abs(losses.loss_G_GAN) > 100 * balance
    text = f"loss_D {loss_D:.2f}, balance is {balance:.2g}: "
    if loss_D < balance / 10:
        return Reading(
            text + "D has won, G learns from L1 alone. Try a smaller --ndf or --n-layers-D, or more data.", True
        )
    if runs_away:
        return Reading(text + "the losses are far above it, training runs away. Start again with a lower --lr.", True)
    if G_has_won:
        return Reading(
            text + "G has won, D no longer tells fake from real. Try a larger --ndf, or check the pairs.", True
        )
    if loss_D < balance / 2:
        return Reading(text + "D is ahead, which is usual.", False)
    return Reading(text + "both players are in the game.", False)
