"""A batch of pairs yet to be cut out: which ones, and the jitter of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

import fastp2p.ops  # noqa: F401 (defines torch.ops.fastp2p)


@dataclass(frozen=True)
class Crops:
    """What a training step reads of a batch before it is images: a few numbers for each pair."""

    pairs: Tensor  # (P, H, W, C) uint8, wherever they are kept; the first input_nc channels are the input
    index: Tensor  # (N,) int64, which of them; this and the next two on their device
    offset: Tensor  # (N, 2) int64, (top, left) of the crop, px
    flip: Tensor  # (N,) bool, mirror after cropping
    crop_size: int  # px
    input_nc: int

    def __len__(self) -> int:
        return len(self.index)

    def gather(self, out: Tensor) -> None:
        """Write the batch's own pairs, and no others, into `out`: (N, H, W, C) uint8 on the pairs' device."""
        torch.index_select(self.pairs, 0, self.index, out=out)

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """(C, H, W) of each image that `cut` gives, by name."""
        channels = {"A": self.input_nc, "B": self.pairs.shape[3] - self.input_nc}
        return {name: (n, self.crop_size, self.crop_size) for name, n in channels.items()}

    def cut(
        self, device: torch.device | str, dtypes: Mapping[str, torch.dtype] = MappingProxyType({})
    ) -> dict[str, Tensor]:
        """Cut them out where the pairs are, and move them to the device.

        Returns:
            A, B: (N, C, crop_size, crop_size) in [-1, 1], channels_last; A, the input, of dtypes["A"], else float32, as
                B always is.
        """
        # Without augment()'s checks: these draws fit by construction, and checking would wait for a GPU.
        cuts = (self.pairs, self.index, self.offset, self.flip, self.crop_size, self.input_nc)
        A, B = torch.ops.fastp2p.augment(*cuts, dtypes.get("A"))
        return {"A": A.to(device), "B": B.to(device)}
