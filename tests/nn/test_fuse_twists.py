"""What is done to a model after fuse(model): the value is the unfused model's, or an InputError. Nothing else."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.comparing import DOUBLE, OperatorCalls, fuse_it, grads, images, small, total
from helpers.plain_models import ResNet
from torch import Tensor, nn
from torch.nn.utils import prune

from fastp2p.errors import InputError

Run = Callable[[nn.Module, Tensor], Tensor | list[Tensor]]


def plainly(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def setting(index: int, **values: object) -> tuple[Callable[[nn.Module], object], Run]:
    """Attributes of one layer, changed after fusing."""

    def twist(model: nn.Module) -> None:
        for name, value in values.items():
            setattr(model[index], name, value)

    return twist, plainly


def hooked(index: int, kind: str, hook: Callable[..., object]) -> tuple[Callable[[nn.Module], object], Run]:
    return lambda model: getattr(model[index], f"register_{kind}")(hook), plainly


def replaced(index: int, module: nn.Module) -> tuple[Callable[[nn.Module], object], Run]:
    return lambda model: model.__setitem__(index, copy.deepcopy(module).to(torch.get_default_device())), plainly


def run(piece: Run) -> tuple[Callable[[nn.Module], object], Run]:
    """Another way to call the parts."""
    return lambda model: None, piece


def nothing(model: nn.Module) -> None: ...


@torch.no_grad()
def average(model: nn.Module) -> None:
    """An exponential moving average as it is mostly written; the result before it must not stay."""
    model(images())
    for p in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
        p.data.mul_(0.9).add_(torch.full_like(p, 0.05), alpha=0.1)


def one_by_one(model: nn.Module, x: Tensor) -> list[Tensor]:
    results = []
    for layer in model.children():
        x = layer(x)
        results.append(x)
    return results


def with_results_kept(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Forward hooks that are there during one call."""
    kept: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda _, args, out: kept.append(out)) for layer in model]
    model(x)
    for handle in handles:
        handle.remove()
    return kept


