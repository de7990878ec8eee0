"""The engine trains the network that it is given, or refuses it by name: there is no third outcome."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine.nets import Trained, batches, small_nets
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

import fastp2p
from fastp2p.errors import InputError

SIZE = (32, 32)
Change = Callable[[Trained], object]


def swap(kind: type[nn.Module], make: Callable[[nn.Module], nn.Module], net: str) -> Change:
    """Each module of this kind, and of no subclass, becomes another."""

    def change(trained: Trained) -> None:
        for parent in list(getattr(trained, net).modules()):
            for name, child in list(parent.named_children()):
                if type(child) is kind:
                    setattr(parent, name, make(child))

    return change


def setting(kind: type[nn.Module], net: str, **values: Any) -> Change:
    """The first module of this kind gets other settings."""

    def change(trained: Trained) -> None:
        module = next(m for m in getattr(trained, net).modules() if type(m) is kind)
        for name, value in values.items():
            setattr(module, name, value)

    return change


def append(net: str, module: nn.Module) -> Change:
    return lambda trained: _chain(getattr(trained, net)).append(module)


def insert(net: str, place: int, module: nn.Module) -> Change:
    return lambda trained: _chain(getattr(trained, net)).insert(place, module)


def _chain(net: nn.Module) -> nn.Sequential:
    chain = net.model if isinstance(net.model, nn.Sequential) else net.model.model
    assert isinstance(chain, nn.Sequential)
    return chain


def first(net: str, kind: type[nn.Module], act: Callable[[Any], object]) -> Change:
    return lambda trained: act(next(m for m in getattr(trained, net).modules() if type(m) is kind))


class MyLeaky(nn.LeakyReLU):
    pass


class Twice(fastp2p.PatchDiscriminator):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def subclass(trained: Trained) -> None:
    trained.netD.__class__ = Twice


def own_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]


def share(trained: Trained) -> None:
    chain = _chain(trained.netD)
    chain[2] = chain[0]


def tie(trained: Trained) -> None:
    below = trained.netG.model.model[1].model
    below[-1].bias = below[2].bias


def _old_weight_norm(module: nn.Module) -> None:
    with pytest.warns(FutureWarning, match="deprecated"):
        weight_norm(module)


ACTIVATIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    kind.__name__: lambda _, kind=kind: kind()  # type: ignore[misc]
    for kind in (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.ReLU6, nn.Tanh, nn.Sigmoid, nn.Identity, MyLeaky)
} | {
    "PReLU": lambda _: nn.PReLU(),
    "Hardtanh": lambda _: nn.Hardtanh(),
    "Softplus": lambda _: nn.Softplus(),
    "slope 0.3": lambda _: nn.LeakyReLU(0.3),
    "slope -0.3": lambda _: nn.LeakyReLU(-0.3),
}
HOOKS: dict[str, Callable[[nn.Module], object]] = {
    "forward hook": lambda m: m.register_forward_hook(lambda _m, _x, y: 2 * y),
    "pre-hook": lambda m: m.register_forward_pre_hook(lambda _m, x: (2 * x[0],)),
    "backward hook": lambda m: m.register_full_backward_hook(lambda _m, gx, _gy: tuple(g and 2 * g for g in gx)),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda _m, gy: (2 * gy[0],)),
    "own forward": own_forward,
    "eval": lambda m: m.eval(),
}


def table() -> Iterator[tuple[str, Change]]:
    for net in ("netG", "netD"):
        for kind in (nn.ReLU, nn.LeakyReLU, nn.Tanh) if net == "netG" else (nn.LeakyReLU,):
            for name, make in ACTIVATIONS.items():
                yield f"{net}: {kind.__name__} -> {name}", swap(kind, make, net)
        for mode in ("reflect", "replicate", "circular"):
            padding = {"padding_mode": mode, "_reversed_padding_repeated_twice": [1, 1, 1, 1]}
            yield f"{net}: {mode}", setting(nn.Conv2d, net, **padding)
        yield f"{net}: dilation", setting(nn.Conv2d, net, dilation=(2, 2), padding=(3, 3))
        yield f"{net}: strides", setting(nn.Conv2d, net, stride=(2, 1))
        yield f"{net}: paddings", setting(nn.Conv2d, net, padding=(1, 2))
        yield f"{net}: eps", setting(nn.BatchNorm2d, net, eps=0.3)
        yield f"{net}: momentum", setting(nn.BatchNorm2d, net, momentum=0.7)
        yield f"{net}: cumulative", setting(nn.BatchNorm2d, net, momentum=None)
        for module in (nn.Sigmoid(), nn.Tanh(), nn.LeakyReLU(0.2), nn.Identity(), nn.Dropout(0.0), nn.Softmax(1)):
            yield f"{net}: then {module}", append(net, module)
        for module in (nn.ReflectionPad2d(0), nn.AvgPool2d(1), nn.Dropout2d(0.5), nn.AlphaDropout(0.5), nn.Identity()):
            yield f"{net}: {module} first", insert(net, 0, module)
        yield f"{net}: {nn.LocalResponseNorm(3)} within", insert(net, 1, nn.LocalResponseNorm(3))
        for kind in (nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU, nn.Sequential):
            for name, hook in HOOKS.items():
                yield f"{net}: {name} of {kind.__name__}", first(net, kind, hook)
        for name, hook in HOOKS.items():
            yield f"{net}: its {name}", lambda trained, net=net, hook=hook: hook(getattr(trained, net))
        group = lambda m: nn.GroupNorm(1, m.num_features)  # noqa: E731
        plain = lambda m: nn.GroupNorm(1, m.num_features, affine=False)  # noqa: E731
        fixed = lambda m: nn.BatchNorm2d(m.num_features, track_running_stats=False)  # noqa: E731
        affine = lambda m: nn.InstanceNorm2d(m.num_features, affine=True)  # noqa: E731
        for name, make in (("GroupNorm", group), ("no affine", plain), ("no averages", fixed), ("instance", affine)):
            yield f"{net}: BatchNorm2d -> {name}", swap(nn.BatchNorm2d, make, net)
        yield f"{net}: two norms", swap(nn.BatchNorm2d, lambda m: nn.Sequential(m, copy.deepcopy(m)), net)
        yield f"{net}: spectral_norm", first(net, nn.Conv2d, parametrizations.spectral_norm)
        yield f"{net}: weight_norm", first(net, nn.Conv2d, parametrizations.weight_norm)
        yield f"{net}: old weight_norm", first(net, nn.Conv2d, _old_weight_norm)
        yield f"{net}: frozen", first(net, nn.Conv2d, lambda m: m.requires_grad_(False))
        yield f"{net}: fused", lambda trained, net=net: fastp2p.fuse(getattr(trained, net))
    yield "netD: a subclass", subclass
    yield "netD: one convolution twice", share
    yield "netG: one bias for two", tie


TABLE = dict(table())
SERVED = {  # what the engine computes, so that not everything is refused
    *("netG: ReLU -> ReLU", "netG: Tanh -> Tanh", "netG: LeakyReLU -> slope 0.3", "netD: LeakyReLU -> slope 0.3"),
    *("netD: LeakyReLU -> ReLU", "netG: eps", "netD: eps", "netG: momentum", "netD: momentum"),
    *("netD: BatchNorm2d -> instance", "netG: BatchNorm2d -> instance", "netD: then Identity()"),
}


def outcome(change: Change, optimizers: Callable[[Any], torch.optim.Optimizer] | None = None) -> str:
    """ "refused" or "equal" after three steps in float64."""
    trained, twin = small_nets(), small_nets()
    for one in (trained, twin):
        change(one)
        make = optimizers or (lambda parameters: torch.optim.Adam(parameters, 2e-3, betas=(0.5, 0.999)))
        one.optimizers = [make(net.double().parameters()) for net in (one.netG, one.netD)]
    try:
        step = trained.fused(SIZE, torch.float64)
    except InputError:
        return "refused"
    for A, B in batches(2, SIZE, torch.float64):
        expected, found = twin.reference(A, B), step(A, B)
        torch.testing.assert_close(torch.stack(tuple(found)), torch.stack(tuple(expected)), rtol=1e-10, atol=1e-10)
    return "equal"


def test_the_table_is_long():
    assert len(TABLE) >= 100
    assert set(TABLE) >= SERVED


@pytest.mark.parametrize("name", TABLE)
def test_a_changed_network_is_computed_or_refused(name: str):
    assert outcome(TABLE[name]) == "equal" or name not in SERVED


@pytest.mark.parametrize("kind", ["RAdam", "NAdam", "Adamax", "AdamW", "SGD", "RMSprop", "Adagrad", "Adadelta", "ASGD"])
def test_another_optimizer_is_refused(kind: str):
    assert outcome(lambda _: None, lambda parameters: getattr(torch.optim, kind)(parameters, 2e-3)) == "refused"


def test_the_unchanged_networks_are_computed():
    assert outcome(lambda _: None) == "equal"


LATER = {
    "slope": setting(nn.LeakyReLU, "netD", negative_slope=0.5),
    "padding mode": setting(nn.Conv2d, "netG", padding_mode="reflect"),
    "eps": setting(nn.BatchNorm2d, "netG", eps=0.5),
    "momentum": setting(nn.BatchNorm2d, "netD", momentum=0.5),
    "activation": lambda trained: _chain(trained.netD).__setitem__(1, nn.GELU()),
    "appended": append("netD", nn.Sigmoid()),
} | {name: first("netD", nn.BatchNorm2d, hook) for name, hook in HOOKS.items()}
OPTIONS = {"betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1, "amsgrad": True, "maximize": True}


@pytest.mark.parametrize("name", LATER)
def test_a_change_after_the_first_step_is_refused(name: str):
    trained = small_nets()
    step = trained.fused(SIZE, torch.float64)
    ((A, B),) = batches(1, SIZE, torch.float64, steps=1)
    step(A, B)
    LATER[name](trained)
    with pytest.raises(InputError, match="engine"):
        step(A, B)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_changed_later_is_refused(option: str):
    trained = small_nets()
    step = trained.fused(SIZE, torch.float64)
    ((A, B),) = batches(1, SIZE, torch.float64, steps=1)
    step(A, B)
    trained.optimizers[1].param_groups[0][option] = OPTIONS[option]
    with pytest.raises(InputError, match=f"the optimizer's {option} went from"):
        step(A, B)
