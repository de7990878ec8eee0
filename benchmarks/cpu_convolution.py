"""Each layer's convolutions on the CPU by matrix product and by ATen, to see whether C++ chooses the better.

python benchmarks/cpu_convolution.py --dtype bfloat16 --batch 4
"""

import argparse
import importlib
from collections.abc import Callable
from functools import partial

import torch
from cpu_parts import DIRECTIONS, Convolved, convolved_layers
from harness.stopwatch import elapsed_ms
from torch import nn

CPU = torch.device("cpu")
ROUNDS = 5
ALGORITHMS = ("direct", "gemm", "auto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default float32")
    parser.add_argument("--batch", type=int, default=1, help="images; default 1")
    args = parser.parse_args()
    layers = convolved_layers(args.batch, getattr(torch, args.dtype))
    print(f"{'layer':<34}{'direction':<18}" + "".join(f"{name + ' ms':>12}" for name in ALGORITHMS))
    totals = dict.fromkeys((*ALGORITHMS, "the better of the two"), 0.0)
    for direction, (_, ours) in DIRECTIONS.items():
        measured = {algorithm: times(layers, ours, algorithm) for algorithm in ALGORITHMS}
        for i, layer in enumerate(layers):
            row = {algorithm: measured[algorithm][i] for algorithm in ALGORITHMS}
            print(f"{describe(layer):<34}{direction:<18}" + "".join(f"{ms:12.3f}" for ms in row.values()))
            row["the better of the two"] = min(row["direct"], row["gemm"])
            totals = {name: total + row[name] for name, total in totals.items()}
    print("\n".join(f"{name:<24}{total:10.1f} ms" for name, total in totals.items()))


def times(layers: list[Convolved], ours: Callable[[Convolved], object], algorithm: str) -> list[float]:
    """Milliseconds of each layer, the least of ROUNDS. A round goes through them all, so no weight is in the cache."""
    force = importlib.import_module("fastp2p._C").force_convolution
    force(algorithm)
    samples: list[list[float]] = [[] for _ in layers]
    for _ in range(ROUNDS + 1):
        for layer, list_ in zip(layers, samples, strict=True):
            list_.append(elapsed_ms(partial(ours, layer), CPU))
    force("auto")
    return [min(list_[1:]) for list_ in samples]


def describe(layer: Convolved) -> str:
    kind = "conv_transpose" if isinstance(layer.module, nn.ConvTranspose2d) else "conv"
    return f"{kind} {tuple(layer.x.shape[1:])} -> {tuple(layer.dy.shape[1:])}"


if __name__ == "__main__":
    main()
