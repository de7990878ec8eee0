"""Which chains fuse(model) takes, which it leaves, and what it says of them."""

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.comparing import assert_same_training, fused_copy
from helpers.on_device import rng_state
from torch import Tensor, nn

from fastp2p.errors import InputError
from fastp2p.nn import ConvNormAct, fuse


def conv(**settings: object) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1, **settings)


def hooked(module: nn.Module, kind: str) -> nn.Module:
    getattr(module, f"register_{kind}")(lambda *args: None)
    return module


def with_forward(module: nn.Module) -> nn.Module:
    module.forward = type(module).forward.__get__(module)
    return module


class OwnConv2d(nn.Conv2d):
    pass


class OwnReLU(nn.ReLU):
    pass


SYNC = nn.SyncBatchNorm(4)
LEFT: list[tuple[Callable[[], list[nn.Module]], str]] = [
    (lambda: [conv()], "nothing to fuse follows it"),
    (lambda: [conv(), nn.MaxPool2d(2)], "nothing to fuse follows it"),
    (lambda: [conv(), nn.Dropout()], "nothing to fuse follows it"),
    (lambda: [conv(groups=4), nn.ReLU()], "has 4 groups"),
    (lambda: [nn.Conv2d(4, 4, 3, stride=(1, 2)), nn.ReLU()], "has stride (1, 2), not alike in both dimensions"),
    (lambda: [nn.Conv2d(4, 4, 3, padding="same"), nn.ReLU()], "has padding 'same'"),
    (lambda: [nn.Conv2d(4, 4, 3, padding_mode="circular", padding=1), nn.ReLU()], "pads by 'circular'"),
    (
        lambda: [nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=(1, 0)), nn.ReLU()],
        "has output_padding (1, 0), not alike in both dimensions",
    ),
    (lambda: [conv(dtype=torch.complex64), nn.Tanh()], "is of torch.complex64"),
    (lambda: [OwnConv2d(4, 4, 3), nn.ReLU()], "is of a class that is not fused"),
    (lambda: [hooked(conv(), "forward_hook"), nn.ReLU()], "has hooks"),
    (lambda: [hooked(conv(), "forward_pre_hook"), nn.ReLU()], "has hooks"),
    (lambda: [hooked(conv(), "full_backward_hook"), nn.ReLU()], "has hooks"),
    (lambda: [nn.utils.weight_norm(conv()), nn.ReLU()], "has a weight that is computed, as by spectral_norm or weight"),
    (lambda: [nn.utils.parametrizations.weight_norm(conv()), nn.ReLU()], "has a parametrization"),
    (lambda: [conv(), hooked(nn.ReLU(), "forward_hook")], "1 (ReLU) has hooks"),
    (lambda: [conv(), with_forward(nn.ReLU())], "1 (ReLU) has a forward that was replaced"),
    (lambda: [conv(), nn.BatchNorm2d(4, momentum=None)], "1 (BatchNorm2d) has momentum None, a cumulative average"),
    (lambda: [conv(), nn.BatchNorm2d(5)], "1 (BatchNorm2d) is for 5 channels, not 4"),
    (lambda: [conv(), nn.InstanceNorm2d(4, track_running_stats=True)], "1 (InstanceNorm2d) has running statistics"),
    (lambda: [conv(), SYNC], "1 (SyncBatchNorm) is of a class that is not fused"),
    (lambda: [conv(), nn.GroupNorm(2, 4)], "1 (GroupNorm) is of a class that is not fused"),
    (lambda: [conv(), nn.RReLU()], "1 (RReLU) is of a class that is not fused"),
    (lambda: [conv(), OwnReLU()], "1 (OwnReLU) is of a class that is not fused"),
    (lambda: [conv(), nn.LeakyReLU(-0.1)], "1 (LeakyReLU) has a slope below 0"),
]


