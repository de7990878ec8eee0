"""Dynamic loss scaling for float16, with its state on the device: no step waits for the host to look at it."""

import torch
from torch import Tensor

FIRST_SCALE = 2.0**16
GROWTH_INTERVAL = 2000  # steps without an infinity until the scale doubles, as torch.amp.GradScaler has it


class LossScale:
    """Losses are multiplied by a power of two, so that small gradients are not lost to float16; weight gradients are
    divided by it again in float32. A step whose gradients overflow is skipped and the scale halved (Micikevicius et
    al., "Mixed precision training", ICLR 2018, section 3.2).

    The operator that makes the first gradients multiplies them by `scale` before it rounds them to float16.

    Args:
        state: (2,) float32 on the networks' device, (scale, steps since it last changed); updated.
    """

    def __init__(self, state: Tensor):
        self.state = state
        self.finite: list[Tensor] = []  # () bool, of each network's gradients so far in this step

    @staticmethod
    def new_state(device: torch.device) -> Tensor:
        """The state before the first step."""
        return torch.tensor([FIRST_SCALE, 0.0], device=device)

    def begin(self) -> None:
        """Begin a step."""
        self.finite = []

    @property
    def scale(self) -> Tensor:
        """The factor of this step's gradients, () float32 on the device."""
        return self.state[0]

    def unscale(self, grad: Tensor) -> Tensor:
        """What to multiply a network's gradients by, () float32: 1 / scale, or 0 to skip its step.

        Args:
            grad: (M,) float32, all of its gradients.
        """
        self.finite.append(torch.linalg.vector_norm(grad, ord=float("inf")).isfinite())
        return torch.where(self.finite[-1], 1 / self.state[0], 0)

    def update(self) -> None:
        """At the step's end: halve the scale if a network was skipped, double it after GROWTH_INTERVAL good steps."""
        finite = torch.stack(self.finite).all()
        scale, good_steps = self.state
        good_steps = torch.where(finite, good_steps + 1, 0)
        grows = good_steps == GROWTH_INTERVAL
        factor = torch.where(finite, torch.where(grows, 2.0, 1.0), 0.5)
        self.state.copy_(torch.stack([scale * factor, torch.where(grows, 0, good_steps)]))
