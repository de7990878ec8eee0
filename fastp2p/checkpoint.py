"""State in, state out: the run's checkpoint, self-describing generators, upstream's files.

Nothing here is unpickled in full: safetensors, and torch.load(weights_only=True).
"""

import io
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fastp2p.config import Direction, Dropout, Norm, NormStats
from fastp2p.errors import InputError
from fastp2p.files import write_atomically
from fastp2p.networks import UnetGenerator

# Raised when the meaning of a file's contents changes
CHECKPOINT_FORMAT = 2
GENERATOR_FORMAT = 1
RANGE = "[-1, 1]"  # of the generator's input and output; written for other programs that read the file

StateDict = Mapping[str, Tensor]


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them, atomically."""
    write_atomically(path, _serialised({"format": CHECKPOINT_FORMAT, **state}))


def _serialised(state: dict[str, Any]) -> bytes:
    """What torch.save writes, with the checksums that loading looks at, whatever the program has set.

    It is made in memory: a full disk then fails in our own write, with a clean error.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        buffer = io.BytesIO()
        torch.save(state, buffer)
    finally:
        torch.serialization.set_crc32_options(before)
    return buffer.getvalue()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU.

    Raises:
        InputError: when there is none, or it is damaged or of another version.
    """
    state = _load_pickled_tensors(path)
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise InputError(f"{path}: is no checkpoint of this version of fastp2p (format {CHECKPOINT_FORMAT})")
    return state


# What torch.load raises on files that are truncated, overwritten, or hold more than tensors; by experiment.
_DAMAGED = (
    *(OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError),
    *(struct.error, pickle.UnpicklingError),
)


def _load_pickled_tensors(path: Path) -> Any:
    """torch.load, after the checksums that torch.save wrote. Old .pth files, which are no zips, have none."""
    try:
        if zipfile.is_zipfile(path):
            _check_stored(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file") from error
    except (*_DAMAGED, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: is damaged, or holds more than torch.save's tensors: {error!r:.200}") from error


def _check_stored(path: Path) -> None:
    """Raise BadZipFile where a member's bytes are not those that torch.save wrote: torch.load does not look."""
    with zipfile.ZipFile(path) as archive:
        packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
        if packed:  # torch.save packs nothing; a small file could unpack to more than there is memory
            raise zipfile.BadZipFile(f"{packed[0]} is compressed, which torch.save never does")
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


@dataclass(frozen=True, kw_only=True)
class GeneratorSpec:
    """All that is needed to rebuild a generator and to feed it: the metadata of netG.safetensors."""

    levels: int
    ngf: int
    input_nc: int = 3
    output_nc: int = 3
    norm: Norm = "batch"
    dropout: Dropout = "upstream"
    norm_stats: NormStats = "image"  # what batch norm is to normalise with when images are generated
    direction: Direction = "AtoB"
    crop_size: int = 256  # px, in training; images are resized to it for evaluation
    data: str = ""  # where the training pairs came from
    step: int = 0  # training steps taken

    def build(self) -> UnetGenerator:
        """The generator, with weights yet to be loaded."""
        return UnetGenerator(
            self.input_nc, self.output_nc, levels=self.levels, ngf=self.ngf, norm=self.norm, dropout=self.dropout
        )


def save_generator(path: Path, state_dict: StateDict, spec: GeneratorSpec) -> None:
    """Write netG.safetensors, atomically: the weights, and in the header's metadata how to use them."""
    metadata = {"format": "pt", "fastp2p": json.dumps({"version": GENERATOR_FORMAT, "range": RANGE, **asdict(spec)})}
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def load_generator(path: Path) -> tuple[UnetGenerator, GeneratorSpec]:
    """Read a generator that `save_generator` wrote, on the CPU.

    Raises:
        InputError: when it is no such file, or its weights do not fit its own description.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected a file, of a run its netG.safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file") from error
    except (OSError, safetensors.SafetensorError) as error:
        hint = "; upstream's .pth files are read by fastp2p convert" if path.suffix == ".pth" else ""
        raise InputError(f"{path}: cannot be read as .safetensors ({error}){hint}") from error
    if "fastp2p" not in metadata:
        raise InputError(f"{path}: has no fastp2p metadata; expected a netG.safetensors of fastp2p train or convert")
    try:
        described = dict(json.loads(metadata["fastp2p"]))
        version = described.pop("version")
        del described["range"]
        spec = GeneratorSpec(**described)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: its fastp2p metadata is damaged, or of another version: {error}") from error
    if version != GENERATOR_FORMAT:
        raise InputError(f"{path}: is of format {version}, this version reads format {GENERATOR_FORMAT}")
    netG = spec.build()
    load_strictly(netG, state_dict, path)
    return netG, spec


def load_strictly(net: torch.nn.Module, state_dict: StateDict, path: Path) -> None:
    """net.load_state_dict, with an InputError that names the file and the first misfits."""
    try:
        net.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        raise InputError(f"{path}: the weights do not fit the network: {str(error)[:600]}") from error


def read_upstream_generator(
    path: Path, *, dropout: Dropout, direction: Direction, crop_size: int | None
) -> tuple[UnetGenerator, GeneratorSpec]:
    """Read upstream's latest_net_G.pth; depth, widths and norm are read off the weights.

    `module.` (DataParallel) and `_orig_mod.` (torch.compile) are stripped from the names. Files from before 2018 lack
    num_batches_tracked; it is added as 0.

    Raises:
        InputError: when the file is no U-Net generator of upstream's, with what it looks like instead.
    """
    loaded = _load_pickled_tensors(path)
    tensors = isinstance(loaded, dict) and all(isinstance(value, Tensor) for value in loaded.values())
    if not tensors or not all(isinstance(name, str) for name in loaded):
        raise InputError(f"{path}: got {type(loaded).__name__}, expected a bare state_dict such as latest_net_G.pth")
    state_dict = {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in loaded.items()}
    first, last = state_dict.get("model.model.0.weight"), state_dict.get("model.model.3.weight")
    if first is None or last is None or first.ndim != 4 or last.ndim != 4:
        looks_like = {"model.0.weight": "a PatchGAN discriminator", "model.1.weight": "a ResNet generator"}
        kind = next((kind for name, kind in looks_like.items() if name in state_dict), "something else")
        raise InputError(
            f"{path}: looks like {kind}, expected a U-Net generator (upstream's --netG unet_256 or unet_128)"
        )

    levels = max(name.count("model.") for name in state_dict) - 1  # each level nests one Sequential deeper
    has_norm = any("running_mean" in name for name in state_dict)
    norm: Norm = "batch" if has_norm else "instance" if "model.model.0.bias" in state_dict else "none"
    for name in [name for name in state_dict if name.endswith("running_mean")]:
        state_dict.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    spec = GeneratorSpec(
        levels=levels,
        ngf=first.shape[0],
        input_nc=first.shape[1],
        output_nc=last.shape[1],
        norm=norm,
        dropout=dropout,
        direction=direction,
        crop_size=2**levels if crop_size is None else crop_size,
    )
    netG = spec.build()
    load_strictly(netG, state_dict, path)
    broken = [name for name, value in netG.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise InputError(f"{path}: {broken[0]} holds NaN or infinity ({len(broken)} tensors do); it cannot be used")
    return netG, spec


def write_upstream_generator(path: Path, state_dict: StateDict) -> None:
    """Write a bare state_dict as upstream's latest_net_G.pth, atomically."""
    write_atomically(path, _serialised(dict(state_dict)))
