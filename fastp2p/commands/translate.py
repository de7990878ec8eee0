"""Images in, translated images out, with nothing but a netG.safetensors."""

from collections import Counter
from collections.abc import Sequence
from os.path import lexists, realpath
from pathlib import Path

import torch
from torch import nn

from fastp2p import terminal
from fastp2p.config import Device
from fastp2p.data.images import bad_files_message, read_image, resize, to_image, to_png, to_tensor
from fastp2p.data.sources.folders import Contents, list_folder, passed_over, why_unreadable
from fastp2p.device import choose_device, memory_bytes
from fastp2p.errors import InputError, WriteError, printable
from fastp2p.files import write_atomically
from fastp2p.models.checkpoint import load_image_generator
from fastp2p.models.generate import NormStats, generate
from fastp2p.terminal import Say
from fastp2p.train.run_folder import make_folder


def translate(
    model: Path,
    inputs: Sequence[Path],
    out: Path,
    *,
    size: int | None = None,
    norm_stats: NormStats | None = None,
    dropout: bool = False,
    overwrite: bool = False,
    seed: int = 0,
    device: Device = "auto",
    say: Say = terminal.say,
) -> list[Path]:
    """Translate images of any size, and write OUT/NAME.png for each, of the size of its input.

    Args:
        model: a netG.safetensors.
        inputs: image files, or folders whose image files are taken.
        out: folder to make or to write into.
        size: resize each image to size x size px (bicubic) first, as in training; None keeps its own size.
        norm_stats: what batch norm normalises with, see `fastp2p.models.generate.generate`; None is the model's own.
        dropout: keep dropout on.
        overwrite: replace files that are in `out` already.
        seed: of the dropout.
        device: "auto", "cpu" or "cuda".
        say: takes each line of report.

    Returns:
        The files written.

    Raises:
        InputError: when there is nothing to translate, or, after all others were translated, with the list of the
            files that could not be.
    """
    chosen = choose_device(device)
    netG, spec = load_image_generator(model)
    netG.to(chosen)
    found = _find_images(inputs, out)
    once = {(realpath(file.parent), file.name): file for file in found.images if isinstance(file, Path)}
    files = list(once.values())
    targets = _targets(files, out, overwrite)
    if size is not None and size < 1:
        raise InputError(f"size: got {size}, expected 1 px or more")
    make_folder(out)
    if dropout and not any(isinstance(module, nn.Dropout) for module in netG.modules()):
        say("--dropout changes nothing: this generator has none")
    torch.manual_seed(seed)

    bad = found.bad
    written = []
    for file, target in zip(files, targets, strict=True):
        try:
            image, note = read_image(file, spec.input_nc)
        except InputError as error:
            bad[str(file)] = str(error)
            continue
        width, height = image.size if size is None else (size, size)
        # The outermost level holds this at once, in float32; with less memory the system would kill the process
        least = 4 * width * height * spec.channels_at_full_size
        if least > memory_bytes(chosen):
            bad[str(file)] = f"{width}x{height} px take {least / 2**30:.0f} GiB at least; use a smaller --size"
            continue
        real_A = to_tensor(image if size is None else resize(image, size)).to(chosen)
        fake_B = generate(netG, real_A, norm_stats=norm_stats or spec.norm_stats, dropout=dropout)
        try:
            write_atomically(target, to_png(to_image(fake_B[0])))
        except WriteError as error:
            if error.is_full:
                raise
            bad[str(file)] = str(error)  # its name, for instance, is too long
            continue
        say(f"{printable(file)} -> {printable(target)}" + (f" (converted: {note})" if note else ""))
        written.append(target)
    if found.others:
        say(passed_over(found.others))
    if bad:
        remedy = f"The other {len(written)} were translated."
        raise InputError("translate: " + bad_files_message(bad, of=len(written) + len(bad), remedy=remedy))
    return written


def _find_images(inputs: Sequence[Path], out: Path) -> Contents:
    """The files to translate, in order, and what else lies in the folders, of which `out` must be none."""
    found = Contents()
    for path in inputs:
        if reason := why_unreadable(path):
            raise InputError(f"translate: {printable(path)}: {printable(reason)}")
        if not path.is_dir():
            found.images.append(path)
            continue
        if realpath(path) == realpath(out):
            raise InputError(f"translate: --out {out} holds the inputs, so its results would be inputs the next time")
        try:
            contents = list_folder(path, f"{path}/")
        except OSError as error:
            raise InputError(f"translate: {printable(path)} cannot be read: {error.strerror}") from error
        if not contents.images and not contents.bad:
            what = passed_over(contents.others) or "it is empty"
            raise InputError(f"translate: {printable(path)} holds no images; {what}")
        found.images += contents.images
        found.bad |= contents.bad
        found.others += contents.others
    if not found.images and not found.bad:
        raise InputError("translate: got no images; name image files, or folders of them")
    return found


def _targets(files: list[Path], out: Path, overwrite: bool) -> list[Path]:
    """OUT/STEM.png, or OUT/NAME.png with the full name where two inputs share a stem; none of which may be in use."""
    stems = Counter(file.stem for file in files)
    targets = [out / f"{file.stem if stems[file.stem] == 1 else file.name}.png" for file in files]
    uses, inputs = Counter(targets), {realpath(file) for file in files}
    for file, target in zip(files, targets, strict=True):
        if realpath(target) in inputs:
            raise InputError(f"translate: {printable(target)} would overwrite an input; choose another --out")
        if uses[target] > 1:
            name = printable(file.name)
            raise InputError(f"translate: two inputs are named {name}; translate their folders one at a time")
    there = [target for target in targets if lexists(target)]
    if there and not overwrite:
        first = printable(there[0])
        raise InputError(f"translate: {first} exists ({len(there)} of {len(targets)} results do); add --overwrite")
    return targets
