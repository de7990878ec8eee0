import pytest
import torch
from torch import nn

from fastp2p.errors import InputError
from fastp2p.models.generate import generate
from fastp2p.models.pix2pix.networks import (
    MAX_LEVELS,
    PatchDiscriminator,
    PixelDiscriminator,
    UnetGenerator,
    build_netD,
)
from fastp2p.nn.init import count_parameters, init_weights
from fastp2p.nn.padding import reflect_pad_to_multiple


def test_init_weights_of_norms_without_weights():
    init_weights(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.InstanceNorm2d(4)))


def test_generator_parameter_counts():
    assert count_parameters(UnetGenerator()) == 54_413_955
    assert count_parameters(UnetGenerator(norm="instance")) == 54_409_603
    assert count_parameters(UnetGenerator(levels=7)) == 41_828_995


@pytest.mark.parametrize(
    ("n_layers", "parameters", "pixels"),
    [(1, 139_585, 16), (2, 666_433, 34), (3, 2_768_705, 70), (4, 6_964_033, 142), (5, 11_159_361, 286)],
)
def test_discriminator_counts_and_receptive_field(n_layers: int, parameters: int, pixels: int):
    assert count_parameters(PatchDiscriminator(n_layers=n_layers)) == parameters

    # Which pixels does the central logit depend on? Norm would couple all of them, so it is left out.
    netD = PatchDiscriminator(1, ndf=1, n_layers=n_layers, norm="none").double()
    side = 2 * pixels + 64
    x = torch.rand(1, 1, side, side, dtype=torch.float64, requires_grad=True)
    logits = netD(x)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    seen = x.grad[0, 0].abs().sum(0).nonzero().flatten()
    assert seen[-1] - seen[0] + 1 == pixels


def test_pixel_discriminator():
    assert count_parameters(PixelDiscriminator()) == 9_024
    assert build_netD("pixel", 6, ndf=64, n_layers=3, norm="batch")(torch.rand(1, 6, 5, 7)).shape == (1, 1, 5, 7)
    assert list(PixelDiscriminator().state_dict())[:2] == ["net.0.weight", "net.0.bias"]


def test_patch_map_of_256_px_is_30():
    netD = build_netD("basic", 6, ndf=4, n_layers=1, norm="batch")  # basic is 3 layers, whatever n_layers says
    assert netD(torch.rand(1, 6, 256, 256)).shape == (1, 1, 30, 30)


def test_generator_keys_are_upstream_s():
    keys = set(UnetGenerator(ngf=2).state_dict())
    path = ["model.model", "model.model.1.model"]
    path += [path[1] + ".3.model" * i for i in range(1, 7)]  # P0 .. P7 of the innermost block
    weights = {f"{path[0]}.0.weight", f"{path[0]}.3.weight", f"{path[0]}.3.bias"}
    norms = set()
    for p in path[1:7]:
        weights |= {f"{p}.1.weight", f"{p}.5.weight"}
        norms |= {f"{p}.2", f"{p}.6"}
    weights |= {f"{path[7]}.1.weight", f"{path[7]}.3.weight"}
    norms |= {f"{path[7]}.4"}
    leaves = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert keys == weights | {f"{norm}.{leaf}" for norm in norms for leaf in leaves}


def test_discriminator_keys_are_upstream_s():
    leaves = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    convolutions = {"model.0.weight", "model.0.bias", "model.2.weight", "model.5.weight", "model.8.weight"}
    convolutions |= {"model.11.weight", "model.11.bias"}
    norms = {f"model.{i}.{leaf}" for i in (3, 6, 9) for leaf in leaves}
    assert set(PatchDiscriminator(ndf=2).state_dict()) == convolutions | norms


@pytest.mark.parametrize(("placement", "levels"), [("upstream", [7, 6, 5]), ("paper", [8, 7, 6]), ("none", [])])
def test_dropout_placement(placement: str, levels: list[int]):
    block = UnetGenerator(ngf=2, dropout=placement).model
    with_dropout = []
    for level in range(1, 9):
        if isinstance(block.model[-1], nn.Dropout):
            with_dropout.append(level)
        block = next((m for m in block.model if type(m) is type(block)), None)
    assert sorted(with_dropout, reverse=True) == levels


