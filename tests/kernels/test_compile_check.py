"""The Triton kernels compiled ahead of time, which needs no GPU."""

import importlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastp2p import ops
from fastp2p.conv_shape import CONVOLUTIONS, ConvShape
from fastp2p.engine.record import record
from fastp2p.models.pix2pix.options import Pix2PixConfig
from fastp2p.ops.library import file_of
from fastp2p.train.state import TrainState

triton = pytest.importorskip("triton", reason="needs triton")
compile_check = pytest.importorskip("fastp2p.kernels.compile_check", reason="needs triton")
disassembly = pytest.importorskip("fastp2p.kernels.disassembly", reason="needs triton")
LAYERS = pytest.importorskip("fastp2p.kernels.layer_shapes", reason="needs triton").LAYERS


@pytest.mark.parametrize("capability", compile_check.TARGETS)
def test_each_kernel_compiles_without_fault(capability: int):
    """One case of each kernel in the first configuration that fits; `make compile-check` does all of both."""
    first = {
        case.kernel: replace(case, configs=[next(c for c in case.configs if case.fits(c, capability))])
        for case in reversed(compile_check.all_cases())
    }
    assert len(first) >= len(ops.operators())
    rows = [
        compile_check.compile_case(*program) for program in compile_check.programs(list(first.values()), [capability])
    ]
    assert not [row for row in rows if row.faults]
    told = compile_check.summary(rows)
    assert all(case.name.split()[0] in told for case in first.values())


def test_every_operator_is_checked():
    assert {file_of(op) for op in ops.operators()} <= set(compile_check.KERNEL_FILES)


def test_every_layer_has_its_programs_on_every_target():
    """A tile that needs more shared memory than a target has is left out there, and never the last one."""
    cases = [case for case in compile_check.all_cases() if case.itemsize]
    layers = {case.name.split()[1] for case in cases}
    assert layers == {layer.name for layer in LAYERS}
    for capability in compile_check.TARGETS:
        assert all(any(case.fits(config, capability) for config in case.configs) for case in cases)
    large = max((case for case in cases), key=lambda case: compile_check.shared_bytes(case.configs[0], case.itemsize))
    assert large.fits(large.configs[0], 90)
    assert not replace(large, itemsize=4).fits(large.configs[0], 86)


def test_the_layers_are_those_of_the_step():
    """All but the innermost, of whose 4x4 taps a step computes the 2x2 that meet a pixel."""
    config = Pix2PixConfig(data="pairs").resolve("cuda", "bf16")
    with torch.device("meta"):
        step = TrainState.new(config, torch.device("meta"), "").engine_step(config)
    calls = [call for call in record(step, 1) if call.operator in CONVOLUTIONS]
    in_the_step = {one_input(ConvShape.of(call.operator, tuple(call.args.values()))) for call in calls}
    layers = {one_input(layer.shape) for layer in LAYERS}
    assert {str(shape) for shape in layers - in_the_step} == {"1x512x2x2-512-4x4s2p1"}
    assert {str(shape) for shape in in_the_step - layers} == {"1x512x2x2-512-2x2s2p0"}


def one_input(shape: ConvShape) -> ConvShape:
    """An image's shape; a data gradient makes that of both inputs in one."""
    return shape._replace(images=1, outer=shape.rows, outer2=0)


def test_a_launch_s_specialisation():
    """Sizes as a launch sees them: 1 is a constant, a multiple of 16 is known, geometry is neither."""
    (case,) = (
        case for case in compile_check.all_cases() if case.name == "conv_transpose D5 bf16"
    )  # 1 channel in, 512 out
    ones, multiples = case.specialisation(True)
    assert ones == {"n_in": 1, "pixel_stride": 1, "pixel_stride2": 1}
    names = {case.kernel.arg_names[position] for position in multiples}
    assert {"x_ptr", "weight_ptr", "n_out"} <= names
    assert not names & {"height", "pixels", "n_in"}


def compiled(**changes: object) -> compile_check.Compiled:
    fine = compile_check.Compiled("x", {"BLOCK_M": 64}, 86, True, registers=32, spilled_bytes=0, shared_bytes=99 * 1024)
    return replace(fine, **changes)


