"""Files that are whole at every instant."""

import contextlib
import os
from pathlib import Path

from fastp2p.errors import WriteError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that at every instant, a power cut included, `path` is the old file or the new one, whole.

    Raises:
        WriteError: when it cannot be written (a full disk); the old file is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
