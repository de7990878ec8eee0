"""State in, state out: the run's checkpoint, and self-describing generators.

Nothing here is unpickled in full: safetensors, and torch.load(weights_only=True).
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fastp2p.errors import InputError
from fastp2p.files import check_file, write_atomically
from fastp2p.models import registry
from fastp2p.models.generator_spec import GeneratorSpec
from fastp2p.models.pickled import load_pickled_tensors
from fastp2p.terminal import Say, warn

CHECKSUM = "sha256"  # beside the content; files of earlier versions have none

# Raised when the meaning of a file's contents changes
CHECKPOINT_FORMAT = 2
GENERATOR_FORMAT = 1
RANGE = "[-1, 1]"  # the generator's input and output; written for other programs that read the file

StateDict = Mapping[str, Tensor]


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them, with a checksum of all, atomically."""
    state = {"format": CHECKPOINT_FORMAT, **_on_cpu(state)}
    write_atomically(path, serialised(state | {CHECKSUM: checksum(state)}))


def _on_cpu(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: _on_cpu(value) for name, value in state.items()}
    if isinstance(state, list):
        return [_on_cpu(value) for value in state]
    return state.detach().cpu() if isinstance(state, Tensor) else state


def checksum(state: Any) -> str:
    """SHA-256 of everything in nested dicts and lists: names, numbers, texts, and tensors with dtype and shape."""
    digest = hashlib.sha256()

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict | list | tuple):
            items = list(value.items() if isinstance(value, dict) else enumerate(value))
            digest.update(f"{name} {type(value).__name__} {len(items)}\n".encode())
            for key, item in items:
                add(f"{name}/{key!r}", item)
        elif isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name} {value!r}\n".encode())

    add("", state)
    return digest.hexdigest()


def serialised(state: dict[str, Any]) -> bytes:
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


def load_checkpoint(path: Path, say: Say = warn) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU.

    Args:
        path: the file.
        say: takes a line when a file of an earlier version has no checksum.

    Raises:
        InputError: when there is none, or it is damaged, changed or of another version.
    """
    state = load_pickled_tensors(path, "a run's checkpoint.pt")
    if not isinstance(state, dict) or (type(state.get("format")), state.get("format")) != (int, CHECKPOINT_FORMAT):
        raise InputError(f"{path}: is no checkpoint of this version of fastp2p (format {CHECKPOINT_FORMAT})")
    check_checksum(path, state.pop(CHECKSUM, None), state, say)
    return state


def check_checksum(path: Path, found: Any, content: Any, say: Say) -> None:
    """Raise InputError where the content is not what was written; a file of an earlier version cannot be checked."""
    if found is None:
        say(f"{path}: has no checksum, as from an earlier version, so damage to it cannot be seen")
    elif found != checksum(content):
        raise InputError(
            f"{path}: its content does not match its checksum: it is damaged, or was changed after it was written; "
            "take another copy"
        )


def save_generator(path: Path, state_dict: StateDict, spec: GeneratorSpec) -> None:
    """Write netG.safetensors, atomically: the weights, and in the header's metadata how to use them, and a checksum."""
    described = json.dumps({"version": GENERATOR_FORMAT, "range": RANGE, "model": spec.model, **asdict(spec)})
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()}
    metadata = {"format": "pt", "fastp2p": described, CHECKSUM: checksum([described, dict(sorted(tensors.items()))])}
    content = safetensors.torch.save(tensors, metadata)
    # The library orders the metadata otherwise in each process, and equal models are to have equal bytes
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]) | {"__metadata__": metadata}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    write_atomically(path, b"".join((len(header).to_bytes(8, "little"), header, memoryview(content)[end:])))


