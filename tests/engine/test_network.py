"""A planned network of any shape is the autograd network in float64: outputs, gradients, averages, Adam steps."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.on_device import generator
from torch import Tensor, nn

from fastp2p.engine.arena import Arena
from fastp2p.engine.network import FusedNetwork
from fastp2p.engine.operation import LEAKY_RELU, NONE, RELU, TANH
from fastp2p.engine.plan import plan_network
from fastp2p.errors import InputError
from fastp2p.models.pix2pix.networks import PatchDiscriminator, UnetGenerator

SIZE = (16, 24)
LR = 2e-3

# Both sides sum the same products in float64, in another order: 2^-53 a term, some thousand terms, a few layers.
VALUE = {"rtol": 1e-10, "atol": 1e-12}
# Autograd gives a bias before a norm rounding noise for a gradient, which Adam weighs against eps; the engine gives 0.
SMALL = 1e-3  # the size of the outputs' gradients


class Residual(nn.Module):
    """CycleGAN's block."""

    def __init__(self, channels: int, *, in_place: bool):
        super().__init__()
        norms = [nn.InstanceNorm2d(channels) for _ in range(2)]
        self.block = nn.Sequential(
            *(nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), norms[0], nn.ReLU(in_place)),
            *(nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), norms[1]),
        )
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        if self.in_place:
            y += x
            return y
        return x + y


def resnet(channels: int = 3, *, in_place: bool = True) -> nn.Module:
    """CycleGAN's generator, small."""
    return nn.Sequential(
        *(nn.ReflectionPad2d(3), nn.Conv2d(channels, 4, 7), nn.InstanceNorm2d(4), nn.ReLU(in_place)),
        *(nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(in_place)),
        *(Residual(8, in_place=in_place), Residual(8, in_place=in_place)),
        *(nn.ConvTranspose2d(8, 4, 3, 2, 1, output_padding=1), nn.InstanceNorm2d(4), nn.ReLU(in_place)),
        *(nn.ReflectionPad2d(3), nn.Conv2d(4, 3, 7), nn.Tanh()),
    )


class Features(nn.Module):
    """pix2pixHD's discriminator: the result of each layer, of the image and of its half."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ModuleList(PatchDiscriminator(3, ndf=4, n_layers=1) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for net in self.scales:
            y = x
            for module in net.model:
                y = module(y)
                if isinstance(module, nn.LeakyReLU):
                    found.append(y)
            found.append(y)
            x = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
        return found


class TwoScales(nn.Module):
    """pix2pixHD's local enhancer: features of the half image are added to those of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.large = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
        self.last = nn.Sequential(Residual(8, in_place=False), nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.last(self.small(self.pool(x)) + self.large(x)))


class Dense(nn.Module):
    """Concatenations that are read by convolutions of both kinds, by an addition and twice."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(n, 4, 3, 1, 1) for n in (3, 7, 8))
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(8, 5, 4, 2, 1)
        self.three = nn.ConvTranspose2d(11, 5, 4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.convs[0](x)
        b = F.leaky_relu(self.convs[1](torch.cat([x, a], 1)), 0.2)
        both = torch.cat((a, b), dim=1)
        c = torch.relu(self.norm(self.convs[2](both)))
        return self.up(torch.relu(both)) + self.three(torch.cat([a, x, c], 1)), torch.relu(F.leaky_relu(c, 0.2))


class Copies(nn.Module):
    """Upsampling by 1 copies, so what is done in place afterwards does not reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        up = F.interpolate(y, scale_factor=1)
        F.relu(y, inplace=True)
        return self.b(up + y)  # type: ignore[no-any-return]


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet": resnet,
    "resnet out of place": lambda: resnet(in_place=False),
    "features": Features,
    "two scales": TwoScales,
    "dense": Dense,
    "U-Net": lambda: UnetGenerator(levels=3, ngf=4),
    "a copy, then in place": lambda: Copies(),
    "one convolution": lambda: nn.Conv2d(3, 2, 3),
    "a transposed one": lambda: nn.Sequential(nn.ConvTranspose2d(3, 2, 3, 2, output_padding=1), nn.LeakyReLU(0.1)),
}


