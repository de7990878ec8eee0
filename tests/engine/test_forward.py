"""A forward is followed as it is, or refused: whatever it does beside calling modules and functions on its images."""

import contextlib
import copy
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.nets import batches, small_nets
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastp2p.engine.forward import follow
from fastp2p.engine.plan import plan_network
from fastp2p.errors import InputError

SIZE = (8, 6)


class Net(nn.Module):
    """Two convolutions, and what happens between them."""

    def __init__(self, between: Callable[[Any, Tensor], Any], **attributes: Any):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.between, self.k, self.kept = between, 0, []
        self.register_buffer("count", torch.zeros(()))
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self, self.a(x)))  # type: ignore[no-any-return]


def swallowed(self: Any, y: Tensor) -> Tensor:
    with contextlib.suppress(Exception):
        y = 2 * y
    return y


def no_grad(self: Any, y: Tensor) -> Tensor:
    with torch.no_grad():
        return F.relu(y)


def inference(self: Any, y: Tensor) -> Tensor:
    with torch.inference_mode():
        return F.relu(y)


def autocast(self: Any, y: Tensor) -> Tensor:
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        return F.relu(y)


def counts(self: Any, y: Tensor) -> Tensor:
    self.k += 1
    return F.relu(y) if self.k % 2 else y


def counts_in_a_buffer(self: Any, y: Tensor) -> Tensor:
    self.count += 1
    return y


def asks_a_buffer(self: Any, y: Tensor) -> Tensor:
    return F.relu(y) if self.count > 0 else y


def clamps(self: Any, y: Tensor) -> Tensor:
    self.b.weight.data.clamp_(-0.01, 0.01)
    return y


def evaluates(self: Any, y: Tensor) -> Tensor:
    self.norm.eval()
    y = self.norm(y)
    self.norm.train()
    return y


def freezes(self: Any, y: Tensor) -> Tensor:
    self.norm.requires_grad_(False)
    y = self.norm(y)
    self.norm.requires_grad_(True)
    return y


def keeps(self: Any, y: Tensor) -> Tensor:
    self.feature = y
    return y


def keeps_in_a_list(self: Any, y: Tensor) -> Tensor:
    self.kept.append(y)
    return y


def writes_data(self: Any, y: Tensor) -> Tensor:
    y.data = F.relu(y)
    return y


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 2 * dy


TWISTS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "a refusal swallowed": (swallowed, "calls rmul, which"),
    "no_grad": (no_grad, "calls _set_grad_enabled, which"),
    "inference_mode": (inference, "runs in another grad, autocast or inference mode"),
    "autocast": (autocast, "which the engine does not compute|runs in another grad, autocast or inference mode"),
    "a count": (counts, "changes itself in its forward"),
    "a count in a buffer": (counts_in_a_buffer, "calls add_, which"),
    "a question to a buffer": (asks_a_buffer, "calls gt, which"),
    "weights clamped": (clamps, "which the engine does not compute"),
    "weights drawn": (lambda self, y: y + torch.rand(()), "calls rand, which"),
    "eval for a call": (evaluates, "is changed by the forward that calls it"),
    "frozen for a call": (freezes, "which the engine does not compute|is changed by the forward"),
    "an attribute": (keeps, "asks a tensor for its type"),
    "a list": (keeps_in_a_list, "changes itself in its forward"),
    "data": (writes_data, "asks a tensor for another data"),
    "isinstance": (lambda self, y: F.relu(y) if isinstance(y, Tensor) else y, "asks a tensor for its type"),
    "is_tensor": (lambda self, y: F.relu(y) if torch.is_tensor(y) else y, "asks a tensor for its type"),
    "autograd.Function": (lambda self, y: Doubled.apply(y), "asks a tensor for its type"),
    "checkpoint": (lambda self, y: checkpoint(self.norm, y, use_reentrant=False), "."),
    "number of images": (lambda self, y: F.relu(y) if y.shape[0] > 1 else y, "asks a tensor for its number of images"),
    "size(0)": (lambda self, y: y if y.size(0) else F.relu(y), "asks a tensor for its number of images"),
    "a shape": (lambda self, y: y if y.shape == (2, 4, 8, 6) else F.relu(y), "asks a tensor for its number of images"),
    "elements": (lambda self, y: y if y.numel() > 9 else F.relu(y), "asks a tensor for numel"),
    "chance": (lambda self, y: y if random.random() < 2 else F.relu(y), "draws random numbers in its forward"),
    "detach": (lambda self, y: y.detach(), "asks a tensor for detach"),
    "a functional call": (
        lambda self, y: torch.func.functional_call(self.norm, {"weight": self.norm.weight * 2}, (y,)),
        "calls mul, which",
    ),
    "channels by a slice": (lambda self, y: y[:, :4, ...], "expected what takes the whole image"),
    "a pool of stride 0": (lambda self, y: F.avg_pool2d(y, 2, 0), "expected a kernel and a stride of 1"),
    "a pool too large": (lambda self, y: F.avg_pool2d(y, 20), r"leaves \(0, 0\) of an image"),
    "a size in halves": (lambda self, y: F.interpolate(y, size=(4.0, 4.0)), "expected whole numbers"),
    "size and factor": (lambda self, y: F.interpolate(y, (4, 4), 2.0), "expected one of them"),
    "half a pixel of padding": (lambda self, y: F.pad(y, (1.0, 1, 1, 1), mode="reflect"), "expected whole numbers"),
}


