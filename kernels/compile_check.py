"""Compile every kernel, in every configuration, for every target, without a GPU, and read what came out.

    python -m fastp2p.kernels.compile_check        # make compile-check: all of TARGETS
    python -m fastp2p.kernels.compile_check 90     # those named

Prints a table (kernel, configuration, target, registers, spilled bytes, shared memory, tensor-core instructions; for
GEMMs on sm_80 and sm_90 programs a processor, and the loop over the sum as machine code), then a summary. It exits with
1 when a kernel spills registers, needs more shared memory than its target has, multiplies 16-bit matrices without
tensor cores, on sm_90 tiles of 64 rows or more without wgmma, or loads whole blocks element by element. Triton brings
the assembler, ptxas, and the disassembler, nvdisasm, along.
"""

import functools
import importlib
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastp2p.kernels import disassembly
from fastp2p.kernels.disassembly import Loop

# Each file that tells what its launches compile
KERNEL_FILES = sorted(
    path.stem for path in Path(__file__).parent.glob("*.py") if "\ndef compile_cases(" in path.read_text()
)

# Compute capability -> shared memory of one block in KiB (CUDA programming guide, technical specifications)
TARGETS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
PTXAS_FLAGS = ["--regAllocOptLevel=2"] if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else []
# A configuration's options for the compiler; the rest are the kernel's constants
OPTIONS = ("num_warps", "num_stages", "maxnreg")
DEFAULT_WARPS = 4  # Triton's, without num_warps
TOGETHER = 16  # programs that one run of the disassembler reads, since it takes half a second to start


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

    def copies_rows(self, config: dict[str, Any]) -> bool:
        """Whether blocks are whole and every matrix has rows of whole 16 bytes: no load need be of single elements."""
        channels = [size for name, size in self.sizes.items() if name.startswith("n_")]
        return bool(config.get("WHOLE_BLOCKS")) and all(n * self.itemsize % 16 == 0 for n in channels)

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
    copies_rows: bool = False  # no load need be of single elements
    loops: tuple[Loop, ...] = ()  # those over the sum, where the machine code is read

    @property
    def programs(self) -> int:
        """How many a processor holds at once; 0 where the target's limits are not written down."""
        if self.capability not in disassembly.MACHINES:
            return 0
        warps: int = self.config.get("num_warps", DEFAULT_WARPS)
        held: int = disassembly.programs_per_processor(self.registers, self.shared_bytes, warps, self.capability)
        return held

    @property
    def pressure(self) -> float:
        """The worst loop's `Loop.pressure`; 0 without a loop of 16-bit products."""
        if self.itemsize != 2:
            return 0.0
        return max((loop.pressure(self.capability) for loop in self.loops), default=0.0)

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
        narrow = self.copies_rows and self.itemsize == 2 and any(loop.narrow for loop in self.loops)
        faults += ["loads single elements of whole blocks"] if narrow else []
        return faults + ["local memory in the loop"] * any(loop.local for loop in self.loops)


def shared_bytes(config: dict[str, int], itemsize: int) -> int:
    """Shared memory to set aside for a GEMM: a tile's operands times its stages, and 4 KiB for barriers and reductions.

    A tile that fits its target with less to spare would run alone on a processor, for which it is too small.
    """
    operands = config["BLOCK_K"] * (config["BLOCK_M"] + config["BLOCK_N"]) * itemsize
    return config["num_stages"] * operands + 4096


TWO_PROGRAMS = {"maxnreg": 128}  # the registers of a thread that let a Hopper GPU's processor hold two of eight warps

HALF = {"BLOCK_N": 128, "num_stages": 3}  # what a tile of 128 x 256 becomes where it spills


def on_target(config: dict[str, Any], capability: int) -> dict[str, Any]:
    """A GEMM's tile for a compute capability: other GPUs spill by TWO_PROGRAMS, and by the widest tile."""
    if capability == 90:
        return config
    config = config | {"maxnreg": 255} if config.items() >= TWO_PROGRAMS.items() else config
    return config | HALF if config.get("BLOCK_N") == 256 else config


