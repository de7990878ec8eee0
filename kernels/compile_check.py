"""Compile every kernel, in every configuration, for every target, without a GPU, and read what came out.

    python -m fastp2p.kernels.compile_check        # make compile-check

Prints a table (kernel, configuration, target, registers, spilled bytes, shared memory) and exits with 1 when a kernel
spills registers or needs more shared memory than its target has. Triton brings the assembler, ptxas, along.
"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNEL_FILES = ("adam", "augment", "patch_loss")

# Compute capability -> shared memory of one block in KiB (CUDA programming guide, technical specifications)
TARGETS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
PTXAS_FLAGS = ["--regAllocOptLevel=2"] if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else []
OPTIONS = ("num_warps", "num_stages")  # of a configuration, for the compiler; the rest are the kernel's constants


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel: argument name -> Triton type, constants, and the configurations to try."""

    name: str
    kernel: Any  # a triton.jit function
    types: dict[str, str]
    constants: dict[str, int]
    configs: list[dict[str, Any]]


@dataclass(frozen=True)
class Compiled:
    """What the compiler and the assembler say of one case, configuration and target."""

    name: str
    config: dict[str, Any]
    capability: int
    aligned: bool
    registers: int  # per thread
    spilled_bytes: int  # per thread
    shared_bytes: int  # per block

    @property
    def faults(self) -> list[str]:
        """Why it may not be used; empty when it may."""
        limit = TARGETS[self.capability] * 1024
        spills = [f"spills {self.spilled_bytes} bytes"] if self.spilled_bytes else []
        return spills + ([f"shared memory over {limit} bytes"] if self.shared_bytes > limit else [])


def all_cases() -> Iterator[Case]:
    """The cases of every kernel file: what its `compile_cases` yields."""
    for name in KERNEL_FILES:
        yield from importlib.import_module(f"fastp2p.kernels.{name}").compile_cases()


def compile_case(case: Case, config: dict[str, Any], capability: int, aligned: bool) -> Compiled:
    """Compile for one target and read the assembler's report.

    A launch specialises on what it finds: `aligned` is its variant for pointers and sizes that are multiples of 16.
    """
    constants = case.constants | {name: value for name, value in config.items() if name not in OPTIONS}
    signature = {name: case.types.get(name, "constexpr") for name in case.kernel.arg_names}
    whole = [["tt.divisibility", 16]]  # what a launch finds of aligned pointers and of sizes that are multiples of 16
    divisible = [i for i, name in enumerate(case.kernel.arg_names) if aligned and signature[name][0] in "*i"]
    compiled = triton.compile(
        ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs={(i,): whole for i in divisible}),
        target=GPUTarget("cuda", capability, 32),
        options={name: config[name] for name in OPTIONS if name in config},
    )
    report = assemble(compiled.asm["ptx"], capability)
    registers = re.search(r"Used (\d+) registers", report)
    assert registers, f"ptxas said nothing of registers:\n{report}"
    return Compiled(
        case.name, config, capability, aligned, int(registers[1]), spilled_bytes(report), compiled.metadata.shared
    )


def assemble(ptx: str, capability: int) -> str:
    """What ptxas -v says of a PTX program."""
    from triton.backends.nvidia.compiler import get_ptxas  # not at the top: kernels import this file on every GPU

    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target, "the PTX names no target"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        flags = ["-v", "-lineinfo", *PTXAS_FLAGS, f"--gpu-name={target[1]}"]  # as Triton calls it
        command = [get_ptxas(capability).path, *flags, str(path), "-o", os.devnull]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def spilled_bytes(report: str) -> int:
    """Spill stores and loads of a ptxas report, in bytes per thread; a stack frame alone is none."""
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill", report))


def check(cases: Iterable[Case], capabilities: Iterable[int] = tuple(TARGETS)) -> list[Compiled]:
    """Compile each case in each configuration for each target, print the table, and return its rows."""
    print(
        f"{'kernel':28} {'configuration':26} {'aligned':7} {'target':7} {'registers':>9} {'spilled':>8} {'shared':>8}"
    )
    rows = []
    for case in cases:
        for config in case.configs:
            for capability in capabilities:
                for aligned in (True, False):
                    row = compile_case(case, config, capability, aligned)
                    settings = " ".join(f"{name}={value}" for name, value in config.items())
                    print(
                        f"{row.name:28} {settings:26} {'yes' if aligned else 'no':7} sm_{capability:<4} "
                        f"{row.registers:9} {row.spilled_bytes:8} {row.shared_bytes:8} {', '.join(row.faults)}"
                    )
                    rows.append(row)
    return rows


if __name__ == "__main__":
    rows = check(all_cases())
    faulty = sum(bool(row.faults) for row in rows)
    print(f"{len(rows)} compiled, {faulty} with a fault")
    sys.exit(faulty > 0)
