"""The convolutions of unet_256 and of the 70x70 PatchGAN, for whoever compiles or times the kernels on real shapes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fastp2p.conv_shape import ConvShape
from fastp2p.kernels.compile_check import HALF, TWO_PROGRAMS, Case

# A kernel's integer arguments that say where pixels lie. Launches do not specialise on them: whether a side is 1 or a
# multiple of 16 helps no program, and every layer would be compiled anew.
GEOMETRY = ["pixels", "rows", "tiles", "share", "images", "height", "width", "out_height", "out_width"]
GEOMETRY += ["outer_height", "outer_width", "layer"]

# The pointers of what an epilogue leaves in float32 beside its result
STATS_TYPES = {"partial_ptr": "*fp32", "mean_ptr": "*fp32", "var_ptr": "*fp32", "counter_ptr": "*i32"}

# What follows a GEMM: nothing (data gradients), a bias, statistics (before a norm), an activation, or the derivative of
# the activation before; or for data gradients the way into a normalised layer before. The numbers are those of
# fastp2p.kernels.activation.
_NO_NORM = {"HAS_NORM": 0, "HAS_AFFINE": 0, "SECOND": -1, "DROP_BELOW": 0}
_NOTHING = {"ACTIVATION": 0, "HAS_BIAS": 0, "HAS_GATE": 0, "HAS_STATS": 0} | _NO_NORM
_NORM = _NOTHING | {"HAS_STATS": 1, "HAS_NORM": 1, "HAS_AFFINE": 1}
EPILOGUES = {
    "plain": _NOTHING,
    "bias": _NOTHING | {"HAS_BIAS": 1},
    "stats": _NOTHING | {"HAS_STATS": 1},
    "bias stats": _NOTHING | {"HAS_BIAS": 1, "HAS_STATS": 1},
    "relu": _NOTHING | {"ACTIVATION": 1},
    "lrelu": _NOTHING | {"ACTIVATION": 2},
    "bias relu": _NOTHING | {"ACTIVATION": 1, "HAS_BIAS": 1},
    "bias lrelu": _NOTHING | {"ACTIVATION": 2, "HAS_BIAS": 1},
    "bias tanh": _NOTHING | {"ACTIVATION": 3, "HAS_BIAS": 1},
    "gate relu": _NOTHING | {"ACTIVATION": 1, "HAS_GATE": 1},
    "gate lrelu": _NOTHING | {"ACTIVATION": 2, "HAS_GATE": 1},
    "gate tanh": _NOTHING | {"ACTIVATION": 3, "HAS_GATE": 1},
    "norm lrelu": _NORM | {"ACTIVATION": 2},
    "norm lrelu+relu": _NORM | {"ACTIVATION": 2, "SECOND": 1},
    "norm relu": _NORM | {"ACTIVATION": 1},
    "norm dropout": _NORM | {"ACTIVATION": 1, "DROP_BELOW": 2**31},
    "no norm lrelu": _NOTHING | {"HAS_NORM": 1, "HAS_STATS": 1, "ACTIVATION": 2},
    "no norm lrelu+relu": _NOTHING | {"HAS_NORM": 1, "ACTIVATION": 2, "SECOND": 1},
}
# The types of what the way into a norm takes, but for addend_ptr, which has the matrices'
GATE_TYPES = {
    **dict.fromkeys(("gate_mean_ptr", "gate_var_ptr", "gate_weight_ptr", "gate_bias_ptr"), "*fp32"),
    "rng_ptr": "*i64",
    **dict.fromkeys(("first", "addend_stride", "layer"), "i32"),
    **dict.fromkeys(("eps", "keep_scale"), "fp32"),
}


@dataclass(frozen=True)
class Layer:
    """A convolution or transposed convolution of one image, with what follows it."""

    name: str
    transposed: bool
    shape: ConvShape
    epilogue: str  # the forward pass's, a key of EPILOGUES
    gradients: tuple[str, ...] = ("plain",)  # the data gradient's: a gate after an activation without a norm
    others: tuple[str, ...] = ()  # epilogues of the forward pass in other models: biases, norms folded away

    @property
    def forward(self) -> tuple[str, ...]:
        """Every epilogue of the forward pass."""
        return (self.epilogue, *self.others)

    @property
    def window(self) -> dict[str, int]:
        """The kernels' compile-time arguments that every direction has."""
        (height, width), shape = self.shape.kernel, self.shape
        return {"KH": height, "KW": width, "STRIDE": shape.stride, "PADDING": shape.padding}