def all_cases() -> list[Case]:
    """The cases of every kernel file: what its `compile_cases` yields."""
    files = (importlib.import_module(f"fastp2p.kernels.{name}") for name in KERNEL_FILES)
    return [case for file in files for case in file.compile_cases()]


Program = tuple[Case, dict[str, Any], int, bool]  # case, configuration, capability, aligned


def compile_case(case: Case, config: dict[str, Any], capability: int, aligned: bool) -> Compiled:
    """Compile for one target and read what came out."""
    return compile_programs([(case, config, capability, aligned)])[0]


def compile_programs(chosen: Sequence[Program]) -> list[Compiled]:
    """Compile each for its target and read what came out; of GEMMs the machine code, of all in one go."""
    kernels = [build(*program) for program in chosen]
    rows = [_read(*program, kernel) for program, kernel in zip(chosen, kernels, strict=True)]
    for capability in disassembly.MACHINES:
        gemms = [i for i, row in enumerate(rows) if row.itemsize and row.capability == capability]
        texts = [disassembly.text_of(kernels[i].asm["cubin"]) for i in gemms]
        for i, instructions in zip(gemms, disassembly.disassemble(texts, capability), strict=True):
            rows[i] = replace(rows[i], loops=tuple(disassembly.main_loops(instructions)))
    return rows


def build(case: Case, config: dict[str, Any], capability: int, aligned: bool) -> Any:
    """Triton's compiled kernel, with its PTX and its cubin."""
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
    return compiled


def _read(case: Case, config: dict[str, Any], capability: int, aligned: bool, kernel: Any) -> Compiled:
    """What the PTX and the cubin show. Only a kernel with a stack frame is assembled again, for what it spills."""
    ptx = kernel.asm["ptx"]
    registers, stack_bytes = disassembly.resources(kernel.asm["cubin"])
    return Compiled(
        case.name,
        config,
        capability,
        aligned,
        registers=registers,
        spilled_bytes=spilled_bytes(assemble(ptx, capability)) if stack_bytes else 0,
        shared_bytes=kernel.metadata.shared,
        itemsize=case.itemsize,
        tensor_core=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
        wgmma=ptx.count("wgmma.mma_async"),
        copies_rows=case.copies_rows(config),
    )


def assemble(ptx: str, capability: int, cubin: str = os.devnull) -> str:
    """What ptxas -v says of a PTX program, which it assembles into the file `cubin`."""
    from triton.backends.nvidia.compiler import get_ptxas  # not at the top: kernels import this file on every GPU

    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target, "the PTX names no target"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        flags = ["-v", "-lineinfo", *PTXAS_FLAGS, f"--gpu-name={target[1]}"]  # as Triton calls it
        command = [get_ptxas(capability).path, *flags, str(path), "-o", cubin]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def spilled_bytes(report: str) -> int:
    """Spill stores and loads of a ptxas report, in bytes per thread; a stack frame alone is none."""
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill", report))


def programs(cases: list[Case], capabilities: Iterable[int] = tuple(TARGETS)) -> Iterator[Program]:
    """What to compile; of those that give the same program the first."""
    seen = set()
    for case in cases:
        for capability in capabilities:
            fitting = [config for config in case.configs if case.fits(config, capability)]
            assert fitting, f"{case.name} has no configuration for sm_{capability}"
            for config in [on_target(config, capability) for config in fitting]:
                for aligned in (True,) if case.sizes else (True, False):
                    program = case.program(config, capability, aligned)
                    if program not in seen:
                        yield case, config, capability, aligned
                    seen.add(program)


_ROW = "{:34} {:88} {:7} {:7} {:>9} {:>7} {:>7} {:>4} {:>5} {:>8} {}"


