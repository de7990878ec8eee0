"""The errors that the command line prints as they are, without a traceback."""

import errno
from pathlib import Path


class InputError(ValueError):
    """The user gave something that cannot be used. The text says what it is, what was expected and what to do.

    Whoever catches ValueError around code that raises this one lets it pass first: its text is for the user.
    """


class UnreadablePair(InputError):
    """A pair that could be read when the run began cannot be read any more: the text names it, and says why."""


class WriteError(Exception):
    """A file could not be written, for a full disk or for want of permission; what was there before is untouched."""

    def __init__(self, path: Path, error: OSError):
        self.is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        self.what = f"{path} cannot be written: {error.strerror or error}"
        super().__init__(f"{self.what}. What was saved before is intact." + " Make room, then go on." * self.is_full)


class TrainingDiverged(RuntimeError):
    """A loss or a weight became NaN or infinite; the last good checkpoint is on disk."""


def printable(name: object) -> str:
    """A name from a folder or an archive, with escapes for what would move the cursor, recolour or break the line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))
