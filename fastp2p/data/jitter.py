"""Order, crop and flip as a pure function of (seed, epoch, index): nothing to save, the same on every machine.

SeedSequence is a hash whose output NumPy guarantees across versions (NEP 19), unlike its distributions.
"""

import numpy as np

_ORDER, _JITTER = 0, 1  # a first word of their own: SeedSequence takes (seed, epoch) and (seed, epoch, 0) for the same


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order in which an epoch visits n pairs: (n,) int64, a permutation."""
    keys = np.random.SeedSequence((_ORDER, seed, epoch)).generate_state(n, np.uint64)
    return np.argsort(keys, kind="stable")


def jitter(seed: int, epoch: int, index: int, *, span: int, flip: bool) -> tuple[int, int, bool]:
    """(top, left, flip) of one pair in one epoch.

    Args:
        span: load_size - crop_size; top and left are uniform in 0 .. span inclusive, in pixels.
        flip: whether to flip at all; if so, with probability 1/2.
    """
    words = np.random.SeedSequence((_JITTER, seed, epoch, index)).generate_state(3, np.uint32)
    top, left = (int(word) * (span + 1) >> 32 for word in words[:2])
    return top, left, flip and bool(words[2] >> 31)
