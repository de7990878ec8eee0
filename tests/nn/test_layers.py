"""ConvNormAct, UpConvNormAct and PatchGANLoss against the modules that they stand for."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.comparing import OperatorCalls, total
from helpers.on_device import generator
from torch import Tensor, nn

import fastp2p
from fastp2p.errors import InputError
from fastp2p.nn import ConvNormAct, PatchGANLoss, UpConvNormAct
from fastp2p.ops.objectives import OBJECTIVES

DOUBLE = torch.float64
ACTIVATIONS = {"none": nn.Identity(), "relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(0.1), "tanh": nn.Tanh()}


class Plain(nn.Module):
    """The layer's own submodules, called one by one."""

    def __init__(self, layer: ConvNormAct | UpConvNormAct):
        super().__init__()
        layer = copy.deepcopy(layer)
        self.conv, self.norm, self.activation = layer.conv, layer.norm, ACTIVATIONS[layer.activation]

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = x if skip is None else torch.cat([skip, x], 1)
        x = self.conv(x)
        return self.activation(x if self.norm is None else self.norm(x))


def randomized(layer: nn.Module) -> nn.Module:
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if tensor.ndim == 1:
            nn.init.uniform_(tensor, 0.5, 1.5) if "bias" not in name else nn.init.uniform_(tensor, -0.5, 0.5)
    return layer


def assert_same(layer: nn.Module, plain: nn.Module, *inputs: Tensor) -> None:
    """Output, gradients of parameters and inputs, and buffers agree in float64; where autograd sees no way, both are
    None."""
    results = []
    for module in (layer, plain):
        own = [i.clone().requires_grad_() for i in inputs]
        module.zero_grad()
        output = module(*own)
        total(output).backward()
        gradients = {name: p.grad for name, p in module.named_parameters()}
        results.append((output.detach(), [i.grad for i in own], gradients, dict(module.named_buffers())))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


NORMS: list[dict[str, Any]] = [
    {"norm": "none"},
    {"norm": "batch"},
    {"norm": "batch", "bias": True, "eps": 0.1, "momentum": 0.4},
    {"norm": "batch", "affine": False},
    {"norm": "batch", "track_running_stats": False},
    {"norm": "instance"},
    {"norm": "instance", "affine": True, "bias": False},
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("settings", NORMS, ids=str)
@pytest.mark.parametrize("up", [False, True])
def test_layer_is_its_modules(up: bool, settings: dict[str, Any], activation: str):
    torch.manual_seed(0)
    kind = UpConvNormAct if up else ConvNormAct
    layer = randomized(kind(6, 5, 4, 2, 1, activation=activation, slope=0.1, **settings).double())
    plain = Plain(layer)
    inputs = [torch.randn(3, 4, 6, 8, dtype=DOUBLE), torch.randn(3, 2, 6, 8, dtype=DOUBLE)]
    if not up:
        inputs = [torch.cat(inputs, 1)]
    for module in (layer, plain):
        module.train()
    assert_same(layer, plain, *inputs)
    for module in (layer, plain):
        module.eval()
    assert_same(layer, plain, *inputs)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(layer(*inputs), plain(*inputs))


@pytest.mark.parametrize("window", [(3, 1, 1), (1, 2, 0), ((3, 5), 1, 2), (7, 3, 3)])
def test_windows(window: tuple[Any, ...]):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 10, dtype=DOUBLE)
    layer = ConvNormAct(3, 4, *window, activation="relu").double()
    assert_same(layer, Plain(layer), x)
    up = UpConvNormAct(3, 4, *window, 1 if window[1] > 1 else 0, activation="relu").double()
    assert_same(up, Plain(up), x)


