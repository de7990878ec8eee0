import pytest

from fastp2p.errors import InputError
from fastp2p.models.pix2pix.networks import levels_of
from fastp2p.models.pix2pix.options import Pix2PixConfig


@pytest.mark.parametrize(("name", "levels"), [("unet_256", 8), ("unet_128", 7), ("unet_4", 2), ("unet_4096", 12)])
def test_levels_of(name: str, levels: int):
    assert levels_of(name) == levels


@pytest.mark.parametrize("name", ["unet_100", "unet_2", "unet_8192", "resnet_9blocks", "unet_", ""])
def test_levels_of_refuses(name: str):
    with pytest.raises(InputError, match="expected unet_S"):
        levels_of(name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gan_mode": "wgan"}, "gan_mode: got 'wgan', expected one of vanilla, lsgan, hinge"),
        ({"lr": 0}, "lr: got 0, expected more than 0"),
        ({"lr": float("nan")}, "lr: got nan"),
        ({"batch_size": 0}, "batch_size: got 0, expected 1 or more"),
        ({"beta1": 1.0}, "beta1: got 1.0"),
        ({"seed": -1}, "seed: got -1"),
        ({"norm": "layer"}, "norm: got 'layer', expected one of batch, instance, none"),
        ({"input_nc": 4}, "input_nc: got 4, expected one of 1, 3"),
        ({"netD": "n_layers", "n_layers_D": 6}, "n_layers_D: got 6, expected 1 to 5"),
        ({"n_layers_D": 4}, "add --netD n_layers"),
        ({"load_size": 100, "crop_size": 128}, "load_size: got 100, expected at least crop_size 128"),
        ({"crop_size": 16}, "crop_size: got 16, expected at least 24 px for this netD"),
        ({"netD": "pixel", "crop_size": 8}, "crop_size: got 8, expected at least 11 px"),
        ({"seed": 2**32}, "seed: got 4294967296, expected less than 2"),
        ({"netG": "unet_99"}, "netG: got 'unet_99'"),
        (
            {"engine": "reference", "precision": "bf16"},
            "precision: got bf16 with engine reference, which computes in fp32",
        ),
        (
            {"statistics": "sample", "norm": "instance"},
            "statistics: got sample with norm instance; it is for norm batch",
        ),
    ],
)
def test_bad_values_say_got_and_expected(fields: dict, message: str):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        Pix2PixConfig(**fields)


def test_resolve_is_the_paper_s_recipe_on_own_data():
    config = Pix2PixConfig(data="facades").resolve("cpu", "bf16")
    assert (config.netG, config.ngf, config.ndf, config.gan_mode) == ("unet_256", 64, 64, "vanilla")
    assert (config.load_size, config.crop_size, config.n_epochs, config.n_epochs_decay) == (286, 256, 100, 100)


def test_resolve_keeps_what_was_given():
    config = Pix2PixConfig(ngf=8, crop_size=64).resolve("cpu", "bf16")
    assert (config.ngf, config.crop_size, config.load_size) == (8, 64, 72)  # load_size at the recipe's ratio
    assert Pix2PixConfig(load_size=286).resolve("cpu", "bf16").crop_size == 256


def test_resolve_takes_the_full_net_on_a_gpu():
    config = Pix2PixConfig().resolve("cuda", "bf16")
    assert (config.netG, config.ngf, config.ndf, config.gan_mode) == ("unet_128", 64, 64, "vanilla")


def test_lr_factor_is_upstream_s_linear_policy():
    config = Pix2PixConfig(data="facades").resolve("cpu", "bf16")
    assert config.lr_factor(1) == config.lr_factor(100) == 1
    assert config.lr_factor(101) == 1 - 1 / 101
    assert config.lr_factor(200) == pytest.approx(0.0099, abs=1e-4)


@pytest.mark.parametrize(("engine", "precision", "expected"), [
    ("fused", "auto", "bf16"), ("reference", "auto", "fp32"), ("fused", "fp16", "fp16"), ("reference", "fp64", "fp64"),
])  # fmt: skip
def test_resolve_decides_the_precision(engine: str, precision: str, expected: str):
    assert Pix2PixConfig(engine=engine, precision=precision).resolve("cpu", "bf16").precision == expected
