"""torch.ops.fastp2p called with what does not fit: C++ says what it got and expected."""

from typing import Any

import pytest
import torch

from fastp2p.ops import served_by

pytestmark = pytest.mark.skipif(served_by("adam", "cpu") != "C++", reason="C++ does not serve the CPU here")
LONG, DOUBLE, HALF = torch.int64, torch.float64, torch.float16


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


X, STATS, VECTOR = zeros(2, 3, 4, 4), zeros(1, 3), zeros(3)
WEIGHT = zeros(5, 3, 4, 4)
OUT = zeros(2, 5, 2, 2)
NORM = (X, STATS, STATS, VECTOR, VECTOR, None, 1e-5, 2, 0.2, -1, 0.0, 0, False)
FLAT = (zeros(8), zeros(8), zeros(8), zeros(8), zeros(), zeros(2, dtype=DOUBLE), 0.5, 0.999, 1e-8, None, None)
PAIRS = (zeros(2, 6, 6, 4, dtype=torch.uint8), zeros(1, dtype=LONG), zeros(1, 2, dtype=LONG), zeros(1) > 0, 4, 2, None)
LOSS = (X, None, 4, 0.0, 1.0, False, -1, 0.0, 0.5, zeros())
DOWN = (X, WEIGHT, VECTOR.new_zeros(5), None, 2, 1, 0, 0.2, 0)
UP = (OUT, None, WEIGHT, None, None, 2, 1, 4, 4, 0, 0.2, 0)
WGRAD = (OUT, None, X, 4, 4, 2, 1, torch.float32)
LAST = WEIGHT.contiguous(memory_format=torch.channels_last)
WGRAD_ADAM = (*WGRAD[:3], LAST, LAST.clone(), LAST.clone(), *FLAT[4:9], 2, 1, None)
SLICE = zeros(5, 6, 6, 3).permute(0, 3, 1, 2)[:, :, 1:5, 1:5]  # LAST's shape
COUNTS = (
    zeros(5), zeros(0, 2, dtype=DOUBLE), zeros(0, 2, dtype=DOUBLE), zeros(0, dtype=LONG), zeros(3, dtype=LONG),
    zeros(2, 3, dtype=LONG), 1,
)  # fmt: skip
STACK = (X, WEIGHT[:2], WEIGHT[2:4])
RUNNING = (VECTOR.clone(), VECTOR.clone(), STATS, STATS, 4, 0.1)


def changed(args: tuple[Any, ...], position: int, value: Any) -> tuple[Any, ...]:
    return *args[:position], value, *args[position + 1 :]


