"""The machine code of GEMMs is read right: from short listings, and from programs compiled on the spot."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton")
compile_check = pytest.importorskip("fastp2p.kernels.compile_check", reason="needs triton")
disassembly = pytest.importorskip("fastp2p.kernels.disassembly", reason="needs triton")

# Lines as nvdisasm 13.1 prints them, of such loops cut to an instruction of each kind
WHOLE = """
	.headerflags	@"EF_CUDA_64BIT_ADDRESS EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR16][R6.64], P2 ;
        /*0020*/                   DEPBAR.LE SB0, 0x2 ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0 ;
        /*0040*/              @!P1 LDGSTS.E.BYPASS.128 [R5], desc[UR16][R6.64], P2 ;
        /*0050*/                   LDGSTS.E [R5+0x400], desc[UR16][R8.64] ;
        /*0060*/               @P0 BRA 0x20 ;
        /*0070*/                   STG.E.128 desc[UR16][R2.64], R4 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
        /*00a0*/                   NOP;
"""
GATHERED = """
        /*0100*/               @P0 BRA 0x1d0 ;
        /*0110*/                   MOV R3, R4 ;
        /*0120*/               @P1 LDG.E.U16 R7, desc[UR4][R8.64] ;
        /*0130*/                   LDG.E.64.CONSTANT R10, desc[UR4][R8.64] ;
        /*0140*/                   LDL.64 R12, [R1+0x8] ;
        /*0150*/                   STL [R1], R12 ;
        /*0160*/                   LDSM.16.M88.4 R16, [R5] ;
        /*0170*/                   HMMA.16816.F32.BF16 R20, R16, R18, R20 ;
        /*0180*/                   LDS.128 R24, [R30] ;
        /*0190*/             @!UP0 BRA 0x180 ;
        /*01a0*/                   FFMA R1, R2, R3, R1 ;
        /*01b0*/               @P2 BRA 0x120 ;
        /*01c0*/               @P3 BRA 0x110 ;
        /*01d0*/                   EXIT ;
