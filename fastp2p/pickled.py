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
    except pickle.UnpicklingError as error:  # PyTorch's text advises to load it all the same
        raise InputError(
            f"{path}: is damaged, or holds more than tensors; a pickle of other objects could run any code, so it is "
            "not loaded. A bare state_dict is what fastp2p reads"
        ) from error
    except (*_DAMAGED, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: is damaged, or holds more than torch.save's tensors: {error!r:.200}") from error
    _check_tensors(path, loaded)
    return loaded


def _check_tensors(path: Path, loaded: Any) -> None:
    """Raise InputError on tensors that no network has: sparse ones, or one number that is told to fill gigabytes."""
    if isinstance(loaded, dict | list | tuple):
        for value in loaded.values() if isinstance(loaded, dict) else loaded:
            _check_tensors(path, value)
    elif isinstance(loaded, Tensor):
        plain = type(loaded) in (Tensor, torch.nn.Parameter) and loaded.layout == torch.strided
        if not plain or loaded.device.type != "cpu" or loaded.is_quantized:
            raise InputError(f"{path}: holds a tensor that is no plain one ({loaded.layout}, {loaded.device})")
        if loaded.numel() * loaded.element_size() > loaded.untyped_storage().nbytes():
            raise InputError(f"{path}: holds a tensor of shape {tuple(loaded.shape)} without a number for each place")


def _check_stored(path: Path) -> None:
    """Raise BadZipFile where a member's bytes are not those that torch.save wrote: torch.load does not look."""
    with zipfile.ZipFile(path) as archive:
        packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
        if packed:  # torch.save packs nothing; a small file could unpack to more than there is memory
            raise zipfile.BadZipFile(f"{packed[0]} is compressed, which torch.save never does")
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
