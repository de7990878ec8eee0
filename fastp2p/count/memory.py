"""What a training step will take, counted before it is run."""

from dataclasses import dataclass

from fastp2p.engine.record import peak_bytes
from fastp2p.engine.step import Step


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one step."""

    state: int  # weights, gradients where they are kept, Adam's moments
    activations: int  # what is kept for the backward passes at the step's peak; with the fused engine all that is held

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