def of(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make().double()


def image(n: int = 2, channels: int = 3, seed: int = 1) -> Tensor:
    return torch.rand(n, channels, *SIZE, dtype=torch.float64, generator=generator(seed)) * 2 - 1


def engine(nets: Sequence[nn.Module], **options: Any) -> list[FusedNetwork]:
    """The networks in one arena."""
    optimizer = torch.optim.Adam([p for net in nets for p in net.parameters()], LR, (0.5, 0.999))
    plans = [plan_network(net, 3, SIZE, skip_dead_taps=not options) for net in nets]
    arena = Arena(nets, optimizer, plans, torch.float64, **options)
    arena.prepare()
    return [FusedNetwork(plan, arena, torch.tensor([0, 0])) for plan in plans]


def outputs_of(net: nn.Module, x: Tensor) -> list[Tensor]:
    y = net(x)
    return [y] if isinstance(y, Tensor) else list(y)


def seeds_of(net: FusedNetwork, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Gradients as `backward` takes them: before an activation that the convolution applies."""
    seeds = []
    for number, (y, dy) in enumerate(zip(outputs, gradients, strict=True)):
        layer = net.plan.output_layer(number)
        code, slope = (layer.activation, layer.slope) if layer is not None and layer.activation_in_conv else (NONE, 0.0)
        slopes = {
            NONE: 1.0,
            RELU: (y > 0).double(),
            LEAKY_RELU: torch.where(y > 0, torch.ones_like(y), slope),
            TANH: 1 - y * y,
        }
        seeds.append((dy * slopes[code]).contiguous(memory_format=torch.channels_last))
    return seeds


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    values = expected.state_dict()
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, values[name], **VALUE, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_a_step_is_autograd_s(name: str, gathers: bool):
    """Outputs, the input's gradient, and Adam's weights after two steps."""
    reference = of(NETS[name])
    twin = copy.deepcopy(reference)
    (net,) = engine([twin], **({"accumulates": True} if gathers else {}))
    optimizer = torch.optim.Adam(reference.parameters(), LR, (0.5, 0.999))
    for step in range(2):
        x = image(seed=step).requires_grad_()
        expected = outputs_of(reference, x)
        gradients = [SMALL * (torch.rand(y.shape, dtype=y.dtype, generator=generator(9)) - 0.3) for y in expected]
        optimizer.zero_grad()
        torch.autograd.backward(expected, gradients)
        optimizer.step()

        with torch.no_grad():
            kept = net.forward(channels_last(x.detach()))
            found = net.outputs(kept)
            for y, y_expected in zip(found, expected, strict=True):
                torch.testing.assert_close(y, y_expected, **VALUE)
            net.arena.begin()
            dx = net.backward(kept, *seeds_of(net, found, gradients), to_input=True)
            net.arena.finish()
        torch.testing.assert_close(dx, x.grad, **VALUE)
    # Adam divides by the gradient's size, so where one is near 0 its rounding shows as a part of lr
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[key], rtol=1e-7, atol=1e-9)


def test_taps_that_are_no_neighbours_are_all_kept():
    """182 convolutions among 4874 have taps that meet padding alone; in 14 the others are no block."""
    cases = [
        (make(2, 4, k, stride, padding), side)
        for make in (nn.Conv2d, nn.ConvTranspose2d)
        for k in range(1, 8) for stride in range(1, 4) for padding in range(4) for side in range(1, 6)
    ]  # fmt: skip
    for conv, side in cases:
        conv = conv.double()
        try:
            y = conv(torch.zeros(1, 2, side, side, dtype=torch.float64))
        except RuntimeError:
            continue  # no such size
        if y.numel() == 0:
            continue  # cuDNN refuses none
        layer = plan_network(conv, 2, (side, side)).layers[0]
        if layer.taps.are_all(layer.weight):
            continue
        x = torch.rand(1, 2, side, side, dtype=torch.float64, generator=generator(3))
        act = F.conv_transpose2d if isinstance(conv, nn.ConvTranspose2d) else F.conv2d
        found = act(x, layer.taps.select(conv.weight), conv.bias, layer.stride, layer.taps.padding)
        assert found.shape == y.shape
        torch.testing.assert_close(found, conv(x), **VALUE)


@pytest.mark.parametrize("n", [1, 2])
def test_two_generators_in_one_arena_that_each_run_twice(n: int):
    """A cycle, as CycleGAN's: gradients of one weight come from two places, and one Adam owns both networks."""
    references = [of(resnet, seed) for seed in (0, 1)]
    twins = copy.deepcopy(references)
    G_A, G_B = engine(twins, accumulates=True)
    optimizer = torch.optim.Adam([p for net in references for p in net.parameters()], LR, (0.5, 0.999))
    for step in range(3):
        A, B = image(n, seed=2 * step), image(n, seed=2 * step + 1)
        optimizer.zero_grad()
        losses = [((second(first(x)) - x) ** 2).mean() for first, second, x in (
            (*references, A), (*reversed(references), B))]  # fmt: skip
        sum(losses).backward()
        optimizer.step()
        with torch.no_grad():
            G_A.arena.begin()
            for first, second, x in ((G_A, G_B, A), (G_B, G_A, B)):
                kept = first.forward(channels_last(x))
                (fake,) = first.outputs(kept)
                kept_2 = second.forward(fake)
                (rec,) = second.outputs(kept_2)
                dfake = second.backward(kept_2, *seeds_of(second, [rec], [2 * (rec - x) / x.numel()]), to_input=True)
                assert dfake is not None
                first.backward(kept, *seeds_of(first, [fake], [dfake]))
            G_A.arena.finish()
    for twin, reference in zip(twins, references, strict=True):
        for key, value in twin.state_dict().items():
            torch.testing.assert_close(value, reference.state_dict()[key], rtol=1e-7, atol=1e-9)


def test_outputs_without_a_seed():
    """A discriminator's own step has no gradient for its features."""
    reference = of(Features)
    twin = copy.deepcopy(reference)
    (net,) = engine([twin])
    optimizer = torch.optim.Adam(reference.parameters(), LR, (0.5, 0.999))
    logits = [2, 5]
    expected = outputs_of(reference, image())
    sum(SMALL * expected[i].sum() for i in logits).backward()
    optimizer.step()
    with torch.no_grad():
        kept = net.forward(channels_last(image()))
        seeds = [torch.full_like(y, SMALL) if i in logits else None for i, y in enumerate(net.outputs(kept))]
        net.backward_and_adam(kept, *seeds)
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[key], rtol=1e-7, atol=1e-9)
    with torch.no_grad(), pytest.raises(InputError, match="no gradient comes to layer conv6"):
        net.backward_and_adam(net.forward(channels_last(image())), *seeds[:3], *[None] * 3)


class Calls(nn.Module):
    """A forward that does something with a convolution's result."""

    def __init__(self, act: Callable[[Any, Tensor], Any], **modules: nn.Module):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3, padding=1), act
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.act(self, self.conv(x))


