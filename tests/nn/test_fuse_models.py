"""fuse(model) on networks that were not written for it."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import plain_models
from helpers.comparing import assert_same_eval, assert_same_training, fused_copy
from torch import Tensor, nn

import fastp2p
from fastp2p.nn import fuse
from fastp2p.ops.philox import keep_mask

CBR, CB, CR = "Conv2d + BatchNorm2d + ReLU", "Conv2d + BatchNorm2d", "Conv2d + ReLU"
UP = "ConvTranspose2d + "

# model -> shape of its input, chains by the convolution's path, paths that are left
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, str], list[str]]] = {
    "resnet": (
        plain_models.ResNet,
        (2, 3, 33, 32),
        {"conv1": CBR}
        | {f"layer{i}.{j}.conv{k}": CB for i in (1, 2) for j in (0, 1) for k in (1, 2)}
        | {"layer2.0.downsample.0": CB},
        [],
    ),
    "segmentation": (
        plain_models.SegmentationUNet,
        (2, 3, 16, 24),
        {
            f"{block}.double_conv.{i}": CBR
            for block in ("downs.0", "downs.1", "bottleneck", "ups.1", "ups.3")
            for i in (0, 3)
        },
        ["ups.0", "ups.2", "head"],
    ),
    "dcgan_G": (
        plain_models.DCGANGenerator,
        (3, 10, 1, 1),
        {"main.0": UP + "BatchNorm2d + ReLU", "main.3": UP + "BatchNorm2d + ReLU", "main.6": UP + "Tanh"},
        [],
    ),
    "dcgan_D": (
        plain_models.DCGANDiscriminator,
        (3, 3, 16, 16),
        {"main.0": "Conv2d + LeakyReLU", "main.2": "Conv2d + BatchNorm2d + LeakyReLU"},
        ["main.5"],
    ),
    "residual": (
        plain_models.ResidualGenerator,
        (2, 3, 16, 16),
        {
            "model.1": "Conv2d + InstanceNorm2d + ReLU",
            "model.4": "Conv2d + InstanceNorm2d + ReLU",
            "model.7.conv_block.1": "Conv2d + InstanceNorm2d + ReLU",
            "model.7.conv_block.5": "Conv2d + InstanceNorm2d",
            "model.8": UP + "InstanceNorm2d + ReLU",
            "model.12": "Conv2d + Tanh",
        },
        [],
    ),
    "in_place_unet": (
        plain_models.in_place_unet,
        (2, 3, 16, 16),
        {
            "model.1.model.1": CB,
            "model.1.model.3.model.1": CR,
            "model.1.model.3.model.3": UP + "BatchNorm2d",
            "model.1.model.5": UP + "BatchNorm2d",
            "model.3": UP + "Tanh",
        },
        ["model.0"],
    ),
    "gated": (plain_models.Gated, (2, 3, 8, 8), {"body.0": CBR}, ["", "head"]),
    "perceptual": (plain_models.Perceptual, (2, 3, 8, 8), {"features.0": CR}, ["features.2", "features.5"]),
    "netG": (
        lambda: fastp2p.UnetGenerator(levels=3, ngf=4, dropout="none"),
        (2, 3, 16, 16),
        {
            "model.model.1.model.1": CB,
            "model.model.1.model.3.model.1": CR,
            "model.model.1.model.3.model.3": UP + "BatchNorm2d",
            "model.model.1.model.5": UP + "BatchNorm2d",
            "model.model.3": UP + "Tanh",
        },
        ["", "model.model.0"],
    ),
    "netD": (
        lambda: fastp2p.PatchDiscriminator(ndf=4),
        (2, 6, 32, 32),
        {"model.0": "Conv2d + LeakyReLU"} | {f"model.{i}": "Conv2d + BatchNorm2d + LeakyReLU" for i in (2, 5, 8)},
        ["model.11"],
    ),
    "netD_instance": (
        lambda: fastp2p.PatchDiscriminator(ndf=4, norm="instance"),
        (2, 6, 32, 32),
        {"model.0": "Conv2d + LeakyReLU"} | {f"model.{i}": "Conv2d + InstanceNorm2d + LeakyReLU" for i in (2, 5, 8)},
        ["model.11"],
    ),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    """A model of MODELS in float64, its norms' parameters and statistics no longer 1 and 0, and an input."""
    build, shape, _, _ = MODELS[name]
    torch.manual_seed(0)
    model = build().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    return model, torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_fused_model_trains_as_before(name: str):
    model, x = make(name)
    fused, _ = fused_copy(model)
    assert_same_eval(model, fused, x)
    assert_same_training(model, fused, x)


@pytest.mark.parametrize("name", MODELS)
def test_report(name: str):
    model, _ = make(name)
    _, report = fused_copy(model)
    _, _, kinds, left = MODELS[name]
    assert {chain.modules[0]: chain.kind for chain in report.fused} == kinds
    assert [row.module for row in report.left] == left
    for chain in report.fused:
        types = [type(model.get_submodule(path)).__name__ for path in chain.modules]
        assert " + ".join(types) == chain.kind


