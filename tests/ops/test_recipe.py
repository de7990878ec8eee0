"""docs/adding.md's first step to a new operator, followed with a dummy in a folder of its own."""

import subprocess
import sys
from pathlib import Path

DUMMY = '''"""dummy: x + 2 y."""

from typing import Any

import torch
from torch import Tensor

from fastp2p.ops import library
from fastp2p.ops.operands import Work


def dummy_ref(x: Tensor, y: Tensor) -> Tensor:
    """The specification of `dummy`."""
    return x + 2 * y


def _fake(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(x)


def _backward(ctx: Any, dx: Tensor) -> tuple[Tensor, Tensor]:
    return dx, 2 * dx


library.define(
    "dummy",
    "(Tensor x, Tensor y) -> Tensor",
    reference=dummy_ref,
    fake=_fake,
    work=Work(maps=("x", "y"), results=("maps",)),
    backward=_backward,
    setup_context=lambda ctx, inputs, output: None,
)
'''
USER = """
import sys
import torch
from fastp2p import ops
from fastp2p.ops.library import cost_of
from fastp2p.ops.operands import Operand

ops.__path__.append(sys.argv[1])
import fastp2p.ops.dummy
assert "dummy" in ops.operators()
print(ops.served_by("dummy", "cpu"))

dummy = torch.ops.fastp2p.dummy
x, y = torch.rand(2, 3, requires_grad=True), torch.rand(2, 3, requires_grad=True)
dummy(x, y).sum().backward()
assert torch.equal(dummy(x, y), x + 2 * y) and torch.equal(y.grad, torch.full((2, 3), 2.0))
assert dummy(x.to("meta"), y.to("meta")).shape == (2, 3)
torch.library.opcheck(dummy.default, (x, y))
operand = Operand.of(x)
flop, traffic = cost_of("dummy", {"x": operand, "y": operand}, (operand,))
assert (flop, traffic.maps) == (0, 3 * 2 * 3 * 4)
"""


def test_an_operator_is_a_file(tmp_path: Path):
    """Another process defines it, so this one never knows of it."""
    (tmp_path / "dummy.py").write_text(DUMMY)
    done = subprocess.run([sys.executable, "-c", USER, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "reference (PyTorch)\n"
