"""Names for the parts of a step, in torch.profiler's timeline and, where PyTorch has CUDA, in Nsight's."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal, get_args

import torch

Part = Literal[
    "augment",
    "netG forward",
    "netD forward",
    "netD backward and Adam",
    "netD forward and backward for netG",
    "netG backward and Adam",
]
PARTS: tuple[Part, ...] = get_args(Part)  # in the order in which they run


@contextmanager
def part(name: Part) -> Iterator[None]:
    """A named range around what is launched in it. A graph is replayed without them."""
    nvtx = torch.cuda.nvtx.range(name) if torch.cuda.is_available() else nullcontext()
    with torch.profiler.record_function(name), nvtx:
        yield
