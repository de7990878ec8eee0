"""Model: all that the trainer, the commands and the engine know of what is trained."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from fastp2p.config import ResolvedConfig, RunConfig, Settings
from fastp2p.count.memory import MemoryEstimate, estimate_autograd_memory, estimate_memory
from fastp2p.device import DTYPES
from fastp2p.engine import LossScale
from fastp2p.engine.layers import LayersStep
from fastp2p.engine.record import META, net_on_meta
from fastp2p.engine.step import Batch, LossValues, Step
from fastp2p.errors import InputError
from fastp2p.models.generator_spec import GeneratorSpec
from fastp2p.models.reading import Reading

Config = TypeVar("Config", bound=ResolvedConfig)
Nets = Mapping[str, nn.Module]
Optimizers = Mapping[str, torch.optim.Adam]


@dataclass(frozen=True)
class Curves:
    """One drawing of losses over the steps."""

    title: str
    losses: Sequence[str]
    level: float | None = None  # a dotted line
    level_name: str = ""


class Model(ABC, Generic[Config]):
    """What is trained: its networks, its objective and what it shows. `fastp2p.models.registry` finds it by its name.

    Every method is a function of its arguments: a model holds no state.
    """

    name: ClassVar[str]  # its folder, and its tag in checkpoints
    options: ClassVar[type[Settings]]  # its own options
    config: ClassVar[type[RunConfig]]  # those, and what runs of all models are told
    generator_spec: ClassVar[type[GeneratorSpec]]  # how its generators' files tell of them
    losses: ClassVar[tuple[str, ...]]  # in the order of the log
    scores: ClassVar[tuple[str, ...]]  # validation's; the best state is the one whose first score is lowest

    @abstractmethod
    def nets(self, config: Config) -> dict[str, nn.Module]:
        """The networks with their first weights, drawn from PyTorch's global generator, in float32 on the CPU."""

    @abstractmethod
    def optimizers(self, config: Config, nets: Nets) -> dict[str, torch.optim.Adam]:
        """One Adam for each group of networks that learn together."""

    @abstractmethod
    def reference_step(self, config: Config, nets: Nets, optimizers: Optimizers, batch: Batch) -> LossValues:
        """One step of training in plain autograd: the specification of every faster one."""

    def fused_step(
        self, config: Config, nets: Nets, optimizers: Optimizers, *, step: int, loss_scale: Tensor
    ) -> Step | None:
        """The same step on fused operators; None where it is not written.

        Args:
            config, nets, optimizers: as for `reference_step`.
            step: how many steps were trained before.
            loss_scale: (2,) float32 on the device, of float16; updated.
        """
        return None

    def step(self, config: Config, nets: Nets, optimizers: Optimizers, *, step: int, loss_scale: Tensor) -> Step:
        """The step of config.engine, fused or layers; arguments as for `fused_step`.

        Raises:
            InputError: where it does not compute these networks or optimizers, or the model has no fused step.
        """
        if config.engine == "reference":
            raise InputError("engine: got reference, which calls no operators of ours; expected fused or layers")
        if config.engine == "layers":
            return LayersStep(
                functools.partial(self.reference_step, config),
                nets,
                optimizers,
                shapes=self.shapes(config),
                dtype=DTYPES[config.precision],
            )
        fused = self.fused_step(config, nets, optimizers, step=step, loss_scale=loss_scale)
        if fused is None:
            raise InputError(f"engine: {self.name} has no step on fused operators; use --engine layers")
        return fused

    @abstractmethod
    def panel(self, nets: Nets, batch: Batch) -> dict[str, Tensor]:
        """A row of pictures by caption, (N, C, H, W) in [-1, 1] each. Networks stay in training mode."""

    @abstractmethod
    def score(self, nets: Nets, batches: Iterable[Batch]) -> dict[str, float]:
        """The means of `scores` over images."""

    @abstractmethod
    def read(self, losses: Mapping[str, float], config: Config) -> Reading:
        """What the losses say of the training."""

    @abstractmethod
    def status(self, losses: Mapping[str, float]) -> str:
        """The losses for the line of progress, in some 30 characters."""

    @abstractmethod
    def curves(self, config: Config) -> list[Curves]:
        """How losses.png draws the losses."""

    @abstractmethod
    def generators(self, config: Config, nets: Nets, step: int) -> dict[str, tuple[nn.Module, GeneratorSpec]]:
        """What people use after training, by file name without suffix, and how to rebuild it."""

    @abstractmethod
    def describe(self, config: Config, nets: Nets) -> list[str]:
        """Lines about the networks and the objective, for the beginning of a run."""

    def shapes(self, config: Config) -> dict[str, tuple[int, int, int]]:
        """(C, H, W) of the images that a step takes, by name."""
        side = config.crop_size
        return {"A": (config.input_nc, side, side), "B": (config.output_nc, side, side)}

    def memory(self, config: Config, nets: Nets, batch_size: int) -> MemoryEstimate:
        """What a step of config.engine will take."""
        # The step is one without values: the real one would take the memory that it is to tell of first
        copies = {name: net_on_meta(net) for name, net in nets.items()}
        optimizers, scale = self.optimizers(config, copies), LossScale.new_state(META)
        if config.engine == "reference":
            dtype = DTYPES[config.precision]
            shapes = self.shapes(config).items()
            batch = {name: torch.empty(batch_size, *shape, dtype=dtype, device=META) for name, shape in shapes}
            step = functools.partial(self.reference_step, config, copies, optimizers, batch)
            return estimate_autograd_memory(step, copies, optimizers, batch)
        return estimate_memory(self.step(config, copies, optimizers, step=0, loss_scale=scale), batch_size)

    @abstractmethod
    def summary(self, config: Config) -> str:
        """The networks in a line of some 60 characters."""

    def own_options(self, config: RunConfig) -> dict[str, Any]:
        """This model's own options in a configuration, as JSON knows them."""
        return {field.name: getattr(config, field.name) for field in fields(self.options)}
