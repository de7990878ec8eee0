"""The command line, generated from the types and docstrings of what it calls."""

import dataclasses
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import torch
import tyro
from tyro.conf import OmitArgPrefixes, Positional, subcommand

from fastp2p.commands.convert import convert
from fastp2p.commands.evaluate import evaluate, format_table, to_json
from fastp2p.commands.info import info
from fastp2p.commands.launches import count_step_launches
from fastp2p.commands.options import RunOptions, with_groups
from fastp2p.commands.profile import profile_step
from fastp2p.commands.roofline import count_roofline, measure_roofline
from fastp2p.commands.translate import translate
from fastp2p.commands.tune import tune_networks
from fastp2p.config import Device, Direction, RunConfig, Workload
from fastp2p.errors import InputError, TrainingDiverged, WriteError
from fastp2p.models import registry
from fastp2p.models.base import Model
from fastp2p.models.generate import NormStats
from fastp2p.models.pix2pix.networks import Dropout
from fastp2p.terminal import lasting_streams
from fastp2p.train.loop import train
from fastp2p.train.run_folder import read_config


@dataclass(frozen=True)
class Train(RunOptions):
    """Train a model on images; without arguments, pix2pix on the built-in set."""

    resume: Path | None = None
    """Continue the run in this folder, bit for bit; its limits may change."""

    def run(self) -> None:
        if self.resume is not None and self.config.out != self.resume:
            raise InputError(f"out: got {self.config.out}, but --resume goes on in {self.resume}; drop --out")
        train(self.config, resume=self.resume is not None)


@dataclass(frozen=True)
class Translate:
    """Translate images of any size with a trained generator."""

    model: Positional[Path]
    """netG.safetensors of a run, or made by fastp2p convert."""
    inputs: Positional[tuple[Path, ...]]
    """Image files, or folders of them."""
    out: Path
    """Folder for the results, NAME.png each."""
    size: int | None = None
    """Resize each image to this side first, px. None: keep its own size."""
    norm_stats: NormStats | None = None
    """Batch norm's statistics: the image's, the batch's, or running averages. None: the model's own."""
    dropout: bool = False
    """Keep dropout on, as the paper does at test time."""
    overwrite: bool = False
    """Replace files that are in --out already."""
    seed: int = 0
    """Seed of the dropout."""
    device: Device = "auto"
    """Where to compute."""

    def run(self) -> None:
        translate(**vars(self))


@dataclass(frozen=True)
class Evaluate:
    """Score a trained generator on pairs: L1, PSNR, SSIM."""

    model: Positional[Path]
    """netG.safetensors of a run, or made by fastp2p convert."""
    data: str
    """Folder or .zip of pairs, as in training; or builtin:emoji."""
    split: str = "val"
    """Folder in it to score."""
    direction: Direction | None = None
    """Which side of a pair is the input. None: the model's own."""
    norm_stats: NormStats | None = None
    """Batch norm's statistics: the image's, those of 8, or running averages. None: the model's own."""
    dropout: bool = False
    """Keep dropout on, as the paper does at test time."""
    skip_bad: bool = False
    """Score the rest when images are unmatched or damaged."""
    json: bool = False
    """Print JSON, with every image's scores, instead of a table."""
    seed: int = 0
    """Seed of the dropout."""
    device: Device = "auto"
    """Where to compute."""

    def run(self) -> None:
        options = {name: value for name, value in vars(self).items() if name != "json"}
        result = evaluate(**options)
        print(to_json(result) if self.json else format_table(result))


@dataclass(frozen=True)
class Convert:
    """Convert upstream's latest_net_G.pth to netG.safetensors, or back; the suffixes say which way."""

    source: Positional[Path]
    """The generator to read: .pth or .safetensors."""
    target: Positional[Path]
    """The file to write: .safetensors or .pth."""
    dropout: Dropout = "upstream"
    """Where the upstream model had dropout; none for --no_dropout."""
    direction: Direction = "AtoB"
    """The --direction that the upstream model was trained with."""
    crop_size: int | None = None
    """The upstream model's --crop_size, px. None: the U-Net's own, 256 for unet_256."""

    def run(self) -> None:
        spec = convert(**vars(self))
        print(
            f"{self.target}: unet_{2**spec.levels}, ngf {spec.ngf}, norm {spec.norm}, dropout {spec.dropout}, "
            f"{spec.direction}, {spec.crop_size} px"
        )


@dataclass(frozen=True)
class OnAStep(RunOptions):
    """A command that looks at a training step on random pairs: it needs no images."""

    @property
    def given(self) -> dict[str, Any]:
        return {"data": "random pairs", **super().given}


@dataclass(frozen=True)
class Tune(OnAStep):
    """Measure which kernels are the fastest here, as the first fastp2p train does for its own networks."""

    again: bool = False
    """Measure what is known, too."""

    def run(self) -> None:
        print(tune_networks(self.config, again=self.again))


