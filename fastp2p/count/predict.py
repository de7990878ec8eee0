"""How long the launches of a step should take on a GPU that need not be there: predicted from counts, never measured.

A model of a few constants, for 16-bit products. `benchmarks/predicted.py` holds it against what GPUs have taken, and
benchmarks/NOTES.md tells how far it is off.
"""

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastp2p.count.ceilings import Ceilings
from fastp2p.count.launches import Launch

# Products in bfloat16 and copies in memory, as measured on one card of each (benchmarks/NOTES.md)
GPUS = {"H100": Ceilings("an H100", 788e12, 3.018e12), "H200": Ceilings("an H200", 778e12, 4.277e12)}
CAPABILITY, PROCESSORS, CYCLES_PER_SEC = 90, 132, 1.755e9  # those of both; NVIDIA's data sheets, the clock at its boost
ISSUES_A_CYCLE = 4  # instructions of warps that a processor begins

# Seconds of a launch that waits for another, without programmatic dependent launch, beside its work. A chain of empty
# kernels takes 1.1 to 1.3 us a node (benchmarks/graph_latency.py); the first loads and last stores come on top.
NODE = 2.5e-6
MERGE = 1.2e-6  # each step of the last program to arrive: about what a merge's iteration took on an H200

# A product that ends in sums over pixels: a wave's seconds for each element of a thread, and the last program's beside
# its merges. An H200 took 0.172 and 2.8 us, of 1636 and 793 instructions (epilogues.json of 2026-11-28, 64x64 tiles);
# now they are 943 and 511, and these two are scaled so
SUMS, LAST = 0.10e-6, 1.8e-6

# Fitted once to products that one launch made on an H200, batch sizes 1 and 16 (benchmarks/predicted.py --fit)
LATENCY = 0.62e-6  # seconds from a block's load to its use; with s stages s - 1 loads are under way
LOADED_PER_SEC = 70e9  # bytes of blocks that a processor takes in
ADAM_PER_SEC = 2.0e12  # bytes of a product that Adam ends, at most: its loads wait for the product
ADAM_LATENCY = 2.7e-6  # seconds of such a program beside its blocks
GATHER_CYCLES = 13.0  # a processor's, for a warp's load of single elements

# Instructions that a warp issues for a block of the sum, about as in sm_90's machine code, which a test reads: in any
# case, for a copy of 16 bytes a thread of the gathered operand, and for one of the other operand
WHOLE, WHOLE_WGRAD = (68, 20, 7), (27, 35, 12)
ELEMENTWISE, ELEMENT, ELEMENT_WGRAD = 60, 16, 30  # in any case, and for a thread's load of one element
REGISTERS, REGISTERS_AN_ELEMENT, MOST_REGISTERS = 100, 1.5, 255  # a thread's: about, and for its part of the tile
ITEMSIZE = 2  # bytes of the operands' element


@dataclass(frozen=True)
class Predicted:
    """Seconds that a launch should take, by what takes them."""

    node: float  # beginning and ending
    work: dict[str, float]  # matrix, issue, loads, gather, serial, bytes, adam: the longest counts
    merges: float

    @property
    def total(self) -> float:
        return self.node + max(self.work.values()) + self.merges

    @property
    def bound_by(self) -> str:
        """What takes most of it."""
        terms = self.work | {"node": self.node, "merges": self.merges}
        return max(terms, key=lambda name: terms[name])


@dataclass(frozen=True)
class PredictedStep:
    """Seconds that a step should take on one GPU.

    Launches side by side slow one another down by no more than the totals of bytes and products.
    """

    ceilings: Ceilings
    launches: list[Predicted]
    path: float  # the longest path through launches that wait for one another
    on_path: list[int]  # their numbers
    bytes: float  # all that is read and written, at the rate of a copy
    matrix: float  # all products, at the rate of a large one

    @property
    def total(self) -> float:
        return max(self.path, self.bytes, self.matrix)

    @property
    def bound_by(self) -> str:
        """The longest of the three."""
        return max(("path", "bytes", "matrix"), key=lambda name: float(getattr(self, name)))

    def terms(self) -> dict[str, float]:
        """The seconds of the longest path, by what they go into, most first."""
        sums: dict[str, float] = {}
        for number in self.on_path:
            one = self.launches[number]
            longest = max(one.work, key=lambda name: one.work[name])
            for name, seconds in (("node", one.node), (longest, one.work[longest]), ("merges", one.merges)):
                sums[name] = sums.get(name, 0.0) + seconds
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


def multiplies(launch: Launch) -> bool:
    """Whether it is a GEMM: a tile, and blocks of a sum."""
    return {"BLOCK_M", "BLOCK_N", "BLOCK_K"} <= set(launch.config)


def instructions(launch: Launch) -> float:
    """What a warp of a GEMM issues for a block of the sum, about."""
    gathered, other = _sides(launch)
    wgrad = launch.kernel.startswith("conv_wgrad")
    threads: int = 32 * launch.config["num_warps"]
    depth: int = launch.config["BLOCK_K"]
    if launch.gathers:
        return ELEMENTWISE + (ELEMENT_WGRAD if wgrad else ELEMENT) * gathered * depth / threads
    once, copy, other_copy = WHOLE_WGRAD if wgrad else WHOLE
    copies = depth * ITEMSIZE / 16 / threads
    return once + (copy * gathered + other_copy * other) * copies