def _shape(outer: int, outer2: int, inner: int, side: int, stride: int = 2) -> ConvShape:
    """A 4x4 convolution of padding 1 between square maps; side: the large ones', in pixels."""
    return ConvShape.between(inner, (side, side), outer, outer2=outer2, k=4, stride=stride, padding=1)


FOLDED = ("bias stats", "bias relu", "bias lrelu")  # tried on two layers of the middle


def _unet_256() -> list[Layer]:
    widths = [3, 64, 128, 256, 512, 512, 512, 512, 512]
    layers = []
    for level in range(1, 9):
        shape = _shape(widths[level], 0, widths[level - 1], 256 >> (level - 1))
        epilogue = {1: "lrelu", 8: "relu"}.get(level, "stats")  # the outermost and the innermost have no norm
        gradient = {1: "plain", 2: "no norm lrelu+relu"}.get(level, "norm lrelu+relu")
        layers.append(Layer(f"e{level}", False, shape, epilogue, (gradient,), FOLDED if level == 4 else ()))
    for level in range(8, 0, -1):
        skip = widths[level] if level < 8 else 0
        shape = _shape(widths[level], skip, widths[level - 1], 256 >> (level - 1))
        epilogue = "bias tanh" if level == 1 else "stats"
        gradient = {8: "gate relu", **dict.fromkeys((6, 5, 4), "norm dropout")}.get(level, "norm relu")
        layers.append(Layer(f"d{level}", True, shape, epilogue, (gradient,), FOLDED if level == 4 else ()))
    return layers


def _patchgan() -> list[Layer]:
    return [
        Layer("D1", False, _shape(64, 0, 6, 256), "bias lrelu"),
        # With the gradient of the bias before, or without
        Layer("D2", False, _shape(128, 0, 64, 128), "stats", ("no norm lrelu", "gate lrelu")),
        Layer("D3", False, _shape(256, 0, 128, 64), "stats", ("norm lrelu",)),
        Layer("D4", False, _shape(512, 0, 256, 32, stride=1), "stats", ("norm lrelu",)),
        Layer("D5", False, _shape(1, 0, 512, 31, stride=1), "bias", ("norm lrelu",)),
    ]


LAYERS = [*_unet_256(), *_patchgan()]


def may_split(config: dict[str, int]) -> bool:
    """A sum is split over programs for want of tiles; large tiles would only make fewer."""
    return config["BLOCK_M"] * config["BLOCK_N"] <= 128 * 64


def fitting(config: dict[str, int], epilogue: dict[str, int], *, transposed: bool) -> dict[str, int]:
    """A tile whose registers hold the epilogue too, and two programs of eight warps a processor where they can.

    Tiles of 128 x 256 spill in conv_transpose, and on the way into a norm: they are halved. A dropout or a second
    gradient makes those of 128 x 128 spill by a kilobyte: they are halved as well, and those of 64 x 64 have eight
    warps there. A program alone on its processor leaves it idle during its epilogue: on an H200 statistics made e2's
    forward pass of 64 images 2.5 times as long, by a tile that lost its neighbour to them.

    Args:
        epilogue: its compile-time arguments.
        transposed: whether the kernel is conv_transpose's, which needs more registers.
    """
    more = epilogue["HAS_NORM"] or (epilogue["HAS_BIAS"] and epilogue["HAS_STATS"])
    if config["BLOCK_N"] == 256 and (more or transposed):
        config = config | HALF
    m, n = config["BLOCK_M"], config["BLOCK_N"]
    plain = config["BLOCK_K"] >= 64 and config.get("SPLIT", 1) == 1  # neither gathered nor float32 nor split
    drops, second = epilogue["DROP_BELOW"] > 0, epilogue["SECOND"] >= 0
    if drops or second:
        if m * n > 128 * 64:
            return config | {"BLOCK_N": 64}
        if m == n == 64:
            config = config | {"num_warps": 8}
            return config if drops or not plain else config | TWO_PROGRAMS
        return config
    many = more or n == 256 or (transposed and m * n > 128 * 64)
    return config | TWO_PROGRAMS if config["num_warps"] == 8 and plain and not many else config


