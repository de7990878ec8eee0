"""One image file -> an 8-bit RGB or grey PIL image, decoded whole, with a word on what was converted."""

import contextlib
import re
import struct
import threading
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from io import BytesIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from fastp2p.data.sources.archive import read_bytes
from fastp2p.device import memory_bytes
from fastp2p.errors import InputError, printable

# Files of other suffixes are passed over in folders, and of other formats never opened: Pillow knows more, and for
# PostScript it starts a program
EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
MAX_PIXELS = 2**29  # 23,170 px square
BYTES_PER_PIXEL = 12  # while an image is decoded and converted
LARGE = 2**26  # px: of such images the threads decode one at a time, lest they fill the memory
LINES_OF_A_KIND = 10  # in an error that lists files
# What Pillow's decoders and conversions raise on damaged files, by experiment; OSError covers truncated ones
_DAMAGED = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, ZeroDivisionError, OverflowError),
    *(struct.error, RuntimeError),
)
_TURNED = range(2, 9)  # values of the orientation tag that turn or mirror


def read_image(file: Traversable, channels: int) -> tuple[Image.Image, str]:
    """Read a file as an image of 3 (RGB) or 1 (grey) channels.

    Grey, palette, CMYK and 16-bit images are converted, transparency is put on white, and the camera's orientation
    tag is applied; of several frames the first is taken. Pillow tries the decoders of FORMATS and no others.

    Returns:
        The image, and what was converted ("palette", "transparency", ...; "" for nothing).

    Raises:
        InputError: when the file is empty, damaged, truncated, too large or of a kind that has no fixed range.
    """
    content = read_bytes(file)
    if not content:
        raise InputError("the file is empty (zero bytes)")
    try:
        with _without_pillows_limit():
            try:
                return _decode(content, channels)
            except ValueError as error:
                if "MAX_TEXT" not in str(error):
                    raise
                return _decode(_without_texts(content), channels)
    except InputError:  # has its words
        raise
    except MemoryError as error:
        raise InputError("cannot be decoded: there is not enough memory for it") from error
    except UnidentifiedImageError as error:
        raise InputError(f"cannot be decoded: {_what_it_is(content)}") from error
    except _DAMAGED as error:
        in_words = isinstance(error, OSError | SyntaxError | ValueError | RuntimeError) and str(error)
        raise InputError(f"cannot be decoded: {in_words or f'damaged ({type(error).__name__} {error})'}") from error


def _decode(content: bytes, channels: int) -> tuple[Image.Image, str]:
    with Image.open(BytesIO(content), formats=FORMATS) as image:
        _check_size(*image.size)
        large = image.width * image.height > LARGE
        with _large_one if large else contextlib.nullcontext():
            return _convert(image, channels)


def _convert(image: ImageFile.ImageFile, channels: int) -> tuple[Image.Image, str]:
    """Decode an opened image, and bring it to the 3 or 1 channels."""
    frames = getattr(image, "n_frames", 1)
    deep = any(";16" in str(tile) for tile in image.tile)  # 16-bit colour, of which Pillow keeps the high bytes
    tiff_tag = getattr(image, "tag_v2", {}).get(ExifTags.Base.Orientation)  # Pillow applies it as it loads
    image.load()
    mode = image.mode
    upright, turned = (image, "orientation tag") if tiff_tag in _TURNED else _upright(image)

    notes = [*(["several frames"] if frames > 1 else []), *([turned] if turned else [])]
    notes += ["16-bit colour"] if deep and not mode.startswith("I") else []
    if mode.startswith("I") or mode == "F":
        upright = _from_16_bit(upright)
        notes.append("16-bit grey")
    elif mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in upright.info:
        ground = Image.new("RGBA", upright.size, "white")
        straight = upright.convert("LA") if mode == "La" else upright  # Pillow has no way from La to RGBA
        ground.alpha_composite(straight.convert("RGBA"))
        upright = ground
        notes.append("transparency" if mode != "P" else "palette with transparency")
    elif mode != "RGB" and (mode, channels) not in (("L", 1), ("1", 1)):
        notes.append({"L": "grey", "1": "black and white", "P": "palette"}.get(mode, mode))
    return upright.convert("RGB" if channels == 3 else "L"), ", ".join(notes)


def _upright(image: Image.Image) -> tuple[Image.Image, str]:
    """The image turned as its orientation tag says, and a word on it."""
    try:
        tagged = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
    except _DAMAGED:
        return image, "damaged tags"  # the pixels are fine
    return (ImageOps.exif_transpose(image), "orientation tag") if tagged else (image, "")


