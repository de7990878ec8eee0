"""Files that are whole at every instant, and files from others."""

import contextlib
import os
import stat
from pathlib import Path

from fastp2p.errors import InputError, WriteError

SMALL = 64 * 2**20  # bytes: more than any configuration or table of kernels has


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that at every instant, a power cut included, `path` is the old file or the new one, whole.

    Raises:
        WriteError: when it cannot be written (a full disk); the old file is then untouched.
    """
    temporary = path.with_name(f".{path.name[:55]}.{os.getpid()}.tmp")  # fewer than 255 bytes, as names may have
    try:
        temporary.unlink(missing_ok=True)  # a killed process of the same number left it, or it is somebody's link
        with open(temporary, "xb") as stream:  # x: never through a link
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must reach the disk, too
        finally:
            os.close(folder)
    except OSError as error:
        raise WriteError(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # a read-only disk says so in the error above
            temporary.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Write one line at a file's end. Raises WriteError; a part of the line may then be there."""
    try:
        with open(path, "a") as stream:
            stream.write(line + "\n")
    except OSError as error:
        raise WriteError(path, error) from error


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed process left in its run folder. Raises WriteError."""
    for temporary in (*folder.glob(".*.tmp"), *folder.glob("panel/.*.tmp")):
        if temporary.is_dir():  # not ours
            continue
        try:
            temporary.unlink(missing_ok=True)
        except OSError as error:
            raise WriteError(temporary, error) from error


def is_there(path: Path) -> bool:
    """Whether a name is in use, also by a link to nowhere or where the process may not look: reading then fails."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def check_file(path: Path, expected: str = "a file") -> None:
    """Raise InputError unless this is a readable file: a pipe would make the process wait, a device never ends."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        link = f"is a link to {os.readlink(path)}, which is not there" if path.is_symlink() else "there is no such file"
        raise InputError(f"{path}: {link}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a named pipe, a socket or a device"
        raise InputError(f"{path}: is {kind}; expected {expected}")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: cannot be read: permission denied")


def read_small(path: Path) -> bytes:
    """A small file of ours. Raises InputError when it cannot be read, or is far too large to be one."""
    check_file(path)
    try:
        if (size := path.stat().st_size) > SMALL:
            raise InputError(f"{path}: has {size:,} bytes, expected at most {SMALL:,}; it is no such file of fastp2p")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
