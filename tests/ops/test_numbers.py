"""Activations and pointwise losses have one numbering: Python's names in order, Triton's constants, C++'s enums."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from fastp2p.ops.activation import ACTIVATIONS
from fastp2p.ops.patch_loss import KINDS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("header", "enum", "names"),
    [
        ("csrc/cpu/activation.h", "ActivationKind", ACTIVATIONS),
        ("csrc/cpu/patch_loss.cpp", "Kind", KINDS),
    ],
)
def test_cpp_counts_as_python_does(header: str, enum: str, names: Sequence[str]):
    match = re.search(rf"enum {enum}[^{{]*\{{([^}}]*)\}}", (ROOT / header).read_text())
    assert match is not None
    assert tuple(name.strip().lower() for name in match[1].split(",")) == tuple(names)


@pytest.mark.parametrize(("module", "names"), [("activation", ACTIVATIONS), ("patch_loss", KINDS)])
def test_triton_counts_as_python_does(module: str, names: Sequence[str]):
    """Each constant that a kernel compares with has its name's place; the last name may be a kernel's else."""
    pytest.importorskip("triton")
    kernels = pytest.importorskip(f"fastp2p.kernels.{module}")
    found = {name: getattr(kernels, name.upper()).value for name in names if hasattr(kernels, name.upper())}
    assert found == {name: number for number, name in enumerate(names) if name in found}
    assert set(names) - set(found) <= {names[0], names[-1]}
