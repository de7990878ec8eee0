"""What is timed: a job is one way to do one thing, and it makes its own inputs when its turn comes."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Config = dict[str, int]
# Takes a kernel's configuration, None for the launcher's own choice (and for who has none), and does the thing once.
Runner = Callable[[Config | None], object]

UNET_256_PARAMETERS = 54_413_955
OURS, BEST, EAGER, COMPILED = "fastp2p", "fastp2p, best of candidates", "eager", "torch.compile"


@dataclass(frozen=True)
class Job:
    case: str  # what is done, such as "down e4 batch 16": jobs of one case are compared
    operator: str  # whose parity tests must be green
    provider: str  # who does it
    make: Callable[[], Runner]  # a set of inputs, and the call on them
    n_bytes: int  # that the operation must move: its inputs, second reads included, and its outputs
    input_bytes: int  # distinct ones that a call reads of one set of inputs, each counted once
    flop: int = 0  # of matrix products, padding counted as if it were pixels
    capturable: bool = True  # in a CUDA graph
    configs: list[Config] = field(default_factory=list)  # to try, for BEST
    facts: dict[str, Any] = field(default_factory=dict)  # for the reader: layer, batch, shapes

    @property
    def name(self) -> str:
        return f"{self.case}, {self.provider}"


def comparison(
    case: str,
    operator: str,
    ours: Callable[..., object],
    plain: Callable[..., object],
    make: Callable[[], tuple[Tensor, ...]],
    *,
    n_bytes: int,
    input_bytes: int,
    flop: int = 0,
    wrap: Callable[[Callable[..., object]], Callable[..., object]] = lambda function: function,
    compiled: bool = True,
    capturable_plain: bool = True,
    **facts: Any,
) -> Iterator[Job]:
    """The jobs of an operator beside plain PyTorch's way on the same tensors, eager and compiled.

    wrap adds to either function what torch.compile does not compile.
    """

    def runner(function: Callable[..., object]) -> Runner:  # called for each set of inputs
        tensors, wrapped = make(), wrap(function)
        return lambda _: wrapped(*tensors)

    @functools.cache
    def compile_plain() -> Callable[..., object]:
        torch._dynamo.reset()  # each case has its own shapes and may not count against the limit of recompilations
        backend = "inductor" if torch.get_default_device().type == "cuda" else "aot_eager"
        return torch.compile(plain, fullgraph=True, dynamic=False, backend=backend)

    shared = {"n_bytes": n_bytes, "input_bytes": input_bytes, "flop": flop, "facts": facts}
    yield Job(case, operator, OURS, lambda: runner(ours), **shared)
    yield Job(case, operator, EAGER, lambda: runner(plain), capturable=capturable_plain, **shared)
    if compiled:
        yield Job(case, operator, COMPILED, lambda: runner(compile_plain()), **shared)


def size(*tensors_shapes: tuple[tuple[int, ...], int]) -> int:
    """Bytes of tensors, each given as (shape, bytes an element)."""
    return sum(torch.Size(shape).numel() * itemsize for shape, itemsize in tensors_shapes)


def image(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random normal values on the default device, channels_last."""
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
