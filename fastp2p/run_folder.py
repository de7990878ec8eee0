"""Making a run's folder, and opening it again."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from fastp2p.config import TrainConfig
from fastp2p.errors import InputError
from fastp2p.files import write_atomically

# What may differ between a run and its continuation: limits, bookkeeping and places, but nothing that is learned from.
CHANGEABLE = {
    *("data", "skip_bad", "stream", "device"),
    *("n_epochs", "n_epochs_decay", "max_steps", "max_minutes"),
    *("log_steps", "panel_steps", "val_epochs", "save_minutes"),
}


def new_folder(config: TrainConfig) -> Path:
    """Make config.out, or the next free runs/DATA-NUMBER, and its config.json.

    Raises:
        InputError: when it is there and not empty, or cannot be made.
    """
    folder = config.out or _next_free(config.data)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"out: {folder} is a file; expected a folder to make")
    if folder.is_dir() and any(folder.iterdir()):
        hint = f"--resume {folder} continues the run in it" if (folder / "config.json").exists() else "it holds files"
        raise InputError(f"out: {folder} is not empty ({hint}); choose another --out")
    make_folder(folder)
    write_config(folder, config)
    return folder


def make_folder(folder: Path) -> None:
    """mkdir -p. Raises InputError when that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out: {folder} cannot be made: {error.strerror}; choose another --out") from error


def reopen_folder(config: TrainConfig) -> Path:
    """Open config.out to go on with the run in it; nothing is written there.

    Raises:
        InputError: when it holds no run, or something was changed that the trained weights depend on.
    """
    assert config.out is not None, "a run is resumed from its folder"
    before = read_config(config.out).as_dict()
    for name, value in config.as_dict().items():
        if value != before[name] and name not in CHANGEABLE:
            raise InputError(f"{name}: got {value}, but {config.out} was trained with {before[name]}; drop the option")
    return config.out


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training in this folder. Raises InputError when one does."""
    descriptor = os.open(folder, os.O_RDONLY)  # locks the folder itself and leaves no file behind
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"out: another process is training in {folder}; stop it, or choose another") from error
        yield
    finally:
        os.close(descriptor)


def read_config(folder: Path) -> TrainConfig:
    """The configuration of the run in this folder.

    Raises:
        InputError: when config.json is missing, damaged, or of another version.
    """
    path = folder / "config.json"
    if not path.exists():
        raise InputError(f"resume: {folder} is no run folder (it has no config.json)")
    try:
        return TrainConfig(**json.loads(path.read_text()) | {"out": folder})
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as a configuration of this version: {error}") from error


def write_config(folder: Path, config: TrainConfig) -> None:
    """Write config.json. Raises WriteError."""
    fields = {name: value for name, value in config.as_dict().items() if name != "out"}  # a folder may be moved
    if not config.data.startswith("builtin:"):
        fields["data"] = str(Path(config.data).resolve())  # a run may be resumed from another folder
    write_atomically(folder / "config.json", json.dumps(fields, indent=2).encode() + b"\n")


KERNELS = "kernels.json"  # which kernel computed what: other ones round otherwise


def _next_free(data: str) -> Path:
    name = Path(data.removeprefix("builtin:")).resolve().stem
    return next(path for n in range(1, 10**6) if not (path := Path("runs") / f"{name}-{n:03d}").exists())
