"""What lies in a folder or an archive: images, what is named like one and cannot be read, and everything else."""

import errno
import os
import stat
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path

from fastp2p.data.images import EXTENSIONS
from fastp2p.errors import InputError, printable

MISSING = "there is no such file or folder"
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


@dataclass
class Contents:
    """A folder's entries, sorted by name; without hidden ones (.DS_Store, ._0.png)."""

    images: list[Traversable] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)  # named like an image, but no file -> reason
    others: list[str] = field(default_factory=list)  # sub-folders with their number of images, then files


def list_folder(folder: Traversable, name: str = "", *, beside: tuple[str, ...] = ()) -> Contents:
    """What is in a folder, its sub-folders not searched.

    Args:
        folder: where to look.
        name: what stands before the entries' names in `bad` and `others`, "train/".
        beside: entries that are left out, too.

    Raises:
        OSError: when the folder cannot be listed.
    """
    contents, files = Contents(), []
    entries = {entry.name: entry for entry in folder.iterdir()}
    for _, entry in sorted(entries.items()):
        if entry.name.startswith(".") or entry.name in beside:
            continue
        reason = why_unreadable(entry)
        if not reason and entry.is_dir():
            images = count_images(entry)
            contents.others.append(f"{name}{entry.name}/ ({images:,} image{'s' * (images != 1)})")
        elif not has_image_name(entry.name):
            files.append(name + entry.name + (f" ({reason})" if reason else ""))
        elif reason:
            contents.bad[name + entry.name] = reason
        else:
            contents.images.append(entry)
    contents.others += files
    return contents


def has_image_name(name: str) -> bool:
    """Whether the suffix (upper or lower case) is an image's, and the name not hidden."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def why_unreadable(entry: Traversable) -> str:
    """Why an entry is neither a file nor a folder that can be looked at; "" when it is one."""
    if isinstance(entry, zipfile.Path):
        is_link = entry.is_file() and stat.S_ISLNK(entry.root.getinfo(entry.at).external_attr >> 16)
        return "is a link in the .zip; pack it with the files that its links lead to" if is_link else ""
    assert isinstance(entry, Path)
    try:
        mode = entry.stat().st_mode
    except OSError as error:
        if error.errno not in _NOT_THERE:
            return f"cannot be read: {error.strerror}"
        if entry.is_symlink():
            return f"is a link to {os.readlink(entry)}, which is not there"
        return MISSING
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return ""
    return "is a named pipe, a socket or a device, and no file"


def is_folder(entry: Traversable) -> bool:
    """Whether there is such a folder.

    Raises:
        InputError: when it is a link to nowhere, or may not be looked at.
    """
    reason = why_unreadable(entry)
    if reason and reason != MISSING:
        raise InputError(f"data: {printable(entry)} {printable(reason)}")
    return entry.is_dir()


def count_images(folder: Traversable) -> int:
    """How many files in a folder and its sub-folders have an image's name."""
    if isinstance(folder, zipfile.Path):
        names = (name.rpartition("/")[2] for name in folder.root.namelist() if name.startswith(folder.at))
    else:
        names = (name for _, _, files in os.walk(str(folder)) for name in files)  # follows no link
    return sum(map(has_image_name, names))


def name_some(names: Iterable[str], limit: int = 5) -> str:
    """The first names, and how many more there are."""
    names = [printable(name) for name in names]
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def passed_over(others: list[str]) -> str:
    """A line on the files that fastp2p passed over, "" when there are none."""
    if not others:
        return ""
    what = "1 entry" if len(others) == 1 else f"{len(others):,} entries"
    return (
        f"passed over {what} (sub-folders are not searched, and images end in {' '.join(EXTENSIONS)}): "
        f"{name_some(others)}"
    )
