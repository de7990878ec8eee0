"""Adversarial objectives: what each player wants of D's logits, as pointwise losses that `patch_loss` computes."""

from typing import Literal, NamedTuple

from torch import Tensor

from fastp2p.ops.patch_loss import Kind

GanMode = Literal["vanilla", "lsgan", "hinge"]


class Target(NamedTuple):
    """A pointwise loss and what it pulls its argument towards."""

    kind: Kind
    value: float | Tensor


class Objective(NamedTuple):
    """An adversarial objective; `fastp2p.models.gan_losses` has the same as formulas, to check it against."""

    D_real: Target
    D_fake: Target
    G: Target  # what G wants D to say to its fakes
    balance: float  # the value of D's losses where D can only guess; above 0

    @property
    def G_is_bounded(self) -> bool:
        """Whether G's loss has a lower end, and so D's balance as well."""
        return self.G.kind != "linear"


OBJECTIVES: dict[GanMode, Objective] = {
    "vanilla": Objective(Target("bce", 1.0), Target("bce", 0.0), Target("bce", 1.0), balance=0.693),
    "lsgan": Objective(Target("square", 1.0), Target("square", 0.0), Target("square", 1.0), balance=0.25),
    "hinge": Objective(Target("hinge", 1.0), Target("hinge", -1.0), Target("linear", 1.0), balance=1.0),
}
