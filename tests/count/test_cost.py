"""The counted step is the step that runs: its calls, their bytes by hand, and its FLOPs as PyTorch counts them."""

import dataclasses
from typing import Any

import pytest
import torch
from helpers.nets import Trained, small_nets
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastp2p.conv_shape import CONVOLUTIONS
from fastp2p.count.ceilings import H200, Ceilings
from fastp2p.count.cost import Cost, Sum, count_step, step_floor
from fastp2p.data import Crops
from fastp2p.engine.plan import Layer
from fastp2p.engine.ranges import part
from fastp2p.engine.record import Call
from fastp2p.models.gan_losses import GANLoss
from fastp2p.models.pix2pix.networks import PatchDiscriminator, PixelDiscriminator, UnetGenerator
from fastp2p.models.pix2pix.reference import train_step
from fastp2p.models.pix2pix.step import FusedStep
from fastp2p.nn.init import count_parameters
from fastp2p.nn.norm import SampleNorm2d, take_statistics_of_samples
from fastp2p.ops.operands import Operand, Traffic


class Calls(TorchDispatchMode):
    """The operators that a step calls where it runs: the part of the step, and the shapes of what they get and give."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, ...]] = []
        self.part = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition("::")
        if name.startswith("_record_function_enter"):
            self.part = args[0]
        if namespace == "fastp2p":
            results = () if result is None else (result,) if isinstance(result, Tensor) else result
            tensors = [t for t in (*args, *results) if isinstance(t, Tensor) and t.dtype != torch.uint8]
            self.found.append((self.part, name, [(tuple(t.shape), t.stride(), t.dtype) for t in tensors]))
        return result


def run(step: FusedStep, n: int) -> Calls:
    """One step on n crops of random pairs."""
    device, side = step.rng.device, step.size[0]
    pairs = torch.zeros(2, side + 3, side + 5, sum(step.channels), dtype=torch.uint8, device=device)
    index, offset = torch.zeros(n, dtype=torch.int64, device=device), torch.ones(n, 2, dtype=torch.int64, device=device)
    crops = Crops(pairs, index, offset, torch.ones(n, dtype=torch.bool, device=device), side, step.channels[0])
    with Calls() as calls:
        with part("augment"):
            real_A, real_B = crops.cut(device, step.image_dtypes).values()
        step(real_A, real_B)
    return calls


def shapes_of(call: Call) -> list[tuple[Any, ...]]:
    operands = [o for o in (*call.args.values(), *call.results) if isinstance(o, Operand) and o.dtype != torch.uint8]
    return [(o.shape, o.strides, o.dtype) for o in operands]


def assert_counted(step: FusedStep, n: int) -> list[Cost]:
    """The record is what then runs, call by call; every call's bytes and FLOPs are those counted by hand."""
    costs = count_step(step, n)
    recorded = [(cost.call.part, cost.call.operator, shapes_of(cost.call)) for cost in costs]
    for call, found in zip(recorded, run(step, n).found, strict=True):
        assert call == found
    for cost in costs:
        assert (cost.flop, cost.traffic) == by_hand(step, n, cost.call), cost.call.name
    return costs


def groups_of(norm: nn.Module | None, images: int, batches: int) -> int:
    return images if isinstance(norm, nn.InstanceNorm2d | SampleNorm2d) else batches


