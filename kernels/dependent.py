"""Programmatic dependent launch: a kernel begins while the one before it in its stream ends. Off by default.

On sm_90 and later a launch may say so. Its programs are put on the processors as those of the kernel before leave, set
up, and wait in `begin` for all that was launched before to end and be seen; only then does anything read or write
memory. Triton's kernels alone take part: any other launch waits as ever.

    FASTP2P_PDL=1    turns it on, for all kernels and the whole process

In a chain of small kernels it saved 0.35 to 0.51 of a node's 1.1 to 1.3 us (an H100, benchmarks/graph_latency.py). In a
step it lost: an H200 took 1.73 ms for batch size 1 with it and 1.61 without, by kernels of 2026-11-27 that let the next
one come as soon as they began, so that programs that waited held processors which the branch needed. These let it come
as they end. No GPU has run that, so it is off; `FASTP2P_PDL=1 make gpu-first ARGS="--only head warm parity times"`
measures it.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from fastp2p.errors import InputError

SWITCH = "FASTP2P_PDL"
OLDEST = (9, 0)  # compute capability


def _is_on(value: str) -> bool:
    """What the environment says. Raises InputError for what it may not say, and where a GPU cannot do it."""
    if value not in ("", "0", "1"):
        raise InputError(f"{SWITCH}: got {value!r}, expected 1 (on) or 0 (off, as without it)")
    if value != "1" or triton.knobs.runtime.interpret:
        return False
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_capability(index)
        if found < OLDEST:
            raise InputError(
                f"{SWITCH}: got 1, but GPU {index} has compute capability {found[0]}.{found[1]}, expected 9.0 or more; "
                "leave the variable out, or hide that GPU by CUDA_VISIBLE_DEVICES"
            )
    return True


IS_ON = tl.constexpr(_is_on(os.environ.get(SWITCH, "")))


def launched(**options: Any) -> Callable[[Callable[..., None]], Any]:
    """triton.jit for a function that is launched, and whose first statement is `begin()`.

    Args:
        options: triton.jit's.
    """

    def decorate(function: Callable[..., None]) -> Any:
        made: Any = triton.jit(**options)(function)
        if IS_ON.value:
            made.run = functools.partial(made.run, launch_pdl=True)
        return made

    return decorate


@triton.jit
def begin():
    """Wait for all that was launched before. Each kernel does, so what has ended has nothing unfinished before it."""
    if IS_ON:
        gdc_wait()
