"""What a kernel file tells of its kernels' launches, for whoever counts a step: LAUNCH_FACTS, by the kernel's name."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Arguments = Mapping[str, Any]  # a launch's, by the names that the kernel gives them, constants included


def no_loop(args: Arguments) -> int:
    """The iterations of a kernel that does its work once."""
    return 1


def nothing_left(args: Arguments) -> int:
    """The iterations for what other programs left, where each does its own work alone."""
    return 0


def over(total: str, *shares: str) -> Callable[[Arguments], int]:
    """The iterations of a loop over an argument's number, divided by further arguments and rounded up each time."""

    def iterations(args: Arguments) -> int:
        left: int = args[total]
        for share in shares:
            left = -(-left // args[share])
        return left

    return iterations


@dataclass(frozen=True)
class LaunchFacts:
    """What a launch does, told from its arguments."""

    iterations: Callable[[Arguments], int] = no_loop  # those of its longest program's loop, one after the other
    merges: Callable[[Arguments], int] = nothing_left  # likewise, of the last program to arrive, for what others left
    updates: tuple[str, ...] = ()  # arguments that it reads and writes
    only_with: Mapping[str, str] = field(default_factory=dict)  # tensors left alone where a constant is off -> which
    multiplies: bool = False  # it does the matrix product of its operator


def facts_of(module: str, kernel: str) -> LaunchFacts:
    """What the kernel's file tells of it.

    Raises:
        LookupError: when it tells nothing.
    """
    told: dict[str, LaunchFacts] = getattr(importlib.import_module(module), "LAUNCH_FACTS", {})
    if kernel not in told:
        raise LookupError(f"{module}: LAUNCH_FACTS tells nothing of {kernel}; expected its iterations there")
    return told[kernel]
