"""Names for the parts of a step, in torch.profiler's timeline and, where PyTorch has CUDA, in Nsight's."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

AUGMENT = "augment"  # the part before every step; the others have the names that the model's step gives them


@contextmanager
def part(name: str) -> Iterator[None]:
    """A named range around what is launched in it. A graph is replayed without them."""
    nvtx = torch.cuda.nvtx.range(name) if torch.cuda.is_available() else nullcontext()
    with torch.profiler.record_function(name), nvtx:
        yield