def _check_size(width: int, height: int) -> None:
    """Raise InputError for an image that takes more memory than there is, or that only a bomb can be."""
    if width * height > MAX_PIXELS:
        raise InputError(
            f"the image is too large to be real: {width}x{height} px, expected at most {MAX_PIXELS:,} in all"
        )
    need, there = width * height * BYTES_PER_PIXEL, memory_bytes(torch.device("cpu"))
    if need > there:
        raise InputError(
            f"{width}x{height} px take {need / 2**30:.1f} GiB, and this machine has {there / 2**30:.1f}; scale it down"
        )


_large_one = threading.Lock()
_no_limit = threading.Lock()
_readers, _limit = 0, Image.MAX_IMAGE_PIXELS


@contextlib.contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """In the `with` block, in any number of threads, Pillow neither warns of large images nor refuses them: we do."""
    global _readers, _limit
    with _no_limit:
        if _readers == 0:
            _limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _readers += 1
    try:
        yield
    finally:
        with _no_limit:
            _readers -= 1
            if _readers == 0:
                Image.MAX_IMAGE_PIXELS = _limit


def _without_texts(png: bytes) -> bytes:
    """A PNG without its texts and its profile, which can be a thousand times larger than they look; its pixels stay."""
    kept, at = [png[:8]], 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4])
        if png[at + 4 : at + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(png[at:end])
        at = end
    return b"".join(kept)


def _what_it_is(content: bytes) -> str:
    """Words for a file that Pillow does not open."""
    if content.startswith((b"II*\0", b"MM\0*")):
        try:
            tags = TiffImagePlugin.ImageFileDirectory_v2(content[:8])
            stream = BytesIO(content)
            stream.seek(tags.next)
            tags.load(stream)
            bands, bits = tags.get(277, 1), tags.get(258, (1,))[0]
            return f"a TIFF of {bands} bands of {bits} bits is not read; expected 1 to 4 of 8 bits, or 1 or 3 of 16"
        except _DAMAGED:
            pass
    return f"no {', '.join(FORMATS)} image, or damaged at its start"


def halves(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The left and the right half; of an odd width the right one is wider, as upstream's."""
    width, height = image.size
    with _without_pillows_limit():
        return image.crop((0, 0, width // 2, height)), image.crop((width // 2, 0, width, height))


def _from_16_bit(image: Image.Image) -> Image.Image:
    """A 16-bit grey image scaled to 8 bits: 65535 -> 255."""
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise InputError(f"{image.mode} pixels ({values.dtype}) have no fixed white; save the image with 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def levels(image: Image.Image) -> np.ndarray:
    """Which values occur in an 8-bit image, in any channel: (256,) bool."""
    return np.asarray(np.reshape(image.histogram(), (-1, 256)).sum(axis=0), bool)


def resize(image: Image.Image, side: int) -> Image.Image:
    """Bicubic to side x side, aspect ignored, as upstream's resize."""
    return image.resize((side, side), Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> Tensor:
    """An 8-bit image -> (1, C, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(to_array(image))).permute(2, 0, 1)[None].float() / 255 * 2 - 1


def to_image(x: Tensor) -> Image.Image:
    """(C, H, W) in [-1, 1], C = 1 or 3 -> an 8-bit image, rounded to nearest."""
    values = ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    array = values.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def to_png(image: Image.Image, *, fast: bool = False) -> bytes:
    """The image as a PNG file. fast: in a third of the time, and a tenth larger."""
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1 if fast else 6)
    return buffer.getvalue()


def to_jpeg(image: Image.Image) -> bytes:
    """The image as a JPEG file at quality 90, its colours at full size: edges of label maps stay sharp."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=90, subsampling=0)
    return buffer.getvalue()


def to_array(image: Image.Image) -> np.ndarray:
    """(H, W, C) uint8; grey images get C = 1."""
    array = np.asarray(image)
    return array if array.ndim == 3 else array[:, :, None]


def bad_files_message(bad: dict[str, str], *, of: int, remedy: str) -> str:
    """One error that lists all unusable files and tells what to do."""
    return "\n".join([f"{len(bad):,} of {of:,} cannot be used:", *bad_file_lines(bad), remedy])


def bad_file_lines(bad: dict[str, str]) -> list[str]:
    """A line for each file and its reason, but for ten at most of each kind: nobody reads 2,000 lines."""
    kinds: dict[str, list[str]] = {}
    for name, reason in bad.items():
        kind = re.match(r"([a-z]+:? ?){0,3}", reason, re.IGNORECASE)  # its first words, before names and numbers
        kinds.setdefault(kind.group() if kind else "", []).append(f"  {printable(name)}: {printable(reason)}")
    shown = []
    for lines in kinds.values():
        more = len(lines) - LINES_OF_A_KIND
        shown += lines[:LINES_OF_A_KIND] + ([f"  and {more:,} more of the same kind"] if more > 0 else [])
    return shown
