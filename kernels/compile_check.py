"""Compile every kernel, in every configuration, for every target, without a GPU, and read what came out.

    python -m fastp2p.kernels.compile_check        # make compile-check: all of TARGETS
    python -m fastp2p.kernels.compile_check 90     # those named

Prints a table (kernel, configuration, target, registers, spilled bytes, shared memory, tensor-core instructions) and
exits with 1 when a kernel spills registers, needs more shared memory than its target has, multiplies 16-bit matrices
without tensor cores, or on sm_90 tiles of 64 rows or more without wgmma. Triton brings the assembler, ptxas, along.
"""

import functools
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Each file that tells what its launches compile
KERNEL_FILES = sorted(
    path.stem for path in Path(__file__).parent.glob("*.py") if "\ndef compile_cases(" in path.read_text()
)

# Compute capability -> shared memory of one block in KiB (CUDA programming guide, technical specifications)
TARGETS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
PTXAS_FLAGS = ["--regAllocOptLevel=2"] if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else []
# A configuration's options for the compiler; the rest are the kernel's constants
OPTIONS = ("num_warps", "num_stages", "maxnreg")


@functools.cache
def fix_keys() -> None:
    """Let Triton hash every kernel once, in one order, whatever this process is going to launch first.

    Triton puts the global constants of a function that a kernel calls into the kernel's hash only if that function was
    hashed before (3.6 and 3.7), so a program's place in the cache would depend on what else a process had compiled.
    """
    if triton.knobs.runtime.interpret:  # nothing is compiled
        return
    modules = [importlib.import_module(f"fastp2p.kernels.{name}") for name in ("activation", *KERNEL_FILES)]
    functions = [f for module in modules for f in vars(module).values() if isinstance(f, triton.JITFunction)]
    for function in functions:  # forget the hashes of another order
        function.hash, function.used_global_vals = None, {}
    for function in functions:
        function.cache_key  # noqa: B018 (it is kept)


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel: argument name -> Triton type, constants, and the configurations to try.

    With `sizes` its integer arguments are those of a real layer, and it is compiled as a launch with them would be.
    """

    name: str
    kernel: Any  # a triton.jit function
    types: dict[str, str]
    constants: dict[str, Any]
    configs: list[dict[str, Any]]
    sizes: dict[str, int] = field(default_factory=dict)
    itemsize: int = 0  # the operands' element, in bytes; 0 where it multiplies none

    def fits(self, config: dict[str, Any], capability: int) -> bool:
        """Whether a target has the shared memory for a configuration, by the estimate that launchers go by."""
        return not self.itemsize or shared_bytes(config, self.itemsize) <= TARGETS[capability] * 1024

    def specialisation(self, aligned: bool) -> tuple[dict[str, int], list[int]]:
        """What a launch finds: arguments that are 1, and the positions of those that are multiples of 16.

        Of sizes it finds what they are. Without, `aligned` is the launch with pointers and sizes that are multiples.
        """
        found = [p for p in self.kernel.params if self.types.get(p.name, "-")[0] in "*i" and not p.do_not_specialize]
        if not self.sizes:
            return {}, [p.num for p in found] if aligned else []
        ones = {p.name: 1 for p in found if self.sizes.get(p.name) == 1}
        return ones, [p.num for p in found if self.types[p.name][0] == "*" or self.sizes.get(p.name, 1) % 16 == 0]

    def program(self, config: dict[str, Any], capability: int, aligned: bool) -> str:
        """Equal for what compiles to the same program."""
        return repr((self.kernel, self.types, self.constants, self.specialisation(aligned), config, capability))


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
    itemsize: int = 0  # the operands' element, in bytes; 0 where it multiplies none
    tensor_core: int = 0  # instructions: mma, wgmma and tcgen05.mma
    wgmma: int = 0  # those among them that are wgmma

    @property
    def faults(self) -> list[str]:
        """Why it may not be used; empty when it may."""
        limit = TARGETS[self.capability] * 1024
        faults = [f"spills {self.spilled_bytes} bytes"] if self.spilled_bytes else []
        faults += [f"shared memory over {limit} bytes"] if self.shared_bytes > limit else []
        if self.itemsize == 2:
            faults += [] if self.tensor_core else ["no tensor-core instruction"]
            large = self.capability == 90 and self.config["BLOCK_M"] >= 64
            faults += ["no wgmma in a tile of 64 rows or more"] if large and not self.wgmma else []
        return faults


def shared_bytes(config: dict[str, int], itemsize: int) -> int:
    """Shared memory to set aside for a GEMM: a tile's operands times its stages, and 4 KiB for barriers and reductions.

    A tile that fits its target with less to spare would run alone on a processor, for which it is too small.
    """
    operands = config["BLOCK_K"] * (config["BLOCK_M"] + config["BLOCK_N"]) * itemsize
    return config["num_stages"] * operands + 4096


def all_cases() -> list[Case]:
    """The cases of every kernel file: what its `compile_cases` yields."""
    files = (importlib.import_module(f"fastp2p.kernels.{name}") for name in KERNEL_FILES)
    return [case for file in files for case in file.compile_cases()]


def compile_case(case: Case, config: dict[str, Any], capability: int, aligned: bool) -> Compiled:
    """Compile for one target and read the assembler's report."""
    constants = case.constants | {name: value for name, value in config.items() if name not in OPTIONS}
    ones, multiples_of_16 = case.specialisation(aligned)
    constants |= ones
    signature = {name: "constexpr" if name in constants else case.types[name] for name in case.kernel.arg_names}
    whole = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=case.kernel, signature=signature, constexprs=constants, attrs={(i,): whole for i in multiples_of_16}
    )
    target = GPUTarget("cuda", capability, 32)
    options = {name: config[name] for name in OPTIONS if name in config}
    compiled = triton.compile(source, target=target, options=options)
    if "ptx" not in compiled.asm:  # from a cache that keeps binaries alone, such as one that was carried here
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.always_compile, triton.knobs.compilation.store_binary_only = True, False
            compiled = triton.compile(source, target=target, options=options)
    ptx = compiled.asm["ptx"]
    report = assemble(ptx, capability)
    registers = re.search(r"Used (\d+) registers", report)
    assert registers, f"ptxas said nothing of registers:\n{report}"
    return Compiled(
        case.name,
        config,
        capability,
        aligned,
        registers=int(registers[1]),
        spilled_bytes=spilled_bytes(report),
        shared_bytes=compiled.metadata.shared,
        itemsize=case.itemsize,
        tensor_core=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
        wgmma=ptx.count("wgmma.mma_async"),
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


def programs(
    cases: list[Case], capabilities: Iterable[int] = tuple(TARGETS)
) -> Iterator[tuple[Case, dict[str, Any], int, bool]]:
    """What to compile: (case, configuration, capability, aligned), of those that give the same program the first."""
    seen = set()
    for case in cases:
        for capability in capabilities:
            fitting = [config for config in case.configs if case.fits(config, capability)]
            assert fitting, f"{case.name} has no configuration for sm_{capability}"
            for config in fitting:
                for aligned in (True,) if case.sizes else (True, False):
                    program = case.program(config, capability, aligned)
                    if program not in seen:
                        yield case, config, capability, aligned
                    seen.add(program)


_ROW = "{:34} {:88} {:7} {:7} {:>9} {:>7} {:>7} {:>4} {:>5} {}"


def check(cases: list[Case], capabilities: Iterable[int] = tuple(TARGETS)) -> list[Compiled]:
    """Compile each case in each configuration that fits each target, print the table, and return its rows.

    A configuration that asks for more shared memory than a target has is left out there, as launchers leave it out.
    """
    jobs = list(programs(cases, capabilities))
    print(
        _ROW.format(
            "kernel", "configuration", "aligned", "target", "registers", "spilled", "shared", "mma", "wgmma", ""
        )
    )
    rows = []
    with multiprocessing.get_context("fork").Pool(initializer=_set_jobs, initargs=(jobs,)) as pool:
        for row in pool.imap(_run_job, range(len(jobs))):
            settings = " ".join(f"{name}={value}" for name, value in row.config.items())
            aligned, faults = "yes" if row.aligned else "no", ", ".join(row.faults)
            numbers = (row.registers, row.spilled_bytes, row.shared_bytes, row.tensor_core, row.wgmma)
            print(_ROW.format(row.name, settings, aligned, f"sm_{row.capability}", *numbers, faults))
            rows.append(row)
    return rows


_jobs: list[tuple[Case, dict[str, Any], int, bool]] = []  # in a worker process: kernels cannot be pickled, numbers can


def _set_jobs(jobs: list[tuple[Case, dict[str, Any], int, bool]]) -> None:
    _jobs[:] = jobs


def _run_job(number: int) -> Compiled:
    return compile_case(*_jobs[number])


if __name__ == "__main__":
    chosen = [int(argument) for argument in sys.argv[1:]] or list(TARGETS)
    if not set(chosen) <= set(TARGETS):
        sys.exit(f"compile_check: got {chosen}, expected some of {', '.join(map(str, TARGETS))}")
    rows = check(all_cases(), chosen)
    faulty = sum(bool(row.faults) for row in rows)
    print(f"{len(rows)} compiled, {faulty} with a fault")
    sys.exit(faulty > 0)
