"""Folders -> pairs of files, in either of the two layouts that people have."""

import struct
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from io import BytesIO
from pathlib import Path

from fastp2p.config import BUILTIN
from fastp2p.data.images import EXTENSIONS, is_image
from fastp2p.errors import InputError

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
    if path.is_file():
        if not zipfile.is_zipfile(path):
            raise InputError(
                f"data: got {data!r}, a file that is no readable .zip; expected a folder or .zip with\n{LAYOUTS}"
            )
        return _zip_root(path)
    if not path.is_dir():
        raise InputError(f"data: got {data!r}, which is no folder; expected a folder or .zip with\n{LAYOUTS}")
    return path


def _zip_root(source: Path | BytesIO) -> Traversable:
    """The root of an archive, or of the one folder in it. Raises InputError when its directory is damaged."""
    try:
        root = zipfile.Path(zipfile.ZipFile(source))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise InputError(f"data: {source}: is a damaged .zip ({error}); copy or make it again") from error
    children = [child for child in root.iterdir() if not child.name.startswith((".", "__"))]
    return children[0] if len(children) == 1 and children[0].is_dir() and children[0].name != "train" else root


def has_split(root: Traversable, split: str) -> bool:
    """Whether there is a folder for this split."""
    return (root / split).is_dir()


def find_pairs(root: Traversable, split: str) -> tuple[list[Pair], dict[str, str], list[str]]:
    """List the pairs of one split, sorted by name.

    Returns:
        The pairs; the files that have no partner, as name -> reason; the names of files that are no images.

    Raises:
        InputError: when the folder is missing or holds no images.
    """
    try:
        return _find_pairs(root, split)
    except OSError as error:
        raise InputError(f"data: {error.filename or root} cannot be read: {error.strerror or error}") from error


def _find_pairs(root: Traversable, split: str) -> tuple[list[Pair], dict[str, str], list[str]]:
    folder = root / split
    if not folder.is_dir():
        there = ", ".join(sorted(child.name + "/" * child.is_dir() for child in root.iterdir())[:8]) or "nothing"
        raise InputError(f"data: {root} has no folder {split}/ (it holds {there}); expected\n{LAYOUTS}")
    side_A, side_B = folder / "A", folder / "B"
    if side_A.is_dir() != side_B.is_dir():
        missing = "B" if side_A.is_dir() else "A"
        raise InputError(
            f"data: {folder} has only one of the folders A and B; {missing}/ is missing. Expected\n{LAYOUTS}"
        )

    if side_A.is_dir():
        pairs, bad = _match_by_stem(side_A, side_B, split)
        others = [f"{split}/{side.name}/{file.name}" for side in (side_A, side_B) for file in _not_images(side)]
        others += [f"{split}/{file.name}" for file in folder.iterdir() if is_image(file)]
    else:
        images = sorted((file for file in folder.iterdir() if is_image(file)), key=lambda file: file.name)
        pairs, bad = [Pair(f"{split}/{file.name}", file) for file in images], {}
        others = [f"{split}/{file.name}" for file in _not_images(folder)]
    if not pairs and not bad:
        there = ", ".join(sorted(child.name + "/" * child.is_dir() for child in folder.iterdir())[:8]) or "nothing"
        raise InputError(f"data: {folder} holds no images but {there} ({', '.join(EXTENSIONS)}); expected\n{LAYOUTS}")
    return pairs, bad, others


def _not_images(folder: Traversable) -> Iterable[Traversable]:
    return (file for file in folder.iterdir() if not is_image(file) and not file.name.startswith("."))


def _match_by_stem(side_A: Traversable, side_B: Traversable, split: str) -> tuple[list[Pair], dict[str, str]]:
    by_stem: dict[str, dict[str, list[Traversable]]] = defaultdict(lambda: {"A": [], "B": []})
    for side, folder in (("A", side_A), ("B", side_B)):
        for file in sorted(filter(is_image, folder.iterdir()), key=lambda file: file.name):
            by_stem[file.name.rpartition(".")[0]][side].append(file)

    pairs, bad = [], {}
    for stem, sides in sorted(by_stem.items()):
        match sides["A"], sides["B"]:
            case [a], [b]:
                pairs.append(Pair(f"{split}/{stem}", a, b))
            case [], [b, *_]:
                bad[f"{split}/B/{b.name}"] = f"has no partner {stem}.* in {split}/A"
            case [a, *_], []:
                bad[f"{split}/A/{a.name}"] = f"has no partner {stem}.* in {split}/B"
            case _:
                both = ", ".join(f"{side}/{file.name}" for side, found in sides.items() for file in found)
                bad[f"{split}/{stem}"] = f"is ambiguous: {both}"
    return pairs, bad
