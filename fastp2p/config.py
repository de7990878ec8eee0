"""RunConfig: the settings that all models share, with default, unit and source; the command line shows them."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastp2p.errors import InputError

Device = Literal["auto", "cpu", "cuda"]
Direction = Literal["AtoB", "BtoA"]
Engine = Literal["fused", "layers", "reference"]
Precision = Literal["auto", "bf16", "fp16", "fp32", "fp64"]

BUILTIN = "builtin:emoji"
NAMED_KERNELS = ("auto", "aten", "triton")  # any other --kernels is a path
MAX_SIDE = 8192  # px, the largest image that a network trains on


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Fields that check themselves when they are set: first their types, then what `check` adds."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), hints[field.name])
        self.check()

    def check(self) -> None:
        """Raise InputError on values that no run can use; the text tells what was expected."""

    def require(self, name: str, holds: Callable[[Any], bool], expected: str) -> None:
        """Raise InputError unless a field is None or fulfils a condition."""
        value = getattr(self, name)
        if value is not None and not holds(value):
            raise InputError(f"{name}: got {value}, expected {expected}")


@dataclass(frozen=True, kw_only=True)
class Workload(Settings):
    """What decides, beside a model's own options, how much a training step computes."""

    input_nc: Literal[1, 3] = 3
    """Channels of the input image: 3 colour, 1 grey. [upstream]"""
    output_nc: Literal[1, 3] = 3
    """Channels of the output image: 3 colour, 1 grey. [upstream]"""
    crop_size: int | None = None
    """Side of the random crop, px. None: 256; builtin:emoji 128. [paper 6.2]"""
    batch_size: int = 1
    """Pairs in a step. [paper 6.2]"""
    precision: Precision = "auto"
    """Number format of the products. auto: bf16, fp16 or fp32, as the hardware has it. [ours]"""
    engine: Engine = "fused"
    """fused: no autograd. layers: fused, with autograd. reference: plain PyTorch. [ours]"""
    device: Device = "auto"
    """Where to train. auto: a CUDA GPU if PyTorch finds one, else the CPU. [ours]"""

    def check(self) -> None:
        super().check()
        for name in ("crop_size", "batch_size"):
            self.require(name, lambda value: value >= 1, "1 or more")
        self.require("crop_size", lambda value: value <= MAX_SIDE, f"at most {MAX_SIDE} px")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Workload):
    """The settings of every training run, whatever its model; a model's own class adds the model's options.

    Where the default reads None the value is chosen from the data and the device, and printed.
    """

    model: str = "pix2pix"
    """What to train: a folder of fastp2p/models. [ours]"""
    data: str = BUILTIN
    """Folder or .zip that holds train/ and perhaps val/. [ours]"""
    direction: Direction = "AtoB"
    """Which side of a pair is the input. [upstream]"""
    load_size: int | None = None
    """Side of an image before the crop, px. None: 286; builtin:emoji 143. [paper 6.2]"""
    flip: bool = True
    """Mirror a random half of the training pairs. [paper 6.2]"""
    skip_bad: bool = False
    """Leave out unmatched and damaged images instead of stopping. [ours]"""
    stream: Literal["auto", "always", "never"] = "auto"
    """Decode images anew in every epoch. auto: if they would fill half of the memory. [ours]"""

    lr: float = 2e-4
    """Learning rate of both Adam optimizers. [paper 3.3]"""
    beta1: float = 0.5
    """Adam's decay of the mean gradient. [paper 3.3]"""
    beta2: float = 0.999
    """Adam's decay of the squared gradient. [paper 3.3]"""
    n_epochs: int | None = None
    """Epochs at the full learning rate. None: 100; builtin:emoji fewer. [upstream]"""
    n_epochs_decay: int | None = None
    """Epochs of linear decay after them. None: 100; builtin:emoji fewer. [upstream]"""
    max_steps: int | None = None
    """Stop after this many steps in all. None: no limit. [ours]"""
    max_minutes: float | None = None
    """Stop after this many minutes of this call. None: no limit. [ours]"""

    seed: int = 0
    """Seed of weights, order, jitter and dropout: 0 to 2**32 - 1. [ours]"""
    kernels: str = "auto"
    """Convolution kernels: auto (measured), aten, triton, or those of a run folder. [ours]"""

    out: Path | None = None
    """Run folder to make. None: the next free runs/DATA-NUMBER. [ours]"""
    log_steps: int = 20
    """Steps between two lines of stats.jsonl, which hold mean losses. [ours]"""
    panel_steps: int = 200
    """Steps between two pictures of the validation panel. [ours]"""
    val_epochs: int = 1
    """Epochs between two validations (L1, PSNR, SSIM). [ours]"""
    save_minutes: float = 2.0
    """Minutes between two checkpoints. 0: after every step. [ours]"""

    def check(self) -> None:
        super().check()
        for name in _AT_LEAST_ONE:
            self.require(name, lambda value: value >= 1, "1 or more")
        self.require("lr", lambda value: value > 0, "more than 0")
        for name in ("seed", "n_epochs_decay", "max_minutes", "save_minutes"):
            self.require(name, lambda value: value >= 0, "0 or more")
        self.require("load_size", lambda value: value <= MAX_SIDE, f"at most {MAX_SIDE} px")
        self.require("lr", math.isfinite, "a finite number")
        self.require("seed", lambda value: value < 2**32, "less than 2**32")
        for name in ("beta1", "beta2"):
            self.require(name, lambda value: 0 <= value < 1, "0 or more and less than 1")
        if self.engine == "reference" and self.precision in ("bf16", "fp16"):
            raise InputError(
                f"precision: got {self.precision} with engine reference, which computes in fp32 or fp64; drop one"
            )
        if self.engine == "layers" and self.precision == "fp16":
            raise InputError(
                "precision: got fp16 with engine layers, which scales no losses; use bf16 or fp32, or --engine fused"
            )
        if self.engine == "reference" and self.kernels != "auto":
            raise InputError(f"kernels: got {self.kernels} with engine reference, which runs on ATen's alone; drop one")
        if self.crop_size is not None and self.load_size is not None and self.load_size < self.crop_size:
            raise InputError(f"load_size: got {self.load_size}, expected at least crop_size {self.crop_size}")

    def defaults(self, device_type: str) -> dict[str, Any]:
        """The value that each None stands for, by field; a model's own class gives its recipe's.

        Args:
            device_type: "cpu" or "cuda".
        """
        return {"load_size": 286, "crop_size": 256, "n_epochs": 100, "n_epochs_decay": 100}

    def resolve(self, device_type: str, precision: Precision) -> "ResolvedConfig":
        """The same configuration with every None and auto that means "chosen for you" replaced.

        Args:
            device_type: "cpu" or "cuda".
            precision: what auto stands for on that device; the reference engine's is fp32, as is that of layers
                instead of fp16.
        """
        chosen = self.defaults(device_type)
        if self.load_size is None and self.crop_size is not None:
            chosen = chosen | {"load_size": round(self.crop_size * 286 / 256)}  # the recipe's ratio
        if self.crop_size is None and self.load_size is not None:
            chosen = chosen | {"crop_size": round(self.load_size * 256 / 286)}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.precision == "auto":
            serves = self.engine == "fused" or (self.engine == "layers" and precision != "fp16")
            fields["precision"] = precision if serves else "fp32"
        return self.resolved()(**fields | {name: value for name, value in chosen.items() if fields[name] is None})

    @classmethod
    def resolved(cls) -> "type[ResolvedConfig]":
        """The class of what `resolve` gives; a model that says which of its options are decided names its own."""
        return _resolved(cls)  # type: ignore[arg-type]  # mypy takes the instances' __hash__ for the class's

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        fields = dataclasses.asdict(self)
        return fields | {"out": None if self.out is None else str(self.out)}


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(RunConfig):
    """A RunConfig in which everything is decided."""

    load_size: int
    crop_size: int
    n_epochs: int
    n_epochs_decay: int

    def lr_factor(self, epoch: int) -> float:
        """Learning rate factor of a 1-based epoch: 1, then linearly down, never 0 (upstream's "linear" policy)."""
        return 1 - max(0, epoch - self.n_epochs) / (self.n_epochs_decay + 1)


