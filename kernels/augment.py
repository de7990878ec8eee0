"""augment in Triton.

Reads 1 byte per pixel and channel, and writes 4 for B, and 4 (float32) or 2 (bfloat16) for A: 2.0 or 1.6 MB for a
256 px pair. Each step of the chain crop, flip, cast, divide, scale, split would move about as much again. One program
takes BLOCK pixels of one sample with all their channels, so that reads and writes are contiguous along a row.
Arithmetic is float32 and the division correctly rounded: the result has the reference's bits.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastp2p.kernels.compile_check import Case
from fastp2p.kernels.dependent import begin, launched
from fastp2p.kernels.launch_facts import LaunchFacts

CONFIGS = [{"BLOCK": 256, "num_warps": 4}, {"BLOCK": 128, "num_warps": 2}, {"BLOCK": 512, "num_warps": 4}]


@launched()
def _augment_kernel(
    pairs_ptr,  # (P, height, width, C_A + C_B) uint8
    index_ptr,  # (N,) int64
    offset_ptr,  # (N, 2) int64
    flip_ptr,  # (N,) bool
    real_A_ptr,  # (N, crop_size, crop_size, C_A)
    real_B_ptr,  # (N, crop_size, crop_size, C_B) float32
    height,
    width,
    crop_size,
    C_A: tl.constexpr,
    C_B: tl.constexpr,
    C_PADDED: tl.constexpr,  # the next power of two
    BLOCK: tl.constexpr,  # pixels
):
    begin()
    blocks = tl.cdiv(crop_size * crop_size, BLOCK)  # a sample's
    sample = tl.program_id(0) // blocks
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[:, None]
    channel = tl.arange(0, C_PADDED)[None, :]
    inside = pixel < crop_size * crop_size
    y, x = pixel // crop_size, pixel % crop_size

    flip = tl.load(flip_ptr + sample)
    row = tl.load(offset_ptr + 2 * sample) + y
    column = tl.load(offset_ptr + 2 * sample + 1) + tl.where(flip, crop_size - 1 - x, x)
    place = (tl.load(index_ptr + sample) * height + row) * width + column  # int64, as index is
    value = tl.load(pairs_ptr + place * (C_A + C_B) + channel, mask=inside & (channel < C_A + C_B), other=0)
    value = tl.div_rn(value.to(tl.float32), 255.0) * 2 - 1

    out = sample.to(tl.int64) * crop_size * crop_size + pixel
    tl.store(real_A_ptr + out * C_A + channel, value, mask=inside & (channel < C_A))
    in_B = (channel >= C_A) & (channel < C_A + C_B)
    tl.store(real_B_ptr + out * C_B + channel - C_A, value, mask=inside & in_B)


LAUNCH_FACTS = {"_augment_kernel": LaunchFacts()}


def compile_cases() -> Iterator[Case]:
    """Colour to colour and grey to colour, in each dtype of A."""
    types = {"pairs_ptr": "*u8", "index_ptr": "*i64", "offset_ptr": "*i64", "flip_ptr": "*i1"}
    types |= dict.fromkeys(("height", "width", "crop_size"), "i32")
    for dtype in ("fp32", "bf16", "fp16"):
        out = {"real_A_ptr": f"*{dtype}", "real_B_ptr": "*fp32"}
        for C_A, C_padded in ((3, 8), (1, 4)):
            constants = {"C_A": C_A, "C_B": 3, "C_PADDED": C_padded}
            yield Case(f"augment {C_A}+3 {dtype}", _augment_kernel, types | out, constants, CONFIGS)


def augment(
    pairs: Tensor,
    index: Tensor,
    offset: Tensor,
    flip: Tensor,
    crop_size: int,
    input_nc: int,
    A_dtype: torch.dtype | None = None,
    config: dict[str, Any] = CONFIGS[0],
) -> tuple[Tensor, Tensor]:
    """Launch; see `fastp2p.ops.augment`."""
    n, (height, width, channels) = len(index), pairs.shape[1:]
    pairs, index, offset, flip = (tensor.contiguous() for tensor in (pairs, index, offset, flip))
    real_A, real_B = (
        torch.empty(
            (n, nc, crop_size, crop_size),
            dtype=dtype,
            device=pairs.device,
            memory_format=torch.channels_last,
        )
        for nc, dtype in ((input_nc, A_dtype or torch.float32), (channels - input_nc, torch.float32))
    )
    grid = (n * triton.cdiv(crop_size * crop_size, config["BLOCK"]),)  # one axis: the others end at 65535
    _augment_kernel[grid](
        pairs,
        index,
        offset,
        flip,
        real_A,
        real_B,
        height,
        width,
        crop_size,
        C_A=input_nc,
        C_B=channels - input_nc,
        C_PADDED=triton.next_power_of_2(channels),
        **config,
    )
    return real_A, real_B
