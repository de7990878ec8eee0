"""stack_pairs: what D sees of a batch, against eager PyTorch's concatenations."""

import torch
from layers import NOISE, each_batch_size, each_dtype

from fastp2p.ops import stack_pairs, stack_pairs_ref


@each_batch_size
@each_dtype
def bench_stack_pairs(compare, rehearse: bool, batch_size: int, dtype: torch.dtype):
    side = 16 if rehearse else 256
    real_A, fake_B = (NOISE.images(batch_size, 3, side, side, dtype=dtype) for _ in range(2))
    real_B = NOISE.images(batch_size, 3, side, side, dtype=torch.float32)  # as data has it

    def ours() -> torch.Tensor:
        return stack_pairs(real_A, fake_B, real_B)

    def check() -> None:
        """Bit for bit: values are rounded once at the most."""
        assert torch.equal(ours(), stack_pairs_ref(real_A, fake_B, real_B))

    compare(
        f"stack_pairs, batch {batch_size}",
        dtype=dtype,
        eager=lambda: stack_pairs_ref(real_A, fake_B, real_B),
        ours=ours,
        check=check,
        n_bytes=real_A.nbytes
        + fake_B.nbytes
        + real_B.nbytes
        + 4 * real_A.nbytes,  # read, and four times as much written
    )