def by_hand(step: FusedStep, n: int, call: Call) -> tuple[int, Traffic]:
    """What a call costs, counted from the plan's layers and the direction alone."""
    low, wide = step.dtype.itemsize, torch.promote_types(step.dtype, torch.float32).itemsize
    rounded = 0 if low == wide else low
    if call.operator == "augment":  # from bytes to A's dtype and float32; index, offset and flip of each image
        return 0, Traffic(
            maps=n * step.size[0] * step.size[1] * (step.channels[0] * (1 + low) + step.channels[1] * 5), vectors=n * 25
        )
    if call.operator == "advance":  # steps and counters read and written, two powers for two betas, a first each
        arenas = step.arenas.values()
        steps = sum(len(arena.parameters) for arena in arenas)
        counters = 2 + sum(isinstance(m, nn.BatchNorm2d) for net in step.nets for m in net.modules())
        return 0, Traffic(vectors=8 * steps + len(arenas) * (2 * 16 + 8) + (2 + 2) * 8 * counters)
    assert call.net is not None
    net = step.networks[call.net]
    if call.operator == "adam":
        rest, weights = net.arena.param.numel() - net.arena.weights_end, net.arena.weights_end
        of_weights = call.direction == "Adam"
        unscales = 4 if step.loss_scale is not None else 0
        per_element = 7 * wide + (rounded if of_weights else 0)
        return 0, Traffic(adam=(weights if of_weights else rest) * per_element, vectors=wide + 16 + unscales)
    images = n if call.net == "netG" or call.part == "netD forward and backward for netG" else 2 * n
    if call.operator == "stack_pairs":  # three images read, real_B in float32, and A written twice
        (A, B), pixels = step.channels, n * step.size[0] * step.size[1]
        return 0, Traffic(maps=pixels * (3 * A * low + 3 * B * low + 4 * B))
    if call.operator == "patch_loss":
        scale = 4 if step.loss_scale is not None else 0
        if call.net == "netG":  # beside real_B, in float32, and the gradient that comes from D
            elements = n * step.channels[1] * step.size[0] * step.size[1]
            return 0, Traffic(maps=elements * (3 * low + 4), vectors=wide * (1 + step.channels[1]) + scale)
        last = net.plan.layers[-1]
        results = 1 if images == n else 3  # two losses, and the sum over the one channel
        return 0, Traffic(maps=images * last.out_size[0] * last.out_size[1] * 2 * low, vectors=results * wide + scale)
    number, layer = next((i, one) for i, one in enumerate(net.plan.layers) if one.name == call.layer)
    groups = groups_of(layer.norm, images, images // n)
    pixels_in, pixels_out = (images * height * width for height, width in (layer.in_size, layer.out_size))
    before, after, channels = pixels_in * layer.in_channels, pixels_out * layer.out_channels, layer.out_channels
    weight = layer.in_channels * layer.out_channels * layer.taps.count**2
    flop, crosses = 2 * layer.macs(images), layer.second is not None
    affine = layer.norm is not None and layer.norm.weight is not None
    vectors = 2 * ((groups if layer.norm is not None else 1) + affine) * channels * wide + (16 if layer.dropout else 0)
    match call.direction:
        case "forward":
            made = (layer.conv.bias is not None) + (2 * groups if layer.norm is not None else 0)
            return flop, Traffic((before + after) * low, weight * low, vectors=made * channels * wide)
        case "norm and activation":
            moved = 4 if isinstance(layer.norm, nn.BatchNorm2d) else 0  # two averages, read and written
            return 0, Traffic((2 + crosses) * after * low, vectors=vectors + moved * channels * wide)
        case "norm, backward":  # dz and x, two statistics and two sums of each group, and the norm's weight
            return 0, Traffic(3 * after * low, vectors=(4 * groups + affine + 2) * channels * wide)
        case "bias gradient":
            return 0, Traffic(after * low, vectors=2 * channels * wide)
        case "weight gradient":
            return flop, Traffic((before + after) * low, adam=weight * wide)
        case "weight gradient and Adam":
            return flop, Traffic((before + after) * low, adam=weight * (6 * wide + rounded), vectors=wide + 16)
        case "data gradient" if number == 0:  # to fake_B alone, and through its tanh
            share = step.channels[1] / layer.in_channels
            maps = after + 2 * round(before * share)
            return round(flop * share), Traffic(maps * low, round(weight * share) * low)
        case "data gradient" if (
            isinstance(last := net.plan.nodes[layer.sources[-1].node], Layer) and not last.activation_in_conv
        ):  # and on to before the norm and the activation there
            normed, scaled = last.norm is not None, last.norm is not None and last.norm.weight is not None
            given = groups_of(last.norm, images, images // n) if normed else 1
            trains = call.part.endswith("Adam") and last.trains_bias
            made = given if normed else int(trains)
            vectors = 2 * (given + scaled + made) * last.out_channels * wide + (16 if last.dropout else 0)
            maps = before + after + pixels_in * last.out_channels * (1 + (last.second is not None))
            return flop, Traffic(maps * low, weight * low, vectors=vectors)
        case "data gradient":
            last = net.plan.layers[number - 1]
            gate = before if last.activation_in_conv and last.activation else 0
            sums = call.part.endswith("Adam") and last.activation_in_conv and last.trains_bias
            return flop, Traffic(
                (before + after + gate) * low, weight * low, vectors=4 * sums * layer.in_channels * wide
            )
    raise AssertionError(call)


def paper_s(device: str = "meta", **options: Any) -> FusedStep:
    """unet_256 and the 70x70 PatchGAN at 256 px; on the meta device nothing is computed, and nothing is slow."""
    with torch.device(device):
        nets = Trained(UnetGenerator(), PatchDiscriminator())
        return nets.fused((256, 256), options.pop("dtype", torch.bfloat16), **options)


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_calls_and_bytes_are_those_of_a_step(norm: str, dtype: torch.dtype):
    """Padded by G, with dropout, dead taps left out but for float16, which gathers its gradients."""
    nets = small_nets(levels=4, norm=norm, dropout="upstream", n_layers=2, dtype=torch.float32)
    assert_counted(nets.fused((20, 20), dtype), 2)


@pytest.mark.parametrize("options", [{}, {"skip_dead_taps": False}, {"reduce": lambda grad: None}])
def test_with_dead_taps_and_with_gathered_gradients(options: dict[str, Any]):
    for dtype in (torch.bfloat16, torch.float64):
        wide = torch.promote_types(dtype, torch.float32)
        costs = assert_counted(small_nets(dtype=wide).fused((16, 16), dtype, **options), 1)
        operators = {cost.call.operator for cost in costs}
        assert ("conv_wgrad" in operators) == ("reduce" in options)
        assert ("conv_wgrad_adam" in operators) == ("reduce" not in options)


def test_other_discriminators_and_statistics_of_samples():
    netG, netD = UnetGenerator(1, 2, levels=3, ngf=4), PixelDiscriminator(3, ndf=4)
    assert_counted(Trained(netG, netD).fused((16, 16), torch.bfloat16), 2)
    nets = small_nets(levels=4, dtype=torch.float32)
    for net in (nets.netG, nets.netD):
        take_statistics_of_samples(net)
    costs = assert_counted(Trained(nets.netG, nets.netD).fused((32, 32), torch.float32), 3)
    groups = {cost.call.args["mean"].shape[0] for cost in costs if cost.call.operator == "batch_norm_act"}
    assert groups == {3, 6}


def test_the_paper_s_step():
    assert len(assert_counted(paper_s(), 4)) == 118


@pytest.mark.parametrize("paper", [False, True])
def test_flops_are_those_of_pytorch_s_counter(paper: bool):
    """But for one thing: of D's first layer autograd computes the gradient to real_A as well, which nobody reads."""
    n, size = (1, 256) if paper else (3, 32)
    with torch.device("meta"):
        netG = UnetGenerator() if paper else UnetGenerator(levels=4, ngf=4)
        netD = PatchDiscriminator() if paper else PatchDiscriminator(ndf=4, n_layers=2)
        nets = Trained(netG, netD)
    optimizers = [torch.optim.SGD(net.parameters()) for net in (netG, netD)]
    with FlopCounterMode(display=False) as counter:
        images = torch.empty(2, n, 3, size, size, device="meta")
        train_step(netG, netD, *optimizers, *images, gan_loss=GANLoss(), lambda_L1=100.0)
    by_pytorch = counter.get_total_flops()
    step = nets.fused((size, size), torch.bfloat16, skip_dead_taps=False)
    counted = sum(cost.flop for cost in count_step(step, n))
    assert counted + 2 * step.netD.plan.layers[0].macs(n) * 3 // 6 == by_pytorch
    if paper:
        assert (round(counted / 1e9, 2), round(by_pytorch / 1e9, 2)) == (86.84, 86.94)


def test_the_design_s_table():
    """Floors in ms on an H200, as worked out before there was an engine, to the digits that they were given in."""
    step = paper_s()
    for n, arithmetic in ((1, 0.110), (4, 0.440), (16, 1.76), (64, 7.04)):
        floor = step_floor(count_step(step, n), H200)
        # All taps are counted in the table; the 24 dead ones of 32 in e8 and d8 are half a thousandth of the work
        whole = step_floor(count_step(paper_s(skip_dead_taps=False), n), H200)
        assert whole.arithmetic * 1e3 == pytest.approx(arithmetic, abs=0.0005 if n < 16 else 0.005)
        assert 0.9994 < floor.arithmetic / whole.arithmetic < 1

        assert floor.weights * 1e3 == pytest.approx(0.047, abs=0.0005)
        assert floor.adam * 1e3 == pytest.approx(0.308, abs=0.0005)  # at every batch size, in the weight gradient

    # 144 MB an image, where e1's data gradient, that nobody asks for, is counted
    e1 = 2 * (64 * 128**2 + 3 * 256**2)
    for n, maps in ((4, 0.134), (16, 0.536), (64, 2.14)):
        floor = step_floor(count_step(step, n), H200)
        in_table = floor.maps + n * e1 / H200.bytes_per_sec
        assert in_table * 1e3 == pytest.approx(maps, abs=0.0005 if n < 64 else 0.005)

    # From batch size 4 on the table has an Adam apart, its gradients among the weights: as the engine has for `reduce`
    apart = step_floor(count_step(paper_s(reduce=lambda grad: None), 4), H200)
    parameters = count_parameters(step.nets[0]) + count_parameters(step.nets[1])
    gradients = 4 * parameters / H200.bytes_per_sec
    assert (floor.weights + gradients) * 1e3 == pytest.approx(0.101, abs=0.0005)
    assert (apart.adam - gradients) * 1e3 == pytest.approx(0.399, abs=0.0005)


def test_adam_s_bytes():
    """26 for each live weight; the rest's gradients are read too; apart, gradients are written and read."""
    step = paper_s()
    live = sum(weight.param.numel() for net in (step.netG, step.netD) for weight in net.arena.weights.values())
    rest = sum(net.arena.param.numel() - net.arena.weights_end for net in (step.netG, step.netD))
    total = sum(count_parameters(net) for net in step.nets)
    assert live + rest == total - 24 * 512**2
    assert sum(cost.traffic.adam for cost in count_step(step, 7)) == 26 * live + 28 * rest
    apart = count_step(paper_s(reduce=lambda grad: None), 7)
    assert sum(cost.traffic.adam for cost in apart) == 34 * (total - rest) + 28 * rest


def test_floors_by_hand():
    ceilings = Ceilings("slow", flop_per_sec=1e3, bytes_per_sec=1e2)
    costs = count_step(small_nets(dtype=torch.float32).fused((16, 16), torch.float32), 1)
    convolution = next(cost for cost in costs if cost.call.operator == "conv")
    made_up = dataclasses.replace(convolution, flop=5_000, traffic=Traffic(maps=300, weights=200, adam=40, vectors=10))
    assert made_up.floor(ceilings) == 5.5
    total = Sum.of([made_up, dataclasses.replace(made_up, flop=7_000)], ceilings)
    assert total == Sum(2, 12_000, Traffic(600, 400, 80, 20), floor=5.5 + 7, bound_by="arithmetic")
    assert Sum.of([made_up], ceilings).bound_by == "bytes"
    norm = next(cost for cost in costs if cost.call.operator == "norm_act")
    again = dataclasses.replace(made_up, call=dataclasses.replace(made_up.call, images=2))
    floor = step_floor([made_up, norm, again], ceilings)  # the norm is not in it, the weight is read once
    assert (floor.arithmetic, floor.maps, floor.weights, floor.adam) == pytest.approx((10, 6, 2, 0.8))
    assert (floor.overlapped, floor.in_turn) == pytest.approx((10, 18.8))


def test_names():
    costs = count_step(small_nets(dtype=torch.float32).fused((16, 16), torch.float32), 1)
    names = [cost.call.name for cost in costs]
    assert names[:3] == ["augment", "counts", "netG e1 forward"]
    assert "netG d3 norm, backward" in names
    assert "netG e4 weight gradient and Adam" in names
    assert names[-1] == "netG Adam of the rest"
    assert all(cost.flop > 0 for cost in costs if cost.call.operator in CONVOLUTIONS)
