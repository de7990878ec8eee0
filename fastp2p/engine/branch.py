"""Work beside the main chain: on a CUDA GPU on a stream of its own, which in a captured graph is a parallel branch."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Branch:
    """Weight gradients and Adam wait for nothing but their operands, and nothing waits for them until the network is
    used again: bound by bytes in the deep layers, they run under the compute-bound gradients of the shallow ones.
    """

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.held: list[Tensor | None] = []  # operands, whose memory must not be given to the main chain before `join`

    @contextmanager
    def beside(self, *operands: Tensor | None) -> Iterator[None]:
        """What is launched here comes after everything launched so far, and not before anything launched later."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        self.held += operands
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        """What is launched from here on comes after the branch."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
            self.held.clear()
