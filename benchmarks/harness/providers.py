"""Who is compared: ways to train pix2pix's networks and to run its generator, with every setting that each one has."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastp2p
from fastp2p.config import Engine, Precision
from fastp2p.device import DTYPES, best_precision
from fastp2p.engine import LossScale
from fastp2p.engine.graph import Graphed, joined
from fastp2p.engine.step import Step as EngineStep
from fastp2p.models.gan_losses import GANLoss
from fastp2p.models.pix2pix.losses import Losses
from fastp2p.models.pix2pix.model import MODEL
from fastp2p.models.pix2pix.networks import Dropout, PatchDiscriminator, UnetGenerator
from fastp2p.models.pix2pix.options import Pix2PixConfig
from fastp2p.models.pix2pix.reference import train_step
from fastp2p.nn.init import init_weights

Step = Callable[[Tensor, Tensor], Losses[Tensor]]
Inference = Callable[[Tensor], Tensor]

NETS, OPTIMIZERS = ("netG", "netD"), ("optimizer_G", "optimizer_D")
OBJECTIVE: dict[str, Any] = {"gan_mode": "vanilla", "lambda_L1": 100.0}  # a step's
BATCHES = [1, 4, 16, 64] if torch.cuda.is_available() else [1, 4]


@dataclass(frozen=True)
class Provider:
    """A way to do the work. All train by torch.optim.Adam's formula, from the same weights."""

    name: str
    settings: str  # all of them, for the reader of a table
    precision: Precision | None = None  # ours; None is eager PyTorch
    engine: Engine = "fused"  # ours
    amp: bool = False  # autocast to the device's half precision
    channels_last: bool = False
    fused_adam: bool = False
    compile_mode: str | None = None
    graph: bool = False  # the whole step as one CUDA graph
    only_on: str = ""  # the type of device that it makes sense on; all, if empty
    quick: bool = True  # short enough for --quick
    # With dropout off it would have to be compiled once more: its losses alone are checked, with dropout's spread
    checked_with_dropout: bool = False

    @property
    def ours(self) -> bool:
        return self.precision is not None


EAGER = Provider("eager float32", "as upstream: float32 (convolutions in TF32 where a GPU has it), NCHW, "
                 "torch.optim.Adam(), cudnn.benchmark")  # fmt: skip
_TRICKS = {"amp": True, "channels_last": True, "fused_adam": True}
_PUBLIC = "channels_last, Adam(fused=True), autocast (inference: half-precision weights), cudnn.benchmark"
_COMPILED = {**_TRICKS, "checked_with_dropout": True}
LAYERS = "fastp2p layers"  # in the best precision
_LAYOUT = "inductor's force_layout_optimization"
OTHERS = [
    EAGER,
    Provider("eager, every trick", f"{_PUBLIC}; epochs: persistent workers, one a core, pinned memory", **_TRICKS),
    Provider("torch.compile", f"{_PUBLIC}, {_LAYOUT}", compile_mode="default", **_COMPILED),
    Provider("torch.compile reduce-overhead", f"{_PUBLIC}, {_LAYOUT}; CUDA graphs of each pass",
             compile_mode="reduce-overhead", only_on="cuda", **_COMPILED),
    Provider("torch.compile max-autotune", f"{_PUBLIC}, {_LAYOUT}; on a GPU CUDA graphs of each pass",
             compile_mode="max-autotune", quick=False, **_COMPILED),
    Provider("graph of eager", f"{_PUBLIC}; the whole step, or forward pass, as one CUDA graph",
             graph=True, only_on="cuda", **_TRICKS),
]  # fmt: skip


def our_provider(precision: Precision, device: torch.device, engine: Engine = "fused") -> Provider:
    """Ours: by the step on fused operators, or by autograd over fused layers."""
    graph = " as one CUDA graph" if device.type == "cuda" else ""
    epochs = "epochs: decoded once, before the first"
    if engine == "layers":
        return Provider(LAYERS, f"autograd over fastp2p.fuse, flat Adam{graph}; {epochs}", precision, engine)
    settings = f"the fused engine{graph}; inference: fastp2p.fuse, without a graph; {epochs}"
    return Provider(f"fastp2p {precision}", settings, precision)


