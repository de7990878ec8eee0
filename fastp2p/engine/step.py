"""What the trainer, the CUDA graph and the tuner ask of a training step, whatever its model."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]  # images by name, such as "A" and "B": (N, C, H, W) in [-1, 1]
LossValues = dict[str, Tensor]  # by name, in the order of the log: () on the device


class Step(Protocol):
    """A step of training on fused operators, in three parts, of which a CUDA graph holds the second."""

    @property
    def device(self) -> torch.device:
        """Where the step computes."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int, int]]:
        """(C, H, W) of the images that the step takes, by name."""

    @property
    def networks(self) -> Mapping[str, Any]:
        """Each `FusedNetwork` by the name that tables give it; none where autograd runs the networks."""

    @property
    def arenas(self) -> Mapping[str, Any]:
        """Each `Arena` by a name: of its networks, or of its optimizer."""

    def on_meta(self) -> "Step":
        """Make a twin that calls the same operators, on networks whose tensors have no values."""

    @property
    def dtype(self) -> torch.dtype:
        """What the step multiplies in."""

    @property
    def image_dtypes(self) -> Mapping[str, torch.dtype]:
        """What the step reads images in, by name, where that is not float32; any other floating dtype is cast first."""

    def prepare(self) -> None:
        """Before `launch`, and on the host: take over learning rates, and parameters changed in between.

        Raises:
            InputError: when networks or optimizers are no longer what the step was made of.
        """

    def launch(self, batch: Batch) -> LossValues:
        """The step's work on the device, nothing else, so that a CUDA graph can hold it."""

    def conclude(self) -> None:
        """After `launch`, and on the host: the parameters have changed."""

    def train(self, batch: Batch) -> LossValues:
        """The three in turn. Raises InputError where the batch is not what the step was made for."""
