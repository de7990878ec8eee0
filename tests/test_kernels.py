"""The Triton kernels compiled ahead of time, which needs no GPU."""

import pytest

from fastp2p import ops

compile_check = pytest.importorskip("fastp2p.kernels.compile_check", reason="needs triton")


@pytest.mark.parametrize("capability", compile_check.TARGETS)
def test_first_configurations_compile_without_fault(capability: int):
    """Every specialisation for every target; `make compile-check` does all configurations."""
    for case in compile_check.all_cases():
        for aligned in (True, False):
            assert not compile_check.compile_case(case, case.configs[0], capability, aligned).faults


def test_every_operator_is_checked():
    assert list(compile_check.KERNEL_FILES) == ops.operators()


def test_a_spill_and_too_much_shared_memory_are_faults():
    fine = compile_check.Compiled("x", {}, 86, True, registers=32, spilled_bytes=0, shared_bytes=99 * 1024)
    spilling = compile_check.Compiled("x", {}, 86, True, registers=255, spilled_bytes=8, shared_bytes=0)
    large = compile_check.Compiled("x", {}, 86, True, registers=32, spilled_bytes=0, shared_bytes=99 * 1024 + 1)
    assert not fine.faults
    assert spilling.faults == ["spills 8 bytes"]
    assert large.faults == ["shared memory over 101376 bytes"]


def test_the_report_of_the_assembler_is_read():
    """A kernel squeezed into few registers spills, and that is seen."""
    ptx = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 p) .maxnreg 24 {
  .reg .u64 %a; .reg .f32 %f<60>;
  ld.param.u64 %a, [p];
"""
    ptx += "".join(f"  ld.volatile.global.f32 %f{i}, [%a+{4 * i}];\n" for i in range(60))
    ptx += "".join(f"  st.volatile.global.f32 [%a+{4 * i}], %f{i};\n" for i in range(60)) + "  ret;\n}\n"
    report = compile_check.assemble(ptx, 80)
    assert compile_check.spilled_bytes(report) > 0
