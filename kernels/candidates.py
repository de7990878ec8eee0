"""Which configurations of a GEMM's kernel are worth timing for an operator's arguments, and which is the rule's."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import PTXASError

from fastp2p.conv_shape import ConvShape
from fastp2p.kernels import conv_wgrad_adam, fold, tile_rule
from fastp2p.kernels.layer_shapes import may_split
from fastp2p.norm_gate import NormGate

Config = dict[str, int]
# What refuses a configuration: the launcher, Triton itself, and the assembler behind it
CANNOT = (triton.OutOfResources, triton.CompilationError, PTXASError)
MOST = 9  # configurations of a problem: each is compiled before it is timed, in about a second


@dataclass(frozen=True)
class Product:
    """`products` GEMMs of (m, k) x (k, n), as the launchers see an operator's arguments."""

    m: int
    n: int
    k: int
    like: Tensor
    whole: int  # tile_rule.whole_block of what is gathered
    products: int = 1
    largest: int = tile_rule.LARGE  # tile, in elements
    may_split: bool = True  # over several programs
    param: Tensor | None = None  # the weight that conv_wgrad_adam updates
    few: Tensor | None = None  # the weight of a transposed convolution that fold is for


def product_of(operator: str, args: tuple[Any, ...]) -> Product:
    """The GEMMs behind conv, conv_transpose, conv_wgrad or conv_wgrad_adam of these arguments."""
    shape, like = ConvShape.of(operator, args), args[0]
    if operator == "conv":
        groups = max(1, args[8])  # those of statistics have tiles of their own
        whole = tile_rule.whole_block(shape.inner)
        into_norm, both = NormGate(*args[9:]).gate_mean is not None, args[2] is not None and args[8] > 0
        spills = into_norm or both or tile_rule.capability_of(like) != 90  # layer_shapes.fitting would halve it
        largest = tile_rule.LARGE if spills else tile_rule.LARGEST
        return Product(shape.pixels // groups, shape.outer, shape.columns, like, whole, groups, largest)
    if operator == "conv_transpose":
        groups = max(1, args[11])
        pixels = shape.images // groups * math.prod(triton.cdiv(side, shape.stride) for side in shape.large)
        k = shape.rows * math.prod(triton.cdiv(side, shape.stride) for side in shape.kernel)
        whole = tile_rule.whole_block(shape.outer, shape.outer2)
        product = Product(pixels, shape.inner, k, like, whole, products=groups * shape.stride**2)
        few = fold.is_for(args[2], shape.stride, shape.padding, args[11], NormGate(*args[12:]).gate_mean)
        return replace(product, few=args[2]) if few else product
    product = Product(shape.rows, shape.columns, shape.pixels, like, tile_rule.whole_block(shape.inner, most=64))
    if operator == "conv_wgrad":
        return product
    param = args[3]
    splits, largest = not conv_wgrad_adam.is_sliced(param), conv_wgrad_adam.largest_tile(param)
    return replace(product, largest=largest, may_split=splits, param=param)


def by_rule(product: Product) -> Config:
    """What a launch takes that is given no configuration."""
    m, n, k, like = product.m, product.n, product.k, product.like
    config: Config
    if product.few is not None:
        config = fold.config_for(like, product.few)
    elif product.param is not None:
        config = conv_wgrad_adam.choose_config(m, n, k, product.param, like)
    else:
        config = tile_rule.choose_config(m, n, k, like, whole=product.whole, products=product.products)
    return config


def candidates(product: Product) -> list[Config]:
    """The rule's own first, then other splits of its sum, and other tiles, split until each processor has a program."""
    rule = by_rule(product)
    limit, processors = tile_rule.SHARED_BYTES_WHEN_INTERPRETED, tile_rule.PROCESSORS_WHEN_INTERPRETED
    if product.like.is_cuda:
        properties = torch.cuda.get_device_properties(product.like.device)
        processors = properties.multi_processor_count
        limit = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    found = [rule]
    if product.few is not None:
        found.append(by_rule(replace(product, few=None)))  # by phases
    for split in (1, rule["SPLIT"] // 2, rule["SPLIT"] * 2):
        if 1 <= split <= _most_splits(product, rule):
            found.append(_split(product, rule, split))
    tiles = tile_rule.candidates(
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
            found.append(_split(product, tile, min(full, _most_splits(product, tile))))
    return [config for i, config in enumerate(found) if config not in found[:i]][:MOST]


def _split(product: Product, config: Config, split: int) -> Config:
    if "FOLD" not in config:
        split = tile_rule.parts_with_blocks(triton.cdiv(product.k, config["BLOCK_K"]), split)
    return config | {"SPLIT": split}


def _most_splits(product: Product, config: Config) -> int:
    """The most parts that a sum is split into, each of LEAST_BLOCKS / 2 blocks at least."""
    if "FOLD" in config or not product.may_split or (product.param is None and not may_split(config)):
        return 1
    blocks = product.k // config["BLOCK_K"]
    return max(1, 2 * blocks // int(tile_rule.LEAST_BLOCKS))
