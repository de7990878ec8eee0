"""Programmatic dependent launch: every kernel waits before it touches memory, and the switch is one."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastp2p.errors import InputError

dependent = pytest.importorskip("fastp2p.kernels.dependent", reason="needs triton")
KERNELS = Path(__file__).resolve().parents[2] / "kernels"

# Compiled with the switch on: what multiplies, what only moves, and what ends in an arrival
NAMES = ("conv e4 bf16", "conv_wgrad_adam e8 bf16", "stack_pairs 3+3 bf16", "adam fp32", "norm_dx bf16")
COMPILE = f"""
import json, sys
from fastp2p.kernels import compile_check, disassembly
compile_check.fix_keys()
found = {{}}
for case in compile_check.all_cases():
    key = next((name for name in {NAMES!r} if case.name.startswith(name)), None)
    if key is None or key in found:
        continue
    program = next(compile_check.programs([case], (90,)))
    text = disassembly.text_of(compile_check.build(*program).asm["cubin"])
    (instructions,) = disassembly.disassemble([text], 90)
    found[key] = [instruction.opcode for instruction in instructions]
json.dump(found, sys.stdout)
"""
NOTE = """
import json, sys
from fastp2p.kernels.ahead import H100, recording
from fastp2p.tuner import ahead
from gpu_programs import new_step
import torch
with recording(H100) as programs:
    ahead.MetaStep(new_step(torch.bfloat16), serves=lambda name: True).launch(1)
json.dump([json.loads(program.specialisation)["options"]["launch_pdl"] for program in programs], sys.stdout)
"""


def run(code: str, value: str) -> Any:
    """What a process prints, with the switch at this value."""
    path = os.pathsep.join([str(KERNELS.parent / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    env = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env | {dependent.SWITCH: value, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def launched_kernels() -> dict[str, ast.FunctionDef]:
    """Every function that a file of kernels launches, by its name."""
    found = {}
    for path in sorted(KERNELS.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list:
                found[f"{path.stem}.{node.name}"] = node
    return found


def test_every_kernel_that_is_compiled_is_looked_at():
    from fastp2p.kernels.compile_check import all_cases

    compiled = {f"{c.kernel.fn.__module__.rpartition('.')[2]}.{c.kernel.fn.__name__}" for c in all_cases()}
    assert compiled <= set(launched_kernels())


@pytest.mark.parametrize("name", launched_kernels())
def test_each_kernel_waits_first(name: str):
    """Or it would read what is still being written."""
    function = launched_kernels()[name]
    assert any(ast.unparse(d).startswith("launched(") for d in function.decorator_list)
    body = function.body[1:] if ast.get_docstring(function) else function.body
    assert ast.unparse(body[0]) == "begin()"


def test_machine_code_waits_before_it_touches_memory():
    """ACQBULK waits for the launches before; PREEXIT would let the next one come before the end."""
    found = run(COMPILE, "1")
    assert found.keys() == set(NAMES)
    for key, opcodes in found.items():
        waits = [i for i, op in enumerate(opcodes) if op.startswith("ACQBULK")]
        touches = [i for i, op in enumerate(opcodes) if op.startswith(("LDG", "STG", "ATOM", "RED", "UTMA", "UBLK"))]
        assert len(waits) == 1, key
        assert not any(op.startswith("PREEXIT") for op in opcodes), key
        assert touches, key
        assert waits[0] < min(touches), key


@pytest.mark.skipif(dependent.IS_ON.value, reason="the switch is on")
def test_without_the_switch_nothing_is_different():
    from fastp2p.kernels.compile_check import all_cases, build, programs

    case = next(case for case in all_cases() if case.name.startswith("stack_pairs"))
    built = build(*next(programs([case], (90,))))
    assert "griddepcontrol" not in built.asm["ptx"]
    assert not built.metadata.launch_pdl
    assert "run" not in vars(case.kernel)


def test_every_launch_of_a_step_says_so():
    noted = run(NOTE, "1")
    assert len(noted) > 50
    assert all(noted)


def test_the_switch_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match=r"FASTP2P_PDL: got 'yes', expected 1 \(on\) or 0"):
        dependent._is_on("yes")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9 - index, 0))
    monkeypatch.setattr(dependent.triton.knobs.runtime, "interpret", False)
    assert not dependent._is_on("")
    with pytest.raises(InputError, match=r"GPU 1 has compute capability 8\.0, expected 9\.0 or more"):
        dependent._is_on("1")


def test_the_interpreter_has_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dependent.triton.knobs.runtime, "interpret", True)
    assert not dependent._is_on("1")