def test_defaults_are_pix2pixs():
    down, up = ConvNormAct(3, 8), UpConvNormAct(8, 3)
    assert down(torch.randn(1, 3, 16, 16)).shape == (1, 8, 8, 8)
    assert up(torch.randn(1, 8, 8, 8)).shape == (1, 3, 16, 16)
    assert up(torch.randn(1, 6, 8, 8), torch.randn(1, 2, 8, 8)).shape == (1, 3, 16, 16)
    batch = ["norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert list(down.state_dict()) == list(up.state_dict()) == ["conv.weight", *batch]
    assert list(ConvNormAct(3, 8, norm="instance").state_dict()) == ["conv.weight", "conv.bias"]
    assert list(ConvNormAct(3, 8, norm="none").state_dict()) == ["conv.weight", "conv.bias"]
    assert list(ConvNormAct(3, 8, norm="none", bias=False).state_dict()) == ["conv.weight"]
    for module in (down, up):
        assert module.conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert module.to(DOUBLE).conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert repr(ConvNormAct(3, 8, activation="leaky_relu", dropout=0.5)).startswith(
        "ConvNormAct(\n  activation=leaky_relu, slope=0.2, dropout=0.5\n  (conv): Conv2d(3, 8,"
    )


def test_initialisation_by_type_reaches_the_layers():
    layer = ConvNormAct(3, 64)
    fastp2p.init_weights(layer, generator=generator(0))
    assert layer.conv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert layer.norm.weight.mean().item() == pytest.approx(1, abs=0.02)


def test_how_many_operators_a_block_takes():
    """In eval mode the whole block is one; in training two, and the running statistics'.

    In eval mode, too, where the weight has more elements than the result: folding the norm into it would cost more.
    """
    x, skip = torch.randn(2, 3, 16, 16), torch.randn(2, 2, 16, 16)
    training = {"batch": ["conv", "running_stats", "norm_act"], "instance": ["conv", "norm_act"], "none": ["conv"]}
    evaluation = {"batch": ["conv"], "instance": ["conv", "norm_act"], "none": ["conv"]}
    for norm in ("batch", "instance", "none"):
        layer = ConvNormAct(3, 4, norm=norm, activation="relu")
        for mode, expected in ((True, training), (False, evaluation)):
            layer.train(mode)
            with OperatorCalls() as calls:
                layer(x)
            assert calls.names == expected[norm]
    with OperatorCalls() as calls, torch.no_grad():
        UpConvNormAct(5, 4).eval()(x, skip)
        ConvNormAct(3, 4).eval()(x[:, :, :8, :8])
    assert calls.names == ["conv_transpose", "conv", "norm_act"]


def test_skip_is_not_copied():
    """cat([skip, x], 1) is not written before the operator reads it, nor is anything else."""
    layer = UpConvNormAct(7, 4, norm="none")
    x, skip = torch.randn(2, 4, 5, 5), torch.randn(2, 3, 5, 5)
    with OperatorCalls() as calls, torch.no_grad():
        layer(x, skip)
    assert calls.all_names == ["conv_transpose"]


def test_dropout():
    layer = ConvNormAct(3, 64, 1, 1, 0, dropout=0.25)
    x = torch.randn(4, 3, 16, 16)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(layer(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    # 65,536 draws: the standard deviation is 0.0017
    assert (outputs[0] == 0).double().mean().item() == pytest.approx(0.25, abs=0.01)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    plain = ConvNormAct(3, 64, 1, 1, 0, norm="none", dropout=0.25)
    assert (plain(x) == 0).double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert (plain.eval()(x) == 0).sum() == 0


def test_what_cannot_be():
    with pytest.raises(InputError, match="ConvNormAct: got norm 'group', expected one of batch, instance, none"):
        ConvNormAct(3, 4, norm="group")
    with pytest.raises(InputError, match="ConvNormAct: got activation 'gelu'"):
        ConvNormAct(3, 4, activation="gelu")
    with pytest.raises(InputError, match=r"UpConvNormAct: got dropout 1\.0, expected 0 to below 1"):
        UpConvNormAct(3, 4, dropout=1.0)
    with pytest.raises(InputError, match="got slope -1"):
        ConvNormAct(3, 4, slope=-1)
    with pytest.raises(InputError, match=r"got one value per channel, \(1, 4, 1, 1\); expected more"):
        ConvNormAct(3, 4)(torch.randn(1, 3, 2, 2))
    with pytest.raises(InputError, match=r"conv_transpose: got .* expected x \(N, C, H, W\)"):
        UpConvNormAct(7, 4)(torch.randn(2, 4, 5, 5), torch.randn(2, 3, 6, 6))
    with pytest.raises(InputError, match=r"conv: got x \(2, 4, 8, 8\) float32"):
        ConvNormAct(3, 4)(torch.randn(2, 4, 8, 8))


def test_batch_of_one_pixel_trains_when_there_are_several_images():
    layer = ConvNormAct(3, 4).double()
    assert_same(layer, Plain(layer), torch.randn(2, 3, 2, 2, dtype=DOUBLE))


@pytest.mark.parametrize("autocast", [False, True])
def test_small_pix2pix_of_layers_learns(autocast: bool):
    """A generator and a discriminator built of the layers lower the L1 loss of one pair."""

    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e1 = ConvNormAct(3, 8, norm="none")
            self.e2 = ConvNormAct(8, 16)
            self.d2 = UpConvNormAct(16, 8, dropout=0.1)
            self.d1 = UpConvNormAct(16, 3, norm="none", activation="tanh")

        def forward(self, x: Tensor) -> Tensor:
            e1 = self.e1(x)
            y = self.d2(F.relu(self.e2(F.leaky_relu(e1, 0.2))))
            return self.d1(F.relu(y), F.relu(e1))

    torch.manual_seed(0)
    real_A, real_B = torch.randn(2, 1, 3, 16, 16).tanh()
    netG, netD = Generator(), nn.Sequential(ConvNormAct(6, 8, activation="leaky_relu"), nn.Conv2d(8, 1, 3, 1, 1))
    loss, history = PatchGANLoss(), []
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-2, betas=(0.5, 0.999)) for net in (netG, netD)]
    for _ in range(8):
        with torch.autocast(real_A.device.type, torch.bfloat16, enabled=autocast):
            fake_B = netG(real_A)
            fake = netD(torch.cat([real_A, fake_B.detach()], 1))
            real = netD(torch.cat([real_A, real_B], 1))
            loss_D = (loss(fake, False) + loss(real, True)) / 2
        optimizers[1].zero_grad()
        loss_D.backward()
        optimizers[1].step()
        with torch.autocast(real_A.device.type, torch.bfloat16, enabled=autocast):
            loss_G_L1 = F.l1_loss(fake_B.float(), real_B)
            loss_G = loss(netD(torch.cat([real_A, fake_B], 1)), True, for_discriminator=False) + 100 * loss_G_L1
        optimizers[0].zero_grad()
        loss_G.backward()
        optimizers[0].step()
        history.append(loss_G_L1.item())
    assert history[-1] < 0.8 * history[0]
    assert {p.dtype for p in netG.parameters()} == {torch.float32}


@pytest.mark.parametrize("gan_mode", OBJECTIVES)
@pytest.mark.parametrize("target_is_real", [True, False])
@pytest.mark.parametrize("for_discriminator", [True, False])
def test_loss_is_the_gan_loss(gan_mode: str, target_is_real: bool, for_discriminator: bool):
    logits = torch.randn(2, 1, 5, 5, dtype=DOUBLE) * 2
    results = []
    for loss in (PatchGANLoss(gan_mode), fastp2p.GANLoss(gan_mode)):
        own = logits.clone().requires_grad_()
        value = loss(own, target_is_real, for_discriminator=for_discriminator)
        (3 * value).backward()
        results.append((value.detach(), own.grad))
    torch.testing.assert_close(*results)


def test_loss_module():
    loss = PatchGANLoss("lsgan")
    assert list(loss.state_dict()) == []
    assert repr(loss) == "PatchGANLoss(gan_mode=lsgan)"
    logits = torch.randn(2, 1, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    value = loss(logits, True)
    value.backward()
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16
    assert torch.allclose(torch.compile(loss, backend="aot_eager", fullgraph=True)(logits, True), value)
    with pytest.raises(InputError, match="gan_mode: got 'wgan', expected one of vanilla, lsgan, hinge"):
        PatchGANLoss("wgan")


@pytest.mark.parametrize("training", [True, False])
def test_layers_compile(training: bool):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = randomized(UpConvNormAct(5, 4, activation="relu").double()).train(training)
    plain = Plain(layer).train(training)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_same(compiled._orig_mod, plain, torch.randn(2, 3, 5, 5, dtype=DOUBLE), torch.randn(2, 2, 5, 5, dtype=DOUBLE))
    inputs = torch.randn(2, 3, 5, 5, dtype=DOUBLE), torch.randn(2, 2, 5, 5, dtype=DOUBLE)
    torch.testing.assert_close(compiled(*inputs), plain(*inputs))
    torch.testing.assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()))
