"""stack_pairs in Triton.

Every byte is read once, but for those of A, which two programs read, and written once: 3.1 MB in bfloat16 for a 256 px
pair. PyTorch takes three copies in turn for it. One program takes BLOCK pixels of one image of the result with all
their channels, so that it writes whole lines.
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
from fastp2p.kernels.layout import pixel_rows

CONFIGS = [{"BLOCK": 256, "num_warps": 4}, {"BLOCK": 128, "num_warps": 2}, {"BLOCK": 512, "num_warps": 4}]


@launched(do_not_specialize=["half"])
def _stack_pairs_kernel(
    real_A_ptr,  # (half, C_A), rows A_stride apart; these three each of its own dtype
    fake_B_ptr,  # (half, C_B), rows fake_stride apart
    real_B_ptr,  # (half, C_B), rows real_stride apart
    out_ptr,  # (2 * half, C_A + C_B)
    half,  # pixels of all images
    A_stride,
    fake_stride,
    real_stride,
    C_A: tl.constexpr,
    C_B: tl.constexpr,
    C_PADDED: tl.constexpr,  # the next power of two
    BLOCK: tl.constexpr,  # pixels
):
    begin()
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]  # the result's
    channel = tl.arange(0, C_PADDED)[None, :]
    inside, is_real = pixel < 2 * half, pixel >= half
    at = tl.where(is_real, pixel - half, pixel)
    in_A, in_B = inside & (channel < C_A), inside & (channel >= C_A) & (channel < C_A + C_B)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    A = tl.load(real_A_ptr + at * A_stride + channel, mask=in_A, other=0.0)
    fake = tl.load(fake_B_ptr + at * fake_stride + channel - C_A, mask=in_B & (is_real == 0), other=0.0)
    real = tl.load(real_B_ptr + at * real_stride + channel - C_A, mask=in_B & is_real, other=0.0)
    B = tl.where(is_real, real.to(tl.float32), fake.to(tl.float32)).to(dtype)
    tl.store(out_ptr + pixel * (C_A + C_B) + channel, tl.where(channel < C_A, A, B), mask=in_A | in_B)


LAUNCH_FACTS = {"_stack_pairs_kernel": LaunchFacts()}


def compile_cases() -> Iterator[Case]:
    """Colour to colour and grey to colour, in each dtype that a step computes in; real_B in float32, as data has it."""
    types = {"real_B_ptr": "*fp32"} | dict.fromkeys(("half", "A_stride", "fake_stride", "real_stride"), "i32")
    for dtype in ("fp32", "bf16", "fp16"):
        low = dict.fromkeys(("real_A_ptr", "fake_B_ptr", "out_ptr"), f"*{dtype}")
        for C_A, C_padded in ((3, 8), (1, 4)):
            constants = {"C_A": C_A, "C_B": 3, "C_PADDED": C_padded}
            yield Case(f"stack_pairs {C_A}+3 {dtype}", _stack_pairs_kernel, types | low, constants, CONFIGS)


def stack_pairs(real_A: Tensor, fake_B: Tensor, real_B: Tensor, config: dict[str, Any] = CONFIGS[0]) -> Tensor:
    """Launch; see `fastp2p.ops.stack_pairs`."""
    n, C_A, height, width = real_A.shape
    C_B, half = real_B.shape[1], n * height * width
    (real_A, A_stride), (fake_B, fake_stride), (real_B, real_stride) = map(pixel_rows, (real_A, fake_B, real_B))
    shape = (2 * n, C_A + C_B, height, width)
    out = torch.empty(shape, dtype=real_A.dtype, device=real_A.device, memory_format=torch.channels_last)
    _stack_pairs_kernel[(triton.cdiv(2 * half, config["BLOCK"]),)](
        real_A,
        fake_B,
        real_B,
        out,
        half,
        A_stride,
        fake_stride,
        real_stride,
        C_A=C_A,
        C_B=C_B,
        C_PADDED=triton.next_power_of_2(C_A + C_B),
        **config,
    )
    return out
