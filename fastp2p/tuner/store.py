"""Which kernels a run's convolutions take: measured, kept with the run, and taken again when it is resumed."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from fastp2p.config import NAMED_KERNELS
from fastp2p.engine.step import Step
from fastp2p.errors import InputError
from fastp2p.files import is_there, read_small, write_atomically
from fastp2p.ops import kernel_choices
from fastp2p.ops.kernel_choices import Measured, Place, Table
from fastp2p.terminal import Say, progress
from fastp2p.tuner import ahead
from fastp2p.tuner.contest import tune, why_not
from fastp2p.tuner.operations import Operation, operations

KERNELS = "kernels.json"  # a run's: which kernel computed what, since other ones round otherwise


def check_kernels(kernels: str, device: torch.device) -> None:
    """Raise InputError for Triton's kernels where they do not run, and for another run's that cannot be read here."""
    if kernels == "triton" and device.type == "cpu":
        raise InputError("kernels: got triton on a CPU, where C++ and ATen compute; use --kernels auto, or a GPU")
    if kernels not in NAMED_KERNELS:
        another_run_s(kernels, kernel_choices.place_of(device))


def another_run_s(kernels: str, place: Place) -> Table:
    """The choices of the run in a folder, or in its kernels.json.

    Raises:
        InputError: when there are none, or they are of another device, other versions or other threads.
    """
    path = Path(kernels) / KERNELS if Path(kernels).is_dir() else Path(kernels)
    try:
        return kernel_choices.from_json(read_small(path), place)
    except ValueError as error:
        raise InputError(
            f"kernels: got {kernels}, expected {', '.join(NAMED_KERNELS)}, or a run folder with a {KERNELS} that was "
            f"made on this machine: {error}"
        ) from error


def check_fit(step: Step, images: int, kernels: str) -> None:
    """Raise InputError where another run's kernels.json knows none of the step's convolutions."""
    if kernels in NAMED_KERNELS:
        return
    table = another_run_s(kernels, kernel_choices.place_of(step.device))
    if not any(operation.problem in table for operation in operations(step, images)):
        raise InputError(
            f"kernels: {kernels} knows none of this run's convolutions, since it is of other networks or another "
            "precision, size or batch; use --kernels auto"
        )


def choose_kernels(step: Step, images: int, kernels: str, folder: Path, say: Say) -> None:
    """Decide which kernels the step's convolutions take, write it to the folder, and install it.

    What the folder holds already, of the run that is resumed, is taken as it is: other kernels round otherwise. An
    epoch's last, smaller batch goes by rule.

    Args:
        step: whose networks are trained.
        images: of a batch.
        kernels: as in RunConfig.
        folder: the run's.
        say: takes each line of report.

    Raises:
        InputError: when the folder's file, or another run's, cannot be read.
        WriteError: when it cannot be written.
    """
    device = step.device
    place = kernel_choices.place_of(device)
    path = folder / KERNELS
    wanted = operations(step, images)
    choices = _of_the_run(path, place, say)
    if choices and not any(operation.problem in choices for operation in wanted):
        choices = None  # the run goes on in another precision
    if choices is None:
        choices = {}
        if (reason := why_not(device, step.dtype)) is not None:
            say(f"kernels: nothing to choose from, {reason}")
        elif kernels == "auto":
            choices = tuned(wanted, place, say, compile_first=candidates_of(step, images, device, say))
        elif kernels == "aten":
            atens = "direct" if place.device_type == "cpu" else "aten"
            choices = {operation.problem: Measured(atens) for operation in wanted}
        elif kernels not in NAMED_KERNELS:
            table = another_run_s(kernels, place)
            choices = {op.problem: table[op.problem] for op in wanted if op.problem in table}
            say(f"kernels: {len(choices)} of {len(wanted)} convolutions as in {kernels}, the others by rule")
        write_atomically(path, kernel_choices.to_json(choices, place))
    kernel_choices.install(place, choices)


def candidates_of(step: Step, images: int, device: torch.device, say: Say) -> Callable[[list[Operation]], None]:
    """What compiles a step's programs ahead of the tuner, with those of every kernel that it may choose."""

    def compile_first(missing: list[Operation]) -> None:
        def launch(serves: ahead.Serves) -> None:
            ahead.launch_tuner(missing)
            ahead.MetaStep(step, serves).launch(images, ahead.whatever_is_chosen)

        ahead.compile_ahead(launch, device, say)

    return compile_first


def compile_step(step: Step, batches: Iterable[int], load_size: int, say: Say) -> None:
    """Compile what the first steps of these batch sizes launch, on pairs of load_size px, by all cores."""
    device = step.device

    def launch(serves: ahead.Serves) -> None:
        twin = ahead.MetaStep(step, serves)
        for images in batches:
            twin.launch(images, ahead.as_chosen(kernel_choices.table(kernel_choices.place_of(device))))
            twin.launch_augment(images, load_size, load_size)

    ahead.compile_ahead(launch, device, say)


def _of_the_run(path: Path, place: Place, say: Say) -> Table | None:
    """The choices in a run's file; None where there is none, or it is of another device or other versions."""
    if not is_there(path):
        return None
    try:
        content = read_small(path)
        made_at = kernel_choices.environment_of(content)
        if made_at == place.environment:
            return kernel_choices.from_json(content, place)
    except ValueError as error:
        why = str(error).removeprefix(f"{path}: ")
        raise InputError(
            f"{path}: cannot be read: {why}; delete it to choose kernels anew, which round otherwise"
        ) from error
    say(f"kernels: chosen anew, since {path} is of {made_at}; the run's bits will not be those of an unbroken one")
    return None


def tuned(
    wanted: list[Operation],
    place: Place,
    say: Say,
    *,
    again: bool = False,
    compile_first: Callable[[list[Operation]], object],
) -> Table:
    """The choices for these operations, from the place's file; what it lacks, or with `again` all, is measured.

    Before anything is measured `compile_first` gets what is going to be.
    """
    known = {} if again else kernel_choices.read_cache(place)
    missing = [operation for operation in wanted if operation.problem not in known]
    path = kernel_choices.cache_path(place)
    if missing:
        if (load := too_busy(place.device_type)) is not None:
            say(
                f"kernels: warning: others keep {load:.1f} cores busy; fastp2p tune --again, with the same networks, "
                "measures once more"
            )
        began = time.monotonic()
        compile_first(missing)
        bar_format = "{desc} |{bar:5}| {n_fmt}/{total_fmt} ETA {remaining}"
        with progress(total=len(missing), desc="tuning kernels", leave=False, bar_format=bar_format) as bar:
            known |= tune(missing, place, report=lambda line: say(f"kernels: {line}"), tick=bar.update)
        took = time.monotonic() - began
        kept = f", kept in {path}" if path and path.exists() else ""  # that it could not be written was warned of
        say(f"kernels: {len(missing)} convolutions measured in {took:.1f} s{kept}")
    return {operation.problem: known[operation.problem] for operation in wanted if operation.problem in known}


def too_busy(device_type: str) -> float | None:
    """How many cores others keep busy, where on a CPU that spoils what is measured; else None."""
    load = os.getloadavg()[0]
    return load if device_type == "cpu" and load > (os.cpu_count() or 1) else None
