"""Files that are whole at every instant."""

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
        with open(temporary, "wb") as stream:
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
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed process left in its run folder."""
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink(missing_ok=True)