def predict(launch: Launch, ceilings: Ceilings) -> Predicted:
    """The time of one launch, in a chain of others.

    Args:
        launch: of 16-bit operands.
        ceilings: of a GPU with the processors of an H100.
    """
    merges = MERGE * (launch.merges or 0) + LAST * launch.sums
    if multiplies(launch):
        return Predicted(NODE, _product(launch, ceilings), merges)
    rate = min(ceilings.bytes_per_sec, LOADED_PER_SEC * (launch.programs or PROCESSORS))
    waits = LATENCY * ((launch.iterations or 1) - 1)
    return Predicted(NODE, {"bytes": launch.n_bytes / rate, "serial": waits}, merges)


def _product(launch: Launch, ceilings: Ceilings) -> dict[str, float]:
    """Seconds of a GEMM, each alone.

    The programs that a processor holds at once share its tensor cores, its issue slots and its loads; each waits for
    its own blocks one after the other.
    """
    config = launch.config
    gathered, other = _sides(launch)
    depth, warps = config["BLOCK_K"], config["num_warps"]
    elements = gathered * depth / 32 if launch.gathers else 0.0  # loads of a warp, by all of them
    ends_with_adam = launch.kernel.endswith("adam_kernel")
    block = {  # one block of one program
        "matrix": config["BLOCK_M"] * config["BLOCK_N"] * depth / (ceilings.flop_per_sec / 2 / PROCESSORS),
        "issue": instructions(launch) * warps / ISSUES_A_CYCLE / CYCLES_PER_SEC,
        "loads": (other + (0 if elements else gathered)) * depth * ITEMSIZE / LOADED_PER_SEC,
    }
    scattered = elements * GATHER_CYCLES / CYCLES_PER_SEC  # beside nothing else, by the fit
    alone = LATENCY / max(1, config["num_stages"] - 1) + block["matrix"] + block["issue"]
    blocks, programs = launch.iterations or 1, launch.programs or 1
    full, rest = divmod(programs, PROCESSORS * _held(launch))
    waves = [_held(launch)] * full + [math.ceil(rest / PROCESSORS)] * (rest > 0)
    after = ADAM_LATENCY * ends_with_adam
    if launch.sums:
        after += SUMS * config["BLOCK_M"] * config["BLOCK_N"] / (32 * warps)
    serial = sum(blocks * max(alone, n * (max(block.values()) + scattered)) + after for n in waves)
    work = {name: sum(waves) * blocks * seconds for name, seconds in block.items()}
    work["gather"] = sum(waves) * blocks * scattered
    work |= {"serial": serial, "bytes": launch.n_bytes / ceilings.bytes_per_sec}
    return work | ({"adam": launch.n_bytes / ADAM_PER_SEC} if ends_with_adam else {})


def _sides(launch: Launch) -> tuple[int, int]:
    """The side of a tile whose operand is gathered, and the other."""
    m, n = launch.config["BLOCK_M"], launch.config["BLOCK_N"]
    return (n, m) if launch.kernel.startswith("conv_wgrad") else (m, n)


def _held(launch: Launch) -> int:
    """The programs that a processor holds at once, by about the registers that they take."""
    disassembly = importlib.import_module("fastp2p.kernels.disassembly")
    shared_bytes = importlib.import_module("fastp2p.kernels.compile_check").shared_bytes
    config, warps = launch.config, launch.config["num_warps"]
    elements = config["BLOCK_M"] * config["BLOCK_N"] / (32 * warps)
    registers = min(MOST_REGISTERS, round(REGISTERS + REGISTERS_AN_ELEMENT * elements))
    held = disassembly.programs_per_processor(registers, shared_bytes(config, ITEMSIZE), warps, CAPABILITY)
    return max(1, int(held))


def predict_step(launches: Sequence[Launch], ceilings: Ceilings) -> PredictedStep:
    """The time of a step: the longest path through its launches, and no less than all bytes or all products take.

    Args:
        launches: all of a step's, as `count_launches` gives them.
        ceilings: one of GPUS.
    """
    found = [predict(launch, ceilings) for launch in launches]
    ends: list[float] = []
    before: list[int] = []  # for each launch the one that it waits for longest; -1: it waits for none
    for launch, one in zip(launches, found, strict=True):
        last = max(launch.after, key=lambda number: ends[number], default=-1)
        ends.append((ends[last] if last >= 0 else 0.0) + one.total)
        before.append(last)
    on_path: list[int] = []
    number = max(range(len(ends)), key=lambda i: ends[i], default=-1)
    while number >= 0:
        on_path.append(number)
        number = before[number]
    return PredictedStep(
        ceilings,
        found,
        path=max(ends, default=0.0),
        on_path=on_path[::-1],
        bytes=sum(launch.n_bytes for launch in launches) / ceilings.bytes_per_sec,
        matrix=sum(launch.flop for launch in launches) / ceilings.flop_per_sec,
    )
