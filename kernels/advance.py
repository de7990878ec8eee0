"""advance in Triton.

A few hundred numbers in one launch, where PyTorch takes one for each buffer and two for the powers. Each lane moves a
step and a counter of its own, and a lane whose step is an Adam's first makes that one's powers, so no program waits for
another. A power is a product of squares in float64, 25 of them: steps are float32 and count to 2^24. Squaring doubles a
relative error, so that of beta^t is t roundings at most.
"""

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastp2p.kernels.compile_check import Case
from fastp2p.kernels.dependent import begin, launched
from fastp2p.kernels.launch_facts import LaunchFacts

CONFIGS = [{"BLOCK": 128, "num_warps": 4}, {"BLOCK": 32, "num_warps": 1}]


@launched(do_not_specialize=["n_steps", "n_counters", "images"])
def _advance_kernel(
    steps_ptr,  # (M,) float32
    powers_ptr,  # (ADAMS, 2) float64
    betas_ptr,  # (ADAMS, 2) float64
    firsts_ptr,  # (ADAMS,) int64
    counters_ptr,  # (K,) int64
    increments_ptr,  # (2, K) int64
    n_steps,
    n_counters,
    images,
    ADAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    step = tl.load(steps_ptr + i, mask=i < n_steps, other=0.0) + 1
    tl.store(steps_ptr + i, step, mask=i < n_steps)
    for adam in tl.static_range(ADAMS):
        first = i == tl.load(firsts_ptr + adam)
        for which in tl.static_range(2):
            power = _power(tl.load(betas_ptr + 2 * adam + which), step.to(tl.int32))
            tl.store(powers_ptr + 2 * adam + which + tl.zeros_like(i), power, mask=first & (i < n_steps))
    counts = i < n_counters
    gain = tl.load(increments_ptr + i, mask=counts) + images * tl.load(increments_ptr + n_counters + i, mask=counts)
    tl.store(counters_ptr + i, tl.load(counters_ptr + i, mask=counts) + gain, mask=counts)


@triton.jit
def _power(base, exponents):
    """A float64 to the power of each whole number below 2^25."""
    power = tl.full(exponents.shape, 1.0, tl.float64)
    for bit in tl.static_range(25):
        power = tl.where((exponents >> bit) & 1 == 1, power * base, power)
        base = base * base
    return power


LAUNCH_FACTS = {"_advance_kernel": LaunchFacts(updates=("steps_ptr", "counters_ptr"))}


def compile_cases() -> Iterator[Case]:
    """One Adam, as with --engine layers, and a generator's and a discriminator's."""
    types = {"steps_ptr": "*fp32", "powers_ptr": "*fp64", "betas_ptr": "*fp64"}
    types |= dict.fromkeys(("firsts_ptr", "counters_ptr", "increments_ptr"), "*i64")
    types |= dict.fromkeys(("n_steps", "n_counters", "images"), "i32")
    for adams in (1, 2):
        yield Case(f"advance {adams}", _advance_kernel, types, {"ADAMS": adams}, CONFIGS)


def advance(
    steps: Tensor,
    powers: Tensor,
    betas: Tensor,
    firsts: Tensor,
    counters: Tensor,
    increments: Tensor,
    images: int,
    config: dict[str, Any] = CONFIGS[0],
) -> None:
    """Launch; see `fastp2p.ops.advance`."""
    longest = max(len(steps), len(counters))
    if longest == 0:
        return
    _advance_kernel[(triton.cdiv(longest, config["BLOCK"]),)](
        steps,
        powers,
        betas.contiguous(),
        firsts.contiguous(),
        counters,
        increments.contiguous(),
        len(steps),
        len(counters),
        images,
        ADAMS=len(powers),
        **config,
    )
