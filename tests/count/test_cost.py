"""The counted step is the step that runs: its calls, their bytes, and its FLOPs as PyTorch counts them."""

import dataclasses
from typing import Any

import pytest
import torch
from helpers.nets import Trained, small_nets
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastp2p.count.ceilings import H200, Ceilings
from fastp2p.count.cost import Cost, Sum, Traffic, count_step, step_floor
from fastp2p.data import Crops
from fastp2p.engine.ranges import part
from fastp2p.models.gan_losses import GANLoss
from fastp2p.models.pix2pix.calls import CONVOLUTIONS
from fastp2p.models.pix2pix.networks import PatchDiscriminator, PixelDiscriminator, UnetGenerator
from fastp2p.models.pix2pix.reference import train_step
from fastp2p.models.pix2pix.step import FusedStep
from fastp2p.nn.init import count_parameters
from fastp2p.nn.norm import take_statistics_of_samples

KINDS = {  # of an operator's arguments; what is not here is a vector
    "maps": ("x", "x2", "gate", "outer", "outer2", "inner", "dy", "dy2", "target"),
    "weights": ("weight",),
    "adam": ("param", "grad", "exp_avg", "exp_avg_sq", "low_precision"),
}


class Calls(TorchDispatchMode):
    """The operators that are called: their part of the step, and the bytes of what they get and give."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str, Traffic]] = []
        self.part = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition("::")
        if name.startswith("_record_function_enter"):
            self.part = args[0]
        if namespace == "fastp2p":
            self.found.append((self.part, name, traffic_of(name, func._schema.arguments, args, result)))
        return result


def traffic_of(operator: str, arguments: Any, args: tuple[Any, ...], result: Any) -> Traffic:
    """Each distinct tensor once; twice where it is read and written."""
    bytes_of = dict.fromkeys(("maps", "weights", "adam", "vectors"), 0)
    results = () if result is None else (result,) if isinstance(result, Tensor) else result
    named = [(a.name, a.alias_info is not None, arg) for a, arg in zip(arguments, args, strict=False)]
    tensors = [(name, changed, t) for name, changed, t in named if isinstance(t, Tensor)]
    assert len({id(t) for _, _, t in tensors}) == len(tensors)
    for name, changed, t in tensors:
        if name == "pairs":  # of the resident pairs only the crops are read, as many values as the results have
            bytes_of["maps"] += sum(r.numel() for r in results)
            continue
        kind = next((kind for kind, names in KINDS.items() if name in names), "vectors")
        kind = "vectors" if operator.startswith("norm_act") and kind == "weights" else kind
        twice = changed and name != "low_precision"  # the compute weight is written, but not read
        bytes_of[kind] += t.nbytes * (1 + twice)
    for t in results:
        kind = "adam" if operator == "conv_wgrad" else "maps" if t.ndim == 4 or operator == "norm_act" else "vectors"
        bytes_of[kind] += t.nbytes
    return Traffic(**bytes_of)


def run(step: FusedStep, n: int) -> Calls:
    """One step on n crops of random pairs."""
    device, side = step.rng.device, step.size[0]
    pairs = torch.zeros(2, side + 3, side + 5, sum(step.channels), dtype=torch.uint8, device=device)
    index, offset = torch.zeros(n, dtype=torch.int64, device=device), torch.ones(n, 2, dtype=torch.int64, device=device)
    crops = Crops(pairs, index, offset, torch.ones(n, dtype=torch.bool, device=device), side, step.channels[0])
    with Calls() as calls:
        with part("augment"):
            real_A, real_B = crops.cut(device).values()
        if device.type == "meta":  # which autocast does not know
            step._step(real_A, real_B)
        else:
            step(real_A, real_B)
    return calls


def assert_counted(step: FusedStep, n: int) -> list[Cost]:
    costs = count_step(step, n)
    counted = [(cost.call.part, cost.call.operator, cost.traffic) for cost in costs]
    found = run(step, n).found
    assert [call[:2] for call in counted] == [call[:2] for call in found]
    for cost, call, recorded in zip(costs, counted, found, strict=True):
        assert call == recorded, cost.call.name
    return costs


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
    assert {cost.call.stat_groups for cost in costs if cost.call.operator == "running_stats"} == {3, 6}


def test_the_paper_s_step():
    assert len(assert_counted(paper_s(), 4)) == 139


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
    live = sum(weight.param.numel() for net in (step.netG, step.netD) for weight in net.arena.weights)
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
    by_hand = dataclasses.replace(convolution, flop=5_000, traffic=Traffic(maps=300, weights=200, adam=40, vectors=10))
    assert by_hand.floor(ceilings) == 5.5
    total = Sum.of([by_hand, dataclasses.replace(by_hand, flop=7_000)], ceilings)
    assert total == Sum(2, 12_000, Traffic(600, 400, 80, 20), floor=5.5 + 7, bound_by="arithmetic")
    assert Sum.of([by_hand], ceilings).bound_by == "bytes"
    norm = next(cost for cost in costs if cost.call.operator == "norm_act")
    again = dataclasses.replace(by_hand, call=dataclasses.replace(by_hand.call, images=2))
    floor = step_floor([by_hand, norm, again], ceilings)  # the norm is not in it, the weight is read once
    assert (floor.arithmetic, floor.maps, floor.weights, floor.adam) == pytest.approx((10, 6, 2, 0.8))
    assert (floor.overlapped, floor.in_turn) == pytest.approx((10, 18.8))


def test_names():
    costs = count_step(small_nets(dtype=torch.float32).fused((16, 16), torch.float32), 1)
    names = [cost.call.name for cost in costs]
    assert names[:2] == ["augment", "netG e1 forward"]
    assert "netG d3 norm and activation, backward" in names
    assert "netG e4 weight gradient and Adam" in names
    assert names[-1] == "netG Adam of the rest"
    assert all(cost.flop > 0 for cost in costs if cost.call.operator in CONVOLUTIONS)