"""


def loops(listing: str) -> list[Any]:
    return disassembly.main_loops(disassembly.parse(listing))


def test_the_loop_over_the_sum_is_found():
    """Without what comes before it, and without the branch to itself at the end."""
    (loop,) = loops(WHOLE)
    assert loop.loads == {"LDGSTS.128": 1, "LDGSTS.32": 1}
    assert loop.matrix == {"HGMMA.64x128x16": 1}
    assert (loop.local, loop.others, loop.narrow, loop.instructions) == (0, 2, 0, 5)
    assert loop.blocks({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 16, "num_warps": 4}) == 1
    assert loop.blocks({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4}) == 2
    assert loop.pressure(90) == 5 / 4 / (64 * 128 * 16 / 4 / 2048)


def test_the_innermost_loop_that_multiplies_is_taken():
    """One within it that multiplies nothing belongs to it, and one around it is left out."""
    (loop,) = loops(GATHERED)
    assert loop.loads == {"LDG.U16": 1, "LDG.64": 1}
    assert loop.matrix == {"HMMA.16x8x16": 1}
    assert (loop.local, loop.narrow, loop.instructions) == (2, 1, 10)
    assert loop.macs == 16 * 8 * 16 + 32
    assert loop.described({"BLOCK_M": 16, "BLOCK_N": 8, "BLOCK_K": 16, "num_warps": 1}).startswith(
        "1 LDG.U16, 1 LDG.64"
    )


def test_two_inputs_have_a_loop_each():
    again = WHOLE.replace("/*00", "/*01").replace("0x20", "0x120").replace("HGMMA.64x128", "HGMMA.64x64")
    found = [loop.matrix for loop in loops(WHOLE.replace("EXIT", "NOP") + 5 * "/*00b0*/ NOP;\n" + again)]
    assert found == [{"HGMMA.64x128x16": 1}, {"HGMMA.64x64x16": 1}]


def test_without_tensor_cores_it_is_the_loop_of_the_most_products():
    listing = GATHERED.replace("HMMA.16816.F32.BF16", "FFMA").replace("LDS.128", "FFMA")
    (loop,) = loops(listing)
    assert loop.matrix == {}
    assert loop.macs == 3 * 32
    assert loop.pressure(90) == 0


def test_a_program_without_a_loop():
    assert loops("/*0000*/ MOV R1, R2 ;\n/*0010*/ EXIT ;") == loops("") == []


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "warps", "on_80", "on_90"),
    [
        (255, 0, 8, 1, 1),  # 8 warps of 8192 registers
        (128, 0, 8, 2, 2),
        (129, 0, 8, 1, 1),  # 4352 a warp, 3 of which a partition holds, 12 a processor
        (32, 0, 4, 16, 16),  # 2048 threads
        (16, 0, 1, 32, 32),  # the most programs
        (32, 81 * 1024, 4, 2, 2),
        (32, 82 * 1024, 4, 1, 2),  # with the kibibyte beside each
        (32, 113 * 1024, 4, 1, 2),
        (32, 227 * 1024, 4, 0, 1),
    ],
)
def test_programs_per_processor(registers: int, shared_bytes: int, warps: int, on_80: int, on_90: int):
    found = [disassembly.programs_per_processor(registers, shared_bytes, warps, target) for target in (80, 90)]
    assert found == [on_80, on_90]


def chosen(names: Iterable[str], capability: int) -> list[Any]:
    """The second configuration of each case, 128x64 or the like."""
    cases = {case.name: case for case in reversed(compile_check.all_cases())}
    configs = {name: compile_check.on_target(cases[name].configs[1], capability) for name in names}
    return [(cases[name], configs[name], capability, True) for name in names]


@pytest.mark.parametrize("capability", disassembly.MACHINES)
def test_compiled_programs(capability: int):
    """Each loop of a program multiplies one block a trip, whose bytes it loads: that is the whole of the reading."""
    programs = chosen(["conv e4 bf16", "conv_transpose d4 bf16", "conv_wgrad e4 bf16", "conv e4 fp32"], capability)
    rows = compile_check.compile_programs(programs)
    assert [len(row.loops) for row in rows] == [1, 2, 1, 1]
    widths = {"32": 4, "64": 8, "128": 16}
    for row in rows:
        sides = row.config["BLOCK_M"] + row.config["BLOCK_N"]
        block_bytes = sides * row.config["BLOCK_K"] * row.itemsize
        for loop in row.loops:
            assert loop.blocks(row.config) == pytest.approx(1, abs=0.02)  # a few FFMA multiply no matrix
            loaded = sum(widths[load.split(".")[1]] * n for load, n in loop.loads.items())
            assert loaded * 32 * row.config["num_warps"] == block_bytes
            kinds = {name.split(".")[0] for name in loop.matrix}
            assert kinds == ({"HGMMA" if capability == 90 else "HMMA"} if row.itemsize == 2 else set())
            assert loop.local == 0
        assert 1 <= row.programs <= 8
        assert not row.faults


def test_gathered_elements_are_seen():
    """A first layer of 3 channels gathers element by element, and may: its rows are no multiples of 16 bytes."""
    (row,) = compile_check.compile_programs(chosen(["conv e1 bf16"], 90))
    (loop,) = row.loops
    assert loop.narrow > 0
    assert not row.copies_rows
    assert not row.faults
    assert replace(row, copies_rows=True).faults == ["loads single elements of whole blocks"]


def test_registers_and_the_stack_of_a_cubin():
    """As the assembler reports them; a program with a stack frame is one that may have spilled."""
    (program,) = chosen(["conv e4 bf16"], 80)
    kernel = compile_check.build(*program)
    registers, stack_bytes = disassembly.resources(kernel.asm["cubin"])
    assert f"Used {registers} registers" in compile_check.assemble(kernel.asm["ptx"], 80)
    assert stack_bytes == 0