# All layers are compiled in bfloat16. In float32 one of each kind is: the others differ from them in no more than which
# sizes are multiples of 16. float16 takes the way of bfloat16 and TF32 that of float32, each with another instruction.
FLOAT32_LAYERS = ("e1", "e2", "e4", "e8", "d8", "d4", "d1", "D1", "D4", "D5")
FLOAT16_AND_TF32_LAYERS = ("e1", "e4", "d4", "D5")


SPLIT_CASE = 4  # over so many programs compile_cases split sums


def _fitted(tiles: list[dict[str, int]], kernel: str, constants: dict[str, int], split: int) -> list[dict[str, int]]:
    """The tiles as a launch takes them; weight gradients have no such epilogues."""
    if "HAS_NORM" not in constants:
        return tiles
    fitted = (fitting(tile | {"SPLIT": split}, constants, transposed=kernel == "conv_transpose") for tile in tiles)
    return [{name: value for name, value in tile.items() if name != "SPLIT"} for tile in fitted]


def gemm_cases(
    layer: Layer,
    kernel: Any,
    pointers: list[str],
    sizes: dict[str, int],
    constants: dict[str, int],
    tiles: Callable[[int], list[dict[str, int]]],
    whole_blocks: Callable[[dict[str, int]], bool],
    *,
    more_types: dict[str, str] | None = None,
) -> Iterator[Case]:
    """A layer's product as a launch would compile it, in the dtypes that the layer stands for.

    bias_ptr is float32, as autocast and folded norms have it.

    Args:
        kernel: a triton.jit function.
        pointers: its arguments of the matrices' dtype. Where the sum is split, the result out_ptr is float32.
        sizes: those of its integer arguments that a launch specialises on.
        constants: its compile-time arguments but the tile's.
        tiles: the candidates for matrices of an itemsize.
        whole_blocks: whether a tile's blocks have one tap each.
        more_types: of other arguments. With SPLIT among the kernel's arguments both ways are compiled.
    """
    name = kernel.__name__.strip("_").removesuffix("_kernel")
    rare = layer.name in FLOAT16_AND_TF32_LAYERS
    dtypes = ["bf16"] + ["fp16"] * rare + ["fp32"] * (layer.name in FLOAT32_LAYERS)
    for dtype in dtypes:
        itemsize = 4 if dtype == "fp32" else 2
        whole, split = (_fitted(tiles(itemsize), name, constants, split) for split in (1, SPLIT_CASE))
        configs = [config | {"WHOLE_BLOCKS": whole_blocks(config)} for config in whole]
        small = [config | {"WHOLE_BLOCKS": whole_blocks(config)} for config in split if may_split(config)]
        types = dict.fromkeys((*GEOMETRY, *sizes), "i32") | dict.fromkeys(pointers, f"*{dtype}")
        types |= (
            STATS_TYPES
            | GATE_TYPES
            | {"bias_ptr": "*fp32", "workspace_ptr": "*fp32", "slope": "fp32"}
            | (more_types or {})
        )
        for precision in ["ieee"] + ["tf32"] * (rare and dtype == "fp32"):
            label = f"{name} {layer.name} {dtype}{' tf32' * (precision == 'tf32')}"
            flags = constants | {"PRECISION": precision}
            if "SPLIT" not in kernel.arg_names:
                yield Case(label, kernel, types, flags, configs, sizes, itemsize)
                continue
            yield Case(label, kernel, types, flags | {"SPLIT": 1}, configs, sizes, itemsize)
            if precision == "tf32" or dtype == "fp16":
                continue  # what differs, the plain float32 store, is that of the other dtypes
            split_types = types
            if "workspace_ptr" not in kernel.arg_names:
                split_types = types | {"out_ptr": "*fp32"}
            yield Case(f"{label} split", kernel, split_types, flags | {"SPLIT": SPLIT_CASE}, small, sizes, itemsize)