def providers(device: torch.device, *, quick: bool) -> tuple[list[Provider], dict[str, str]]:
    """Those to compare on a device, ours last, of these the best precision first; and why the rest is left out."""
    left_out = {p.name: f"is for {p.only_on}" for p in OTHERS if p.only_on not in ("", device.type)}
    left_out |= {p.name: "takes longer than --quick has" for p in OTHERS if quick and not p.quick}
    best = best_precision(device)
    ours = [our_provider(precision, device) for precision in dict.fromkeys((best, "fp32"))]  # type: ignore[call-overload]
    layers = our_provider(best, device, engine="layers")
    if best == "fp16":
        left_out[LAYERS] = "does not compute in float16, since it scales no losses"
    others = OTHERS
    if best == "fp32":  # half precision would slow them down
        others = [replace(p, amp=False, settings=f"{p.settings}; in float32, since half is slow here") if p.amp else p
                  for p in OTHERS]  # fmt: skip
    if quick:
        left_out |= {p.name: "--quick takes ours in the best precision alone" for p in ours[1:]}
    return [p for p in [*others, *ours, layers] if p.name not in left_out], left_out


@dataclass(frozen=True)
class Scale:
    """How large the networks and images are."""

    name: str
    size: int  # px
    levels: int
    width: int  # ngf and ndf
    n_layers: int  # the discriminator's

    @property
    def load_size(self) -> int:
        """What images are resized to before the crop: 286 px for 256."""
        return self.size + self.size * 30 // 256

    @property
    def options(self) -> dict[str, Any]:
        """A run's options, by the names that upstream and we have for them."""
        nets = {"netG": f"unet_{2**self.levels}", "ngf": self.width}
        nets |= {"netD": "n_layers", "n_layers_D": self.n_layers, "ndf": self.width}
        return nets | {"crop_size": self.size, "load_size": self.load_size}

    def networks(self, *, dropout: bool) -> tuple[UnetGenerator, PatchDiscriminator]:
        """The same weights at every call: dropout has none, so it changes nothing about them."""
        with torch.device("meta"):
            nets = self._build(dropout="upstream" if dropout else "none")
        for net, weights in zip(nets, _initial_weights(self), strict=True):
            net.to_empty(device="cpu").load_state_dict(weights)
        return nets

    def _build(self, dropout: Dropout) -> tuple[UnetGenerator, PatchDiscriminator]:
        netG = UnetGenerator(levels=self.levels, ngf=self.width, dropout=dropout)
        return netG, PatchDiscriminator(ndf=self.width, n_layers=self.n_layers)

    def describe(self, what: str) -> str:
        """What is timed, in words."""
        netG = f"unet_{2**self.levels}, ngf {self.width}"
        nets = f"{netG}, and PatchGAN of {self.n_layers} layers, ndf {self.width}, at {self.size} px"
        return {
            "step": f"a training step of {nets}; images are in the device's memory",
            "epoch": f"training of {nets}, from files on",
            "inference": f"{netG}, in eval mode at {self.size} px",
        }[what]


@functools.cache
def _initial_weights(scale: Scale) -> list[dict[str, Tensor]]:
    """Drawn once, since that takes longer than a step."""
    torch.manual_seed(0)
    nets = scale._build(dropout="none")
    for net in nets:
        init_weights(net)
    return [net.state_dict() for net in nets]


PAPER = Scale("paper", 256, 8, 64, 3)
HALF_SIDE = Scale("half-side", 128, 7, 64, 3)  # for --quick on a CPU: 0.8 of the weights, a quarter of the pixels
TINY = Scale("tiny", 32, 5, 4, 2)
SCALES = {scale.name: scale for scale in (PAPER, HALF_SIDE, TINY)}


class Training(NamedTuple):
    step: Step
    nets: tuple[nn.Module, nn.Module]
    optimizers: tuple[torch.optim.Adam, torch.optim.Adam]


