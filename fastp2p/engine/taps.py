"""Which taps of a kernel ever meet a pixel: the others change no result and have no gradient."""

from dataclasses import dataclass

from torch import Tensor, nn

from fastp2p.conv_shape import Size
from fastp2p.nn.block import Convolution


@dataclass(frozen=True)
class Taps:
    """The taps of a square kernel that meet a pixel, the same in both directions, and the padding left for them."""

    first: int
    count: int
    padding: int

    def select(self, weight: Tensor) -> Tensor:
        """These taps of a weight (O, C, KH, KW): a view, the weight itself where all are live."""
        if self.count == weight.shape[2]:
            return weight
        taps = slice(self.first, self.first + self.count)
        return weight[:, :, taps, taps]

    def are_all(self, weight: Tensor) -> bool:
        return self.count == weight.shape[2]


def all_taps(conv: Convolution) -> Taps:
    """Every tap of a convolution."""
    return Taps(0, int(conv.kernel_size[0]), _padding(conv))


def live_taps(conv: Convolution, in_size: Size, out_size: Size) -> Taps:
    """The square block of taps that meet a pixel somewhere; all, where that is no square or the sizes would change."""
    small, large = (in_size, out_size) if isinstance(conv, nn.ConvTranspose2d) else (out_size, in_size)
    stride, padding, kernel = int(conv.stride[0]), _padding(conv), int(conv.kernel_size[0])

    def live(inner: int, outer: int) -> list[int]:
        return [k for k in range(kernel) if any(0 <= i * stride - padding + k < inner for i in range(outer))]

    rows, columns = (live(inner, outer) for inner, outer in zip(large, small, strict=True))
    gaps = bool(rows) and rows != list(range(rows[0], rows[-1] + 1))
    if not rows or gaps or rows != columns or padding < rows[0]:
        return all_taps(conv)
    taps = Taps(rows[0], len(rows), padding - rows[0])
    sizes = tuple((side + 2 * taps.padding - taps.count) // stride + 1 for side in large)
    return taps if sizes == small else all_taps(conv)


def _padding(conv: Convolution) -> int:
    padding = conv.padding[0]
    assert isinstance(padding, int)  # the engine refuses padding by name, such as "same"
    return padding