@pytest.mark.parametrize(
    ("operator", "args", "position", "value", "message"),
    [
        (
            "norm_stats",
            (X, 1),
            0,
            zeros(3, 4),
            r"got x \(3, 4\) Float of strides \(4, 1\) on cpu, expected \(N, C, H, W\)",
        ),
        ("norm_stats", (X, 1), 0, zeros(0, 3, 4, 4), "with elements"),
        ("norm_stats", (X, 1), 0, X.long(), "got x .* Long .*, expected .* Float, BFloat16, Half or Double"),
        ("norm_stats", (X, 1), 1, 3, "got stat_groups 3, expected 0 or a divisor of 2 images"),
        ("norm_act", NORM, 1, zeros(1, 4), r"got mean \(1, 4\) .*, expected \(1, 3\) Float on cpu"),
        ("norm_act", NORM, 1, zeros(3, 3), "G a divisor of 2 images"),
        ("norm_act", NORM, 2, STATS.double(), r"got var \(1, 3\) Double .*, expected \(1, 3\) Float"),
        ("norm_act", NORM, 3, zeros(4), r"got weight \(4\) .*, expected \(3\) Float"),
        ("norm_act", NORM, 5, zeros(2), r"got rng \(2\) Float .*, expected \(2\) Long"),
        ("norm_act", NORM, 7, 4, "got activation 4, second -1, expected 0 to 3"),
        ("norm_act", NORM, 10, 1.0, "got dropout 1, expected 0 to below 1"),
        (
            "norm_act_backward",
            (X, None, *NORM),
            0,
            zeros(2, 3, 4, 5),
            r"got dy \(2, 3, 4, 5\) .*, expected \(2, 3, 4, 4\) Float",
        ),
        ("norm_act_backward", (X, None, *NORM), 0, X.bfloat16(), "got dy .* BFloat16 .*, expected .* Float"),
        ("norm_act_backward", (X, None, *NORM), 1, X, "expected none without a second activation"),
        (
            "running_stats",
            (VECTOR, VECTOR, STATS, STATS, 4, 0.1),
            1,
            zeros(4),
            r"got running_var \(4\) .*, expected \(3\)",
        ),
        ("running_stats", RUNNING, 2, zeros(1, 4), r"got mean \(1, 4\) .*, expected \(1, 3\)"),
        ("running_stats", RUNNING, 4, 1, "got 1 values per channel"),
        ("stack_pairs", STACK, 0, X.long(), "got real_A .* Long .*, expected .* Float, BFloat16, Half or Double"),
        ("stack_pairs", STACK, 1, zeros(2, 3, 4, 5), r"got fake_B \(2, 3, 4, 5\) .*, expected \(2, 3, 4, 4\)"),
        ("stack_pairs", STACK, 2, zeros(1, 3, 4, 4), r"got real_B \(1, 3, 4, 4\) .*, expected \(2, 3, 4, 4\)"),
        ("advance", COUNTS, 1, zeros(2), r"got powers \(2\) Float .*, expected \(0, 2\) Double"),
        ("advance", COUNTS, 4, zeros(3), r"got counters \(3\) Float .*, expected \(3\) Long"),
        ("advance", COUNTS, 5, zeros(2, 4, dtype=LONG), r"got increments \(2, 4\) .*, expected \(2, 3\)"),
        (
            "patch_loss",
            (X, X, 4, 0.0, 1.0, False),
            1,
            zeros(2, 3, 4),
            r"got target \(2, 3, 4\) .*, expected the shape and device of x \(2, 3, 4, 4\)",
        ),
        ("patch_loss", (X, X, 4, 0.0, 1.0, False), 2, 5, "got kind 5, expected 0 to 4"),
        ("patch_loss", (X, None, 4, 0.0, 1.0, False, -1), 6, 5, "got second_kind 5, expected -1 to 4"),
        ("patch_loss", (X, None, 4, 0.0, 1.0, False, 4), 1, X, "a second kind, expected two halves and no target"),
        ("patch_loss", (X, None, 4, 0.0, 1.0, False, 4), 0, X[:1], "a second kind, expected two halves and no target"),
        ("patch_loss", (*LOSS, X.clone(), True), 0, zeros(96), r"expected \(N, C, H, W\) for sums"),
        ("patch_loss", (*LOSS, X.clone(), True), 10, X.bfloat16(), "got addend .* BFloat16 .*, expected Float"),
        ("patch_loss", (*LOSS, X.clone(), True), 10, X[:1], "got addend .*, expected the shape and device of x"),
        ("patch_loss", (*LOSS, X.clone(), True), 9, zeros(2), r"got dx_scale \(2\) .*, expected \(\) Float"),
        ("patch_loss", (X, X, 4, 0.0, 1.0, False), 0, X.long(), "got x .* Long .*, expected elements of Float"),
        ("adam", FLAT, 1, zeros(7), r"got grad \(7\) Float .*, expected \(8\) Float on cpu"),
        ("adam", FLAT, 2, zeros(16)[::2], r"got exp_avg .* of strides \(2\) .*, expected it contiguous"),
        ("adam", FLAT, 0, zeros(8, dtype=HALF), r"got param \(8\) Half .*, expected Float or Double"),
        ("adam", FLAT, 4, zeros(2), r"got lr \(2\) .*, expected \(\) Float"),
        ("adam", FLAT, 5, zeros(2), r"got powers \(2\) Float .*, expected \(2\) Double"),
        ("adam", FLAT, 9, zeros(8), r"got low_precision \(8\) Float .*, expected \(8\) BFloat16"),
        ("adam", FLAT, 1, zeros(8, dtype=DOUBLE), r"got grad \(8\) Double .*, expected \(8\) Float on cpu"),
        ("adam", FLAT, 2, zeros(8, dtype=HALF), r"got exp_avg \(8\) Half .*, expected \(8\) Float"),
        ("adam", FLAT, 10, zeros(1), r"got unscale \(1\) .*, expected \(\) Float"),
        ("adam", FLAT, 10, zeros(dtype=DOUBLE), r"got unscale \(\) Double .*, expected \(\) Float"),
        ("augment", PAIRS, 0, zeros(2, 6, 6, 4), r"got pairs .* Float .*, expected \(P, H, W, C\) Byte"),
        ("augment", PAIRS, 1, torch.tensor([2]), r"got index 2, offset \(0, 0\), crop_size 4"),
        ("augment", PAIRS, 2, torch.tensor([[0, 3]]), r"offset \(0, 3\)"),
        ("augment", PAIRS, 2, torch.tensor([[-1, 0]]), r"offset \(-1, 0\)"),
        ("augment", PAIRS, 2, torch.tensor([[2**63 - 1, 0]]), r"got index 0, offset \(9223372036854775807, 0\)"),
        ("augment", PAIRS, 4, 7, "got crop_size 7, input_nc 2"),
        ("augment", PAIRS, 6, LONG, "got Long, expected Float"),
        ("conv", DOWN, 0, zeros(2, 4, 4, 4), r"got x \(2, 4, 4, 4\).*expected \(N, C, H, W\) and \(O, C, KH, KW\)"),
        ("conv", DOWN, 1, WEIGHT.bfloat16(), "got weight .* BFloat16 .*, expected Float on cpu"),
        ("conv", DOWN, 2, zeros(4), r"got bias \(4\) .*, expected \(5\)"),
        ("conv", DOWN, 3, zeros(2, 5, 2, 3), r"got gate \(2, 5, 2, 3\)"),
        ("conv", DOWN, 4, 0, "got stride 0, padding 1, expected at least 1"),
        ("norm_act", NORM, 11, 2**32, "got layer 4294967296, expected 0 to 2\\^32 - 1"),
        ("conv", DOWN, 5, 2**40, "got stride 2, padding 1099511627776, expected .* at most 2\\^30"),
        ("conv", DOWN, 5, -1, "got stride 2, padding -1"),
        ("conv", DOWN, 0, zeros(2, 3, 1, 1), "expected something to be left of the image"),
        ("conv_transpose", UP, 1, zeros(2, 2, 2, 3), r"got x2 \(2, 2, 2, 3\)"),
        ("conv_transpose", UP, 1, zeros(2, 2, 2, 2), r"got weight \(5, 3, 4, 4\) .*, expected as many rows"),
        ("conv_transpose", UP, 5, 0, "got stride 0"),
        ("conv_transpose", UP, 7, 6, "got height 6, width 4, expected what a convolution of stride 2 takes"),
        ("conv_wgrad", WGRAD, 0, zeros(2, 5, 3, 2), r"got outer \(2, 5, 3, 2\)"),
        ("conv_wgrad", WGRAD, 1, zeros(2, 5, 2, 3), r"got outer2 \(2, 5, 2, 3\)"),
        ("conv_wgrad", WGRAD, 2, X.bfloat16(), r"got outer \(2, 5, 2, 2\) Float .*, expected BFloat16"),
        ("conv_wgrad", WGRAD, 5, 0, "got stride 0"),
        ("conv_wgrad_adam", WGRAD_ADAM, 3, WEIGHT, "got param .*, expected channels_last"),
        ("conv_wgrad_adam", WGRAD_ADAM, 3, zeros(5, 3, 4), "got param .*, expected .O, C, KH, KW"),
        ("conv_wgrad_adam", WGRAD_ADAM, 3, LAST.bfloat16(), "got param .* BFloat16 .*, expected Float or Double"),
        ("conv_wgrad_adam", WGRAD_ADAM, 3, SLICE, "got param .*, expected all three of the same strides"),
        ("conv_wgrad_adam", WGRAD_ADAM, 4, SLICE, "got param .*, exp_avg .*, expected all three of the same strides"),
        ("conv_wgrad_adam", WGRAD_ADAM, 5, LAST.double(), "got exp_avg_sq .* Double .*, expected .* Float"),
        ("conv_wgrad_adam", WGRAD_ADAM, 5, LAST[:4], r"got exp_avg_sq \(4, 3, 4, 4\) .*, expected \(5, 3, 4, 4\)"),
        ("conv_wgrad_adam", WGRAD_ADAM, 6, zeros(1), r"got lr \(1\)"),
        ("conv_wgrad_adam", WGRAD_ADAM, 13, SLICE.bfloat16()[:, :, :, :3], "got low_precision .*"),
        ("conv_wgrad_adam", WGRAD_ADAM, 13, LAST, "got low_precision .* Float .*, expected .* BFloat16"),
        (
            "conv_wgrad_adam",
            WGRAD_ADAM,
            13,
            zeros(5, 6, 6, 3, dtype=HALF).permute(0, 3, 1, 2)[:, :, 1:5, 1:5],
            "got low_precision .*, expected channels_last, without gaps",
        ),
        ("conv_wgrad_adam", WGRAD_ADAM, 0, zeros(2, 5, 3, 2), r"got outer \(2, 5, 3, 2\)"),
        (
            "conv",
            (X.long(), *DOWN[1:]),
            1,
            WEIGHT.long(),
            "got x .* Long .*, expected .* Float, BFloat16, Half or Double",
        ),
        ("conv_wgrad", (OUT.long(), *WGRAD[1:]), 2, X.long(), "got outer .* Long .*, expected .* Float, BFloat16"),
    ],
)
def test_what_does_not_fit_is_told(operator: str, args: tuple[Any, ...], position: int, value: Any, message: str):
    with pytest.raises(RuntimeError, match=f"^{operator}: .*{message}"):
        getattr(torch.ops.fastp2p, operator)(*changed(args, position, value))


@pytest.mark.parametrize(
    ("operator", "args"),
    [
        ("norm_stats", (X, 1)),
        ("norm_act", NORM),
        ("norm_act_backward", (X, None, *NORM)),
        ("patch_loss", (X, X, 4, 0.0, 1.0, False)),
        ("adam", FLAT),
        ("augment", PAIRS),
        ("conv", DOWN),
        ("conv_transpose", UP),
        ("conv_wgrad", WGRAD),
        ("running_stats", RUNNING),
        ("advance", COUNTS),
        ("stack_pairs", STACK),
        ("conv_wgrad_adam", WGRAD_ADAM),
    ],
)
def test_what_the_cases_start_from_fits(operator: str, args: tuple[Any, ...]):
    getattr(torch.ops.fastp2p, operator)(*args)