def training(provider: Provider, nets: tuple[UnetGenerator, nn.Module], device: torch.device, scale: Scale) -> Training:
    """A provider's training step on these networks, which it takes over."""
    set_cudnn(provider)
    for net in nets:
        net.to(device, memory_format=torch.channels_last if provider.channels_last else torch.preserve_format)
    settings = {"lr": 2e-4, "betas": (0.5, 0.999)}
    settings |= {"fused": True} if provider.fused_adam else {}
    settings |= {"capturable": True} if provider.graph else {}
    optimizers = tuple(torch.optim.Adam(net.parameters(), **settings) for net in nets)
    if provider.precision is not None:
        ours = engine_step(provider, nets, optimizers, scale)

        def launch(real_A: Tensor, real_B: Tensor) -> Losses[Tensor]:
            return Losses(**ours.launch({"A": real_A, "B": real_B}))

        launched = graphed(launch) if device.type == "cuda" else launch

        def train(real_A: Tensor, real_B: Tensor) -> Losses[Tensor]:
            ours.prepare()
            losses = launched(real_A, real_B)
            ours.conclude()
            return losses

        return Training(train, nets, optimizers)

    called, gan_loss = compiled(provider, *nets), GANLoss(OBJECTIVE["gan_mode"])

    def step(real_A: Tensor, real_B: Tensor) -> Losses[Tensor]:
        if provider.compile_mode and device.type == "cuda":  # two of the modes have CUDA graphs
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device.type, half(device), enabled=provider.amp):
            return train_step(*called, *optimizers, real_A, real_B, gan_loss=gan_loss, lambda_L1=OBJECTIVE["lambda_L1"])

    return Training(graphed(step) if provider.graph else step, nets, optimizers)


def engine_step(
    provider: Provider, nets: Sequence[nn.Module], optimizers: Sequence[torch.optim.Adam], scale: Scale
) -> EngineStep:
    """The step of our engine on these networks, as the trainer makes it."""
    device = next(nets[0].parameters()).device
    assert provider.precision is not None
    config = Pix2PixConfig(engine=provider.engine, precision=provider.precision, **OBJECTIVE, **scale.options)
    resolved = config.resolve(device.type, provider.precision)
    players = (dict(zip(names, who, strict=True)) for names, who in ((NETS, nets), (OPTIMIZERS, optimizers)))
    return MODEL.step(resolved, *players, step=0, loss_scale=LossScale.new_state(device))


def inference(provider: Provider, netG: UnetGenerator, device: torch.device) -> Inference:
    """A provider's generator in eval mode, prepared as far as it can be. Ours is what `fastp2p.fuse` makes of it."""
    set_cudnn(provider)
    netG.to(device, memory_format=torch.channels_last if provider.channels_last else torch.preserve_format).eval()
    if provider.precision is not None:
        fastp2p.fuse(netG)
        ours = DTYPES[provider.precision]

        def run_ours(real_A: Tensor) -> Tensor:
            with torch.inference_mode(), torch.autocast(device.type, ours, enabled=ours.itemsize < 4):
                return netG(real_A)

        return run_ours

    dtype = half(device) if provider.amp else torch.float32
    torch._inductor.config.freezing = True  # weights become constants
    called = compiled(provider, netG.to(dtype))[0]

    def run(real_A: Tensor) -> Tensor:
        with torch.inference_mode():
            return called(real_A.to(dtype))

    return graphed(run) if provider.graph else run


def set_cudnn(provider: Provider) -> None:
    """Ours as its trainer has it, the others with the choice by trial."""
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = not provider.ours, provider.ours


def compiled(provider: Provider, *nets: nn.Module) -> tuple[Callable[..., Tensor], ...]:
    if provider.compile_mode is None:
        return nets
    # Inductor's own rule declines channels_last for convolutions like these on a GPU
    torch._inductor.config.force_layout_optimization = True
    # Each batch size is compiled anew, and none may end in eager unseen
    torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = 64, True
    return tuple(torch.compile(net, mode=provider.compile_mode, dynamic=False) for net in nets)


def half(device: torch.device) -> torch.dtype:
    """What autocast computes in."""
    return torch.float16 if device.type == "cuda" and best_precision(device) == "fp16" else torch.bfloat16


def graphed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors as one CUDA graph, which reads them from fixed addresses. Its results are overwritten."""
    inputs: list[Tensor] = []
    graph = Graphed(lambda: function(*inputs))

    def call(*tensors: Tensor) -> Any:
        with joined(graph.stream):
            inputs.extend(torch.empty_like(t) for t in tensors[len(inputs) :])
            for mine, given in zip(inputs, tensors, strict=True):
                mine.copy_(given)
            return graph()

    return call
