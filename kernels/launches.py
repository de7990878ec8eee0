"""Launches noted instead of done, on a GPU that need not be there: which kernel, how many programs, what it is given.

The launchers run as they are, on tensors that may be on the meta device, and choose as on the target.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

from triton.runtime.jit import KernelInterface

from fastp2p.kernels.ahead import Target, pretending
from fastp2p.kernels.launch_facts import LaunchFacts, facts_of


@dataclass(frozen=True)
class KernelLaunch:
    """One launch of a Triton kernel."""

    module: str
    kernel: str
    programs: int
    arguments: dict[str, Any]  # by the kernel's names, constants included
    options: dict[str, Any]  # the compiler's: warps, stages, registers

    @classmethod
    def of(cls, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], named: dict[str, Any]) -> "KernelLaunch":
        """What `kernel[grid](*args, **named)` launches."""
        names = kernel.arg_names
        given = dict(zip(names, args, strict=False)) | {name: named[name] for name in names if name in named}
        options = {name: value for name, value in named.items() if name not in names}
        return cls(kernel.fn.__module__, kernel.fn.__name__, prod(grid), given, options)

    @property
    def name(self) -> str:
        """The kernel's file and name."""
        return f"{self.module.rpartition('.')[2]}.{self.kernel}"

    @property
    def facts(self) -> LaunchFacts:
        """What the kernel's file tells of it."""
        return facts_of(self.module, self.kernel)

    @property
    def config(self) -> dict[str, Any]:
        """Its tile, its split and the compiler's options."""
        return {n: v for n, v in self.arguments.items() if n.startswith("BLOCK") or n == "SPLIT"} | self.options


@contextmanager
def noting(target: Target, note: Callable[[KernelLaunch], object]) -> Iterator[None]:
    """Hand every launch to `note`, as it would be on a target; none is compiled, and no kernel runs."""

    def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **named: Any) -> None:
            note(KernelLaunch.of(kernel, grid, args, named))

        return launch

    before = KernelInterface.__getitem__
    with pretending(target):
        KernelInterface.__getitem__ = launcher
        try:
            yield
        finally:
            KernelInterface.__getitem__ = before
