"""Images in, translated images out, with nothing but a netG.safetensors."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastp2p.checkpoint import load_generator
from fastp2p.config import Device, NormStats
from fastp2p.data.images import bad_files_message, is_image, read_image, resize, to_array
from fastp2p.device import choose_device
from fastp2p.errors import InputError
from fastp2p.networks import generate
from fastp2p.recorder import to_image


def translate(
    model: Path,
    inputs: Sequence[Path],
    out: Path,
    *,
    size: int | None = None,
    norm_stats: NormStats = "image",
    dropout: bool = False,
    seed: int = 0,
    device: Device = "auto",
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Translate images of any size, and write OUT/NAME.png for each, of the size of its input.

    Args:
        model: a netG.safetensors.
        inputs: image files, or folders whose image files are taken.
        out: folder to make or to write into.
        size: resize each image to size x size px (bicubic) first, as in training; None keeps its own size.
        norm_stats, dropout: see `fastp2p.networks.generate`.
        seed: of the dropout.
        device: "auto", "cpu" or "cuda".
        say: takes each line of report.

    Returns:
        The files written.

    Raises:
        InputError: when there is nothing to translate, or, after all others were translated, with the list of the
            files that could not be.
    """
    where = choose_device(device)
    netG, spec = load_generator(model)
    netG.to(where)
    files = _image_files(inputs)
    targets = _targets(files, out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)

    bad: dict[str, str] = {}
    written = []
    for file, target in zip(files, targets, strict=True):
        try:
            image, _ = read_image(file, spec.input_nc)
        except InputError as error:
            bad[str(file)] = str(error)
            continue
        image = image if size is None else resize(image, size)
        array = np.array(to_array(image))  # a copy: PIL's is read-only
        real_A = torch.from_numpy(array).permute(2, 0, 1)[None].to(where).float() / 255 * 2 - 1
        fake_B = generate(netG, real_A, norm_stats=norm_stats, dropout=dropout)
        save_png(to_image(fake_B[0]), target)
        say(f"{file} -> {target}")
        written.append(target)
    if bad:
        remedy = f"The other {len(written)} were translated."
        raise InputError("translate: " + bad_files_message(bad, of=len(files), remedy=remedy))
    return written


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG under a temporary name first, so that no half picture is left."""
    temporary = path.with_name(f".{path.name}.tmp")
    image.save(temporary, "PNG")
    temporary.replace(path)


def _image_files(inputs: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if is_image(file))
            if not found:
                raise InputError(f"translate: {path} holds no images")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise InputError(f"translate: {path}: there is no such file or folder")
    return files


def _targets(files: list[Path], out: Path) -> list[Path]:
    """OUT/STEM.png; where two inputs share a stem, or it would overwrite its input, OUT/NAME.png with the full name."""
    stems = [file.stem for file in files]
    targets = [out / f"{file.stem if stems.count(file.stem) == 1 else file.name}.png" for file in files]
    inputs = {file.resolve() for file in files}
    for file, target in zip(files, targets, strict=True):
        if target.resolve() in inputs:
            raise InputError(f"translate: {target} would overwrite an input; choose another --out")
        if targets.count(target) > 1:
            raise InputError(f"translate: two inputs are named {file.name}; translate their folders one at a time")
    return targets