def with_global_hook(model: nn.Module, x: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []
    handle = nn.modules.module.register_module_forward_hook(lambda _, args, out: kept.append(out))
    try:
        model(x)
    finally:
        handle.remove()
    return kept


def after_an_error(model: nn.Module, x: Tensor) -> Tensor:
    """A part alone, when the whole has failed halfway."""
    handle = model[4].register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    handle.remove()
    return model[:2](x)


def frozen_with_batch_statistics(model: nn.Module) -> None:
    for norm in (model[1], model[5]):
        norm.running_mean = norm.running_var = None


def swap(model: nn.Module) -> None:
    model[1], model[2] = model[2], model[1]


EQUAL = {
    "dilation": setting(0, dilation=(2, 2)),
    "dilation of the transposed": setting(4, dilation=(2, 2)),
    "circular padding": setting(0, padding_mode="circular", _reversed_padding_repeated_twice=[1, 1, 1, 1]),
    "reflection": setting(0, padding_mode="reflect", _reversed_padding_repeated_twice=[1, 1, 1, 1]),
    "stride": setting(0, stride=(1, 1)),
    "oblong stride": setting(0, stride=(1, 2)),
    "stride as a number": setting(0, stride=2),
    "padding": setting(7, padding=(2, 2)),
    "oblong padding": setting(0, padding=(1, 0)),
    "padding by name": setting(7, padding="same"),
    "output padding": setting(4, output_padding=(0, 0)),
    "no bias": setting(0, bias=None),
    "momentum": setting(1, momentum=0.9),
    "cumulative average": setting(1, momentum=None),
    "eps": setting(5, eps=0.5),
    "no affine": setting(1, weight=None, bias=None),
    "half an affine": setting(1, bias=None),
    "statistics of the batch": setting(1, track_running_stats=False),
    "no statistics": (frozen_with_batch_statistics, plainly),
    "instance norm with statistics": (
        lambda m: (
            m[8].register_buffer("running_mean", torch.zeros(2).double()),
            m[8].register_buffer("running_var", torch.ones(2).double()),
            setattr(m[8], "track_running_stats", True),
        ),
        plainly,
    ),
    "slope": setting(2, negative_slope=0.01),
    "negative slope": setting(2, negative_slope=-0.5),
    "slope without end": setting(2, negative_slope=float("inf")),
    "number of features": setting(1, num_features=7),
    "slope in place": setting(2, inplace=True),
    "everything dropped": setting(3, p=1.0),
    "norm in eval mode": (lambda m: m[1].eval(), plainly),
    "norm in training mode": (lambda m: m.eval()[5].train(), plainly),
    "forward of a member": (lambda m: setattr(m[2], "forward", F.silu), plainly),
    "weight norm": (lambda m: nn.utils.parametrizations.weight_norm(m[0]), plainly),
    "spectral norm of old": (lambda m: nn.utils.weight_norm(m[4]), plainly),
    "pruned": (lambda m: prune.l1_unstructured(m[0], "bias", amount=2), plainly),
    "forward hook on the convolution": hooked(0, "forward_hook", lambda _, args, out: out * 2),
    "forward hook on the norm": hooked(1, "forward_hook", lambda _, args, out: out * 2),
    "forward hook on the activation": hooked(6, "forward_hook", lambda _, args, out: out * 2),
    "pre-hook on the norm": hooked(5, "forward_pre_hook", lambda _, args: (args[0] + 1,)),
    "backward hook": hooked(1, "full_backward_hook", lambda _, grad_in, grad_out: (grad_in[0] * 2,)),
    "backward pre-hook": hooked(6, "full_backward_pre_hook", lambda _, grad_out: (grad_out[0] * 2,)),
    "hooks for one call": (nothing, with_results_kept),
    "a hook on all modules": (nothing, with_global_hook),
    "average through .data": (average, plainly),
    "one element through .data": (lambda m: m[0].weight.data[0, 0, 0, 0].fill_(3), plainly),
    "another convolution": replaced(0, nn.Conv2d(3, 4, 4, 2, 1).double()),
    "slice": run(lambda m, x: m[:2](x)),
    "slice of one": run(lambda m, x: m[:1](x)),
    "slice within": run(lambda m, x: m[5:8](m[:5](x))),
    "children": run(lambda m, x: nn.Sequential(*list(m.children())[:-1])(x)),
    "two members": run(lambda m, x: m[1](m[0](x))),
    "one member": run(lambda m, x: m[2](x)),
    "one by one": run(one_by_one),
    "members in another order": run(lambda m, x: m[1](m[2](m[0](x)))),
    "something between": run(lambda m, x: m[2](m[1](m[0](x) * 2))),
    "a result used twice": run(lambda m, x: (lambda y: y.mean((2, 3)) + m[1](y).mean((2, 3)))(m[0](x))),
    "members in place": run(lambda m, x: m[1](m[0](x).mul_(2))),
    "a convolution of another slice": run(lambda m, x: nn.Sequential(m[0], nn.SiLU())(x)),
    "forward called itself": run(lambda m, x: m.forward(x)),
    "copy of a slice": run(lambda m, x: copy.deepcopy(m[:2])(x)),
    "after an error": run(after_an_error),
    "the whole and a slice": run(lambda m, x: [m(x), m[:2](x), m(x), m[:6](x)]),
    "no batch": run(lambda m, x: m[:1](x[0])),
    "output_size": run(lambda m, x: m[4](m[:4](x), output_size=[7, 7])),
}
REFUSED = {
    "another norm": replaced(1, nn.GroupNorm(2, 4).double()),
    "another activation": replaced(2, nn.SiLU()),
    "nothing for the norm": replaced(1, nn.Identity()),
    "nothing at the end": replaced(9, nn.Identity()),
    "norm popped": (lambda m: m.pop(1), plainly),
    "activation popped": (lambda m: m.pop(2), plainly),
    "last popped": (lambda m: m.pop(9), plainly),
    "something inserted": (lambda m: m.insert(1, nn.Dropout2d()), plainly),
    "a convolution inserted": (lambda m: m.insert(1, nn.Conv2d(4, 4, 1).double()), plainly),
    "swapped": (swap, plainly),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", [*EQUAL, *REFUSED])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated", "ignore:Using padding='same'")
def test_equal_or_refused(name: str, training: bool):
    twist, piece = {**EQUAL, **REFUSED}[name]
    outcomes = []
    for model in (small(), fuse_it(small())):
        twist(model.train(training))
        outcomes.append(outcome(model, piece))
    if name in REFUSED:
        assert isinstance(outcomes[1], str)
        assert "call fastp2p.unfuse(model)" in outcomes[1]
    else:
        torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-9, atol=1e-9, equal_nan=True)


def outcome(model: nn.Module, piece: Run) -> object:
    """Outputs, gradients and buffers, once in autograd and once more without; or the InputError's text."""
    x = images().requires_grad_()
    try:
        output = piece(model, x)
        with torch.no_grad():
            again = piece(model, images())
    except InputError as error:
        return str(error)
    total(output).backward()
    return output, again, x.grad, grads(model), dict(model.named_buffers())


def test_the_whole_is_fused_and_a_part_is_not():
    fused = fuse_it(small())
    whole, part = (
        ["conv", "running_stats", "norm_act", "conv_transpose", "running_stats", "norm_act", "conv", "norm_act"],
        [],
    )
    for piece, expected in ((fused, whole), (fused[:9], part), (copy.deepcopy(fused), whole)):
        with OperatorCalls() as calls:
            piece(images())
        assert calls.names == expected