@pytest.mark.parametrize("name", ["resnet", "netG"])
def test_in_float32(name: str):
    model, x = make(name)
    model, x = model.float(), x.float()
    fused, _ = fused_copy(model)
    # float32 rounding (6e-8) through a dozen layers, whose gradients are sums of up to some thousand terms of order 1
    assert_same_training(model, fused, x, rtol=1e-3, atol=1e-3)


def test_report_says_why():
    report = fuse(plain_models.ResNet())
    notes = {chain.modules[0]: chain.note for chain in report.fused}
    assert notes["conv1"] == ""
    assert notes["layer1.0.conv1"] == "layer1.0.relu (ReLU) is called at 2 places"
    assert notes["layer2.0.downsample.0"] == ""
    reasons = {row.module: row.reason for row in fuse(plain_models.Perceptual()).left}
    assert reasons == dict.fromkeys(("features.2", "features.5"), "its result is read at 2 places")
    reasons = {row.module: row.reason for row in fuse(plain_models.Gated()).left}
    assert reasons["head"] == "is not called by a forward that could be followed"
    assert reasons[""].startswith("cannot be followed: TraceError")


def test_report_prints_as_a_table():
    text = str(fuse(fastp2p.PatchDiscriminator(ndf=4, n_layers=1)))
    assert text.splitlines() == [
        "fused: 2",
        "  model.0, .1      Conv2d + LeakyReLU",
        "  model.2, .3, .4  Conv2d + BatchNorm2d + LeakyReLU",
        "left as they are: 1",
        "  model.5          Conv2d                            nothing to fuse follows it",
    ]
    assert str(fuse(nn.Linear(2, 2))) == "fused: none\nleft as they are: none"


def test_awkward_model_is_left_untouched():
    torch.manual_seed(0)
    model = plain_models.Awkward()
    before = copy.deepcopy(model)
    report = fuse(model)
    assert not report.fused
    reasons = {row.module: row.reason for row in report.left}
    assert reasons == {
        "grouped.0": "has 2 groups",
        "dilated.0": "has dilation (2, 2)",
        "reflected.0": "pads by 'reflect'",
        "spectral.0": "has a weight that is computed, as by spectral_norm or weight_norm",
        "parametrized.0": "has a parametrization",
        "oblong.0": "has padding (1, 0), not alike in both dimensions",
    }
    for (_, module), (_, original) in zip(model.named_modules(), before.named_modules(), strict=True):
        assert type(module).__name__ == type(original).__name__
    x = torch.randn(2, 4, 16, 16)
    torch.testing.assert_close(model(x), before(x), rtol=0, atol=0)


def test_dropout_of_the_generator(monkeypatch: pytest.MonkeyPatch):
    """With the operators' own mask in nn.Dropout's place the unfused generator takes the same training step."""

    def dropout(self: nn.Dropout, x: Tensor) -> Tensor:
        if not self.training:
            return x
        rng = torch.randint(0, 2**63 - 1, (2,))
        return x * keep_mask(x, rng, 0, self.p) / (1 - self.p)

    torch.manual_seed(0)
    model = fastp2p.UnetGenerator(levels=4, ngf=4, dropout="paper").double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    fused, report = fused_copy(model)
    assert sum(chain.kind.endswith("Dropout") for chain in report.fused) == 3
    gradients = []
    with monkeypatch.context() as patch:
        patch.setattr(nn.Dropout, "forward", dropout)
        torch.manual_seed(1)
        expected = model(x)
        expected.sum().backward()
    torch.manual_seed(1)
    y = fused(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    gradients = [{name: p.grad for name, p in m.named_parameters()} for m in (fused, model)]
    torch.testing.assert_close(*gradients)
    assert not torch.equal(fused(x), fused(x))


def test_training_step_of_both_players():
    """One step of pix2pix's two optimizers on fused networks leaves the weights where unfused ones leave them."""
    torch.manual_seed(0)
    real_A, real_B = torch.randn(2, 1, 3, 32, 32, dtype=torch.float64).tanh()
    netG = fastp2p.UnetGenerator(levels=4, ngf=4, dropout="none").double()
    netD = fastp2p.PatchDiscriminator(ndf=4).double()
    weights = []
    for fuse_them in (False, True):
        G, D = copy.deepcopy(netG), copy.deepcopy(netD)
        optimizers = [torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.5, 0.999)) for net in (G, D)]
        if fuse_them:  # after the optimizers were made
            fuse(G)
            fuse(D)
        loss = fastp2p.GANLoss()
        for _ in range(2):
            fake_B = G(real_A)
            optimizers[1].zero_grad()
            fake, real = D(torch.cat([real_A, fake_B.detach()], 1)), D(torch.cat([real_A, real_B], 1))
            ((loss(fake, False) + loss(real, True)) / 2).backward()
            optimizers[1].step()
            optimizers[0].zero_grad()
            loss_G_GAN = loss(D(torch.cat([real_A, fake_B], 1)), True)
            (loss_G_GAN + 100 * F.l1_loss(fake_B, real_B)).backward()
            optimizers[0].step()
        weights.append(G.state_dict() | {f"D.{key}": value for key, value in D.state_dict().items()})
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-6, atol=1e-8)  # Adam divides by tiny gradients