def test_faults():
    assert not compiled().faults
    assert compiled(spilled_bytes=8).faults == ["spills 8 bytes"]
    assert compiled(shared_bytes=99 * 1024 + 1).faults == ["shared memory over 101376 bytes"]
    assert compiled(itemsize=2).faults == ["no tensor-core instruction"]
    assert not compiled(itemsize=4).faults
    assert not compiled(itemsize=2, tensor_core=1).faults
    assert compiled(itemsize=2, tensor_core=1, capability=90).faults == ["no wgmma in a tile of 64 rows or more"]
    assert not compiled(itemsize=2, tensor_core=1, wgmma=1, capability=90).faults
    assert not compiled(itemsize=2, tensor_core=1, capability=90, config={"BLOCK_M": 32}).faults
    wide = disassembly.Loop({"LDGSTS.128": 8}, {"HMMA.16x8x16": 4}, local=0, others=90, macs=8192)
    narrow, spilling = replace(wide, loads={"LDG.U16": 8}), replace(wide, local=1)
    of_rows = compiled(itemsize=2, tensor_core=1, copies_rows=True, loops=(wide, narrow))
    assert of_rows.faults == ["loads single elements of whole blocks"]
    assert not replace(of_rows, loops=(wide,)).faults
    assert not replace(of_rows, copies_rows=False).faults
    assert replace(of_rows, loops=(wide, spilling)).faults == ["local memory in the loop"]


def test_whole_rows_need_no_single_elements():
    """Blocks are whole and so are 16 bytes of a row; d1's weight has rows of 3 channels."""
    cases = {case.name: case for case in compile_check.all_cases()}
    rows = {
        name: cases[name].copies_rows({"WHOLE_BLOCKS": True}) for name in ("conv e4 bf16", "conv_transpose d1 bf16")
    }
    assert rows == {"conv e4 bf16": True, "conv_transpose d1 bf16": False}
    assert not cases["conv e4 bf16"].copies_rows({"WHOLE_BLOCKS": False})
    assert not cases["norm_stats bf16"].copies_rows({})


def test_the_summary():
    """The median and the worst of each kind: most registers, fewest programs."""
    loop = disassembly.Loop({"LDGSTS.128": 8}, {"HGMMA.64x64x16": 4}, local=0, others=500, macs=65536)
    config = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "WHOLE_BLOCKS": True}
    gemm = compiled(
        name="conv e4 bf16", config=config, capability=90, itemsize=2, tensor_core=1, wgmma=1, loops=(loop,)
    )
    many = replace(gemm, registers=200, spilled_bytes=8, loops=(replace(loop, others=244),))
    *_, first, second = compile_check.summary([gemm, many, compiled(name="adam", capability=90)]).splitlines()
    assert re.split(r"\s{2,}", first)[:6] == ["adam", "sm_90", "1", "0", "32, 32", "99, 99"]
    numbers = ["2", "1", "116, 200", "99, 99", "2, 2", "384, 512", "3.0, 4.0"]
    assert re.split(r"\s{2,}", second) == ["conv, 16 bits, whole blocks", "sm_90", *numbers]


def test_the_report_of_the_assembler_is_read(tmp_path: Path):
    """A kernel squeezed into few registers spills, and that is seen; so is its stack frame, without the report."""
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
    cubin = tmp_path / "k.cubin"
    report = compile_check.assemble(ptx, 80, str(cubin))
    assert compile_check.spilled_bytes(report) > 0
    registers, stack_bytes = disassembly.resources(cubin.read_bytes())
    assert registers == 24
    assert stack_bytes > 0


def test_layers_of_one_channel_compile():
    """A size of 1 is a constant in a launch, which a kernel may not assign to: only a compiler shows it."""
    for op in ("conv", "conv_transpose", "conv_wgrad", "conv_wgrad_adam"):
        cases = [case for case in compile_check.all_cases() if case.name.startswith(f"{op} d4 bf16")]
        for name in cases[0].sizes:
            sizes = cases[0].sizes | {name: 1}
            compile_check.compile_case(replace(cases[0], sizes=sizes), cases[0].configs[-1], 90, True)
        compile_check.compile_case(replace(cases[0], sizes=dict.fromkeys(sizes, 1)), cases[0].configs[-1], 90, True)


def test_a_cache_of_binaries_alone_will_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """make gpu-cache keeps no PTX: what is found there is compiled again, to be read."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_STORE_BINARY_ONLY", "1")
    (case,) = (case for case in compile_check.all_cases() if case.name == "norm_stats bf16")
    assert not compile_check.compile_case(case, case.configs[0], 90, True).faults
    assert triton.knobs.compilation.store_binary_only


def test_a_program_s_key_depends_on_no_other():
    """What was compiled before, in another order than a launch's, changes no program's place in the cache."""
    modules = [importlib.import_module(f"fastp2p.kernels.{name}") for name in compile_check.KERNEL_FILES]
    functions = [f for module in modules for f in vars(module).values() if isinstance(f, triton.JITFunction)]
    found = []
    for order in (functions, functions[::-1]):
        for function in functions:
            function.hash, function.used_global_vals = None, {}
        for function in order:
            function.cache_key  # noqa: B018 (it is kept)
        found.append({function: function.cache_key for function in functions})
        compile_check.fix_keys.__wrapped__()
        found.append({function: function.cache_key for function in functions})
    assert found[0] != found[2]  # as Triton has it
    assert found[1] == found[3]
