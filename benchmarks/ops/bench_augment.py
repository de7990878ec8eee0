"""augment: one batch of crops from resident 286 px pairs, against the same by indexing and arithmetic in PyTorch."""

import torch
from layers import DEVICE, each_batch_size, each_dtype

from fastp2p.ops import augment, augment_ref


@each_batch_size
@each_dtype
def bench_augment(compare, rehearse: bool, batch_size: int, dtype: torch.dtype):
    load_size, crop_size = (18, 16) if rehearse else (286, 256)
    pairs = torch.randint(0, 256, (32, load_size, load_size, 6), dtype=torch.uint8, device=DEVICE)
    index = torch.arange(batch_size, device=DEVICE)
    offset = torch.randint(0, load_size - crop_size + 1, (batch_size, 2), device=DEVICE)
    flip = index % 2 == 0

    def eager() -> tuple[torch.Tensor, torch.Tensor]:
        return augment_ref(pairs, index, offset, flip, crop_size, 3, dtype)

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        return augment(pairs, index, offset, flip, crop_size=crop_size, input_nc=3, dtype=dtype)

    def check() -> None:
        """Bit for bit: a function of 256 values, rounded as the reference does."""
        assert all(map(torch.equal, ours(), eager())), "augment differs from its reference, so it is not timed"

    n_bytes = batch_size * crop_size**2 * 6 * (1 + dtype.itemsize)  # uint8 read
    compare(f"augment, batch {batch_size}", dtype=dtype, eager=eager, ours=ours, check=check, n_bytes=n_bytes)
