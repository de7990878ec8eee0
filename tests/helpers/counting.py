"""An is_last that leaves its counters as they are, for the interpreter."""

import triton
import triton.language as tl


@triton.jit
def count_on(counter_ptr, programs):
    """Whether so many programs have come; afterwards the counter tells how many did."""
    return tl.atomic_add(counter_ptr, 1) == programs - 1
