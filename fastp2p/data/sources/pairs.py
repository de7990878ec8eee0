"""Folders -> pairs of files, in either of the two layouts that people have."""

import unicodedata
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from io import BytesIO
from pathlib import Path

from fastp2p.config import BUILTIN
from fastp2p.data.images import EXTENSIONS
from fastp2p.data.sources.archive import open_archive
from fastp2p.data.sources.folders import MISSING, Contents, is_folder, list_folder, name_some, why_unreadable
from fastp2p.errors import InputError, printable

SPLITS = ("train", "val", "test")
LAYOUTS = """\
  DIR/train/NAME.jpg                     A and B side by side in one image, A on the left; or
  DIR/train/A/NAME.jpg, train/B/NAME.png two folders, matched by NAME
and the same under DIR/val for validation."""


@dataclass(frozen=True)
class Pair:
    """Two images in one file (B is None) or in two."""

    name: str
    A: Traversable
    B: Traversable | None = None


def open_root(data: str) -> Traversable:
    """The folder of a --data value: a directory, a .zip file, or the set inside the package.

    Raises:
        InputError: when there is none.
    """
    if data == BUILTIN:
        return _zip_root(BytesIO((files("fastp2p.data") / "builtin" / "emoji.zip").read_bytes()))
    if data.startswith("builtin:"):
        raise InputError(f"data: got {data!r}, but the only built-in set is {BUILTIN}")
    path = Path(data)
    reason = why_unreadable(path)
    if reason:
        what = "is no folder" if reason == MISSING else reason
        raise InputError(f"data: got {data!r}, which {what}; expected a folder or .zip with\n{LAYOUTS}")
    if path.is_dir():
        return path
    try:
        with open(path, "rb") as stream:
            is_zip = zipfile.is_zipfile(stream)
    except OSError as error:
        raise InputError(f"data: {path} cannot be read: {error.strerror}") from error
    if not is_zip:
        raise InputError(
            f"data: got {data!r}, a file that is no readable .zip; expected a folder or .zip with\n{LAYOUTS}"
        )
    return _zip_root(path)


def _zip_root(source: Path | BytesIO) -> Traversable:
    """The root of an archive, or of the one folder in it. Raises InputError when its directory is damaged."""
    root = open_archive(source)
    folders = [child for child in root.iterdir() if child.is_dir() and not child.name.startswith((".", "__"))]
    return folders[0] if len(folders) == 1 and _is_wrapper(folders[0]) else root


def _is_wrapper(folder: Traversable) -> bool:
    """Whether the one folder of an archive is the set, as many programs pack it, and not one of its splits."""
    inner = {child.name for child in folder.iterdir() if child.is_dir()}
    if folder.name in SPLITS:
        return bool(inner & {"train", folder.name})
    return bool(inner - {"A", "B"})


def has_split(root: Traversable, split: str) -> bool:
    """Whether there is a folder for this split with something in it. Raises InputError when it cannot be looked at."""
    folder = root / split
    try:
        return is_folder(folder) and _holds_something(folder)
    except OSError as error:
        raise InputError(f"data: {folder} cannot be read: {error.strerror or error}") from error


def _holds_something(folder: Traversable) -> bool:
    """Whether a folder has a visible entry, but for an empty A/ and B/."""
    entries = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return any(entry.name not in ("A", "B") or not entry.is_dir() or _holds_something(entry) for entry in entries)


def find_pairs(root: Traversable, split: str) -> tuple[list[Pair], dict[str, str], list[str]]:
    """List the pairs of one split, sorted by name.

    Returns:
        The pairs; the files that cannot be used, as name -> reason: they have no partner, or are links to nowhere; the
        sub-folders and the files of other kinds, which are passed over.

    Raises:
        InputError: when the folder is missing, cannot be read or holds no images.
    """
    try:
        return _find_pairs(root, split)
    except OSError as error:
        raise InputError(
            f"data: {printable(error.filename or root)} cannot be read: {error.strerror or error}"
        ) from error


def _find_pairs(root: Traversable, split: str) -> tuple[list[Pair], dict[str, str], list[str]]:
    folder = root / split
    if not is_folder(folder):
        there = name_some(sorted(child.name + "/" * child.is_dir() for child in root.iterdir()), 8) or "nothing"
        raise InputError(f"data: {root} has no folder {split}/ (it holds {there}); expected\n{LAYOUTS}")
    side_A, side_B = folder / "A", folder / "B"
    has_A, has_B = is_folder(side_A), is_folder(side_B)
    if has_A != has_B:
        missing = "B" if has_A else "A"
        raise InputError(
            f"data: {folder} has only one of the folders A and B; {missing}/ is missing. Expected\n{LAYOUTS}"
        )

    here = list_folder(folder, f"{split}/", beside=("A", "B") if has_A else ())
    if has_A:
        A, B = (list_folder(side, f"{split}/{side.name}/") for side in (side_A, side_B))
        pairs, bad = _match_by_stem(A, B, split)
        others = [*here.others, *(f"{split}/{file.name}" for file in here.images), *here.bad, *A.others, *B.others]
    else:
        pairs, bad = [Pair(f"{split}/{file.name}", file) for file in here.images], here.bad
        others = here.others
    if not pairs and not bad:
        there = name_some((name.removeprefix(f"{split}/") for name in others), 8)
        what = f"holds no images but {there} (images end in {' '.join(EXTENSIONS)}; sub-folders are not searched)"
        raise InputError(f"data: {folder} {what if there else 'is empty'}; expected\n{LAYOUTS}")
    return pairs, bad, others


def _match_by_stem(A: Contents, B: Contents, split: str) -> tuple[list[Pair], dict[str, str]]:
    by_stem: dict[str, dict[str, list[Traversable]]] = defaultdict(lambda: {"A": [], "B": []})
    for side, contents in (("A", A), ("B", B)):
        for file in contents.images:
            by_stem[_stem(file.name)][side].append(file)
    bad = A.bad | B.bad
    excused = {_stem(name.rpartition("/")[2]) for name in bad}  # their partners are not to blame

    pairs = []
    for stem, sides in sorted(by_stem.items()):
        match sides["A"], sides["B"]:
            case [a], [b]:
                pairs.append(Pair(f"{split}/{a.name.rpartition('.')[0]}", a, b))
            case ([], [_]) | ([_], []) if stem in excused:
                pass
            case [], [b, *_]:
                bad[f"{split}/B/{b.name}"] = f"has no partner {stem}.* in {split}/A"
            case [a, *_], []:
                bad[f"{split}/A/{a.name}"] = f"has no partner {stem}.* in {split}/B"
            case _:
                both = ", ".join(f"{side}/{file.name}" for side, found in sides.items() for file in found)
                bad[f"{split}/{stem}"] = f"is ambiguous: {both}"
    return sorted(pairs, key=lambda pair: pair.name), bad


def _stem(name: str) -> str:
    """What a file is matched by: its name without suffix. An e with an accent is one letter or, on a Mac, two."""
    return unicodedata.normalize("NFC", name.rpartition(".")[0])
