"""patch_loss in Triton.

Reads x (and the target and the addend, if they are tensors) once and writes dx once: 4 to 8 bytes an element in
bfloat16, where each step of the chain loss, mean, backward, scale, cast, add would move about as much again. One
program takes BLOCK elements of a half and leaves partial sums; the last program to arrive adds them in a fixed order,
so that the same input gives the same bits. All of it is one launch. Arithmetic is float32.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastp2p.errors import InputError
from fastp2p.kernels.arrival import counters, is_last
from fastp2p.kernels.compile_check import Case
from fastp2p.kernels.dependent import begin, launched
from fastp2p.kernels.launch_facts import Arguments, LaunchFacts

T = TypeVar("T", Tensor, Tensor | None)

CONFIGS = [
    {"BLOCK": 1024, "num_warps": 4, "maxnreg": 128},  # unbounded, ptxas aims at 32, and spills
    {"BLOCK": 256, "num_warps": 2, "maxnreg": 128},
    {"BLOCK": 2048, "num_warps": 8, "maxnreg": 128},
]
MANY = 2**21  # elements from which on programs take more of them: the last to arrive adds 1024 partial sums at once
BLOCK_T = 1024
BCE, SQUARE, HINGE, LINEAR = (tl.constexpr(kind) for kind in range(4))  # the order of ops.patch_loss.KINDS; then l1


@launched()
def _patch_loss_kernel(
    x_ptr,  # (PARTS * n_elements,)
    target_ptr,  # likewise, of its own dtype; x_ptr again when the target is a number
    addend_ptr,  # likewise, of x's dtype; x_ptr again when there is none
    dx_ptr,  # likewise
    dx_scale_ptr,  # () float32; partial_ptr again when there is none
    partial_ptr,  # (1 + CHANNELS, PARTS * blocks) float32: sums of the loss, and of dx for each channel
    loss_ptr,  # (PARTS,) float32
    sums_ptr,  # (CHANNELS,) float32; not written without channels
    counter_ptr,  # () int32, 0; left 0
    n_elements,  # a part's
    blocks,  # a part's
    channel_step,  # elements from a channel to the next
    target_value,
    second_value,
    loss_scale,  # weight / n_elements
    dx_weight,  # the same times dx's own weight
    KIND: tl.constexpr,
    SECOND_KIND: tl.constexpr,
    PARTS: tl.constexpr,  # 1; 2 where the second half has a loss of its own
    CHANNELS: tl.constexpr,  # 0 where their sums are not wanted
    HAS_TARGET: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    THROUGH_TANH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    begin()
    program, programs = tl.program_id(0), PARTS * blocks
    part = program // blocks
    place = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n_elements
    i = part.to(tl.int64) * n_elements + place
    x = tl.load(x_ptr + i, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(target_ptr + i, mask=inside, other=0.0).to(tl.float32) if HAS_TARGET else target_value

    if PARTS == 1:
        loss, slope = _pointwise(x, t, KIND)
    elif KIND == SECOND_KIND:
        loss, slope = _pointwise(x, tl.where(part == 0, target_value, second_value), KIND)
    else:
        loss, slope = _pointwise(x, target_value, KIND)
        second_loss, second_slope = _pointwise(x, second_value, SECOND_KIND)
        loss, slope = tl.where(part == 0, loss, second_loss), tl.where(part == 0, slope, second_slope)

    if THROUGH_TANH:
        slope *= 1.0 - x * x
    dx = slope * dx_weight
    if HAS_SCALE:
        dx *= tl.load(dx_scale_ptr)
    if HAS_ADDEND:
        dx += tl.load(addend_ptr + i, mask=inside, other=0.0).to(tl.float32)
    dx = dx.to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + i, dx, mask=inside)
    tl.store(partial_ptr + program, tl.sum(tl.where(inside, loss, 0.0), axis=0))
    for channel in tl.static_range(CHANNELS):
        counts = inside & (i // channel_step % CHANNELS == channel)
        total = tl.sum(tl.where(counts, dx.to(tl.float32), 0.0), axis=0)
        tl.store(partial_ptr + (1 + channel) * programs + program, total)

    if is_last(counter_ptr, programs):
        for p in tl.static_range(PARTS):
            total = _sum_of_all(partial_ptr + p * blocks, blocks, BLOCK_T)
            tl.store(loss_ptr + p, total * loss_scale)
        for channel in tl.static_range(CHANNELS):
            total = _sum_of_all(partial_ptr + (1 + channel) * programs, programs, BLOCK_T)
            tl.store(sums_ptr + channel, total)


@triton.jit
def _sum_of_all(partial_ptr, count, BLOCK_T: tl.constexpr):
    """The sum of so many partial sums, by an order that depends on their number alone."""
    total = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, count, BLOCK_T):
        i = start + tl.arange(0, BLOCK_T)
        total += tl.load(partial_ptr + i, mask=i < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=0)


@triton.jit
def _pointwise(x, t, KIND: tl.constexpr):
    """The loss of each value, and its slope there."""
    if KIND == BCE:
        decay = tl.exp(-tl.abs(x))  # the larger side's: never overflows
        loss = tl.maximum(x, 0.0) - x * t + _log1p(decay)
        sigmoid = tl.div_rn(tl.where(x >= 0, 1.0, decay), 1.0 + decay)
        slope = sigmoid - t
    elif KIND == SQUARE:
        loss = (x - t) * (x - t)
        slope = 2.0 * (x - t)
    elif KIND == HINGE:
        margin = 1.0 - t * x
        loss = tl.where(margin <= 0.0, 0.0, margin)  # tl.maximum would swallow a NaN on a GPU
        slope = tl.where(margin <= 0.0, 0.0, -t)
    elif KIND == LINEAR:
        loss = -t * x
        slope = tl.zeros_like(x) - t
    else:
        loss = tl.abs(x - t)
        slope = tl.where(x > t, 1.0, tl.where(x < t, -1.0, 0.0))
    return loss, slope


@triton.jit
def _log1p(x):
    """log(1 + x) for 0 <= x <= 1 to float32's precision: the correction cancels the rounding of 1 + x (Kahan)."""
    y = 1.0 + x
    rest = x - (y - 1.0)
    return tl.log(y) + tl.div_rn(rest, y)


