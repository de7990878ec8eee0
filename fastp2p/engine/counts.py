"""What a training step counts: each Adam's steps, and whole numbers such as those of the dropouts and the norms."""

from collections.abc import Sequence

import torch
from torch import Tensor

import fastp2p.ops  # noqa: F401 (defines torch.ops.fastp2p)
from fastp2p.engine.branch import Branch
from fastp2p.engine.record import about

operators = torch.ops.fastp2p


class Counts:
    """Flat buffers of numbers that one launch moves at a step's begin, beside the main chain.

        steps       each Adam's: (M,) float32, one for each of its parameters
        powers      each Adam's: (2,) float64, its betas to the power of the steps, made anew by `advance`
        counters    (K,) int64

    Args:
        steps, betas: each Adam's, (M,) float32 that are all equal, and (2,) float64.
        counters: () int64 each. They and the steps are copied: who counted in them must take the copies.
        increments: what each counter gains in a step, and what it gains for each image of the step.
    """

    def __init__(
        self,
        steps: Sequence[Tensor],
        betas: Sequence[Tensor],
        counters: Sequence[Tensor] = (),
        increments: Sequence[tuple[int, int]] = (),
    ):
        device, lengths = steps[0].device, [len(one) for one in steps]
        self._steps, self._betas = torch.cat(list(steps)), torch.stack(list(betas))
        self._powers = torch.ones_like(self._betas)
        self._firsts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))], device=device)
        gains = [[gain[i] for gain in increments] for i in range(2)]
        self._increments = torch.tensor(gains, dtype=torch.int64, device=device)
        self.steps, self.powers = self._steps.split(lengths), self._powers.unbind()
        self.counters = torch.stack(list(counters)) if counters else self._firsts.new_empty(0)
        self.branch, self.awaited = Branch(device), False
        self._unfinished: set[int] = set()  # whose Adam has not ended this step
        self._images = 0

    def advance(self, owner: object = None, images: int = 0) -> None:
        """Count a step of so many images. Who reads a number calls `wait` before."""
        with self.branch.beside():
            about(owner, None, "counts")
            operators.advance(
                *(self._steps, self._powers, self._betas, self._firsts, self.counters, self._increments, images)
            )
        self.awaited, self._images = True, images
        self._unfinished = set(range(len(self.steps)))

    def keep(self, number: int) -> None:
        """One Adam has ended its step."""
        self._unfinished.discard(number)

    def take_back(self) -> None:
        """A step was given up: what it had counted counts no more, but for the Adams that have ended theirs."""
        if not self._unfinished or (self.counters.is_cuda and torch.cuda.is_current_stream_capturing()):
            return  # a step that was captured did not run
        self.wait()
        for number in self._unfinished:
            self.steps[number].sub_(1)
        self.counters.sub_(self._increments[0] + self._images * self._increments[1])
        self._unfinished = set()

    def wait(self) -> None:
        """What is launched from here on reads the numbers of this step."""
        if self.awaited:
            self.branch.join()
            self.awaited = False
