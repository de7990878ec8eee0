"""What the machine code of a GEMM shows: its loops over the sum, what an iteration issues, programs per processor.

The compiler moves the first and last loads out of the loop, so that an iteration copies one block while it multiplies
another. Counts are of instructions that a warp issues, those under a predicate included.
"""

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import triton

MACHINES = {80: "SM80", 90: "SM90a"}  # the targets that are read, by nvdisasm's names
STEP = 16  # bytes of an instruction

# CUDA programming guide, technical specifications: those of compute capabilities 8.0 and 9.0, for one processor
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024}
RESERVED_BYTES = 1024  # for each program beside its own
REGISTERS, THREADS, MOST_PROGRAMS = 65536, 2048, 32
PARTITIONS = 4  # each has a quarter of the registers and issues an instruction a cycle, and a warp stays in one
# Multiply-accumulates of 16-bit numbers that a processor's tensor cores do in a cycle (NVIDIA's data sheets: 312
# TFLOP/s of 108 processors at 1.41 GHz, 989 of 132 at 1.83 GHz)
MACS_A_CYCLE = {80: 1024, 90: 2048}
REGISTER_UNIT = 256  # a warp has a multiple of it

_LINE = re.compile(r"/\*(?P<address>[0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>[^;]*);")
_BRANCH = re.compile(r"^(?:BRA|BRX|JMP)\b")
_GLOBAL_LOAD = re.compile(r"^(?P<kind>LDGSTS|LDG|UTMALDG|UBLKCP)\b")
_WIDTH = re.compile(r"\.(?P<width>[US]?(?:8|16)|64|128)\b")
_MATRIX = re.compile(r"^(?:HGMMA\.(?P<m>\d+)x(?P<n>\d+)x(?P<k>\d+)|HMMA\.16(?P<n8>8)(?P<depth>16|8|4))\b")


class Instruction(NamedTuple):
    """A line of a listing."""

    address: int
    opcode: str  # with its modifiers: LDGSTS.E.BYPASS.128
    target: int | None = None  # a branch's


@dataclass(frozen=True)
class Loop:
    """One trip around a loop, as a warp issues it."""

    loads: Mapping[str, int]  # from global memory: kind and width -> count, such as {"LDGSTS.128": 8}
    matrix: Mapping[str, int]  # on tensor cores: kind and shape -> count, such as {"HGMMA.64x128x16": 4}
    local: int  # loads and stores of spilled registers
    others: int
    macs: int  # multiply-accumulates of one warp

    @property
    def instructions(self) -> int:
        return sum(self.loads.values()) + sum(self.matrix.values()) + self.local + self.others

    @property
    def narrow(self) -> int:
        """Loads of one or two bytes a thread: elements that are gathered one by one."""
        return sum(count for load, count in self.loads.items() if re.search(r"\.[US]?(8|16)$", load))

    def pressure(self, capability: int) -> float:
        """Cycles to issue a trip's instructions over cycles of its 16-bit products; 0 without tensor cores.

        Both for a processor full of such warps, so that above 1 its tensor cores wait, whatever else is well.
        """
        return self.instructions / PARTITIONS / (self.macs / MACS_A_CYCLE[capability]) if self.matrix else 0.0

    def described(self, config: Mapping[str, int]) -> str:
        """What a warp issues for a block of the sum, or, where a trip is not one block, for a trip."""
        blocks = self.blocks(config)
        counts = {**self.loads, **self.matrix, "local": self.local, "others": self.others}
        trip = "" if blocks == 1 else f" a trip of {blocks:.2g} blocks"
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count) + trip

    def blocks(self, config: Mapping[str, int]) -> float:
        """Blocks of the sum that a trip multiplies, told from its multiply-accumulates.

        Above 1 the compiler has unrolled the loop, or warps compute the same elements of a tile that is small for them.
        """
        tile = config["BLOCK_M"] * config["BLOCK_N"] * config["BLOCK_K"]
        return self.macs * config["num_warps"] / tile


