"""One image file -> an 8-bit RGB or grey PIL image, decoded whole, with a word on what was converted."""

import lzma
import re
import zipfile
import zlib
from importlib.resources.abc import Traversable
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastp2p.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")  # Pillow knows more: for PostScript it starts a program
LINES_OF_A_KIND = 10  # in an error that lists files
# What zipfile and its decompressors raise on a damaged or encrypted member, by experiment
_DAMAGED_MEMBER = (zipfile.BadZipFile, RuntimeError, EOFError, zlib.error, lzma.LZMAError)


def read_image(file: Traversable, channels: int) -> tuple[Image.Image, str]:
    """Read a file as an image of 3 (RGB) or 1 (grey) channels.

    Grey, palette, CMYK and 16-bit images are converted, transparency is put on white, and the camera's orientation
    tag is applied; of several frames the first is taken. Pillow tries the decoders of FORMATS and no others.

    Returns:
        The image, and what was converted ("palette", "transparency", ...; "" for nothing).

    Raises:
        InputError: when the file is empty, damaged, truncated or of a kind that has no fixed range.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}") from error
    except _DAMAGED_MEMBER as error:
        raise InputError(f"cannot be read from its .zip: {error}") from error
    if not content:
        raise InputError("the file is empty (zero bytes)")
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            frames = getattr(image, "n_frames", 1)
            deep = any(";16" in str(tile) for tile in image.tile)  # 16-bit colour, of which Pillow keeps the high bytes
            image.load()
            mode, tagged = image.mode, image.getexif().get(0x0112, 1) != 1
            upright = ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        raise InputError(f"the image is too large to be real: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, ZeroDivisionError) as error:
        # What Pillow's decoders raise on damaged files, by experiment; OSError covers unknown and truncated ones.
        reason = (
            str(error) if "BytesIO" not in str(error) else f"no {', '.join(FORMATS)} image, or damaged at its start"
        )
        raise InputError(f"cannot be decoded: {reason}") from error

    notes = [text for holds, text in ((frames > 1, "several frames"), (tagged, "orientation tag")) if holds]
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
    """The one error on all files that cannot be used, which says what to do."""
    return "\n".join([f"{len(bad):,} of {of:,} cannot be used:", *bad_file_lines(bad), remedy])


def bad_file_lines(bad: dict[str, str]) -> list[str]:
    """A line for each file and its reason, but for ten at most of each kind: of 2,000 lines none would be read."""
    kinds: dict[str, list[str]] = {}
    for name, reason in bad.items():
        kind = re.match(r"([a-z]+:? ?){0,3}", reason, re.IGNORECASE)  # its first words, before names and numbers
        kinds.setdefault(kind.group() if kind else "", []).append(f"  {name}: {reason}")
    shown = []
    for lines in kinds.values():
        more = len(lines) - LINES_OF_A_KIND
        shown += lines[:LINES_OF_A_KIND] + ([f"  and {more:,} more of the same kind"] if more > 0 else [])
    return shown
