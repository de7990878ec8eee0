"""Work beside the main chain: on a CUDA GPU on a stream of its own, which in a captured graph is a parallel branch."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor


class Chains(Protocol):
    """A record of which launches wait for which others, on a device without streams of its own."""

    def fork(self, branch: "Branch") -> None:
        """What is launched from here on belongs to a branch, and waits for all that the current chain has launched."""

    def back(self) -> None:
        """What is launched from here on belongs to the chain before the last fork."""

    def join(self, branch: "Branch") -> None:
        """What the current chain launches from here on waits for a branch."""


class _Current(threading.local):
    chains: Chains | None = None


_current = _Current()


@contextmanager
def told_to(chains: Chains) -> Iterator[None]:
    """Tell a record of each fork and join."""
    before, _current.chains = _current.chains, chains
    try:
        yield
    finally:
        _current.chains = before


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
            with _forked(self):
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
        elif _current.chains is not None:
            _current.chains.join(self)


@contextmanager
def _forked(branch: Branch) -> Iterator[None]:
    if _current.chains is None:
        yield
        return
    _current.chains.fork(branch)
    yield
    _current.chains.back()