@functools.cache
def _resolved(kind: type[RunConfig]) -> type[ResolvedConfig]:
    bases = (ResolvedConfig, kind)
    return dataclasses.make_dataclass(f"Resolved{kind.__name__}", [], bases=bases, frozen=True, kw_only=True)


_AT_LEAST_ONE = ("load_size", "n_epochs", "max_steps", "log_steps", "panel_steps", "val_epochs")


# What each annotation admits; a bool is no number here, though Python counts it as one
_TYPES: dict[type, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "a text"),
    Path: (Path, "a path"),
}


def _check_type(name: str, value: Any, hint: Any) -> None:
    """Raise InputError on a value of another type or choice: an edited config.json may hold one."""
    parts = get_args(hint) or (hint,)
    if value is None and type(None) in parts:
        return
    if choices := _literals(hint):
        if (type(value), value) not in ((type(choice), choice) for choice in choices):
            raise InputError(f"{name}: got {value!r:.60}, expected one of {', '.join(map(str, choices))}")
        return
    kind, expected = next(_TYPES[part] for part in parts if part in _TYPES)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool) or value != value:
        raise InputError(f"{name}: got {value!r:.60}, expected {expected}")


def _literals(hint: Any) -> tuple[Any, ...]:
    """The values that a Literal, or a Literal | None, allows; () for other types."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return next((get_args(part) for part in get_args(hint) if get_origin(part) is Literal), ())
