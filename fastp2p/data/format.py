"""A pair of images -> one uint8 array, with what a first reading tells of it."""

import itertools
import zlib
from dataclasses import dataclass
from importlib.resources.abc import Traversable

import numpy as np
from PIL import Image

from fastp2p.config import Direction
from fastp2p.data import images
from fastp2p.data.sources.pairs import Pair
from fastp2p.errors import InputError

MAX_ASPECT_DIFFERENCE = 0.02  # A's to B's: a rounded resize explains no more, so they show different frames
NARROW = 64  # levels of 256: a set that spans less, or uses no more in a row, was not made for the eye


@dataclass(frozen=True)
class Checked:
    """What the first reading of a pair found."""

    array: np.ndarray  # shaped as format.shape
    note: str
    checksum: int  # the array's: it shows at --resume whether a picture changed
    levels: np.ndarray  # (2, 256) bool: which values occur in A and in B before resizing


@dataclass(frozen=True)
class PairFormat:
    """How a pair becomes an array: (load_size, load_size, input_nc + output_nc) uint8, the network's input first."""

    direction: Direction
    load_size: int  # px
    input_nc: int = 3
    output_nc: int = 3
    min_side: int = 1  # px; a smaller image is refused

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.load_size, self.load_size, self.input_nc + self.output_nc

    def read(self, pair: Pair) -> tuple[Image.Image, Image.Image, str]:
        """A, B, and a word on what was converted or is odd. Raises InputError with the reason on a bad pair."""
        nc_A, nc_B = self.input_nc, self.output_nc
        if self.direction == "BtoA":
            nc_A, nc_B = nc_B, nc_A
        if pair.B is None:
            both, note = images.read_image(pair.A, max(nc_A, nc_B))
            width, height = both.size
            odd = ["no wider than tall: is B really beside A?"] if width <= height else []
            A, B = (
                side.convert("L") if nc == 1 else side
                for side, nc in zip(images.halves(both), (nc_A, nc_B), strict=True)
            )
        else:
            (A, note_A), (B, note_B) = _read_side("A", pair.A, nc_A), _read_side("B", pair.B, nc_B)
            note = "; ".join(f"{side} {text}" for side, text in (("A", note_A), ("B", note_B)) if text)
            odd = []

        for side, image in (("A", A), ("B", B)):
            if min(image.size) < self.min_side:
                width, height = image.size
                raise InputError(f"{side} is too small: {width}x{height} px, expected at least {self.min_side} a side")
        if abs(A.width * B.height / (A.height * B.width) - 1) > MAX_ASPECT_DIFFERENCE and pair.B is not None:
            raise InputError(f"A is {A.width}x{A.height} and B {B.width}x{B.height} px: not the same frame")
        return A, B, ", ".join([*([f"converted: {note}"] if note else []), *odd])

    def to_array(self, A: Image.Image, B: Image.Image) -> np.ndarray:
        """Both sides resized, the network's input first."""
        sides = (B, A) if self.direction == "BtoA" else (A, B)
        return np.concatenate([images.to_array(images.resize(side, self.load_size)) for side in sides], axis=2)

    def check(self, pair: Pair) -> Checked | str:
        """The pair with what a first reading tells of it, or the reason why it cannot be used."""
        try:
            A, B, note = self.read(pair)
        except InputError as error:
            return str(error)
        array = self.to_array(A, B)
        return Checked(array, note, zlib.crc32(array.data), np.stack([images.levels(A), images.levels(B)]))

    def decode(self, pair: Pair) -> np.ndarray | str:
        """The pair, or the reason why it cannot be read any more."""
        try:
            A, B, _ = self.read(pair)
        except InputError as error:
            return str(error)
        return self.to_array(A, B)


def _read_side(side: str, file: Traversable, channels: int) -> tuple[Image.Image, str]:
    """The image of one side of a pair in two files; an error says which side it is."""
    try:
        return images.read_image(file, channels)
    except InputError as error:
        raise InputError(f"{error} ({side}/{file.name})") from error


def levels_warning(side: str, used: np.ndarray) -> str:
    """What to say when a set's pictures leave most of the range of 8 bits unused, else "".

    Two things do: pictures of 12 bits in files of 16, and bare class numbers. Either their values span less than a
    quarter of the range, or there are few of them, most of which are neighbours.

    Args:
        side: "A" or "B".
        used: (256,) bool, which values occur.
    """
    values = np.flatnonzero(used).tolist()
    low, high = values[0], values[-1]
    classes = values[:-1] if high == 255 and len(values) > 2 else values  # 255 often is the number of no class
    neighbours = sum(after - before == 1 for before, after in itertools.pairwise(classes))
    if high - low >= NARROW and (len(values) > NARROW or 2 * neighbours <= len(classes) - 1):
        return ""
    return (
        f"the pictures of {side} together use {len(values)} of 256 levels, {low} to {high}, "
        f"{(high - low) / 255:.0%} of the range from black to white, which is little to learn from. "
        f"Stretch all of them alike, {low} to black and {high} to white (12 bits in files of 16: times 16), "
        "or give class numbers a colour each"
    )
