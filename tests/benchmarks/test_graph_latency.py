"""benchmarks/graph_latency.py as far as it goes without a GPU: its kernels compile for one."""

import importlib
import subprocess
import sys
from typing import Any

import gpu_cache
import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton")
graph_latency = importlib.import_module("graph_latency")
TYPES = {"x": "*fp32", "parts": "*fp32", "y": "*fp32", "weights": "*bf16", "counter": "*i32"}


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("name", "constants", "waits"),
    [
        ("add_one", {"PDL": True, "BLOCK": 128}, True),
        ("add_one", {"PDL": False, "BLOCK": 128}, False),
        ("add_weights", {"ROWS": 256, "COLUMNS": 128, "WAIT": "after the weights"}, True),
        ("add_weights", {"ROWS": 256, "COLUMNS": 128, "WAIT": "none"}, False),
        ("sum_rows", {"BLOCK": 32, "C": 64}, False),
        ("merge", {"BLOCK": 32, "C": 64}, False),
        ("sum_rows_and_merge", {"BLOCK": 32, "C": 64}, False),
        ("barriers", {}, False),
    ],
)
def test_a_kernel_compiles(name: str, constants: dict[str, Any], waits: bool):
    kernel = getattr(graph_latency, name)
    types = {arg: "constexpr" if arg in constants else TYPES.get(arg, "i32") for arg in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    program = triton.compile(source, target=target, options={"launch_pdl": waits})
    assert ("griddepcontrol.wait" in program.asm["ptx"]) == waits


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = str(gpu_cache.ROOT / "benchmarks" / "graph_latency.py")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "graph_latency: PyTorch finds no CUDA GPU here\n"
