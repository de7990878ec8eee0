"""Reading what torch.save wrote: tensors, numbers, texts and containers of them, and nothing that runs code."""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastp2p.errors import InputError
from fastp2p.files import check_file

# What torch.load raises on files that are truncated, overwritten, or hold more than tensors; by experiment.
_DAMAGED = (
    *(OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError),
    struct.error,
)


def load_pickled_tensors(path: Path, expected: str) -> Any:
    """torch.load, after the checksums that torch.save wrote. Old .pth files, which are no zips, have none."""
    check_file(path, expected)
    try:
        if zipfile.is_zipfile(path):
            _check_stored(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:  # has its words
        raise
    except pickle.UnpicklingError as error:  # PyTorch's text advises to load it all the same
        raise InputError(
            f"{path}: is damaged, or holds more than tensors; a pickle of other objects could run any code, so it is "
            "not loaded. A bare state_dict is what fastp2p reads"
        ) from error
    except (*_DAMAGED, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: is damaged, or holds more than torch.save's tensors: {error!r:.200}") from error
    _check_content(path, loaded)
    return loaded


MAX_DEPTH = 32  # containers in containers; a checkpoint has six
MAX_ENTRIES = 1_000_000  # a checkpoint has some thousand; a container in two places counts twice


def _check_content(path: Path, loaded: Any) -> None:
    """Raise InputError on what no program should walk through, such as a list in itself, and on odd tensors."""
    left, entries = [(loaded, 0)], 0
    while left:
        value, depth = left.pop()
        entries += 1
        if depth > MAX_DEPTH or entries > MAX_ENTRIES:
            raise InputError(
                f"{path}: holds containers in containers, more than {MAX_DEPTH} deep or of more than {MAX_ENTRIES:,} "
                "entries in all, or one that contains itself; expected a dict of tensors: take another copy"
            )
        if isinstance(value, dict):
            left += [(inner, depth + 1) for item in value.items() for inner in item]
        elif isinstance(value, list | tuple | set):
            left += [(inner, depth + 1) for inner in value]
        elif isinstance(value, Tensor):
            _check_tensor(path, value)


def _check_tensor(path: Path, value: Tensor) -> None:
    """Raise InputError on a tensor that no network has: a sparse one, or a number that is told to fill gigabytes."""
    plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided
    if not plain or value.device.type != "cpu" or value.is_quantized:
        raise InputError(f"{path}: holds a tensor that is no plain one ({value.layout}, {value.device})")
    if value.is_conj() or value.is_neg():
        raise InputError(
            f"{path}: holds a {value.dtype} tensor whose conjugate or negative is yet to be computed, expected a plain "
            "one; call resolve_conj and resolve_neg before it is saved"
        )
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise InputError(f"{path}: holds a tensor of shape {tuple(value.shape)} without a number for each place")


def _check_stored(path: Path) -> None:
    """Raise BadZipFile where a member's bytes are not those that torch.save wrote: torch.load does not look."""
    with zipfile.ZipFile(path) as archive:
        packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
        if packed:  # torch.save packs nothing; a small file could unpack to more than there is memory
            raise zipfile.BadZipFile(f"{packed[0]} is compressed, which torch.save never does")
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
