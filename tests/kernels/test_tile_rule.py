"""The tile by rule: which blocks it may have, and over how many programs a sum is split."""

import random

import pytest
import torch
import triton

from fastp2p.kernels import tile_rule
from fastp2p.kernels.candidates import candidates, product_of

LIKE = torch.empty(0, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tile_rule, "PROCESSORS_WHEN_INTERPRETED", 132)
    tile_rule._choose_config.cache_clear()
    yield
    tile_rule._choose_config.cache_clear()


@pytest.mark.parametrize(
    ("channels", "block"), [((128,), 128), ((512, 256), 128), ((64,), 64), ((64, 128), 64), ((192,), 64), ((3,), 0),
                            ((512, 3), 0), ((96,), 0)],
)  # fmt: skip
def test_the_longest_block_that_channels_fill(channels: tuple[int, ...], block: int):
    assert tile_rule.whole_block(*channels) == block
    assert tile_rule.whole_block(*channels, most=64) == min(block, 64)


def test_no_block_is_longer_than_the_channels_fill():
    for whole in (128, 64, 0):
        tiles = tile_rule.candidates(4, 512, 2, whole=whole)
        assert tiles
        assert max(tile["BLOCK_K"] for tile in tiles) == {128: 128, 64: 64, 0: 32}[whole]


def test_every_split_has_blocks():
    """Seventeen programs for sixteen times as many blocks would leave one idle, and a partial sum to add for it."""
    draw = random.Random(0)
    for _ in range(300):
        m, n = (draw.choice([1, 4, 16, 60, 64, 256, 900, 1024, 4096]) for _ in range(2))
        whole = draw.choice([128, 64, 0])
        k = draw.randint(1, 80) * (whole or draw.choice([48, 96]))
        config = tile_rule.choose_config(m, n, k, LIKE, whole=whole, products=draw.choice([1, 2, 4]))
        assert_no_idle_part(k, config)
        assert_no_idle_part(k, tile_rule.choose_config(m, n, k, LIKE, whole=min(whole, 64), always_splits=True))


def test_every_split_that_the_tuner_tries_has_blocks():
    for m, n, side in ((512, 512, 4), (512, 512, 8), (128, 64, 128)):
        x, weight = (
            torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((1, n, side, side), (m, n, 4, 4))
        )
        product = product_of("conv", (x, weight, None, None, 2, 1, 0, 0.0, 1))
        for config in candidates(product):
            assert_no_idle_part(product.k, config)


def assert_no_idle_part(k: int, config: dict[str, int]) -> None:
    blocks = triton.cdiv(k, config["BLOCK_K"])
    assert (config["SPLIT"] - 1) * triton.cdiv(blocks, config["SPLIT"]) < blocks, (k, config)


def test_a_skinny_deep_product_has_two_programs_a_processor():
    """e7 of unet_256 at batch 1: 4 pixels, 512 channels, 16 taps of 512."""
    config = tile_rule.choose_config(4, 512, 8192, LIKE, whole=128)
    assert (config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"], config["SPLIT"]) == (16, 32, 128, 16)
    assert tile_rule.choose_config(4, 512, 8192, LIKE, whole=64)["BLOCK_K"] == 64


def test_the_largest_tile_is_the_tuner_s_alone():
    """The rule does not take what no GPU has timed; other GPUs than sm_90, and larger epilogues, halve it."""
    from fastp2p.kernels.compile_check import on_target
    from fastp2p.kernels.layer_shapes import EPILOGUES, fitting

    largest = tile_rule.candidates(4096, 512, 2, whole=128, largest=tile_rule.LARGEST)[0]
    assert (largest["BLOCK_M"], largest["BLOCK_N"]) == (128, 256)
    assert tile_rule.choose_config(1 << 20, 512, 4096, LIKE, whole=128)["BLOCK_N"] < 256
    assert fitting(largest, EPILOGUES["stats"], transposed=False) == largest
    halved = [
        on_target(largest, 80),
        fitting(largest, EPILOGUES["stats"], transposed=True),
        fitting(largest, EPILOGUES["bias stats"], transposed=False),
        fitting(largest, EPILOGUES["norm lrelu"], transposed=False),
    ]
    assert all(tile["BLOCK_N"] == 128 and tile["num_stages"] == 3 for tile in halved)
    assert fitting(largest, EPILOGUES["norm dropout"], transposed=False)["BLOCK_N"] == 64


def test_the_tuner_tries_it_where_it_may():
    x, weight = (
        torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((8, 256, 32, 32), (512, 256, 4, 4))
    )
    tiles = candidates(product_of("conv", (x, weight, None, None, 1, 1, 0, 0.0, 2)))
    assert any(tile["BLOCK_N"] == 256 for tile in tiles)
    bias = torch.empty(512, device="meta")
    tiles = candidates(product_of("conv", (x, weight, bias, None, 1, 1, 0, 0.0, 2)))
    assert all(tile["BLOCK_N"] < 256 for tile in tiles)  # a bias and statistics take the registers
    y = torch.empty(8, 512, 31, 31, dtype=torch.bfloat16, device="meta")
    tiles = candidates(product_of("conv_transpose", (y, None, weight, None, None, 1, 1, 32, 32, 0, 0.0, 0)))
    assert all(tile["BLOCK_N"] < 256 for tile in tiles)
