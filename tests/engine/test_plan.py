"""The plan is the network: layers, sizes, readers, and the work counted as PyTorch counts it."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastp2p.count import plan_table
from fastp2p.engine import Plan
from fastp2p.engine.operation import LEAKY_RELU, NONE, RELU, TANH
from fastp2p.engine.plan import plan_network
from fastp2p.models.pix2pix.networks import PatchDiscriminator, PixelDiscriminator, UnetGenerator
from fastp2p.models.pix2pix.step import layer_names
from fastp2p.nn.init import count_parameters


def named(net: nn.Module, channels: int, size: tuple[int, int]) -> Plan:
    return plan_network(net, channels, size, names=layer_names(net))


def test_unet_256():
    plan = named(UnetGenerator(), 3, (256, 256))
    assert [layer.name for layer in plan.layers] == [
        *("e1", "e2", "e3", "e4", "e5", "e6", "e7", "e8"),
        *("d8", "d7", "d6", "d5", "d4", "d3", "d2", "d1"),
    ]
    layers = {layer.name: layer for layer in plan.layers}
    assert [layer.out_size[0] for layer in plan.layers] == [128, 64, 32, 16, 8, 4, 2, 1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert [layer.out_channels for layer in plan.layers][:8] == [64, 128, 256, 512, 512, 512, 512, 512]
    assert {name for name, layer in layers.items() if layer.norm is None} == {"e1", "e8", "d1"}
    assert {name for name, layer in layers.items() if layer.dropout} == {"d7", "d6", "d5"}
    skips = {name: layer.sources[0].node for name, layer in layers.items() if len(layer.sources) == 2}
    assert {name: plan.nodes[node].name for name, node in skips.items()} == {f"d{i}": f"e{i}" for i in range(1, 8)}
    for i in range(1, 8):  # one raw tensor for two readers: leaky down, relu across
        assert (layers[f"e{i}"].activation, layers[f"e{i}"].slope, layers[f"e{i}"].second) == (
            LEAKY_RELU,
            0.2,
            RELU,
        )
    for i in range(2, 9):
        assert (layers[f"d{i}"].activation, layers[f"d{i}"].second) == (RELU, None)
    assert (layers["e8"].activation, layers["d1"].activation) == (RELU, TANH)
    assert {name for name, layer in layers.items() if layer.activation_in_conv} == {"e8", "d1"}
    assert {name for name, layer in layers.items() if layer.trains_bias} == {"d1"}
    assert {name: layer.taps.count for name, layer in layers.items() if layer.taps.count != 4} == {"e8": 2, "d8": 2}


def test_patch_gan():
    plan = named(PatchDiscriminator(), 6, (256, 256))
    assert [(layer.name, layer.stride, *layer.out_size) for layer in plan.layers] == [
        *[("c1", 2, 128, 128), ("c2", 2, 64, 64), ("c3", 2, 32, 32), ("c4", 1, 31, 31), ("c5", 1, 30, 30)]
    ]
    assert [layer.activation for layer in plan.layers] == [LEAKY_RELU] * 4 + [NONE]
    assert [layer.activation_in_conv for layer in plan.layers] == [True, False, False, False, True]


@pytest.mark.parametrize("paper", [False, True])
def test_flops_are_those_of_pytorch_s_counter(paper: bool):
    """All taps counted, as PyTorch does; 6.05 and 3.20 GMAC for the paper's networks."""
    netG = UnetGenerator(levels=8 if paper else 5, ngf=64 if paper else 8, dropout="paper")
    netD = PatchDiscriminator(ndf=64 if paper else 8)
    nets = [(netG, 3), (netD, 6), (PixelDiscriminator(ndf=4), 6)]
    size = (256, 256) if paper else (32, 64)
    for net, channels in nets:
        with FlopCounterMode(display=False) as counter:
            net.to("meta")(torch.empty(3, channels, *size, device="meta"))
        assert 2 * plan_network(net, channels, size, skip_dead_taps=False).macs(3) == counter.get_total_flops()
    if paper:
        macs = [plan_network(net, channels, size, skip_dead_taps=False).macs() / 1e9 for net, channels in nets[:2]]
        assert macs == [pytest.approx(6.05, abs=0.005), pytest.approx(3.20, abs=0.005)]


def test_no_parameter_is_lost():
    nets = (UnetGenerator(levels=6, ngf=4, norm="instance"), PatchDiscriminator(ndf=4), PixelDiscriminator())
    for net, channels in zip(nets, (3, 6, 6), strict=True):
        plan = plan_network(net, channels, (64, 64))
        owners = [module for layer in plan.layers for module in (layer.conv, layer.norm) if module is not None]
        assert sum(count_parameters(module) for module in owners) == count_parameters(net)


def test_table_can_be_read():
    table = plan_table(named(UnetGenerator(), 3, (256, 256)), 1, torch.bfloat16)
    assert len(table.splitlines()) == 18
    assert "e8" in table
    assert "512→512 4x4 s2 (2x2 live)" in table
    assert "BatchNorm relu dropout 0.5" in table


def test_which_data_gradients_complete_what_comes_to_a_norm():
    """The encoder's, whose second results the decoder has read by then, and the decoder's, of the way from below."""
    G, D = named(UnetGenerator(), 3, (256, 256)), named(PatchDiscriminator(), 6, (256, 256))
    names = [node.name for node in G.nodes]
    found = {names[place]: (names[source.node], source.slot) for place, source in G.completes().items()}
    expected = {f"e{i}": (f"e{i - 1}", 0) for i in range(2, 9)} | {f"d{i}": (f"d{i + 1}", 0) for i in range(1, 8)}
    assert found == expected
    assert {D.nodes[place].name: source.node for place, source in D.completes().items()} == {"c3": 1, "c4": 2, "c5": 3}


class Block(nn.Module):
    """A convolution, norm and ReLU, whose result the readers read."""

    def __init__(self, *readers: str):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for reader in readers if reader == "conv")
        self.is_output = "output" in readers

    def forward(self, x: torch.Tensor) -> Any:
        x = self.first(x)
        results = [conv(x) for conv in self.convolutions]
        if self.is_output:
            return x, *results
        return sum(results[1:], results[0])


def test_what_others_read_is_not_completed_by_one():
    assert len(plan_network(Block("conv"), 3, (8, 8)).completes()) == 1
    for readers in (("conv", "conv"), ("conv", "output")):
        assert plan_network(Block(*readers), 3, (8, 8)).completes() == {}