@pytest.mark.parametrize(("layers", "reason"), LEFT, ids=lambda value: value if isinstance(value, str) else "")
def test_left_with_a_reason(layers: Callable[[], list[nn.Module]], reason: str):
    model = nn.Sequential(*layers())
    types = [type(module) for module in model]
    report = fuse(model)
    assert not report.fused
    assert [row.module for row in report.left] == ["0"]
    assert report.left[0].reason.startswith(reason.rstrip())
    assert [type(module) for module in model] == types


ENDS: list[tuple[Callable[[], list[nn.Module]], tuple[str, ...], str]] = [
    (lambda: [conv(), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU()], ("0", "1", "2"), ""),
    (lambda: [conv(), nn.ReLU(), nn.BatchNorm2d(4)], ("0", "1"), ""),
    (lambda: [conv(), nn.BatchNorm2d(4), nn.BatchNorm2d(4)], ("0", "1"), ""),
    (lambda: [conv(), nn.InstanceNorm2d(4), nn.Tanh(), nn.Dropout(0.3)], ("0", "1", "2", "3"), ""),
    (lambda: [conv(), nn.BatchNorm2d(4), nn.SiLU()], ("0", "1"), "2 (SiLU) is of a class that is not fused"),
    (lambda: [conv(), nn.BatchNorm2d(4), nn.Dropout2d()], ("0", "1"), "2 (Dropout2d) is of a class that is not fused"),
    (lambda: [conv(), nn.ReLU(), nn.Dropout(1.0)], ("0", "1"), "2 (Dropout) drops with probability 1.0"),
    (lambda: [conv(), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())], ("0", "1.0", "1.1"), ""),
    (
        lambda: [nn.Sequential(conv(), nn.BatchNorm2d(4)), hooked(nn.Sequential(nn.ReLU()), "forward_hook")],
        ("0.0", "0.1"),
        "1.0 (ReLU) is on the other side of 1, which has hooks",
    ),
]


@pytest.mark.parametrize(("layers", "paths", "note"), ENDS)
def test_a_chain_ends(layers: Callable[[], list[nn.Module]], paths: tuple[str, ...], note: str):
    (chain,) = fuse(nn.Sequential(*layers())).fused
    assert chain.modules == paths
    assert chain.note.startswith(note)
    assert bool(note) == bool(chain.note)


def test_fuse_is_idempotent():
    model = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.Tanh())
    assert len(fuse(model).fused) == 2
    types = [type(module) for module in model]
    chain = model[0]._chain
    report = fuse(model)
    assert not report.fused
    assert [row.reason for row in report.left] == ["is fused already"] * 2
    assert [type(module) for module in model] == types
    assert model[0]._chain is chain


def test_own_layers_are_no_work_for_fuse():
    report = fuse(nn.Sequential(ConvNormAct(4, 4), conv(), nn.ReLU()))
    assert [chain.modules for chain in report.fused] == [("1", "2")]
    assert not report.left


def test_names_of_a_shared_module():
    relu = nn.ReLU()
    model = nn.Sequential(conv(), nn.BatchNorm2d(4), relu, conv(), nn.BatchNorm2d(4), relu)
    report = fuse(model)
    assert [chain.modules for chain in report.fused] == [("0", "1"), ("3", "4")]
    assert {chain.note for chain in report.fused} == {"2 (ReLU) is called at 2 places"}


def test_a_module_shared_by_parts_that_are_followed_apart():
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            relu = nn.ReLU()
            self.a, self.b = nn.Sequential(conv(), relu), nn.Sequential(conv(), nn.BatchNorm2d(4), relu)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else self.b(x)

    report = fuse(Parts())
    assert [(chain.modules, chain.note) for chain in report.fused] == [
        (("b.0", "b.1"), "b.2 (ReLU) is registered under 2 names")
    ]
    assert [(row.module, row.reason) for row in report.left[1:]] == [("a.0", "a.1 (ReLU) is registered under 2 names")]


