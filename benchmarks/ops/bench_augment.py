"""augment: one batch of crops from resident 286 px pairs, against the same by indexing and arithmetic in PyTorch."""

import torch
from harness.cases import augment_case
from harness.providers import PAPER, TINY
from layers import DEVICE, each_batch_size, each_dtype


@each_batch_size
@each_dtype
def bench_augment(compare, rehearse: bool, batch_size: int, dtype: torch.dtype):
    scale = TINY if rehearse else PAPER
    case = augment_case(batch_size, scale.size, scale.load_size, dtype, eager_dtype=dtype, device=DEVICE)
    compare(f"augment, batch {batch_size}", dtype=dtype, **vars(case))