@pytest.mark.parametrize("name", TWISTS)
def test_a_twist_is_refused_and_leaves_the_network_as_it_was(name: str):
    between, message = TWISTS[name]
    net = Net(between, norm=nn.BatchNorm2d(4))
    before = copy.deepcopy(net.state_dict()), {m: dict(m.__dict__) for m in net.modules()}, list(net.kept)
    with pytest.raises(InputError, match=message):
        plan_network(net, 3, SIZE)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[0][key]), key
    assert {m: dict(m.__dict__) for m in net.modules()} == before[1]
    assert net.kept == before[2]


def test_shapes_that_are_known_may_be_asked_for():
    """Sides, channels, and whether two tensors are alike."""

    def between(self: Any, y: Tensor) -> Tensor:
        z = F.avg_pool2d(y, 2)
        _, channels, height, width = z.shape
        assert (channels, height, width, y.size(2)) == (4, 4, 3, SIZE[0])
        assert z.shape != y.shape
        up = F.interpolate(z, size=y.shape[-2:])
        return up + y if up.shape == y.shape else y

    assert [node.name for node in plan_network(Net(between), 3, SIZE).nodes] == [
        *("conv1", "pool1", "upsample1", "add1", "conv2")
    ]


def test_parameters_that_share_memory_are_refused():
    net = Net(lambda self, y: y, c=nn.Conv2d(4, 4, 3))
    net.c.weight.data = net.b.weight.data
    with pytest.raises(InputError, match="two modules share a parameter"):
        plan_network(net, 3, SIZE)


def test_the_same_object_stays_the_same():
    """What PyTorch gives back itself, a stand-in is, too."""
    seen = []

    def between(self: Any, y: Tensor) -> Tensor:
        seen.append((nn.Identity()(y) is y, self.act(y) is y, F.relu(y, inplace=True) is y, F.relu(y) is y))
        return y

    follow(Net(between, act=nn.Identity()), 3, SIZE)
    assert seen == [(True, True, True, False)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, ValueError])
def test_forwards_are_given_back_whatever_is_raised(error: type[BaseException]):
    def between(self: Any, y: Tensor) -> Tensor:
        raise error

    net = Net(between)
    with pytest.raises(InputError if issubclass(error, Exception) else error):
        follow(net, 3, SIZE)
    assert not [module for module in net.modules() if "forward" in module.__dict__]


def test_two_threads_follow_two_networks():
    nets = [Net(lambda self, y: F.relu(y)) for _ in range(2)]
    barrier, default = threading.Barrier(2), torch.get_default_device()

    def run(net: Net) -> list[int]:
        barrier.wait()
        return [len(plan_network(net, 3, SIZE).layers) for _ in range(20)]

    with ThreadPoolExecutor(2, initializer=torch.set_default_device, initargs=(default,)) as pool:
        assert list(pool.map(run, nets)) == [[2] * 20] * 2


LATER: dict[str, Callable[[Any], object]] = {
    "a function": lambda net: setattr(net, "between", lambda self, y: torch.tanh(y)),
    "a number": lambda net: setattr(net, "k", 1),
    "a list's contents": lambda net: net.kept.append(3),
    "a new attribute": lambda net: setattr(net, "more", 1),
    "a method": lambda net: setattr(net, "helper", lambda: None),
    "in place": lambda net: setattr(net.d, "inplace", True),
}


@pytest.mark.parametrize("name", LATER)
def test_a_change_after_the_step_was_made_is_refused(name: str):
    trained = small_nets()

    class Judge(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.between(self, self.d(self.a(x))))  # type: ignore[no-any-return]

    trained.netD = Judge(
        lambda self, y: F.relu(y), a=nn.Conv2d(6, 4, 3), b=nn.Conv2d(4, 1, 3), d=nn.Dropout(0.0)
    ).double()
    trained.optimizers[1] = torch.optim.Adam(trained.netD.parameters())
    step = trained.fused((16, 16), torch.float64)
    ((A, B),) = batches(1, (16, 16), torch.float64, steps=1)
    step(A, B)
    LATER[name](trained.netD)
    with pytest.raises(InputError, match=r"was changed after the step was made|has \w+ of its own"):
        step(A, B)