class Model(nn.Module):
    """conv, bn, relu and whatever forward a test gives it."""

    def __init__(self, forward: Callable[..., object], **modules: nn.Module):
        super().__init__()
        self.conv, self.bn, self.relu = conv(), nn.BatchNorm2d(4), nn.ReLU()
        for name, module in modules.items():
            setattr(self, name, module)
        type(self).forward = forward


def model_of(forward: Callable[..., object], **modules: nn.Module) -> nn.Module:
    """A Model of a class of its own."""
    return type("Model", (Model,), {})(forward, **modules)


def chains(model: nn.Module) -> list[tuple[str, ...]]:
    return [chain.modules for chain in fuse(model).fused]


def test_twins_are_fused():
    """Called twice, but always one after the other: as D on fake and real."""

    def forward(self: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(a))) - self.relu(self.bn(self.conv(b)))

    assert chains(model_of(forward)) == [("conv", "bn", "relu")]


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: (self.bn(self.conv(x)), self.bn(x)),
        lambda self, x: self.bn(self.conv(self.bn(x))),
        lambda self, x: self.bn(self.conv(x)) if self.training else self.conv(self.bn(x)),
        lambda self, x: self.bn(self.conv(x)) if self.training else self.conv(x),
        lambda self, x: (lambda y: (y, self.bn(y)))(self.conv(x)),
        lambda self, x: self.bn(F.relu(self.conv(x))),
        lambda self, x: self.bn(self.conv(x) + 1),
        lambda self, x, last=None: self.bn(self.conv(x)) if last is None else self.conv(x),
        lambda self, x, last=None: self.conv(x) if last is None else self.bn(self.conv(x)),
        lambda self, x: self.bn(input=self.conv(x)),
    ],
)
def test_a_norm_that_is_reached_in_another_way_is_left(forward: Callable[..., object]):
    model = model_of(forward)
    assert chains(model) == []
    assert type(model.bn) is nn.BatchNorm2d


def test_a_norm_for_each_domain():
    report = fuse(model_of(lambda self, a, b: self.bn(self.conv(a)) + self.bn2(self.conv(b)), bn2=nn.BatchNorm2d(4)))
    assert [(row.module, row.reason) for row in report.left] == [("conv", "its result goes to bn or bn2")]


def test_output_size_is_left():
    model = model_of(
        lambda self, x: self.relu(self.conv_transpose(x, output_size=[9, 9])),
        conv_transpose=nn.ConvTranspose2d(4, 4, 3, stride=2),
    )
    report = fuse(model)
    assert not report.fused
    assert {row.module: row.reason for row in report.left}["conv_transpose"].startswith(
        "is called with more than its input"
    )


def test_no_grad_in_between_is_seen():
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.conv(x)
        return self.relu(self.bn(y))

    report = fuse(model_of(forward))
    assert not report.fused
    assert report.left[0].reason == "bn (BatchNorm2d) runs in another grad or autocast mode"


def test_flag_that_collects_features_is_untraceable():
    def forward(self: nn.Module, x: Tensor, features: bool = False) -> object:
        y = self.conv(x)
        z = self.bn(y)
        return (y, z) if features else z

    report = fuse(model_of(forward))
    assert not report.fused
    assert report.left[0].reason.startswith("cannot be followed: TraceError")


class ByValue(nn.Module):
    """Nothing that a graph could show."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else x


def test_around_a_module_that_cannot_be_followed():
    inner = nn.Sequential(conv(), nn.ReLU())
    model = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), ByValue(inner), conv(), nn.InstanceNorm2d(4)).double()
    fused, report = fused_copy(model)
    assert [chain.modules for chain in report.fused] == [("0", "1", "2"), ("3.inner.0", "3.inner.1"), ("4", "5")]
    assert [row.module for row in report.left] == ["3"]
    assert_same_training(model, fused, torch.randn(2, 4, 6, 6, dtype=torch.float64))


def test_part_of_a_module_that_cannot_be_followed():
    """box.inner's parts are also called from outside of the box, which cannot be seen into."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.box(self.box.inner[1](self.box.inner[0](x)))

    model = model_of(forward, box=ByValue(nn.Sequential(conv(), nn.ReLU())))
    report = fuse(model)
    assert not report.fused
    reasons = {row.module: row.reason for row in report.left}
    assert reasons["box.inner.0"] == "is part of box, which cannot be followed"


