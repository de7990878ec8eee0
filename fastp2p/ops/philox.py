"""Counter-based random bits: the same for an element whoever computes it, in whatever order.

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); `tl.philox` gives the
same bits.
"""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words for each counter; all words are int64 tensors of values 0 to 2^32 - 1, broadcast together."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        (high0, low0), (high1, low1) = _multiply(_MULTIPLIERS[0], c0), _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a * b, by halves of b: int64 cannot hold the whole."""
    top, bottom = a * (b >> 16), a * (b & 0xFFFF)  # below 2^48 each
    middle = top + (bottom >> 16)
    return middle >> 16, ((middle << 16) | (bottom & 0xFFFF)) & _LOW


def keep_mask(x: Tensor, rng: Tensor, layer: int, dropout: float) -> Tensor:
    """Which elements of x a dropout keeps: bool, x's shape.

    Element (n, c, h, w) has the counter (((n H + h) W + w) C + c, step, layer) under the key seed, with (seed, step) =
    rng, and is kept when its first word is at least dropout * 2^32.
    """
    n, c, h, w = x.shape
    element = torch.arange(x.numel(), device=x.device).view(n, h, w, c).permute(0, 3, 1, 2)
    seed, step = rng.unbind()
    key = (seed & _LOW, (seed >> 32) & _LOW)
    word, *_ = philox(key, (element & _LOW, element >> 32, step & _LOW, torch.full_like(step, layer)))
    return word >= drop_below(dropout)


def drop_below(dropout: float) -> int:
    """The 32-bit words below this are dropped."""
    return round(dropout * 2**32)