@dataclass(frozen=True)
class Roofline(OnAStep):
    """Count what a training step must do, and compare the least time that takes here with what it takes."""

    steps: int = 5
    """Steps to run with the profiler, and as many without."""
    layers: bool = False
    """Show every call of an operator, instead of sums."""
    limits: tuple[float, float] | None = None
    """TFLOP/s and GB/s of another machine, an H200's being 790 4300: count for it, run nothing."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> None:
        if self.limits is None:
            result = measure_roofline(self.config, steps=self.steps)
        else:
            result = count_roofline(self.config, tflop_per_sec=self.limits[0], gb_per_sec=self.limits[1])
        print(json.dumps(result.as_dict(), indent=1) if self.json else result.table(layers=self.layers))


@dataclass(frozen=True)
class Launches(OnAStep):
    """List every kernel that a training step launches on an H100, and what waits for what; it needs no GPU."""

    summary: bool = False
    """Show the sums by part and by kernel alone, without the list."""
    predict: bool = False
    """Add the time that each should take: predicted by a model, not measured."""
    json: bool = False
    """Print JSON instead of tables."""

    def run(self) -> None:
        result = count_step_launches(self.config, predict=self.predict)
        print(json.dumps(result.as_dict(), indent=1) if self.json else result.table(summary=self.summary))


@dataclass(frozen=True)
class Profile(OnAStep):
    """Show where a training step's time goes, part by part and kernel by kernel, and write its timeline."""

    steps: int = 5
    """Steps to profile."""
    trace: Path = Path("fastp2p-trace.json.gz")
    """The timeline, for ui.perfetto.dev: .json or .json.gz."""
    overwrite: bool = False
    """Replace a timeline that is there."""
    json: bool = False
    """Print JSON instead of tables."""

    def run(self) -> None:
        result = profile_step(self.config, trace=self.trace, steps=self.steps, overwrite=self.overwrite)
        print(json.dumps(result.as_dict(), indent=1) if self.json else result.table())


@dataclass(frozen=True)
class Info:
    """Show versions, the device, and which kernel serves each operator."""

    def run(self) -> None:
        print(info())


ON_A_STEP = ("tune", "roofline", "launches", "profile")  # the commands that take the options of a step
AnyCommand = Train | Translate | Evaluate | Convert | Tune | Roofline | Launches | Profile | Info


def commands_of(asked: str | None, model: Model[Any], config: RunConfig | None = None) -> Any:
    """The union of all commands; the one that is asked for with the model's own options, where it takes them.

    Args:
        asked: the command's name. The others' options are for nobody to read.
        model: whose options they are.
        config: gives the defaults of train; None: the model's own defaults.
    """
    kinds: dict[str, Any] = {
        "train": Train,
        "translate": Translate,
        "evaluate": Evaluate,
        "convert": Convert,
        "tune": Tune,
        "roofline": Roofline,
        "launches": Launches,
        "profile": Profile,
        "info": Info,
    }
    if asked == "train":
        kinds[asked] = with_groups(Train, model, config=config)
    elif asked in ON_A_STEP:
        names = {"model", *(field.name for kind in (model.options, Workload) for field in dataclasses.fields(kind))}
        kinds[asked] = with_groups(kinds[asked], model, names=names)
    return Union[tuple(Annotated[kind, subcommand(name)] for name, kind in kinds.items())]  # noqa: UP007 (a tuple's)


def parse(args: Sequence[str]) -> AnyCommand:
    """The command that the arguments ask for. Exits with 2 and a hint when they do not parse."""
    asked = args[0] if args else None
    resumed = _value_of("--resume", args) if asked == "train" else None
    # A run's own configuration gives the defaults, so only typed options change it
    config = None if resumed is None else read_config(Path(resumed))
    named = _value_of("--model", args) if asked == "train" or asked in ON_A_STEP else None
    model = registry.find(named or (config.model if config else "pix2pix"))
    if config is not None and config.model != model.name:
        raise InputError(f"model: got {model.name}, but {resumed} was trained as {config.model}; drop the option")
    kind = commands_of(asked, model, config)
    command: Any = tyro.cli(kind, prog="fastp2p", args=args, config=(OmitArgPrefixes,))
    assert isinstance(command, Train | Translate | Evaluate | Convert | Tune | Roofline | Launches | Profile | Info)
    return command


def _value_of(option: str, args: Sequence[str]) -> str | None:
    """The value that the arguments give an option; parse reads it first, since other options depend on it."""
    for arg, following in zip(args, [*args[1:], None], strict=True):
        if arg == option:
            return following
        if arg.startswith(f"{option}="):
            return arg.partition("=")[2]
    return None


def main(args: Sequence[str] | None = None) -> int:
    """Run fastp2p; returns the exit status: 0, 1 for an error in words, 2 for bad usage, 130 for Ctrl-C.

    The reader of the output may go away: the command does its work to the end. Where the output's file is full, the
    command prints so at the end and returns 1.
    """
    warnings.filterwarnings("ignore", module="PIL")  # Pillow's warnings name no file; read_image tells what matters
    with lasting_streams() as stdout:
        try:
            status = _run(sys.argv[1:] if args is None else args)
        except SystemExit as usage:  # tyro's
            status = usage.code if isinstance(usage.code, int) else 0 if usage.code is None else 2
        stdout.flush()
        if stdout.lost is not None and not isinstance(stdout.lost, BrokenPipeError):
            print(f"fastp2p: stdout cannot be written: {stdout.lost}; lines of this command are lost", file=sys.stderr)
            status = status or 1
    return status


def _run(args: Sequence[str]) -> int:
    try:
        parse(args).run()
    except (InputError, TrainingDiverged, WriteError) as error:
        print(f"fastp2p: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # what no command could foresee, such as a name that is too long for this disk
        print(f"fastp2p: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if not out_of_memory:
            raise
        print(f"fastp2p: out of memory: {error}\nLower --batch-size, --crop-size or --ngf in training, or --size in "
              "translation; what was saved before is intact.", file=sys.stderr)  # fmt: skip
        return 1
    except KeyboardInterrupt:
        print("fastp2p: interrupted", file=sys.stderr)
        return 130
    return 0
