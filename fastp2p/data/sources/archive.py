"""The bytes of a file, or of a member of a .zip: never more than fit, whatever the archive claims."""

import struct
import zipfile
import zlib
from importlib.resources.abc import Traversable
from io import BytesIO
from pathlib import Path

from fastp2p.errors import InputError

try:
    from lzma import LZMAError
except ImportError:  # a Python built without it, whose zipfile refuses such members with a RuntimeError
    LZMAError = zipfile.BadZipFile  # type: ignore[assignment,misc]

MAX_BYTES = 2**30  # a file's size: nobody trains on a larger image
# What zipfile and its decompressors raise on damaged, encrypted and unknown archives, by experiment
_DAMAGED = (
    *(zipfile.BadZipFile, LZMAError, zlib.error, struct.error),
    *(RuntimeError, ValueError, EOFError, OverflowError),
)
_PIECE = 64  # bytes of bzip2 or LZMA, for which zipfile knows no limit: of 64 they make 100 MB at most


def open_archive(source: Path | BytesIO) -> zipfile.Path:
    """The root of a .zip.

    Raises:
        InputError: when it cannot be read, or its directory is damaged.
    """
    name = source if isinstance(source, Path) else "the built-in set"
    try:
        return zipfile.Path(zipfile.ZipFile(source))
    except OSError as error:
        raise InputError(f"data: {name} cannot be read: {error.strerror or error}") from error
    except _DAMAGED as error:
        raise InputError(f"data: {name}: is a damaged .zip ({error}); copy or make it again") from error


def read_bytes(file: Traversable) -> bytes:
    """The whole content of a file or a member.

    Raises:
        InputError: when it cannot be read, is damaged, or is larger than MAX_BYTES.
    """
    try:
        if isinstance(file, zipfile.Path):
            return _read_member(file)
        assert isinstance(file, Path)
        _check_size(file.stat().st_size)
        return file.read_bytes()
    except InputError:  # has its words
        raise
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise InputError("there is not enough memory to read it") from error
    except _DAMAGED as error:
        raise InputError(f"cannot be read from its .zip: {error}") from error


def _read_member(file: zipfile.Path) -> bytes:
    """A member's content, which is no more than its directory entry says: a bomb is refused, and a liar cut off."""
    member = file.root.getinfo(file.at)
    _check_size(member.file_size)
    with file.root.open(member) as stream:
        assert isinstance(stream, zipfile.ZipExtFile)
        if member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            return stream.read(member.file_size + 1)
        stream.MIN_READ_SIZE = _PIECE
        return b"".join(iter(lambda: stream.read(_PIECE), b""))


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise InputError(f"is too large: {size / 2**30:.1f} GiB, expected at most {MAX_BYTES / 2**30:.0f}")
