"""Programs of one launch that finish each other's sums: who arrives last takes what the others left.

A second kernel that adds partial sums costs a launch, and on a dependent chain its latency. Instead each program counts
itself after it has stored its share, and the last one adds all of them. Which program that is differs from run to run;
the order of the sum does not, so the same input gives the same bits. A counter is 0 before a launch and after it.
"""

import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

FEWEST = 4096  # counters in a buffer

_buffers: dict[tuple[torch.device, int, bool], Tensor] = {}
_outgrown: list[Tensor] = []  # captured graphs still count in them


@triton.jit
def is_last(counter_ptr, programs):
    """Whether so many programs have come here with this counter; what the others stored can be read then.

    Read it past the first-level cache (`.cg`), which may hold what was there before.
    """
    tl.debug_barrier()  # the count of one thread comes after the stores of all
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


def counters(n: int, like: Tensor) -> Tensor:
    """Counters for a launch on the current stream, (n,) int32, all of them 0.

    Launches of a stream share them, one after the other; captured graphs have others than launches. So graphs that
    were captured on one stream must not be replayed side by side.
    """
    device = like.device
    if device.type == "meta":  # where nothing counts
        return torch.empty(n, dtype=torch.int32, device=device)
    if not like.is_cuda:
        return _kept((device, threading.get_ident(), False), n)[:n]
    stream = torch.cuda.current_stream(device).cuda_stream
    if not torch.cuda.is_current_stream_capturing():
        _kept((device, stream, True), n)  # a capture, which cannot write zeros, comes after a launch of the same
        return _kept((device, stream, False), n)[:n]
    kept = _buffers.get((device, stream, True))
    if kept is None or len(kept) < n:
        return torch.zeros(n, dtype=torch.int32, device=device)  # the graph writes them at each replay
    return kept[:n]


def _kept(key: tuple[torch.device, int, bool], n: int) -> Tensor:
    kept = _buffers.get(key)
    if kept is None or len(kept) < n:
        if kept is not None:
            _outgrown.append(kept)
        size = max(FEWEST, triton.next_power_of_2(n))
        kept = _buffers[key] = torch.zeros(size, dtype=torch.int32, device=key[0])
    return kept
