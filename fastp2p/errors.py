"""The errors that the command line prints without a traceback."""

import errno
from pathlib import Path


class InputError(ValueError):
    """The user gave something that cannot be used. The text says what it is, what was expected and what to do.

    Whoever catches ValueError around code that raises this one lets it pass first: its text is for the user.
    """


class UnreadablePair(InputError):
    """A run cannot read a pair any more that it could read when it began. The text names the pair and the reason."""


class WriteError(Exception):
    """A write failed: the disk is full, say, or a permission is missing. The old file is untouched."""

    def __init__(self, path: Path, error: OSError):
        self.is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        self.what = f"{path} cannot be written: {error.strerror or error}"
        super().__init__(f"{self.what}. What was saved before is intact." + " Make room, then go on." * self.is_full)


class TrainingDiverged(RuntimeError):
    """A loss or a weight became NaN or infinite; the disk has the last good checkpoint."""


def printable(name: object) -> str:
    """A name from a folder or an archive, with escapes for what would move the cursor, recolour or break the line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))
