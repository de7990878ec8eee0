"""Which configurations of a GEMM's kernel are worth timing for an operator's arguments, and which is the rule's."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import PTXASError

from fastp2p.kernels import conv_wgrad_adam, gemm
from fastp2p.kernels.layer_shapes import may_split

Config = dict[str, int]
# What refuses a configuration: the launcher, Triton itself, and the assembler behind it
CANNOT = (triton.OutOfResources, triton.CompilationError, PTXASError)
MOST = 8  # configurations of a problem: each is compiled before it is timed, in about a second


@dataclass(frozen=True)
class Product:
    """`products` GEMMs of (m, k) x (k, n), as the launchers see an operator's arguments."""

    m: int
    n: int
    k: int
    like: Tensor
    whole: bool  # gemm.is_whole of what is gathered
    products: int = 1
    largest: int = 128 * 128  # tile, in elements
    may_split: bool = True  # over several programs
    param: Tensor | None = None  # the weight that conv_wgrad_adam updates


def product_of(operator: str, args: tuple[Any, ...]) -> Product:
    """The GEMMs behind conv, conv_transpose, conv_wgrad or conv_wgrad_adam of these arguments."""
    if operator == "conv":
        x, weight, _, _, stride, padding, *_ = args
        (n, n_in, height, width), (n_out, _, kh, kw) = x.shape, weight.shape
        out_sides = [(side + 2 * padding - k) // stride + 1 for side, k in ((height, kh), (width, kw))]
        return Product(n * out_sides[0] * out_sides[1], n_out, kh * kw * n_in, x, gemm.is_whole(n_in))
    if operator == "conv_transpose":
        x, x2, weight, _, _, stride, _, height, width, *_ = args
        channels = [x.shape[1], 0 if x2 is None else x2.shape[1]]
        (_, n_out, kh, kw), phases = weight.shape, stride * stride
        pixels = len(x) * triton.cdiv(height, stride) * triton.cdiv(width, stride)
        k = triton.cdiv(kh, stride) * triton.cdiv(kw, stride) * sum(channels)
        return Product(pixels, n_out, k, x, gemm.is_whole(*channels), phases)
    outer, outer2, inner, *rest = args
    rows = outer.shape[1] + (0 if outer2 is None else outer2.shape[1])
    pixels, n_inner = outer.numel() // outer.shape[1], inner.shape[1]
    if operator == "conv_wgrad":
        return Product(rows, rest[0] * rest[1] * n_inner, pixels, inner, gemm.is_whole(n_inner))
    param = rest[0]
    columns = param[0].numel()
    largest, may_split = conv_wgrad_adam.largest_tile(param), not conv_wgrad_adam.is_sliced(param)
    return Product(rows, columns, pixels, inner, gemm.is_whole(n_inner), 1, largest, may_split, param)


def by_rule(product: Product) -> Config:
    """What a launch takes that is given no configuration."""
    m, n, k, like = product.m, product.n, product.k, product.like
    config: Config
    if product.param is not None:
        config = conv_wgrad_adam.choose_config(m, n, k, product.param, like)
    else:
        config = gemm.choose_config(m, n, k, like, whole=product.whole, products=product.products)
    return config


def candidates(product: Product) -> list[Config]:
    """The rule's own first, then other splits of its sum, and other tiles, split until each processor has a program."""
    rule = by_rule(product)
    limit, processors = gemm.SHARED_BYTES_WHEN_INTERPRETED, gemm.PROCESSORS_WHEN_INTERPRETED
    if product.like.is_cuda:
        properties = torch.cuda.get_device_properties(product.like.device)
        processors = properties.multi_processor_count
        limit = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    found = [rule]
    for split in (1, rule["SPLIT"] // 2, rule["SPLIT"] * 2):
        if 1 <= split <= _most_splits(product, rule):
            found.append(rule | {"SPLIT": split})
    tiles = gemm.candidates(
        product.m,
        product.n,
        product.like.dtype.itemsize,
        whole=product.whole,
        largest=product.largest,
        shared_limit=limit,
    )
    for tile in tiles:
        programs = product.products * triton.cdiv(product.m, tile["BLOCK_M"]) * triton.cdiv(product.n, tile["BLOCK_N"])
        full = triton.cdiv(processors, programs)
        if {**rule, "SPLIT": 1} != {**tile, "SPLIT": 1}:
            found.append(tile | {"SPLIT": min(full, _most_splits(product, tile))})
    return [config for i, config in enumerate(found) if config not in found[:i]][:MOST]


def _most_splits(product: Product, config: Config) -> int:
    """The most parts that a sum is split into, each of LEAST_BLOCKS / 2 blocks at least."""
    if not (product.may_split and may_split(config)):
        return 1
    blocks = product.k // config["BLOCK_K"]
    return max(1, 2 * blocks // int(gemm.LEAST_BLOCKS))