def shared(self: Any, y: Tensor) -> Tensor:
    return torch.cat([y, self.conv(y[:, :3])], 1)


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "a product": (lambda self, y: 2 * y, r"the network: Calls calls rmul, which the engine does not compute"),
    "a method": (lambda self, y: y.flatten(1), r"asks a tensor for flatten, which the engine does not"),
    "a parameter": (lambda self, y: y + self.conv.bias, r"calls add with something else than two tensors"),
    "a number": (lambda self, y: y + 1, r"calls add with something else than two tensors of one shape"),
    "channels": (lambda self, y: self.conv(y), r"conv: Conv2d\(3, 4.* is called with 4 channels"),
    "a loop": (lambda self, y: y if y.sum() > 0 else -y, r"asks a tensor for sum, which"),
    "a part": (lambda self, y: y[..., 1:], r"calls getitem with .*; expected what takes the whole image"),
    "some channels": (lambda self, y: y[:, :2], r"calls getitem with .*; expected what takes the whole image"),
    "zeros around": (lambda self, y: F.pad(y, (1, 1, 1, 1)), r"calls pad with mode 'constant'"),
    "bilinear": (lambda self, y: F.interpolate(y, scale_factor=2.0, mode="bilinear"), r"with mode 'bilinear'"),
    "another dimension": (lambda self, y: torch.cat([y, y], 2), r"calls cat along another dimension"),
    "ceil_mode": (lambda self, y: F.avg_pool2d(y, 2, ceil_mode=True), r"calls avg_pool2d with ceil_mode"),
    "two after another": (lambda self, y: torch.tanh(F.relu(y)), r"comes after another activation"),
    "leaky after leaky": (lambda self, y: F.leaky_relu(F.leaky_relu(y)), r"comes after another activation"),
    "unread": (lambda self, y: (self.other(y), y)[1], r"other: Conv2d.* has a result that nothing reads"),
    "after an addition": (lambda self, y: F.relu(y + y), r"calls relu stands where no convolution is before it"),
    "three activations": (
        lambda self, y: F.relu(y) + torch.tanh(y) + F.leaky_relu(y),
        r"is a third activation of layer conv1's result",
    ),
    "two slopes": (lambda self, y: F.leaky_relu(y, 0.1) + F.leaky_relu(y, 0.2), r"or a second slope"),
    "a slope below 0": (lambda self, y: F.leaky_relu(y, -0.1), r"with a slope of -0\.1"),
    "no tensor": (lambda self, y: (y, 3), r"returns 3; expected tensors"),
    "an error": (lambda self, y: self.nothing(y), r"cannot be followed: AttributeError"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_planned_is_refused_by_name(name: str):
    act, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as caught:
        plan_network(Calls(act, **({"other": nn.Conv2d(4, 4, 1)} if name == "unread" else {})), 3, SIZE)
    assert "--engine layers" in str(caught.value)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Conv2d(4, 4, 1), r"more: Conv2d.* has parameters that no layer uses"),
        (nn.Linear(3, 3), r"more: Linear.* has parameters that no layer uses"),
    ],
)
def test_parameters_that_the_forward_does_not_reach_are_refused(module: nn.Module, message: str):
    with pytest.raises(InputError, match=message):
        plan_network(Calls(lambda self, y: y, more=module), 3, SIZE)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([nn.ELU()], r"0: ELU\(alpha=1\.0\) is not among Conv2d, "),
        ([nn.BatchNorm2d(3)], r"0: BatchNorm2d.* stands where it is not computed"),
        ([nn.Conv2d(3, 4, 1), nn.BatchNorm2d(5)], r"1: BatchNorm2d.* is called with 4 channels"),
        ([nn.Conv2d(3, 4, 1), nn.Dropout(0.5), nn.Tanh()], r"2: Tanh\(\) comes after dropout"),
        ([nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)], r"2: BatchNorm2d.* stands where it is not computed"),
        ([nn.Upsample(scale_factor=2, mode="bilinear")], r"0: Upsample.* with mode 'bilinear'"),
        ([nn.ReflectionPad2d(16)], r"0: ReflectionPad2d.* of an image of \(16, 24\); expected padding"),
        ([nn.Identity()], "the network returns its input"),
    ],
)
def test_modules_out_of_place_are_refused_by_name(modules: list[nn.Module], message: str):
    with pytest.raises(InputError, match=message):
        plan_network(nn.Sequential(*modules), 3, SIZE)


def test_a_module_that_is_called_twice_is_refused_where_it_has_parameters():
    conv, act = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()
    with pytest.raises(InputError, match=r"0: Conv2d.* is called twice"):
        plan_network(nn.Sequential(conv, act, conv), 3, SIZE)
    plan = plan_network(nn.Sequential(conv, act, copy.deepcopy(conv), act), 3, SIZE)
    assert [layer.activation for layer in plan.layers] == [RELU, RELU]
