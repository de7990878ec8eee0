"""What a training step will take, counted before it is run."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastp2p.engine.record import Recorder, peak_bytes
from fastp2p.engine.step import Batch, Step


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one step."""

    state: int  # what is there between steps: weights, gradients where they are kept, Adam's moments
    activations: int  # what the step's peak holds beyond that

    @property
    def total(self) -> int:
        return self.state + self.activations


def estimate_memory(step: Step, batch_size: int) -> MemoryEstimate:
    """Count the bytes of a step from a record of it; nothing is run or allocated.

    A lower bound: the operators' scratch space comes on top, and on a GPU gradients that the branch of weight gradients
    holds.

    Args:
        step: on any device.
        batch_size: the number of images.
    """
    state = sum(arena.n_bytes for arena in step.arenas.values())
    return MemoryEstimate(state, peak_bytes(step, batch_size))


def estimate_autograd_memory(
    step: Callable[[], object],
    nets: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    batch: Batch,
) -> MemoryEstimate:
    """Count the bytes of a step in plain autograd by running it where tensors have no values; nothing is allocated.

    A lower bound: the convolution library's scratch space, on a GPU the temporaries of multi-tensor Adam, and PyTorch
    itself come on top.

    Args:
        step: trains the networks on the batch.
        nets, optimizers, batch: what it trains, on the meta device.
    """
    step()  # the first one: later ones find gradients and Adam's moments
    state = [*_state(nets, optimizers)]
    with Recorder({}) as recorder:
        recorder.hold([*state, *batch.values()])
        n_bytes = recorder.n_bytes - sum(image.untyped_storage().nbytes() for image in batch.values())
        del state  # gradients count while they live
        step()
    return MemoryEstimate(n_bytes, recorder.most_bytes - n_bytes)


def _state(nets: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]) -> Iterator[Tensor]:
    for net in nets.values():
        yield from net.buffers()
        for parameter in net.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
    for optimizer in optimizers.values():
        for values in optimizer.state.values():
            yield from (value for value in values.values() if isinstance(value, Tensor) and value.is_meta)