@pytest.mark.parametrize("levels", [2, 3, 5, 8])
@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_every_depth_and_norm_runs_forward_and_back(levels: int, norm: str):
    netG = UnetGenerator(1, 4, levels=levels, ngf=2, norm=norm)
    x = torch.randn(2, 1, 2**levels, 2**levels)
    y = netG(x)
    assert y.shape == (2, 4, *x.shape[2:])
    y.sum().backward()
    missing = [name for name, parameter in netG.named_parameters() if parameter.grad is None]
    assert not missing


@pytest.mark.parametrize("levels", [1, MAX_LEVELS + 1])
def test_impossible_depth_is_refused(levels: int):
    with pytest.raises(InputError, match="levels: got"):
        UnetGenerator(levels=levels)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (17, 40), (100, 64), (9, 200)])
def test_any_size_is_padded_and_cropped(height: int, width: int):
    netG = UnetGenerator(levels=5, ngf=2)
    assert netG(torch.randn(2, 3, height, width)).shape == (2, 3, height, width)


def test_reflection_is_numpy_s():
    import numpy as np

    for height, width in [(1, 1), (3, 5), (8, 9), (17, 2)]:
        x = torch.arange(height * width, dtype=torch.float32).view(1, 1, height, width)
        padded = reflect_pad_to_multiple(x, 8)
        pads = [((-size % 8) // 2, -size % 8 - (-size % 8) // 2) for size in (height, width)]
        assert np.array_equal(padded[0, 0].numpy(), np.pad(x[0, 0].numpy(), pads, mode="reflect"))
    x = torch.rand(1, 1, 16, 8)
    assert reflect_pad_to_multiple(x, 8) is x


def test_init_is_the_paper_s():
    torch.manual_seed(0)
    netG = UnetGenerator(levels=6, ngf=32)
    init_weights(netG)
    weights = torch.cat([p.detach().flatten() for n, p in netG.named_parameters() if p.ndim == 4])
    assert weights.std() == pytest.approx(0.02, rel=0.01)
    assert abs(weights.mean()) < 1e-4
    norms = [m for m in netG.modules() if isinstance(m, nn.BatchNorm2d)]
    scales = torch.cat([m.weight.detach() for m in norms])
    assert scales.mean() == pytest.approx(1, abs=0.005)
    assert all((m.bias == 0).all() for m in norms)


def test_generate_image_statistics_do_not_depend_on_the_batch():
    netG = UnetGenerator(levels=5, ngf=4, dropout="paper")
    x = torch.randn(3, 3, 32, 32)
    together = generate(netG, x)
    alone = torch.cat([generate(netG, x[i : i + 1]) for i in range(3)])
    assert torch.equal(together, alone)
    assert not torch.allclose(together, generate(netG, x, norm_stats="batch"), atol=1e-3)


def test_generate_is_train_mode_at_batch_one_less_dropout():
    netG = UnetGenerator(levels=5, ngf=4, dropout="none")
    x = torch.randn(1, 3, 32, 32)
    before = {name: value.clone() for name, value in netG.state_dict().items()}
    ours = generate(netG, x)
    assert all(torch.equal(value, before[name]) for name, value in netG.state_dict().items()), "statistics moved"
    assert netG.training
    assert torch.equal(ours, netG(x))


def test_generate_running_is_eval_mode():
    netG = UnetGenerator(levels=5, ngf=4)
    for _ in range(3):
        netG(torch.randn(2, 3, 32, 32))
    x = torch.randn(2, 3, 32, 32)
    running = generate(netG, x, norm_stats="running")
    assert torch.equal(running, netG.eval()(x))
    assert not netG.training
    generate(netG, x)
    assert not any(module.training for module in netG.modules()), "the mode was not restored"


def test_generate_dropout_draws():
    netG = UnetGenerator(levels=6, ngf=4)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(generate(netG, x), generate(netG, x))
    assert not torch.equal(generate(netG, x, dropout=True), generate(netG, x, dropout=True))


def test_generate_refuses_unknown_statistics():
    with pytest.raises(InputError, match="norm_stats: got 'eval', expected one of image, batch, running"):
        generate(UnetGenerator(levels=2, ngf=2), torch.rand(1, 3, 4, 4), norm_stats="eval")