def test_parent_that_takes_a_sequential_to_pieces():
    class Collector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU())
            self.tail = nn.Sequential(conv(), nn.ReLU())

        def forward(self, x: Tensor) -> list[Tensor]:
            collected = []
            for layer in self.features:
                x = layer(x)
                collected.append(x)
            return [*collected, self.tail(x)] if x.sum() > 0 else collected

    torch.manual_seed(0)
    model, x = Collector().double(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    fused, report = fused_copy(model)
    assert [chain.modules for chain in report.fused] == [("tail.0", "tail.1")]
    reasons = {row.module: row.reason for row in report.left}
    assert reasons["features"] == "its parts are called one by one by a forward that cannot be followed"
    assert_same_training(model, fused, x)


def test_replaced_forward_is_not_trusted():
    model = nn.Sequential(conv(), nn.ReLU())
    model.forward = lambda x: [model[0](x), model[1](x)]
    report = fuse(model)
    assert not report.fused
    assert report.left[0].reason == "its forward was replaced"


def test_following_leaves_no_trace():
    """Attributes, buffers, modes and random generators are as before; even what a forward notes down is."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x)
        self.last = x
        self.buffer.add_(1)
        self.draws = (torch.rand(()), random.random())
        return self.relu(self.bn(self.conv(x)))

    model = model_of(forward)
    model.register_buffer("buffer", torch.zeros(()))
    model.calls, model.seen = 0, []
    model.eval()
    model.bn.train()
    state, python_state = rng_state(), random.getstate()
    assert len(fuse(model).fused) == 1
    assert (model.calls, model.seen, model.buffer.item()) == (0, [], 0)
    assert not hasattr(model, "last")
    assert not hasattr(model, "draws")
    assert torch.equal(rng_state(), state)
    assert random.getstate() == python_state
    assert [module.training for module in model.modules()] == [False, False, True, False]


def test_leaky_relu_changed_in_place_afterwards():
    """PyTorch takes leaky_relu's gradient from its input, the operator from its result: that must stay."""
    forwards = [
        lambda self, x: self.leaky(self.conv(x)).mul_(2),
        lambda self, x: self.relu_(self.leaky(self.conv(x))),
        lambda self, x: F.relu(self.leaky(self.conv(x)), inplace=True),
    ]

    def add_in_place(self: nn.Module, x: Tensor) -> Tensor:
        y = self.leaky(self.conv(x))
        y += x
        return y

    for forward in [*forwards, add_in_place]:
        model = model_of(forward, leaky=nn.LeakyReLU(0.2), relu_=nn.ReLU(inplace=True)).double()
        fused, report = fused_copy(model)
        reason = "leaky (LeakyReLU) has a result that is changed in place afterwards"
        assert [row.reason for row in report.left] == [reason]
        assert_same_training(model, fused, torch.randn(2, 4, 6, 6, dtype=torch.float64))

    after_norm = model_of(lambda self, x: self.leaky(self.bn(self.conv(x))).mul_(2), leaky=nn.LeakyReLU(0.2)).double()
    fused, report = fused_copy(after_norm)
    assert [chain.modules for chain in report.fused] == [("conv", "bn")]
    assert_same_training(after_norm, fused, torch.randn(2, 4, 6, 6, dtype=torch.float64))


def test_what_is_no_module_is_told():
    with pytest.raises(InputError, match=r"fuse: got a str, expected an nn\.Module"):
        fuse("model")
