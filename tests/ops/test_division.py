"""Kernels divide correctly rounded, but where a reason stands: read from the programs, compiled without a GPU.

A plain division of float32 becomes div.full, which is off by up to 2 ulp; the interpreter rounds it, and shows nothing.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from fastp2p.ops.extension import INTERPRETED

compile_check = pytest.importorskip("fastp2p.kernels.compile_check", reason="needs triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
TANH = 3
# Each with the function that says why
EXCEPTIONS = {
    "adam": {"div.full", "sqrt.approx"},  # adam_update
    "conv_wgrad_adam": {"div.full", "sqrt.approx"},
    **{
        name: {"rsqrt.approx"} for name in ("batch_norm_act", "conv", "conv_transpose", "norm_act", "norm_dx", "reduce")
    },
}  # norm_tile.rstd_of, which corrects it
FLAGS = ("KIND", "HAS_STATS", "HAS_NORM", "WRITE_SUMS")  # by which a kernel divides, or not; and ACTIVATION, by tanh


def kinds() -> Iterator[Any]:
    """Give each kernel's first configuration, once for each of the flags' values, and with tanh."""
    seen = set()
    for case in compile_check.all_cases():
        cases = [case]
        if case.name.startswith("norm_act ") and "ACTIVATION" in case.constants:
            cases.append(replace(case, name=f"{case.name} tanh", constants=case.constants | {"ACTIVATION": TANH}))
        for each in cases:
            tanh = each.constants.get("ACTIVATION") == TANH
            kind = (each.kernel.fn.__module__, each.kernel.fn.__name__, tanh, *map(each.constants.get, FLAGS))
            if kind not in seen:
                yield replace(each, configs=each.configs[:1])
            seen.add(kind)


def ptx(case: Any) -> str:
    """The program for sm_90."""
    found: str = compile_check.build(case, case.configs[0], 90, True).asm["ptx"]
    return found


@pytest.mark.parametrize("case", list(kinds()), ids=lambda case: case.name)
def test_divisions_and_roots_are_correctly_rounded(case: Any):
    inexact = r"\b(?:div\.(?:full|approx)|rcp\.approx|r?sqrt\.approx|tanh\.approx|lg2\.approx)"
    assert set(re.findall(inexact, ptx(case))) <= EXCEPTIONS.get(case.name.split()[0], set())


def test_the_kernels_that_divide_are_among_them():
    """Or the test above would have nothing to find."""
    dividing = {case.name.split()[0] for case in kinds() if "div.rn" in ptx(case)}
    assert dividing == {
        "adam",
        "augment",
        "conv",
        "fold",
        "norm_act",
        "norm_stats",
        "patch_loss",
        "reduce",
        "conv_transpose",
        "conv_wgrad_adam",
    }
