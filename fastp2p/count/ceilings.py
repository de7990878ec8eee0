"""What a machine can do at most: its bandwidth and its rate of multiplying, as constants or measured on the spot."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastp2p.errors import InputError
from fastp2p.ops import kernel_choices

COPY_BYTES = {"cpu": 256_000_000, "cuda": 2_000_000_000}  # more than caches hold
SIDES = {"cpu": 4096, "cuda": 8192}  # the matrices' side
SIDES_ON_CPU = {torch.float64: 2048, torch.float16: 512}  # where a product takes long; float16 has no instructions
MOST, FEWEST, SECONDS = 8, 3, 1.5  # runs of each, within so many seconds; the fastest counts: others only ever add


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do at most."""

    name: str
    flop_per_sec: float
    bytes_per_sec: float

    def or_higher(self, other: "Ceilings") -> "Ceilings":
        """The higher of two measurements, limit by limit."""
        flop_per_sec = max(self.flop_per_sec, other.flop_per_sec)
        return Ceilings(self.name, flop_per_sec, max(self.bytes_per_sec, other.bytes_per_sec))


H200 = Ceilings("an H200", 790e12, 4.3e12)  # bfloat16 products and copying, as measured on one


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure a device's ceilings, in two to four seconds on a CPU of two cores.

    Bytes are those read and written by a copy in memory; the rate is that of a product of two large square matrices of
    normal values, in float32 on a GPU as its convolutions multiply (by default as TF32). It is what the vendor's
    library reaches, which a good kernel comes near to, not what the data sheet promises. Of several runs the fastest
    counts, but on a machine that others keep busy all along the ceilings come out too low.

    Args:
        device: a CPU or a CUDA GPU.
        dtype: of the matrices.

    Raises:
        InputError: on another device.
    """
    if device.type not in COPY_BYTES:
        raise InputError(f"ceilings: got device {device}, expected a CPU or a CUDA GPU")
    return Ceilings(
        kernel_choices.place_of(device).name, product_flop_per_sec(device, dtype), copy_bytes_per_sec(device)
    )


def copy_bytes_per_sec(device: torch.device) -> float:
    """Bytes a second that a copy in memory reads and writes."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _least_seconds(lambda: target.copy_(source), device)


def product_flop_per_sec(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second in a product of two large square matrices."""
    side = SIDES[device.type]
    if device.type == "cpu":
        side = min(side, SIDES_ON_CPU.get(dtype, side))
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        return 2 * side**3 / _least_seconds(lambda: torch.mm(a, b, out=product), device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def _least_seconds(run: Callable[[], object], device: torch.device) -> float:
    run()
    seconds: list[float] = []
    while len(seconds) < FEWEST or (len(seconds) < MOST and sum(seconds) < SECONDS):
        seconds.append(_seconds(run, device))
    return min(seconds)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    began_at, ended_at = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        began_at.record()
        run()
        ended_at.record()
        ended_at.synchronize()
    return float(began_at.elapsed_time(ended_at)) / 1e3
