"""The engine trains the network that it is given, or refuses it by name: there is no third outcome."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.nets import Trained, batches, outcome, small_nets
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


def narrow(module: nn.Module, name: str) -> None:
    """Its tensor in another dtype than the others."""
    tensor = getattr(module, name)
    setattr(module, name, nn.Parameter(tensor.float()) if isinstance(tensor, nn.Parameter) else tensor.float())


def without_affine(module: Any) -> nn.Module:
    return nn.BatchNorm2d(module.num_features, affine=False)


def bias_for(module: Any) -> nn.Parameter:
    return nn.Parameter(torch.ones_like(module.weight[:, 0, 0, 0]))


def own(name: str) -> Callable[[Any], None]:
    """The instance has its own method of this name, which does more."""

    def replace(module: Any) -> None:
        method = getattr(module, name)
        setattr(module, name, lambda *args: None if (y := method(*args)) is None else 2 * y)

    return replace


def beside(module: nn.Module) -> None:
    module.more = nn.Parameter(torch.ones(3))


def accumulated(module: Any) -> None:
    module.weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2))


def last_level_last(trained: Trained) -> None:
    chain = _chain(trained.netG)
    chain.append(chain.pop(1))


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
        for module in (nn.ReLU(), nn.LeakyReLU(0.2), nn.Tanh(), nn.Dropout(0.5)):
            yield f"{net}: {module} first", insert(net, 0, module)
        for slope in (0.0, math.nan, math.inf, True):
            yield f"{net}: slope {slope}", setting(nn.LeakyReLU, net, negative_slope=slope)
        for p in (0.0, 1.0, math.nan):
            yield f"{net}: dropout {p}", insert(net, 1 if net == "netG" else 4, nn.Dropout(p))
        for eps in (0.0, -1e-3, math.nan, math.inf):
            yield f"{net}: eps {eps}", setting(nn.BatchNorm2d, net, eps=eps)
        for momentum in (0.0, 1.0, 1.5, -0.5, math.nan):
            yield f"{net}: momentum {momentum}", setting(nn.BatchNorm2d, net, momentum=momentum)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            yield f"{net}: no {name} in a norm", setting(nn.BatchNorm2d, net, **{name: None})
            yield f"{net}: float32 {name} in a norm", first(net, nn.BatchNorm2d, lambda m, name=name: narrow(m, name))
        yield f"{net}: BatchNorm2d without affine", swap(nn.BatchNorm2d, without_affine, net)
        yield f"{net}: a bias before a norm", first(net, nn.Conv2d, lambda m: setattr(m, "bias", bias_for(m)))
        yield f"{net}: no bias", first(net, nn.Conv2d, lambda m: setattr(m, "bias", None))
        yield f"{net}: channels told wrongly", setting(nn.Conv2d, net, in_channels=99)
        yield f"{net}: in-place activations", setting(nn.LeakyReLU, net, inplace=True)
        yield f"{net}: own _conv_forward", first(net, nn.Conv2d, own("_conv_forward"))
        yield f"{net}: own _check_input_dim", first(net, nn.BatchNorm2d, own("_check_input_dim"))
        yield (
            f"{net}: a module beside",
            lambda trained, net=net: setattr(getattr(trained, net), "more", nn.Conv2d(1, 1, 1)),
        )
        yield f"{net}: a parameter beside", lambda trained, net=net: beside(getattr(trained, net))
        yield f"{net}: a conv's own parameter", first(net, nn.Conv2d, beside)
        yield f"{net}: a conv's own module", first(net, nn.Conv2d, lambda m: setattr(m, "more", nn.ReLU()))
        yield f"{net}: a hook on a weight", first(net, nn.Conv2d, lambda m: m.weight.register_hook(lambda g: 2 * g))
        yield f"{net}: a hook after a gradient", first(net, nn.Conv2d, accumulated)
        yield f"{net}: frozen", first(net, nn.Conv2d, lambda m: m.requires_grad_(False))
        yield f"{net}: fused", lambda trained, net=net: fastp2p.fuse(getattr(trained, net))
    yield "netD: a subclass", subclass
    yield "netG: more levels than it has", lambda trained: setattr(trained.netG, "levels", 5)
    yield "netG: fewer levels than it has", lambda trained: setattr(trained.netG, "levels", 3)
    yield "netG: an inner level as outermost", lambda trained: setattr(_chain(trained.netG)[1], "outermost", True)
    yield "netG: the outermost as an inner one", lambda trained: setattr(trained.netG.model, "outermost", False)
    yield "netG: a level after its convolutions", last_level_last
    yield "netD: one convolution twice", share
    yield "netG: one bias for two", tie


TABLE = dict(table())
SERVED = {  # what the engine computes, so that not everything is refused
    *("netG: ReLU -> ReLU", "netG: Tanh -> Tanh", "netG: LeakyReLU -> slope 0.3", "netD: LeakyReLU -> slope 0.3"),
    *("netD: LeakyReLU -> ReLU", "netG: eps", "netD: eps", "netG: momentum", "netD: momentum"),
    *("netD: BatchNorm2d -> instance", "netG: BatchNorm2d -> instance", "netD: then Identity()"),
    *("netG: in-place activations", "netD: in-place activations", "netG: slope 0.0", "netD: dropout 0.0"),
    *("netG: momentum 0.0", "netD: momentum 1.0", "netD: no bias", "netG: Identity() first"),
}


def test_the_table_is_long():
    assert len(TABLE) >= 100
    assert set(TABLE) >= SERVED


@pytest.mark.parametrize("name", TABLE)
def test_a_changed_network_is_computed_or_refused(name: str):
    assert outcome(TABLE[name]) == "equal" or name not in SERVED


def test_the_unchanged_networks_are_computed():
    assert outcome(lambda _: None) == "equal"


LATER: dict[str, Change] = {
    "slope": setting(nn.LeakyReLU, "netD", negative_slope=0.5),
    "padding mode": setting(nn.Conv2d, "netG", padding_mode="reflect"),
    "eps": setting(nn.BatchNorm2d, "netG", eps=0.5),
    "momentum": setting(nn.BatchNorm2d, "netD", momentum=0.5),
    "activation": lambda trained: _chain(trained.netD).__setitem__(1, nn.GELU()),
    "appended": append("netD", nn.Sigmoid()),
} | {name: first("netD", nn.BatchNorm2d, hook) for name, hook in HOOKS.items()}
LATER |= {
    f"{name} of a norm": first("netD", nn.BatchNorm2d, change)
    for name, change in {
        "float32 weight": lambda m: narrow(m, "weight"),
        "another average": lambda m: setattr(m, "running_mean", torch.ones_like(m.running_mean)),
        "no average": lambda m: setattr(m, "running_var", None),
        "a hook on the weight": lambda m: m.weight.register_hook(lambda g: 2 * g),
        "a frozen weight": lambda m: m.weight.requires_grad_(False),
        "another weight": lambda m: setattr(m, "weight", nn.Parameter(torch.ones_like(m.weight))),
        "weight data": lambda m: setattr(m.weight, "data", m.weight.detach().clone()),
        "a parameter beside": beside,
    }.items()
} | {
    f"{name} of a convolution": first("netD", nn.Conv2d, change)
    for name, change in {
        "own _conv_forward": own("_conv_forward"),
        "no bias": lambda m: setattr(m, "bias", None),
        "dilation": lambda m: setattr(m, "dilation", (2, 2)),
    }.items()
}


@pytest.mark.parametrize("name", LATER)
def test_a_change_after_the_first_step_is_refused(name: str):
    trained = small_nets()
    step = trained.fused(SIZE, torch.float64)
    ((A, B),) = batches(1, SIZE, torch.float64, steps=1)
    step(A, B)
    LATER[name](trained)
    with pytest.raises(InputError, match="engine"):
        step(A, B)


def test_hooks_for_all_modules_are_refused():
    """Also when they came after the step was made."""
    trained = small_nets()
    step = trained.fused(SIZE, torch.float64)
    ((A, B),) = batches(1, SIZE, torch.float64, steps=1)
    hook = nn.modules.module.register_module_forward_hook(lambda module, x, y: None)
    try:
        with pytest.raises(InputError, match="a hook is registered for all modules"):
            step(A, B)
        with pytest.raises(InputError, match="a hook is registered for all modules"):
            small_nets().fused(SIZE, torch.float64)
    finally:
        hook.remove()
    step(A, B)


def test_the_error_names_the_module_and_the_way_out():
    trained = small_nets()
    _chain(trained.netD)[1] = nn.GELU()
    with pytest.raises(
        InputError,
        match=r"engine: model\.1: GELU.* is not among .*--engine layers, on fused layers, or --engine reference",
    ):
        trained.fused(SIZE, torch.float64)
    trained = small_nets()
    _chain(trained.netG).append(nn.Tanh())
    with pytest.raises(InputError, match=r"engine: model\.model\.5: Tanh\(\) comes after another activation"):
        trained.fused(SIZE, torch.float64)
