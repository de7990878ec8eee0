"""The errors that speak to the user. The command line prints their text without a traceback."""


class InputError(Exception):
    """What the user gave cannot be used: the text says what was got, what was expected and what to do."""


class TrainingDiverged(RuntimeError):
    """A loss or a weight became NaN or infinite; the last good checkpoint is on disk."""
