"""TrainConfig: every hyperparameter once, with its default, unit and source. The command line is generated from it."""

import dataclasses
import math
import numbers
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastp2p.errors import InputError

Device = Literal["auto", "cpu", "cuda"]
Direction = Literal["AtoB", "BtoA"]
Norm = Literal["batch", "instance", "none"]
Dropout = Literal["upstream", "paper", "none"]
Engine = Literal["fused", "reference"]
NetD = Literal["basic", "n_layers", "pixel"]
GanMode = Literal["vanilla", "lsgan", "hinge"]
NormStats = Literal["image", "batch", "running"]
Precision = Literal["auto", "bf16", "fp16", "fp32", "fp64"]
Statistics = Literal["batch", "sample"]

BUILTIN = "builtin:emoji"
NAMED_KERNELS = ("auto", "aten", "triton")  # any other --kernels is a path
MAX_LEVELS = 12  # 4096 px; a deeper U-Net would only see padding
MAX_SIDE = 8192  # px, of what a network is trained on


def levels_of(netG: str) -> int:
    """Number of U-Net levels of a name: unet_256 has 8, unet_128 has 7, unet_S has log2(S)."""
    match = re.fullmatch(r"unet_(\d+)", netG)
    side = int(match[1]) if match else 0
    if side < 4 or side > 2**MAX_LEVELS or side & (side - 1):
        raise InputError(f"netG: got {netG!r}, expected unet_S with S a power of two from 4 to 4096, such as unet_256")
    return side.bit_length() - 1


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train pix2pix on paired images.

    The defaults are the paper's (Isola et al. 2017, "paper" below) as upstream (junyanz/pytorch-CycleGAN-and-pix2pix)
    implements them. Where the default reads None the value is chosen from the data and the device, and printed.
    """

    data: str = BUILTIN
    """Folder or .zip with train/ and, if there is one, val/: aligned A|B images, or folders A and B matched by file
    name. builtin:emoji is the set inside the package. Source: ours."""
    direction: Direction = "AtoB"
    """Which side of a pair is the input. Source: upstream."""
    load_size: int | None = None
    """Side to which images are resized (bicubic) before the random crop, px. None: 286, or 143 for builtin:emoji.
    Source: paper, appendix 6.2."""
    crop_size: int | None = None
    """Side of the random crop that is trained on, px. None: 256, or 128 for builtin:emoji. Source: paper, appendix
    6.2."""
    flip: bool = True
    """Mirror a random half of the training pairs. Source: paper, appendix 6.2."""
    input_nc: Literal[1, 3] = 3
    """Channels of the input image: 3 colour, 1 grey. Source: upstream."""
    output_nc: Literal[1, 3] = 3
    """Channels of the output image: 3 colour, 1 grey. Source: upstream."""
    skip_bad: bool = False
    """Train on the rest when images are unmatched or damaged, instead of stopping with their list. Source: ours."""
    stream: Literal["auto", "always", "never"] = "auto"
    """Decode images in every epoch anew instead of keeping them in memory. auto: when they would take more than half
    of this machine's memory. Source: ours."""

    netG: str | None = None
    """Generator: unet_S halves the side log2(S) times. None: unet_256, or for builtin:emoji unet_128, on a CPU
    unet_32. Source: paper, appendix 6.1.1."""
    ngf: int | None = None
    """Channels of the generator's first layer. None: 64, or 32 for builtin:emoji on a CPU. Source: paper, appendix
    6.1.1."""
    netD: NetD = "basic"
    """Discriminator: basic is the 70x70 PatchGAN, n_layers takes --n-layers-D, pixel judges each pixel alone. Source:
    paper, appendix 6.1.2."""
    ndf: int | None = None
    """Channels of the discriminator's first layer. None: 64, or 16 for builtin:emoji on a CPU. Source: paper,
    appendix 6.1.2."""
    n_layers_D: int = 3
    """Strided layers of --netD n_layers, 1 to 5: a patch of 16, 34, 70, 142 or 286 px. Source: upstream."""
    norm: Norm = "batch"
    """Normalisation layer of both networks. Source: paper, appendix 6.1."""
    statistics: Statistics = "batch"
    """Over what batch norm takes its statistics: the batch, or each sample alone, which at any batch size is what batch
    size 1 does. Source: batch, upstream; sample, ours."""
    dropout: Dropout = "upstream"
    """Place of the decoder's Dropout(0.5): as upstream has it, one level deeper as in the paper, or none. Source:
    upstream; paper, appendix 6.1.1."""
    init_gain: float = 0.02
    """Standard deviation of the initial weights. Source: paper, appendix 6.2."""

    gan_mode: GanMode | None = None
    """Adversarial loss. None: vanilla, or lsgan for builtin:emoji on a CPU, where a short run is smoother with it.
    Source: vanilla, paper eq. 1; lsgan, Mao et al. 2017; hinge, Lim and Ye 2017."""
    lambda_L1: float = 100.0
    """Weight of the L1 loss. Source: paper, eq. 4 and section 3.3."""
    lr: float = 2e-4
    """Learning rate of both Adam optimizers. Source: paper, section 3.3."""
    beta1: float = 0.5
    """Adam's decay of the mean gradient. Source: paper, section 3.3."""
    beta2: float = 0.999
    """Adam's decay of the squared gradient. Source: paper, section 3.3."""
    batch_size: int = 1
    """Pairs per step. Source: paper, appendix 6.2."""
    n_epochs: int | None = None
    """Epochs at the full learning rate. None: 100, or a short schedule for builtin:emoji. Source: upstream."""
    n_epochs_decay: int | None = None
    """Epochs of linear decay after them. None: 100, or a short schedule for builtin:emoji. Source: upstream."""
    max_steps: int | None = None
    """Stop after this many steps in all, the schedule notwithstanding. None: no limit. Source: ours."""
    max_minutes: float | None = None
    """Stop after this many minutes of this call. None: no limit. Source: ours."""

    seed: int = 0
    """Seed of the weights, the order, the jitter and the dropout, 0 to 2**32 - 1. The same seed gives the same run
    on the same kernels. Where none are kept yet, a run measures them, and may choose others: --kernels RUN takes
    another run's. Source: ours."""
    device: Device = "auto"
    """Where to train. auto: a CUDA GPU if PyTorch finds one, else the CPU. Source: ours."""
    engine: Engine = "fused"
    """fused: the fast one, on fused operators. reference: the same step in plain PyTorch autograd, to compare with.
    Source: ours."""
    kernels: str = "auto"
    """Of the fused engine's convolutions. auto: for each layer the fastest on this machine, which is measured where
    fastp2p has not done so before. aten: ATen's, on a GPU cuDNN's. triton: our own on a GPU, by rule. A path: those of
    another run, named by its folder or its kernels.json; with its seed, its bits. Source: ours."""
    precision: Precision = "auto"
    """Number format of the fused engine's activations, their gradients and the weights it multiplies by; the weights
    that Adam updates, statistics and losses are in fp32. auto: bf16 on GPUs from compute capability 8.0 on and on CPUs
    with AVX512_BF16 or AMX, fp16 with loss scaling on GPUs of 7.0 and 7.5, else fp32. fp64 is for proofs. Source: ours;
    fp16, Micikevicius et al. 2018."""

    out: Path | None = None
    """Run folder to make. None: the next free runs/DATA-NUMBER. Source: ours."""
    log_steps: int = 20
    """Steps between two lines of stats.jsonl; losses are means over them. Source: ours."""
    panel_steps: int = 200
    """Steps between two pictures of the validation panel (input, output, target). Source: ours."""
    val_epochs: int = 1
    """Epochs between two validations (L1, PSNR, SSIM); there is one more at the end. Source: ours."""
    save_minutes: float = 2.0
    """Minutes between two checkpoints; there is one more at the end and on Ctrl-C. 0: after every step. Source:
    ours."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name in hints:
            _check_type(name, getattr(self, name), hints[name])
        for name in _AT_LEAST_ONE:
            _require(self, name, lambda value: value >= 1, "1 or more")
        for name in ("lr", "init_gain"):
            _require(self, name, lambda value: value > 0, "more than 0")
        for name in ("lambda_L1", "seed", "n_epochs_decay", "max_minutes", "save_minutes"):
            _require(self, name, lambda value: value >= 0, "0 or more")
        for name in ("ngf", "ndf"):
            _require(self, name, lambda value: value <= 4096, "at most 4096")
        for name in ("load_size", "crop_size"):
            _require(self, name, lambda value: value <= MAX_SIDE, f"at most {MAX_SIDE} px")
        for name in ("lr", "init_gain", "lambda_L1"):
            _require(self, name, math.isfinite, "a finite number")
        _require(self, "seed", lambda value: value < 2**32, "less than 2**32")
        for name in ("beta1", "beta2"):
            _require(self, name, lambda value: 0 <= value < 1, "0 or more and less than 1")
        _require(self, "n_layers_D", lambda value: 1 <= value <= 5, "1 to 5")
        if self.netD != "n_layers" and self.n_layers_D != 3:
            raise InputError(f"n_layers_D: got {self.n_layers_D} with netD {self.netD}; add --netD n_layers")
        if self.engine == "reference" and self.precision in ("bf16", "fp16"):
            raise InputError(
                f"precision: got {self.precision} with engine reference, which computes in fp32 or fp64; drop one"
            )
        if self.engine == "reference" and self.kernels != "auto":
            raise InputError(f"kernels: got {self.kernels} with engine reference, which runs on ATen's alone; drop one")
        if self.statistics == "sample" and self.norm != "batch":
            raise InputError(f"statistics: got sample with norm {self.norm}; it is for norm batch")
        if self.netG is not None:
            levels_of(self.netG)
        if self.crop_size is not None:
            if self.load_size is not None and self.load_size < self.crop_size:
                raise InputError(f"load_size: got {self.load_size}, expected at least crop_size {self.crop_size}")
            smallest = 11 if self.netD == "pixel" else max(11, 3 * 2**self.n_layers_D)  # 11: the window of SSIM
            if self.crop_size < smallest:
                raise InputError(
                    f"crop_size: got {self.crop_size}, expected at least {smallest} px for this netD and SSIM; "
                    "enlarge the crop, or take fewer layers with --netD n_layers --n-layers-D K"
                )

    def resolve(self, device_type: str, precision: Precision) -> "ResolvedConfig":
        """The same configuration with every None and auto that means "chosen for you" replaced.

        Args:
            device_type: "cpu" or "cuda".
            precision: what the fused engine's auto stands for on that device; the reference's is fp32.
        """
        chosen: dict[str, Any] = _PAPER
        if self.data == BUILTIN:
            chosen = _PAPER | _EMOJI | (_EMOJI_CPU if device_type == "cpu" else {})
        if self.load_size is None and self.crop_size is not None:
            chosen = chosen | {"load_size": round(self.crop_size * 286 / 256)}  # the recipe's ratio
        if self.crop_size is None and self.load_size is not None:
            chosen = chosen | {"crop_size": round(self.load_size * 256 / 286)}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.precision == "auto":
            fields["precision"] = precision if self.engine == "fused" else "fp32"
        return ResolvedConfig(**fields | {name: value for name, value in chosen.items() if fields[name] is None})

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        fields = dataclasses.asdict(self)
        return fields | {"out": None if self.out is None else str(self.out)}


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(TrainConfig):
    """A TrainConfig in which everything is decided."""

    load_size: int
    crop_size: int
    netG: str
    ngf: int
    ndf: int
    gan_mode: GanMode
    n_epochs: int
    n_epochs_decay: int

    def lr_factor(self, epoch: int) -> float:
        """Learning rate factor of a 1-based epoch: 1, then linearly down, never 0 (upstream's "linear" policy)."""
        return 1 - max(0, epoch - self.n_epochs) / (self.n_epochs_decay + 1)


# What a None stands for: the paper's setting, and what a first look at the built-in set needs instead.
_PAPER = {
    "load_size": 286,
    "crop_size": 256,
    "netG": "unet_256",
    "ngf": 64,
    "ndf": 64,
    "gan_mode": "vanilla",
    "n_epochs": 100,
    "n_epochs_decay": 100,
}
_EMOJI = {"load_size": 143, "crop_size": 128, "netG": "unet_128", "n_epochs": 20, "n_epochs_decay": 20}
_EMOJI_CPU = {"netG": "unet_32", "ngf": 32, "ndf": 16, "gan_mode": "lsgan", "n_epochs": 2, "n_epochs_decay": 8}

_AT_LEAST_ONE = [
    "load_size",
    "crop_size",
    "ngf",
    "ndf",
    "batch_size",
    "n_epochs",
    "max_steps",
    "log_steps",
    "panel_steps",
    "val_epochs",
]


# What each annotation admits; a bool is no number here, though Python counts it as one
_TYPES: dict[type, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "a text"),
    Path: (Path, "a path"),
}


def _check_type(name: str, value: Any, hint: Any) -> None:
    """Raise InputError on a value of another type or choice, such as a config.json that was edited may hold."""
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


def _require(config: TrainConfig, name: str, holds: Callable[[Any], bool], expected: str) -> None:
    value = getattr(config, name)
    if value is not None and not holds(value):
        raise InputError(f"{name}: got {value}, expected {expected}")