def _merges(args: Arguments) -> int:
    losses = args["PARTS"] * triton.cdiv(args["blocks"], args["BLOCK_T"])
    return int(losses + args["CHANNELS"] * triton.cdiv(args["PARTS"] * args["blocks"], args["BLOCK_T"]))


LAUNCH_FACTS = {"_patch_loss_kernel": LaunchFacts(merges=_merges)}


def compile_cases() -> Iterator[Case]:
    """Each loss in each precision, with a number for a target; D's two halves; L1 with a tensor, plain and as G's."""
    configs = [config | {"BLOCK_T": BLOCK_T} for config in CONFIGS]
    floats = ("target_value", "second_value", "loss_scale", "dx_weight")
    none = {"SECOND_KIND": -1, "PARTS": 1, "CHANNELS": 0, "HAS_TARGET": 0, "HAS_ADDEND": 0, "HAS_SCALE": 0}
    for dtype in ("fp32", "bf16", "fp16"):
        types = dict.fromkeys(("x_ptr", "target_ptr", "addend_ptr", "dx_ptr"), f"*{dtype}")
        types |= dict.fromkeys(("dx_scale_ptr", "partial_ptr", "loss_ptr", "sums_ptr"), "*fp32")
        types |= {"counter_ptr": "*i32"} | dict.fromkeys(("n_elements", "blocks", "channel_step"), "i32")
        types |= dict.fromkeys(floats, "fp32")
        scaled = {"HAS_SCALE": int(dtype == "fp16")}  # the engine's float16 has a loss scale
        for kind in range(4):
            constants = none | scaled | {"KIND": kind, "THROUGH_TANH": 0}
            yield Case(f"patch_loss {kind} {dtype}", _patch_loss_kernel, types, constants, configs)
            if kind != 3:
                halves = constants | {"SECOND_KIND": kind, "PARTS": 2, "CHANNELS": 1}
                yield Case(f"patch_loss {kind} halves {dtype}", _patch_loss_kernel, types, halves, configs)
        for through_tanh in (0, 1):
            constants = none | {"KIND": 4, "HAS_TARGET": 1, "THROUGH_TANH": through_tanh}
            if through_tanh:
                constants |= scaled | {"HAS_ADDEND": 1, "CHANNELS": 3}
            for target in dict.fromkeys((dtype, "fp32")):
                name = f"patch_loss l1 tanh={through_tanh} {dtype}/{target}"
                case_types = types | {"target_ptr": f"*{target}"}
                yield Case(name, _patch_loss_kernel, case_types, constants, configs)


def patch_loss(
    x: Tensor,
    target: Tensor | None,
    kind: int,
    target_value: float,
    weight: float,
    through_tanh: bool,
    second_kind: int = -1,
    second_value: float = 0.0,
    dx_weight: float = 1.0,
    dx_scale: Tensor | None = None,
    addend: Tensor | None = None,
    sums: bool = False,
    config: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch; see `fastp2p.ops.patch_loss`."""
    parts = 1 if second_kind < 0 else 2
    if parts == 2 and (len(x) % 2 or target is not None):
        raise InputError(f"patch_loss: got x {tuple(x.shape)} and a second kind, expected two halves and no target")
    # The kernel runs along the memory, where halves and channels must lie one after the other
    as_images = (sums or parts == 2) and not (x.is_contiguous() or _is_channels_last(x))
    dense = x.contiguous() if as_images else x
    dx = torch.empty_like(dense)  # dense, in x's own order of dimensions
    dense, target, addend = _lying_like(dx, dense), _lying_like(dx, target), _lying_like(dx, addend)
    config = config or CONFIGS[2 if x.numel() >= MANY else 0]
    n, channels = x.numel() // parts, x.shape[1] if sums else 0
    blocks = triton.cdiv(n, config["BLOCK"])
    wide = partial(torch.empty, dtype=torch.float32, device=x.device)
    partial_sums, loss, totals = wide((1 + channels, parts * blocks)), wide(parts), wide(channels)
    _patch_loss_kernel[(parts * blocks,)](
        dense,
        dense if target is None else target,
        dense if addend is None else addend,
        dx,
        partial_sums if dx_scale is None else dx_scale,
        partial_sums,
        loss,
        totals,
        counters(1, x),
        n,
        blocks,
        dx.stride(1) if sums else 1,
        target_value,
        second_value,
        weight / n,
        weight * dx_weight / n,
        KIND=kind,
        SECOND_KIND=second_kind,
        PARTS=parts,
        CHANNELS=channels,
        HAS_TARGET=target is not None,
        HAS_ADDEND=addend is not None,
        HAS_SCALE=dx_scale is not None,
        THROUGH_TANH=through_tanh,
        BLOCK_T=BLOCK_T,
        **config,
    )
    return loss.view(()) if parts == 1 else loss, torch.empty_like(x).copy_(dx) if as_images else dx, totals


def _lying_like(dx: Tensor, t: T) -> T:
    """The same values in dx's order of dimensions; no tensor stays none."""
    if not isinstance(t, Tensor) or t.stride() == dx.stride():
        return t
    return torch.empty_like(dx, dtype=t.dtype).copy_(t)


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
