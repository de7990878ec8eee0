"""Who is compared: ways to train pix2pix's networks and to run its generator, with every setting that each one has."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastp2p
from fastp2p.config import Precision
from fastp2p.device import DTYPES, best_precision
from fastp2p.models.gan_losses import GANLoss
from fastp2p.models.pix2pix.losses import Losses
from fastp2p.models.pix2pix.networks import Dropout, PatchDiscriminator, UnetGenerator
from fastp2p.models.pix2pix.reference import train_step
from fastp2p.models.pix2pix.step import FusedStep
from fastp2p.nn.init import init_weights

Step = Callable[[Tensor, Tensor], Losses[Tensor]]
Inference = Callable[[Tensor], Tensor]

BATCHES = [1, 4, 16, 64] if torch.cuda.is_available() else [1, 4]
GRAPH_WARM_UP = 3  # steps before a capture: the allocator and cuDNN's choice settle


@dataclass(frozen=True)
class Provider:
    """A way to do the work. All train by torch.optim.Adam's formula, from the same weights."""

    name: str
    settings: str  # all of them, for the reader of a table
    precision: Precision | None = None  # of the fused engine; None is eager PyTorch
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


def providers(device: torch.device, *, quick: bool) -> tuple[list[Provider], dict[str, str]]:
    """Those to compare on a device, ours last, of these the best precision first; and why the rest is left out."""
    left_out = {p.name: f"is for {p.only_on}" for p in OTHERS if p.only_on not in ("", device.type)}
    left_out |= {p.name: "takes longer than --quick has" for p in OTHERS if quick and not p.quick}
    best = best_precision(device)
    graph = " as one CUDA graph" if device.type == "cuda" else ""
    settings = (
        f"the fused engine{graph}; inference: fastp2p.fuse, without a graph; epochs: decoded once, before the first"
    )
    ours = [Provider(f"fastp2p {name}", settings, name) for name in dict.fromkeys((best, "fp32"))]  # type: ignore[call-overload]
    others = OTHERS
    if best == "fp32":  # half precision would slow them down
        others = [replace(p, amp=False, settings=f"{p.settings}; in float32, since half is slow here") if p.amp else p
                  for p in OTHERS]  # fmt: skip
    if quick:
        left_out |= {p.name: "--quick takes ours in the best precision alone" for p in ours[1:]}
    return [p for p in [*others, *ours] if p.name not in left_out], left_out


@dataclass(frozen=True)
class Scale:
    """How large the networks and images are."""

    name: str
    size: int  # px
    levels: int
    width: int  # ngf and ndf
    n_layers: int  # of the discriminator

    @property
    def load_size(self) -> int:
        """What images are resized to before the crop: 286 px for 256."""
        return self.size + self.size * 30 // 256

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


def training(provider: Provider, nets: tuple[UnetGenerator, nn.Module], device: torch.device, size: int) -> Training:
    """A provider's training step on these networks, which it takes over."""
    set_cudnn(provider)
    for net in nets:
        net.to(device, memory_format=torch.channels_last if provider.channels_last else torch.preserve_format)
    settings = {"lr": 2e-4, "betas": (0.5, 0.999)}
    settings |= {"fused": True} if provider.fused_adam else {}
    settings |= {"capturable": True} if provider.graph else {}
    optimizers = tuple(torch.optim.Adam(net.parameters(), **settings) for net in nets)
    if provider.precision is not None:
        fused = FusedStep(*nets, *optimizers, size=(size, size), dtype=DTYPES[provider.precision])
        return Training(GraphedFused(fused) if device.type == "cuda" else fused, nets, optimizers)

    called = compiled(provider, *nets)

    def step(real_A: Tensor, real_B: Tensor) -> Losses[Tensor]:
        if provider.compile_mode and device.type == "cuda":  # two of the modes have CUDA graphs
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device.type, half(device), enabled=provider.amp):
            return train_step(*called, *optimizers, real_A, real_B, gan_loss=GANLoss(), lambda_L1=100.0)

    return Training(Graphed(step) if provider.graph else step, nets, optimizers)


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

    return Graphed(run) if provider.graph else run


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


class Graphed:
    """A function of tensors as one CUDA graph, which reads them from fixed addresses. Its results are overwritten."""

    def __init__(self, function: Callable[..., Any]):
        self.function, self.calls = function, 0
        self.stream = torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *tensors: Tensor) -> Any:
        self.calls += 1
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self._run(*tensors)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def _run(self, *tensors: Tensor) -> Any:
        if self.calls <= GRAPH_WARM_UP:
            return self.function(*tensors)
        if self.graph is None:
            self.inputs = [torch.empty_like(t) for t in tensors]
            self.graph = torch.cuda.CUDAGraph()
            # A loader's thread that pins memory need know nothing of it
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.result = self.function(*self.inputs)
        for mine, given in zip(self.inputs, tensors, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.result


class GraphedFused:
    """The fused step on given images as one CUDA graph; what the trainer replays cuts its crops in the graph, too."""

    def __init__(self, fused: FusedStep):
        self.fused = fused
        self.launch = Graphed(lambda real_A, real_B: Losses(**fused.launch({"A": real_A, "B": real_B})))

    def __call__(self, real_A: Tensor, real_B: Tensor) -> Losses[Tensor]:
        self.fused.prepare()
        losses = self.launch(real_A, real_B)
        self.fused.conclude()
        return losses
