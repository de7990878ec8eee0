"""--engine layers: a model's own step in autograd, over fused layers, with a flat Adam."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastp2p.engine.arena import Arena
from fastp2p.engine.plan import Plan
from fastp2p.engine.record import net_on_meta
from fastp2p.engine.step import Batch, LossValues
from fastp2p.engine.supported import check_optimizer
from fastp2p.errors import InputError
from fastp2p.nn.fuse import fuse
from fastp2p.ops.library import autocast_to

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
NOTHING = Plan([], [], 0, [], [])  # no layer's weight has a gradient of the engine's own

Nets = Mapping[str, nn.Module]
Optimizers = Mapping[str, torch.optim.Adam]
ReferenceStep = Callable[[Nets, Optimizers, Batch], LossValues]


class FlatAdam(torch.optim.Adam):
    """torch.optim.Adam whose step is one operator over flat buffers, which parameters and moments become views of.

    Args:
        optimizer: goes on as it was: both have the same groups and the same state.
        nets: whose parameters it owns, all of them.

    Raises:
        InputError: on parameters or an optimizer that an `Arena` does not take.
    """

    def __init__(self, optimizer: torch.optim.Adam, nets: list[nn.Module]):
        check_optimizer(optimizer)
        self.__dict__.update({name: value for name, value in optimizer.__dict__.items() if name != "step"})
        dtype = next(nets[0].parameters()).dtype
        self.arena = Arena(nets, optimizer, [NOTHING] * len(nets), dtype, accumulates=True)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step with the parameters' gradients; raises InputError where one has none."""
        assert closure is None, "a closure would be called by none of the family's steps"
        with torch.no_grad():
            self.arena.begin()
            self.arena.take_gradients({id(p): p.grad for p in self.arena.parameters if p.grad is not None})
            self.arena.finish()


class LayersStep:
    """A training step of any model: what it does in autograd, with each convolution's chain as one fused block.

    `fastp2p.fuse` changes the networks in place; parameters, buffers and names stay, so checkpoints go on.

    Args:
        reference_step: the model's, a function of networks, optimizers and a batch.
        nets, optimizers: what it trains; in training mode, parameters in float32, or in float64 to compute in it.
        shapes: (C, H, W) of each image of a batch.
        dtype: of multiplications, by autocast: bfloat16, float32, float64.

    Raises:
        InputError: on another dtype; on an optimizer that is no plain Adam over all of one or several networks.
    """

    def __init__(
        self,
        reference_step: ReferenceStep,
        nets: Nets,
        optimizers: Optimizers,
        *,
        shapes: Mapping[str, tuple[int, int, int]],
        dtype: torch.dtype,
    ):
        if dtype not in DTYPES:
            raise InputError(
                f"engine: layers got {dtype}, expected bfloat16, float32 or float64; --engine fused scales float16's "
                "losses"
            )
        self.reference_step, self.nets, self.optimizers = reference_step, nets, optimizers
        self.shapes, self.dtype = dict(shapes), dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        for net in nets.values():
            fuse(net)
        self.adams = {name: FlatAdam(optimizer, self._owned(optimizer)) for name, optimizer in optimizers.items()}
        self.networks: dict[str, Any] = {}  # none is planned

    def _owned(self, optimizer: torch.optim.Adam) -> list[nn.Module]:
        """The networks that an optimizer trains."""
        parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [net for net in self.nets.values() if any(id(p) in parameters for p in net.parameters())]

    @property
    def device(self) -> torch.device:
        """Where the step computes."""
        return next(iter(self.adams.values())).arena.param.device

    @property
    def image_dtypes(self) -> dict[str, torch.dtype]:
        """None: the first convolution casts, and what else a step may do with images it does in float32."""
        return {}

    @property
    def arenas(self) -> dict[str, Arena]:
        """Each optimizer's buffers, by its name."""
        return {name: adam.arena for name, adam in self.adams.items()}

    def on_meta(self) -> "LayersStep":
        """Make a twin that calls the same operators, on networks whose tensors have no values."""
        nets = {name: net_on_meta(net) for name, net in self.nets.items()}
        twins = {
            id(p): twin
            for name, net in self.nets.items()
            for p, twin in zip(net.parameters(), nets[name].parameters(), strict=True)
        }
        optimizers = {
            name: torch.optim.Adam([twins[id(p)] for p in group["params"]], betas=group["betas"], eps=group["eps"])
            for name, optimizer in self.optimizers.items()
            for group in optimizer.param_groups
        }
        return LayersStep(self.reference_step, nets, optimizers, shapes=self.shapes, dtype=self.dtype)

    def prepare(self) -> None:
        """Before `launch`, and on the host: take over learning rates, and parameters changed in between.

        Raises:
            InputError: when networks or optimizers are no longer what the step was made of.
        """
        for name, adam in self.adams.items():
            check_optimizer(self.optimizers[name])
            adam.arena.prepare()

    def launch(self, batch: Batch) -> LossValues:
        """The step's work on the device, forward, backward and Adam, so that a CUDA graph can hold it."""
        images = {name: self._image(x) for name, x in batch.items()}
        with autocast_to(self.dtype if self.dtype != self.wide else None, self.device.type):
            return self.reference_step(self.nets, self.adams, images)

    def _image(self, x: Tensor) -> Tensor:
        return x.to(self.wide, memory_format=torch.channels_last)

    def conclude(self) -> None:
        """After `launch`, and on the host: the parameters have changed."""
        for adam in self.adams.values():
            adam.arena.conclude()

    def train(self, batch: Batch) -> LossValues:
        """The three in turn. Raises InputError where the batch is not what the step was made for."""
        found = {name: tuple(x.shape[1:]) for name, x in batch.items()}
        if found != self.shapes or any(x.device != self.device or not x.is_floating_point() for x in batch.values()):
            got = ", ".join(f"{name} {tuple(x.shape)} {x.dtype} on {x.device}" for name, x in batch.items())
            made_for = ", ".join(f"{name} {shape}" for name, shape in self.shapes.items())
            raise InputError(f"engine: got {got}; this step was made for floating {made_for} on {self.device}")
        self.prepare()
        losses = self.launch(batch)
        self.conclude()
        return losses
