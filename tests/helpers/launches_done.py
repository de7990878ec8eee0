"""A small step in Triton's interpreter, in a process with TRITON_INTERPRET=1: prints each launch as it was done.

One JSON list: of each launch the kernel, its programs, its numbers and constants, shapes and dtypes of its tensors, and
how many iterations the loops of its longest program had, those for what other programs left apart.
"""

import builtins
import importlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from triton.runtime import interpreter

from fastp2p.engine.step import Batch
from fastp2p.kernels.compile_check import KERNEL_FILES
from fastp2p.kernels.launches import KernelLaunch
from fastp2p.models.pix2pix.networks import PatchDiscriminator, UnetGenerator
from fastp2p.models.pix2pix.step import FusedStep

SIDE, IMAGES = 16, 2
MERGES = ("add_splits", "merge_rows", "add_rows", "_sum_of_all")  # functions whose loops take what others left
PROCESSORS, SHARED_BYTES = 8, 227 * 1024  # as kernels.gemm has them for the interpreter


def step_of(dtype: torch.dtype) -> FusedStep:
    """Small networks with batch norm, two inputs, dropout and split sums, on the default device."""
    torch.manual_seed(0)
    nets = (UnetGenerator(levels=4, ngf=16), PatchDiscriminator(ndf=8, n_layers=1))
    optimizers = [torch.optim.Adam(net.parameters(), betas=(0.5, 0.999)) for net in nets]
    return FusedStep(*nets, *optimizers, size=(SIDE, SIDE), dtype=dtype)


def batch() -> Batch:
    """Images as crops are cut."""
    images = torch.rand(2, IMAGES, 3, SIDE, SIDE) * 2 - 1
    return {name: x.contiguous(memory_format=torch.channels_last) for name, x in zip("AB", images, strict=True)}


def told(launch: KernelLaunch) -> dict[str, Any]:
    """What a launch was given, without addresses."""
    given = {
        name: [*value.shape, str(value.dtype)] if isinstance(value, Tensor) else value
        for name, value in launch.arguments.items()
    }
    return {"kernel": launch.name, "programs": launch.programs, "arguments": given}


class Loops:
    """Counts the iterations of `range` in each program of a launch."""

    def __init__(self) -> None:
        self.programs: list[list[int]] = []  # iterations of each, and those of merges
        set_grid_idx = interpreter.interpreter_builder.set_grid_idx

        def begin(*place: int) -> None:
            self.programs.append([0, 0])
            set_grid_idx(*place)

        interpreter.interpreter_builder.set_grid_idx = begin
        for name in (*KERNEL_FILES, "sums"):
            vars(importlib.import_module(f"fastp2p.kernels.{name}"))["range"] = self.range

    def range(self, *ends: Any) -> Iterator[int]:
        caller = sys._getframe(1).f_code.co_name
        for i in builtins.range(*ends):
            if self.programs:
                self.programs[-1][caller in MERGES] += 1
            yield i


def main() -> None:
    step, images, loops, done = step_of(torch.bfloat16), batch(), Loops(), list[dict[str, Any]]()
    launch = interpreter.InterpretedFunction.run

    def run(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **named: Any) -> None:
        loops.programs.clear()
        launch(kernel, *args, grid=grid, warmup=warmup, **named)
        looped, merged = map(max, zip(*loops.programs, strict=True))
        loops.programs.clear()
        done.append(told(KernelLaunch.of(kernel, grid, args, named)) | {"iterations": looped, "merges": merged})

    interpreter.InterpretedFunction.run = run
    step.launch(images)
    print(json.dumps(done))


if __name__ == "__main__":
    main()