def text_of(cubin: bytes) -> bytes:
    """The instructions of a cubin that holds one kernel: its section .text, as ELF's header tells where it lies."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    # Each header: name, type, flags, address, offset, size
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + i * size) for i in range(count)]
    begin = sections[names][4]
    found = [s for s in sections if cubin[begin + s[0] :].startswith(b".text.")]
    assert len(found) == 1, f"the cubin holds {len(found)} kernels, expected one"
    offset, length = found[0][4:6]
    return cubin[offset : offset + length]


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack frame, without which it spills none; as cuobjdump tells them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"\bREG:(\d+) STACK:(\d+)", usage)
    assert found, f"cuobjdump said nothing of registers:\n{usage}"
    return int(found[1]), int(found[2])


def disassemble(programs: Sequence[bytes], capability: int) -> list[list[Instruction]]:
    """The instructions of each program, as `text_of` gives it.

    One run of nvdisasm, which takes half a second to start, reads all of them.
    """
    if not programs:
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "programs.bin"
        path.write_bytes(b"".join(programs))
        command = [triton.knobs.nvidia.nvdisasm.path, "--binary", MACHINES[capability], str(path)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions, found, begin = parse(listing), [], 0
    for program in programs:
        count = len(program) // STEP
        found.append(instructions[begin : begin + count])
        begin += count
    assert begin == len(instructions), f"nvdisasm gave {len(instructions)} instructions, expected {begin}"
    return found


def parse(listing: str) -> list[Instruction]:
    """The instructions of nvdisasm's listing of bare machine code, whose branches name addresses."""
    found = []
    for line in _LINE.finditer(listing):
        target = re.search(r"0x([0-9a-f]+)\s*$", line["rest"]) if _BRANCH.match(line["opcode"]) else None
        found.append(Instruction(int(line["address"], 16), line["opcode"], int(target[1], 16) if target else None))
    return found


def main_loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """The loops that multiply matrices, in their order: one for each input that a sum is over.

    A loop lies between a branch backward and its target; one that holds another that multiplies is not counted. Without
    tensor cores it is the loop of the most FFMA. None: the compiler has unrolled the sum, or there is none.
    """
    first = instructions[0].address if instructions else 0
    ends: dict[int, int] = {}  # first instruction -> last
    for i, instruction in enumerate(instructions):
        if instruction.target is not None and first <= instruction.target < instruction.address:
            ends[(instruction.target - first) // STEP] = i
    bodies = {(begin, end): _count(instructions[begin : end + 1]) for begin, end in ends.items()}
    multiplying = [span for span, loop in bodies.items() if loop.matrix]
    if not multiplying:
        most = max((loop.macs for loop in bodies.values()), default=0)
        multiplying = [span for span, loop in bodies.items() if loop.macs and loop.macs == most]
    innermost = [
        (begin, end)
        for begin, end in multiplying
        if not any(begin <= a and b <= end and (a, b) != (begin, end) for a, b in multiplying)
    ]
    return [bodies[span] for span in sorted(innermost)]


def _count(body: Sequence[Instruction]) -> Loop:
    loads: Counter[str] = Counter()
    matrix: Counter[str] = Counter()
    local = others = macs = 0
    for _, opcode, _ in body:
        load, product = _GLOBAL_LOAD.match(opcode), _MATRIX.match(opcode)
        if load:
            width = _WIDTH.search(opcode)
            loads[f"{load['kind']}.{width['width'] if width else '32'}"] += 1
        elif product and product["m"]:  # four warps together
            matrix[f"HGMMA.{product['m']}x{product['n']}x{product['k']}"] += 1
            macs += int(product["m"]) * int(product["n"]) * int(product["k"]) // 4
        elif product:
            matrix[f"HMMA.16x8x{product['depth']}"] += 1
            macs += 16 * 8 * int(product["depth"])
        else:
            local += opcode.startswith(("LDL", "STL"))
            others += not opcode.startswith(("LDL", "STL"))
            macs += 32 * opcode.startswith("FFMA")  # a thread's one
    return Loop(dict(loads), dict(matrix), local, others, macs)


def programs_per_processor(registers: int, shared_bytes: int, warps: int, capability: int) -> int:
    """How many programs a processor holds at once; 0 when not even one fits.

    Args:
        registers: a thread's.
        shared_bytes: a program's.
        warps: a program's, of 32 threads.
        capability: 80 or 90.
    """
    of_a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers: int = REGISTERS // PARTITIONS // of_a_warp * PARTITIONS // warps
    by_shared = SHARED_BYTES[capability] // (shared_bytes + RESERVED_BYTES)
    return min(by_registers, by_shared, THREADS // (32 * warps), MOST_PROGRAMS)