def test_groups():
    models = [nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    fuse_it(models[1])
    for model in models:
        model[0].groups, model[0].weight = 3, nn.Parameter(model[0].weight[:, :1].detach())
    torch.testing.assert_close(*(outcome(model, plainly) for model in models))


@pytest.mark.parametrize("change", [
    lambda m: setattr(m[1], "eps", 0.0),
    lambda m: setattr(m[3], "p", 1.5),
    lambda m: setattr(m[0], "stride", (0, 0)),
    lambda m: setattr(m[4], "output_padding", (2, 2)),
    lambda m: setattr(m[8], "num_features", 3),
    lambda m: m[1].float(),
    lambda m: setattr(m[0], "groups", 2),
    lambda m: setattr(m[5], "running_var", torch.ones(7).double()),
])  # fmt: skip
def test_where_pytorch_raises(change: Callable[[nn.Module], object]):
    for model in (small(), fuse_it(small())):
        change(model)
        with pytest.raises((ValueError, RuntimeError, InputError)):
            model(images())


class Chooser(nn.Module):
    """An attribute chooses the path."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.way = 0
        self.double()

    def forward(self, x: Tensor) -> Tensor | list[Tensor] | dict[str, Tensor]:
        y = self.conv(x)
        match self.way:
            case 1:
                return y
            case 2:
                return self.relu(y)
            case 3:
                return [self.bn(y)]
            case 4:
                return self.relu(self.bn(y)) + y
            case 5:
                return self.relu(self.bn(y.mul_(2)))
            case 6:
                return self.relu(self.bn(y)) + self.relu(self.bn(y))
            case 7:
                return self.relu(self.bn(torch.cat([y, y])))
            case 8:
                return self.relu(self.bn(1 - y))
            case 9:
                return self.conv(self.bn(y)[:, :3])
            case 10:
                return {"a": self.bn(y)}
            case 11:
                with torch.no_grad():
                    return self.relu(self.bn(y))
            case 12:
                return self.relu(self.bn(copy.deepcopy(y)))
            case 13:
                return self.relu(self.bn(y)) * y.shape[0]
            case 14:
                return torch.from_numpy(np.asarray(y))
            case 15:
                return nn.functional.interpolate(y, scale_factor=2)
            case 16:
                return self.relu(self.bn(y if y else x))
        return self.relu(self.bn(y))


@pytest.mark.parametrize("way", range(1, 17))
def test_a_path_chosen_by_an_attribute_afterwards(way: int):
    fused = fuse_it(Chooser())
    torch.testing.assert_close(fused(images()), Chooser()(images()))
    fused.way = way
    with pytest.raises(
        InputError, match=r"\): its result went elsewhere than when fastp2p.fuse saw conv \(Conv2d\) -> "
    ):
        fused(images())
    fused.way = 0
    assert fused(images()).shape == (2, 4, 6, 6)


def test_hook_on_a_container_within_the_chain():
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 3)),
            nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()),
            nn.Sequential(nn.Dropout(0.0)),
        ).double()

    for index in range(3):
        outcomes = []
        for model in (build(), fuse_it(build())):
            model[index].register_forward_hook(lambda _, args, out: out * 2 + 1)
            outcomes.append(outcome(model, plainly))
        torch.testing.assert_close(outcomes[1], outcomes[0])


def test_collecting_forward_that_looks_at_values():
    """It takes a Sequential to pieces only sometimes, so that no graph shows it."""

    class Collect(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.wanted = small(), True

        def forward(self, x: Tensor) -> list[Tensor]:
            if x.abs().max() > 1000:
                return [self.features(x)]
            return one_by_one(self.features, x)

    torch.testing.assert_close(outcome(fuse_it(Collect()), plainly), outcome(Collect(), plainly))


def test_feature_extractor_of_a_resnet():
    torch.manual_seed(0)
    model = ResNet().double()
    fused = fuse_it(copy.deepcopy(model))
    x = torch.randn(2, 3, 32, 32, dtype=DOUBLE)
    for n in range(1, 8):
        outputs = [nn.Sequential(*list(m.children())[:n])(x) for m in (model, fused)]
        torch.testing.assert_close(outputs[1], outputs[0])


def test_tracing_by_others_is_refused():
    """Their graphs would hold the path of a call in which nothing is fused, or fail within it."""
    with pytest.raises(InputError, match=r"torch.fx: got a fused model; call fastp2p.unfuse\(model\) first"):
        torch.fx.symbolic_trace(fuse_it(small()))


def test_threads_do_not_see_each_other():
    """A part that one thread calls while another is within the whole."""
    model = small().eval()
    fused = fuse_it(small().eval())
    results: list[Tensor] = []
    default = torch.get_default_device()

    def elsewhere(module: nn.Module, args: object) -> None:
        with ThreadPoolExecutor(1, initializer=torch.set_default_device, initargs=(default,)) as thread:
            results.append(thread.submit(lambda: fused[:2](images())).result())

    handle = fused[4].register_forward_pre_hook(elsewhere)
    torch.testing.assert_close(fused(images()), model(images()))
    handle.remove()
    torch.testing.assert_close(results, [model[:2](images())])