def check(cases: list[Case], capabilities: Iterable[int] = tuple(TARGETS)) -> list[Compiled]:
    """Compile each case in each configuration that fits each target, print the table, and return its rows.

    A configuration that asks for more shared memory than a target has is left out there, as launchers leave it out.
    """
    jobs = list(programs(cases, capabilities))
    heads = ("kernel", "configuration", "aligned", "target", "registers", "spilled", "shared", "mma", "wgmma")
    print(_ROW.format(*heads, "programs", "loop over the sum, a block; faults"))
    rows = []
    with multiprocessing.get_context("fork").Pool(initializer=_set_jobs, initargs=(jobs,)) as pool:
        together = max(1, min(TOGETHER, len(jobs) // multiprocessing.cpu_count()))
        starts = range(0, len(jobs), together)
        for some in pool.imap(_run_jobs, [range(i, min(i + together, len(jobs))) for i in starts]):
            for row in some:
                settings = " ".join(f"{name}={value}" for name, value in row.config.items())
                numbers = (row.registers, row.spilled_bytes, row.shared_bytes, row.tensor_core, row.wgmma)
                ends = (row.programs or "-", "; ".join([*_loops(row), *row.faults]))
                aligned = "yes" if row.aligned else "no"
                print(_ROW.format(row.name, settings, aligned, f"sm_{row.capability}", *numbers, *ends))
                rows.append(row)
    return rows


def _loops(row: Compiled) -> list[str]:
    return [loop.described(row.config) for loop in row.loops]


def _kind(row: Compiled) -> str:
    """What a line of the summary is about."""
    if not row.itemsize:
        return row.name.split()[0]
    blocks = "whole blocks" if row.config.get("WHOLE_BLOCKS", True) else "gathered"
    return f"{row.name.split()[0]}, {8 * row.itemsize} bits, {blocks}"


SUMMARY_SAYS = """
Each kind's median program and its worst. Programs: those that a processor holds at once. Instructions: a warp's for a
block of the sum. Issue / matrix: cycles to issue them over the cycles of the products; above 1 tensor cores wait."""


def summary(rows: Iterable[Compiled]) -> str:
    """A line for each kind of kernel and target: the median program, and the worst."""
    kinds: dict[tuple[str, int], list[Compiled]] = {}
    for row in rows:
        kinds.setdefault((_kind(row), row.capability), []).append(row)
    line = "{:42} {:7} {:>8} {:>6} {:>13} {:>13} {:>16} {:>18} {:>16}"
    heads = ("compiled", "faults", "registers", "shared KiB", "programs", "instructions", "issue / matrix")
    lines = [SUMMARY_SAYS, line.format("kind", "target", *heads)]
    for (kind, capability), found in sorted(kinds.items()):
        registers = [row.registers for row in found]
        shared = [row.shared_bytes / 1024 for row in found]
        held = [row.programs for row in found if row.programs]
        issued = [loop.instructions / loop.blocks(row.config) for row in found for loop in row.loops]
        pressures = [row.pressure for row in found if row.pressure]
        faults = sum(bool(row.faults) for row in found)
        cells = [_median_and(max, registers), _median_and(max, shared), _median_and(min, held)]
        cells += [_median_and(max, issued), _median_and(max, pressures, digits=1)]
        lines.append(line.format(kind, f"sm_{capability}", len(found), faults, *cells))
    return "\n".join(lines)


def _median_and(worst: Callable[[Sequence[float]], float], values: Sequence[float], digits: int = 0) -> str:
    return f"{statistics.median(values):.{digits}f}, {worst(values):.{digits}f}" if values else "-"


_jobs: list[Program] = []  # in a worker process: kernels cannot be pickled, numbers can


def _set_jobs(jobs: list[Program]) -> None:
    _jobs[:] = jobs


def _run_jobs(numbers: range) -> list[Compiled]:
    return compile_programs([_jobs[number] for number in numbers])


if __name__ == "__main__":
    chosen = [int(argument) for argument in sys.argv[1:]] or list(TARGETS)
    if not set(chosen) <= set(TARGETS):
        sys.exit(f"compile_check: got {chosen}, expected some of {', '.join(map(str, TARGETS))}")
    rows = check(all_cases(), chosen)
    faulty = sum(bool(row.faults) for row in rows)
    print(summary(rows))
    print(f"{len(rows)} compiled, {faulty} with a fault")
    sys.exit(faulty > 0)
