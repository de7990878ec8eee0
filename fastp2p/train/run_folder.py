"""Making a run's folder, and opening it again."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from fastp2p.config import RunConfig
from fastp2p.errors import InputError, WriteError
from fastp2p.files import is_there, read_small, remove_leftovers, write_atomically
from fastp2p.models import registry
from fastp2p.terminal import Say

# Fields that may differ between a run and its continuation: limits, bookkeeping and places, which teach nothing.
CHANGEABLE = {
    *("data", "skip_bad", "stream", "device"),
    *("n_epochs", "n_epochs_decay", "max_steps", "max_minutes"),
    *("log_steps", "panel_steps", "val_epochs", "save_minutes"),
}
# Fields that mend a run that diverged: they may differ, too, and the run prints that they do.
REMEDIES = {"lr", "precision"}


@contextlib.contextmanager
def new_folder(config: RunConfig) -> Iterator[Path]:
    """Make config.out, or the next free runs/DATA-NUMBER, and its config.json; locked as long as the `with` block.

    The lock comes before the look and the writing: of runs that start together each gets a folder with its own
    configuration, or is refused.

    Raises:
        InputError: when it is there and not empty, cannot be made, or another process trains in it.
    """
    with contextlib.ExitStack() as lock:
        if config.out is None:
            folder = _lock_next(config.data, lock)
        else:
            folder = config.out
            if folder.exists() and not folder.is_dir():
                raise InputError(f"out: {folder} is a file; expected a folder to make")
            make_folder(folder)
            lock.enter_context(locked(folder))
        _check_empty(folder)
        remove_leftovers(folder)
        write_config(folder, config)
        yield folder


def check_unused(config: RunConfig) -> None:
    """Raise InputError where config.out is there and not empty, before anything takes its time."""
    if config.out is not None and config.out.is_dir():
        _check_empty(config.out)


def _check_empty(folder: Path) -> None:
    # A process that was killed as it wrote config.json left no run behind
    if any(not path.match(".config.json.*.tmp") for path in folder.iterdir()):
        is_run = is_there(folder / "config.json")
        hint = f"--resume {quote(str(folder))} continues the run in it" if is_run else "it holds files"
        raise InputError(f"out: {folder} is not empty ({hint}); choose another --out")


def make_folder(folder: Path) -> None:
    """mkdir -p. Raises InputError when the disk or the permissions refuse."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out: {folder} cannot be made: {error.strerror}; choose another --out") from error


def reopen_folder(config: RunConfig, say: Say) -> Path:
    """Open config.out to go on with the run in it; this writes nothing there.

    Raises:
        InputError: when it holds no run, or an option differs that the trained weights depend on.
    """
    assert config.out is not None, "a run is resumed from its folder"
    before, now = read_config(config.out).as_dict(), config.as_dict()
    changed = [name for name, value in now.items() if value != before[name] and name not in CHANGEABLE]
    for name in changed:
        fp64 = "fp64" in (now[name], before[name])  # its weights are of another type
        if name not in REMEDIES or fp64:
            raise InputError(
                f"{name}: got {now[name]}, but {config.out} was trained with {before[name]}; drop the option"
            )
        say(f"{name}: {now[name]} from here on; {config.out} was trained with {before[name]}")
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


@contextlib.contextmanager
def resume_advice(folder: Path) -> Iterator[None]:
    """Within the `with` block, a WriteError for a full disk names the command that goes on with the run in folder.

    Raises:
        WriteError: the one that the block raised.
    """
    try:
        yield
    except WriteError as error:
        if error.is_full:
            error.args = (f"{error} The run goes on with: fastp2p train --resume {quote(str(folder))}",)
        raise


def read_config(folder: Path) -> RunConfig:
    """The configuration of the run in this folder.

    Raises:
        InputError: when config.json is missing, damaged, or of another version.
    """
    path = folder / "config.json"
    if not is_there(path):
        raise InputError(f"resume: {folder} is no run folder (it has no config.json)")
    content = read_small(path)
    try:
        fields = json.loads(content)
        if not isinstance(fields, dict):
            raise ValueError(f"it holds {fields!r:.60}, expected settings by name")
        model = registry.find(fields.get("model", "pix2pix"))  # earlier versions had no other, and wrote none
        return model.config(**fields | {"out": folder})
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as a configuration of this version: {error}") from error


def write_config(folder: Path, config: RunConfig) -> None:
    """Write config.json. Raises WriteError."""
    fields = {name: value for name, value in config.as_dict().items() if name != "out"}  # a user may move the folder
    if not config.data.startswith("builtin:"):
        fields["data"] = str(Path(config.data).resolve())  # a user may resume the run from another folder
    write_atomically(folder / "config.json", json.dumps(fields, indent=2).encode() + b"\n")


def _lock_next(data: str, lock: contextlib.ExitStack) -> Path:
    """Make the next free folder and lock it; where a run with --out locks it first, take the next one."""
    while True:
        folder = _make_next(data)
        with contextlib.suppress(InputError):
            lock.enter_context(locked(folder))
            return folder


def _make_next(data: str) -> Path:
    """Make the folder with the lowest number that is free, which no other process can have made."""
    name = Path(data.removeprefix("builtin:")).resolve().stem
    make_folder(Path("runs"))
    number = 0
    while True:
        number += 1
        folder = Path("runs") / f"{name}-{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"out: {folder} cannot be made: {error.strerror}; choose another --out") from error
        return folder
