"""The training step on fake CUDA tensors, which have a device and a shape and no memory: a GPU is not needed.

It needs a PyTorch that was built with CUDA. It finds a tensor on the wrong device, and what makes the host wait for the
GPU. Values are not computed, so nothing is compared.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastp2p.data import Crops
from fastp2p.engine import GraphedStep
from fastp2p.engine.graph import WARM_UP
from fastp2p.models.pix2pix.networks import PatchDiscriminator, UnetGenerator
from fastp2p.models.pix2pix.options import Pix2PixConfig
from fastp2p.models.pix2pix.step import FusedStep
from fastp2p.train import loop
from fastp2p.train.state import TrainState

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="needs a PyTorch that was built with CUDA; no GPU"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning"),  # all have the same
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIDE, PAIRS = 256, 7
aten = torch.ops.aten
# Their results, or the shapes of these, depend on values: the host reads them
WAITS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2}


class WaitsError(Exception):
    """The host waits for the GPU."""


class WrongDeviceError(Exception):
    """A tensor is on the CPU that should be on the GPU."""


class Watch(TorchDispatchMode):
    """Raises where the host would wait for the GPU, or an operator of ours gets a tensor of the host's."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.graph_only = False  # in what a graph holds not even pinned memory is read: its address may be another's

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten":
            with self:  # item, to and their like consist of other operators: look at those
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_host = [t for t in tensors if not t.is_cuda]
        if func.namespace == "fastp2p":
            self.operators += 1
            if on_host:
                raise WrongDeviceError(f"{func} got a tensor {tuple(on_host[0].shape)} on the CPU")
        if func.overloadpacket in WAITS and len(on_host) < len(tensors):
            raise WaitsError(f"{func} of a tensor on the GPU")
        if func.overloadpacket in (aten.copy_, aten._to_copy, aten._copy_from):
            self.check_copy(func, args, kwargs)
        if self.graph_only and any(t.ndim > 0 for t in on_host):
            raise WrongDeviceError(f"{func} in a graph reads the host's memory")
        try:
            return func(*args, **kwargs)
        except DynamicOutputShapeException as error:  # such as of an index that is a mask
            raise WaitsError(f"{func}: its result's shape depends on values") from error

    @staticmethod
    def check_copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Only a copy from pinned memory that does not block lets the host go on."""
        if func.overloadpacket is aten.copy_:
            to, source, without_waiting = args[0].device, args[1], [*args, False][2]
        else:
            to, source = torch.device(kwargs.get("device") or args[0].device), args[0]
            without_waiting = kwargs.get("non_blocking", False)
        if to.type == source.device.type:
            return
        if to.type == "cpu" or not (without_waiting and getattr(source, "is_in_pinned_memory", False)):
            raise WaitsError(f"{func}: a copy of {tuple(source.shape)} from {source.device} to {to}")


class FakeStream:
    """CUDA's streams and events need a GPU; who waits for whom is a matter of other tests."""

    device = torch.device("cuda", 0)

    def __init__(self, *args: Any, **options: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record(self, stream: Any) -> None: ...
    def synchronize(self) -> None: ...
    def replay(self) -> None: ...


def in_pinned_memory(tensor: Tensor) -> Tensor:
    tensor.is_in_pinned_memory = True
    return tensor


@pytest.fixture
def watch(_device: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """A machine with a fake GPU; `with watch:` looks at what is done there."""
    watch = Watch()

    @contextlib.contextmanager
    def stream(*args: Any) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def graph(*args: Any, **options: Any) -> Iterator[None]:
        watch.graph_only = True
        yield
        watch.graph_only = False

    for name in ("Stream", "Event", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    with torch.device("cpu"):
        torch.ones(())  # PyTorch lists its factory functions at the first use: before torch.empty is replaced
    empty = torch.empty

    def pinned_empty(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return in_pinned_memory(empty(*args, **options)) if pin_memory else empty(*args, **options)

    monkeypatch.setattr(torch, "empty", pinned_empty)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: in_pinned_memory(self.clone()))
    with FakeTensorMode():
        yield watch


def fused_step(dtype: torch.dtype, **options: Any) -> FusedStep:
    """The paper's networks at 256 px; a smaller U-Net would leave layers out."""
    with torch.device("cuda"):
        netG, netD = UnetGenerator(ngf=8), PatchDiscriminator(ndf=8)
    optimizers = [torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999)) for net in (netG, netD)]
    return FusedStep(netG, netD, *optimizers, size=(SIDE, SIDE), dtype=dtype, **options)


def crops(n: int, place: str) -> Crops:
    """A batch of n, its pairs on the GPU, in the host's memory, or decoded into that."""
    pairs = torch.zeros(n if place == "streamed" else PAIRS, SIDE, SIDE, 6, dtype=torch.uint8)
    index, offset = torch.zeros(n, dtype=torch.int64), torch.zeros(n, 2, dtype=torch.int64)
    flip = torch.zeros(n, dtype=torch.bool)
    device = "cuda" if place == "on the GPU" else "cpu"
    return Crops(*(t.to(device) for t in (pairs, index, offset, flip)), SIDE, 3)


@pytest.mark.parametrize("reduce", [None, lambda grad: grad.div_(2)], ids=["", "reduce"])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step(watch: Watch, dtype: torch.dtype, n: int, reduce: Any):
    step = fused_step(dtype, reduce=reduce)
    images = torch.zeros(2, n, 3, SIDE, SIDE, device="cuda")
    with watch:
        for _ in range(2):
            losses = step(*images)
    assert watch.operators > 2 * 100
    wide = torch.promote_types(dtype, torch.float32)
    assert [(loss.shape, loss.dtype, loss.device.type) for loss in losses] == [((), wide, "cuda")] * 4


@pytest.mark.parametrize("place", ["on the GPU", "in the host's memory", "streamed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_as_a_graph(watch: Watch, dtype: torch.dtype, place: str):
    """The ordinary steps, the capture, and a replay; of two batch sizes."""
    step = GraphedStep(fused_step(dtype))
    batches = [crops(1, place), crops(4, place)]
    with watch:
        for _ in range(WARM_UP + 2):
            for batch in batches:
                step(batch)
    assert len(step.recorded) == 2
    for recorded, batch in zip(step.recorded.values(), batches, strict=True):
        assert recorded.launch.graph is not None
        inputs = recorded.inputs.crops
        assert {t.device.type for t in (inputs.pairs, inputs.index, inputs.offset, inputs.flip)} == {"cuda"}
        assert len(inputs.pairs) == (PAIRS if place == "on the GPU" else len(batch))


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_the_trainer_s_loop(
    watch: Watch, precision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aligned: Path
):
    """From batch to batch; what reads losses, draws or saves does wait, and is left out."""
    config = Pix2PixConfig(
        data=str(aligned), out=tmp_path / "run", ngf=8, ndf=8, batch_size=2, n_epochs=8, precision=precision
    ).resolve("cuda", precision)
    with torch.device("cuda"), monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "to", lambda self, *args: self)  # which cannot move a fake tensor
        state = TrainState.new(config, torch.device("cuda", 0), "")
    epoch = [crops(2, "on the GPU")] * 3
    monkeypatch.setattr(loop, "train_crops", lambda *args, **options: iter(epoch))
    for name in ("panel", "validate", "save", "write_losses", "log"):
        monkeypatch.setattr(loop.Run, name, lambda self, *args: None)
    data: Any = SimpleNamespace(train=range(6), val=None, panel=[])
    bar: Any = SimpleNamespace(update=lambda: None, set_description_str=lambda *args, **options: None)
    recorder: Any = None
    step = state.training_step(config)
    monkeypatch.setattr(TrainState, "training_step", lambda self, config: step)  # its buffers are filled from the host
    run = loop.Run(config, data, state, tmp_path, recorder, bar, print)
    with watch:
        run.train(8, [])
    assert state.step == 8
    assert state.loss_sums.is_cuda
    assert watch.operators > 100 * (WARM_UP + 1)


def planted_in_reduce(fault: Callable[[Tensor], object]) -> Callable[[], FusedStep]:
    return lambda: fused_step(torch.float32, reduce=fault)


def planted_rng() -> FusedStep:
    step = fused_step(torch.float32)
    step.netG.rng = step.netG.rng.cpu()
    return step


PLANTED: list[tuple[Callable[[], FusedStep], type[Exception], str]] = [
    (planted_in_reduce(lambda grad: grad.sum().item()), WaitsError, "_local_scalar_dense"),
    (planted_in_reduce(lambda grad: bool(grad.isfinite().all())), WaitsError, "_local_scalar_dense"),
    (planted_in_reduce(lambda grad: grad.cpu()), WaitsError, "from cuda:0 to cpu"),
    (planted_in_reduce(lambda grad: grad[grad > 0]), WaitsError, "index.Tensor: its result's shape depends on values"),
    (
        planted_in_reduce(lambda grad: grad.add_(torch.ones(2, device="cpu").to("cuda").sum())),
        WaitsError,
        "from cpu to cuda",
    ),
    (
        planted_in_reduce(lambda grad: grad.add_(torch.ones(grad.shape, device="cpu"))),
        RuntimeError,
        "different devices",
    ),
    (planted_rng, WrongDeviceError, r"norm_act.default got a tensor \(2,\) on the CPU"),
]


@pytest.mark.parametrize(("make", "error", "said"), PLANTED)
def test_a_planted_fault_is_found(watch: Watch, make: Callable[[], FusedStep], error: type[Exception], said: str):
    step = make()
    with watch, pytest.raises(error, match=said):
        step(*torch.zeros(2, 1, 3, SIDE, SIDE, device="cuda"))


def test_a_graph_that_reads_the_host_s_memory_is_found(watch: Watch):
    pinned = torch.zeros(3, device="cpu").pin_memory()
    to = torch.zeros(3, device="cuda")
    with watch:
        to.copy_(pinned, non_blocking=True)
        with pytest.raises(WrongDeviceError, match="in a graph reads the host's memory"), torch.cuda.graph():
            to.copy_(pinned, non_blocking=True)
