"""Which Triton programs a training step takes, told without a launch, and compiling them in parallel before it.

The step runs on meta tensors, which have shapes and no values; the operators' launchers run as they are.
"""

import importlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastp2p.conv_shape import CONVOLUTIONS
from fastp2p.engine.record import META, Rehearsal
from fastp2p.engine.step import Step
from fastp2p.ops import kernel_choices, library
from fastp2p.ops.kernel_choices import Choice, Table
from fastp2p.tuner.operations import Noise, Operation

FEWEST = 8  # programs for a process: it takes seconds to begin, and half a second for each

Args = tuple[Any, ...]  # what an operator is called with
Choose = Callable[[str, Args], Sequence[Choice | None]]  # by which kernels an operator is to be launched
Serves = Callable[[str], bool]  # whether Triton serves an operator


def by_rule(operator: str, args: Args) -> Sequence[Choice | None]:
    """As operators are launched that were never measured."""
    return [None]


def candidates_of(operator: str, args: Args) -> list[Choice]:
    """What is worth timing on a GPU for a convolution's arguments, the rule's choice first."""
    candidates = importlib.import_module("fastp2p.kernels.candidates")
    return [*candidates.candidates(candidates.product_of(operator, args)), "aten"]


def whatever_is_chosen(operator: str, args: Args) -> Sequence[Choice | None]:
    """By every kernel that the tuner may choose."""
    return candidates_of(operator, args) if operator in CONVOLUTIONS else [None]


def as_chosen(table: Table) -> Choose:
    """As operators are launched with these choices in force."""

    def choose(operator: str, args: Args) -> Sequence[Choice | None]:
        measured = table.get(kernel_choices.problem_of(operator, args)) if operator in CONVOLUTIONS else None
        return [None if measured is None else measured.choice]

    return choose


class MetaStep(Rehearsal):
    """A training step without values: its methods launch what it launches, for `kernels.ahead.recording` to note.

    Args:
        step: is left as it is.
        serves: the other operators launch nothing.
    """

    def __init__(self, step: Step, serves: Serves):
        super().__init__(step)
        self.serves = serves

    def launch(self, images: int, choose: Choose = by_rule) -> None:
        """A step of so many images, each operator by every kernel that `choose` names."""
        with _Launches(self.serves, choose):
            self.step.launch(self.batch(images))

    def launch_augment(self, images: int, height: int, width: int) -> None:
        """What cuts a batch out of pairs of this size, as a graph does."""
        with torch._C._AutoDispatchBelowAutograd(), _Launches(self.serves, by_rule):
            self.crops(images, height, width).cut(META, self.step.image_dtypes)


def launch_tuner(operations: Sequence[Operation]) -> None:
    """Launch everything that the tuner times of these operations, on operands as it makes them."""
    noise = Noise(META)
    for operation in operations:
        args, name = operation.operands(noise), operation.operator
        for choice in candidates_of(name, args):
            library.launch(name, choice, args)


def compile_ahead(launch: Callable[[Serves], object], device: torch.device, say: Callable[[str], object]) -> None:
    """Compile the programs that `launch` launches by as many processes as there are cores, on a GPU that Triton serves.

    What Triton's cache holds is not compiled again; for a few programs, or on one core, no process is begun. What does
    not compile is left to who launches it, and raises there.

    Args:
        launch: is told which operators Triton serves; works on meta tensors.
        device: whose programs they are.
        say: takes a line of report.
    """
    if device.type != "cuda" or library.served_by("conv", "cuda") != "Triton":
        return
    compiler = importlib.import_module("fastp2p.kernels.ahead")
    target = compiler.Target.of(torch.cuda.current_device() if device.index is None else device.index)
    with compiler.recording(target) as programs:
        launch(lambda operator: library.served_by(operator, "cuda") == "Triton")
    compile_missing(programs, target, say)


def compile_missing(programs: Any, target: Any, say: Callable[[str], object]) -> None:
    """Those of `recording` that the cache lacks, in parallel where that is worth it."""
    compiler = importlib.import_module("fastp2p.kernels.ahead")
    missing = compiler.missing(programs, target)
    processes = min(len(os.sched_getaffinity(0)), len(missing) // FEWEST)
    if processes < 2:
        return
    began = time.monotonic()
    results = compiler.compile_programs(missing, target, processes=processes)
    failed = sum(result.error is not None for result in results)
    left = f", {failed} of them in vain" if failed else ""
    say(f"kernels: {len(missing)} programs compiled by {processes} processes in {time.monotonic() - began:.1f} s{left}")


class _Launches(TorchDispatchMode):
    """Sends operators to Triton's launchers, whatever their device."""

    def __init__(self, serves: Serves, choose: Choose):
        super().__init__()
        self.serves, self.choose = serves, choose

    def __torch_dispatch__(self, func: Any, types: Any, args: Args = (), kwargs: Any = None) -> Tensor | Any:
        namespace, _, name = func.name().partition("::")
        if namespace != "fastp2p" or not self.serves(name):
            return func(*args, **(kwargs or {}))
        results = [library.launch(name, choice, args) for choice in self.choose(name, args)]
        return results[0]