def load_generator(path: Path, say: Say = warn) -> tuple[nn.Module, GeneratorSpec]:
    """Read a generator that `save_generator` wrote, on the CPU.

    Args:
        path: the file.
        say: takes a line when a file of an earlier version has no checksum.

    Raises:
        InputError: when it is no such file, is damaged or was changed. Also when its weights do not fit its own
            description, which is found before memory is taken for them.
    """
    check_file(path, "a file, of a run its netG.safetensors")
    if path.name == "checkpoint.pt":
        raise InputError(f"{path}: is a run's checkpoint; its generator is {path.with_name('netG.safetensors')}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            spec = _read_spec(path, metadata)
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            netG = build_to_fit(path, spec, {name: tuple(slice.get_shape()) for name, slice in slices.items()})
            state_dict = {name: file.get_tensor(name).clone() for name in slices}  # a mapped file may be cut
    except (OSError, safetensors.SafetensorError) as error:
        hint = "; upstream's .pth files are read by fastp2p convert" if path.suffix == ".pth" else ""
        raise InputError(f"{path}: cannot be read as .safetensors ({error}){hint}") from error
    content = [metadata["fastp2p"], dict(sorted(state_dict.items()))]
    check_checksum(path, metadata.get(CHECKSUM), content, say)
    fill(netG, state_dict, path)
    return netG, spec


def load_image_generator(path: Path, say: Say = warn) -> tuple[nn.Module, GeneratorSpec]:
    """`load_generator`, for images.

    Raises:
        InputError: as there, and on channels that are no image's.
    """
    netG, spec = load_generator(path, say)
    for name, channels in (("input", spec.input_nc), ("output", spec.output_nc)):
        if channels not in (1, 3):
            raise InputError(
                f"{path}: its {name} has {channels} channels, which no image file means; expected 3 (colour) or 1 "
                "(grey). In Python, fastp2p.models.checkpoint.load_generator gives the network"
            )
    return netG, spec


def _read_spec(path: Path, metadata: Mapping[str, str]) -> GeneratorSpec:
    if "fastp2p" not in metadata:
        raise InputError(f"{path}: has no fastp2p metadata; expected a netG.safetensors of fastp2p train or convert")
    try:
        described = dict(json.loads(metadata["fastp2p"]))
        version, value_range = described.pop("version"), described.pop("range")
        model = described.pop("model", "pix2pix")  # which earlier versions did not write
        spec = registry.find(model).generator_spec(**described)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{path}: its fastp2p metadata is damaged, or of another version: {error}") from error
    if (type(version), version, value_range) != (int, GENERATOR_FORMAT, RANGE):
        raise InputError(
            f"{path}: is of format {version!r:.60} for values in {value_range!r:.60}, this version reads format "
            f"{GENERATOR_FORMAT} for {RANGE}"
        )
    return spec


def build_to_fit(path: Path, spec: GeneratorSpec, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """The generator without memory for its weights. Raises InputError where a file's shapes are not its own."""
    with torch.device("meta"):
        netG = spec.build()
    check_fit(netG, shapes, path)
    return netG


def check_fit(net: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise InputError, with the first misfits, unless these are the names and shapes of net's state_dict."""
    expected = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    misfits = [f"{name} is missing" for name in expected if name not in shapes]
    misfits += [f"{name} has no place in it" for name in shapes if name not in expected]
    misfits += [
        f"{name} is {shapes[name]}, expected {shape}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    if misfits:
        more = f", and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise InputError(f"{path}: the weights do not fit the network: {', '.join(misfits[:3])}{more}")


_NOT_READ = {torch.bool, torch.float4_e2m1fn_x2}  # a byte of the latter packs two numbers, which no operator unpacks


def fill(netG: nn.Module, state_dict: StateDict, path: Path) -> None:
    """Give a generator without memory its weights. Raises InputError where they are no numbers to compute with."""
    for name, own in netG.state_dict().items():
        got = state_dict[name].dtype  # a float may count batches: nobody reads that number
        if got in _NOT_READ or got.is_complex or (own.dtype.is_floating_point and not got.is_floating_point):
            raise InputError(f"{path}: {name} is {got}, expected {own.dtype}; convert it before it is saved")
    fitting = {name: state_dict[name].to(own.dtype) for name, own in netG.state_dict().items()}
    # The cast makes infinity of what is too large, and a whole number of NaN
    broken = [
        name
        for name, value in fitting.items()
        if not (value if value.is_floating_point() else state_dict[name].double()).isfinite().all()
    ]
    if broken:
        raise InputError(
            f"{path}: {broken[0]} holds NaN or infinity, or more than {fitting[broken[0]].dtype} can hold "
            f"({len(broken)} tensors do); it cannot be used: take another copy, or train anew"
        )
    for name, value in fitting.items():
        if name.endswith("running_var") and value.min() < 0:
            raise InputError(
                f"{path}: {name} holds {float(value.min()):.3g}, expected variances of 0 or more; it is damaged: take "
                "another copy"
            )
    netG.load_state_dict(fitting, strict=True, assign=True)
