"""Which kernel computes a convolution where several can: chosen by measurement, kept in one file for each device.

A choice is, on a CPU, "gemm" (our matrix product) or "direct" (ATen's convolution); on a GPU "aten" (ATen's convolution
and a pass for what follows it) or the configuration of our Triton kernel. `fastp2p.tuner.contest` measures and
installs; here is the table. A CPU's lies in C++, from its file at import; a GPU's is read when the first convolution
asks for it. So the layers of fastp2p.nn are served by it as well. A problem that is not in it goes by rule.
"""

import importlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastp2p.conv_shape import CONVOLUTIONS, ConvShape
from fastp2p.environment import cpu_model, installed_version, slug
from fastp2p.errors import WriteError
from fastp2p.files import is_there, read_small, write_atomically
from fastp2p.ops.extension import INTERPRETED, WHY_ABSENT

FORMAT = 1  # the file's
MOST_MS = 1e9  # a candidate takes less: this is twelve days
CPU_CHOICES = ("gemm", "direct")
Choice = str | dict[str, int]

_KEY = r"(\w+) (\w+) (N)px (N)\+(N)-(N) (N)x(N)s(N)".replace("N", r"\d{1,15}")
_RENAMED = {"down": "conv", "up": "conv_transpose", "wgrad": "conv_wgrad", "wgrad_adam": "conv_wgrad_adam"}


class Problem(NamedTuple):
    """What decides how fast a convolution's kernels are."""

    operator: str  # conv, conv_transpose, conv_wgrad or conv_wgrad_adam
    dtype: torch.dtype  # the operands'
    pixels: int  # this and what follows are its ConvShape's
    outer: int
    outer2: int
    inner: int
    kernel_height: int
    kernel_width: int
    stride: int

    @classmethod
    def of(cls, operator: str, dtype: torch.dtype, shape: ConvShape) -> "Problem":
        return cls(operator, dtype, shape.pixels, shape.outer, shape.outer2, shape.inner, *shape.kernel, shape.stride)

    @property
    def key(self) -> str:
        """For a file: conv bfloat16 16384px 64+0-3 4x4s2."""
        dtype = str(self.dtype).removeprefix("torch.")
        channels = f"{self.outer}+{self.outer2}-{self.inner}"
        window = f"{self.kernel_height}x{self.kernel_width}s{self.stride}"
        return f"{self.operator} {dtype} {self.pixels}px {channels} {window}"

    @classmethod
    def parse(cls, key: str) -> "Problem":
        """The problem of a key. Raises ValueError."""
        match = re.fullmatch(_KEY, key)
        dtype = getattr(torch, match[2], None) if match else None
        operator = _RENAMED.get(match[1], match[1]) if match else None
        if match is None or operator not in CONVOLUTIONS or not isinstance(dtype, torch.dtype):
            raise ValueError(f"{key!r} is no problem")
        return cls(operator, dtype, *map(int, match.groups()[2:]))


class Measured(NamedTuple):
    """A choice, and the milliseconds of each candidate that it was made from, by name."""

    choice: Choice
    rule: str = ""  # name of what would serve without
    ms: dict[str, float] = {}  # noqa: RUF012 (never written to)


Table = dict[Problem, Measured]


class Place(NamedTuple):
    """A device as choices depend on it."""

    device_type: str  # cpu, cuda, or triton-interpreted
    number: int  # a CPU's threads, or a GPU's index

    @property
    def name(self) -> str:
        """For people and file names."""
        if self.device_type == "cuda":
            return torch.cuda.get_device_name(self.number)
        if self.device_type == "cpu":
            return f"{cpu_model()} {torch.backends.cpu.get_cpu_capability()} {self.number} threads"
        return self.device_type

    @property
    def environment(self) -> str:
        """The place and the versions that a choice holds for."""
        packages = ("torch", "triton", "fastp2p")
        versions = (f"{package}{installed_version(package) or 'none'}" for package in packages)
        return "-".join(map(slug, (self.name, *versions)))


def place_of(device: torch.device) -> Place:
    if INTERPRETED:
        return Place("triton-interpreted", 0)
    if device.type == "cpu":
        return Place("cpu", torch.get_num_threads())
    return Place("cuda", torch.cuda.current_device() if device.index is None else device.index)


def name_of(choice: Choice) -> str:
    """A choice in a word: gemm, 128x64x32-split2-warps8-stages3."""
    if isinstance(choice, str):
        return choice
    tile = "x".join(str(choice[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    return f"{tile}-split{choice['SPLIT']}-warps{choice['num_warps']}-stages{choice['num_stages']}"


_tables: dict[Place, Table] = {}


def table(place: Place) -> Table:
    """The choices in force, from the place's file where none were installed."""
    if place not in _tables:
        install(place, read_cache(place))
    return _tables[place]


def install(place: Place, choices: Table) -> None:
    """Let these choices, and no others, serve from now on in this process."""
    _tables[place] = dict(choices)
    if place.device_type == "cpu" and WHY_ABSENT is None:
        rows = [(p.operator, str(p.dtype).removeprefix("torch."), *p[2:], m.choice) for p, m in choices.items()]
        _extension().choose_convolutions(place.number, rows)


def forget() -> None:
    """Take the choices from the files again."""
    _tables.clear()
    if WHY_ABSENT is None:
        _extension().forget_convolutions()
        install_files()


def install_files() -> None:
    """Let the CPU's choices serve that the files hold, for each number of threads; C++ asks for none by itself."""
    folder = _folder()
    try:
        names = [] if folder is None else os.listdir(folder)
    except OSError:  # no folder yet, or one that may not be read: the tuner tells of it
        return
    for name in sorted(names):
        match = re.fullmatch(r"kernels-.*-(\d{1,4})-threads-.*\.json", name)
        place = Place("cpu", int(match[1])) if match else None
        path = cache_path(place) if place is not None else None
        if place is not None and path is not None and path.name == name:
            install(place, read_cache(place))


def _extension() -> Any:
    return importlib.import_module("fastp2p._C")


def cache_path(place: Place) -> Path | None:
    """The file of a place's choices; None where the user has no home folder, as in some containers."""
    folder = _folder()
    return None if folder is None else folder / f"kernels-{place.environment}.json"


def _folder() -> Path | None:
    try:
        return Path(os.environ.get("FASTP2P_CACHE") or Path.home() / ".cache" / "fastp2p")
    except RuntimeError:  # Path.home()
        return None


def read_cache(place: Place) -> Table:
    """The choices in the place's file; none where there is no file, or a damaged one, which is warned of."""
    path = cache_path(place)
    if path is None:  # add_to_cache warns of it
        return {}
    try:
        return from_json(read_small(path), place) if is_there(path) else {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{path}: cannot be used ({error}); kernels go by rule until they are tuned anew", stacklevel=2)
        return {}


def add_to_cache(place: Place, choices: Table) -> None:
    """Write choices into the place's file, beside those that are there; where that cannot be, it is warned of."""
    path = cache_path(place)
    if path is None:
        warnings.warn("no home folder, so kernels are tuned in every run; set FASTP2P_CACHE to a folder", stacklevel=2)
        return
    try:
        kept = from_json(read_small(path), place)
    except (OSError, ValueError):  # none yet, or said when it was read
        kept = {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, to_json(kept | choices, place))
    except (OSError, WriteError) as error:
        warnings.warn(f"{path}: cannot be written, so kernels are tuned in every run: {error}", stacklevel=2)


def to_json(choices: Mapping[Problem, Measured], place: Place) -> bytes:
    """The content of a file of choices."""
    rows = {problem.key: measured._asdict() for problem, measured in choices.items()}
    return json.dumps({"format": FORMAT, "environment": place.environment, "choices": rows}, indent=1).encode() + b"\n"


def environment_of(content: bytes) -> str:
    """The environment of what `to_json` wrote. Raises ValueError where it is damaged."""
    return str(_loaded(content)["environment"])


def from_json(content: bytes, place: Place) -> Table:
    """What `to_json` wrote. Raises ValueError where it is damaged, or of another place."""
    loaded = _loaded(content)
    if loaded["environment"] != place.environment:
        raise ValueError(f"it is for {loaded['environment']}, this is {place.environment}")
    try:
        found = {Problem.parse(key): Measured(**row) for key, row in loaded["choices"].items()}
    except (TypeError, AttributeError) as error:
        raise ValueError(f"it is damaged: {error!r}") from error
    for problem, measured in found.items():
        if not _is_choice(measured.choice, place):
            raise ValueError(f"it is damaged: {problem.key} has the choice {measured.choice!r:.60}")
        times = isinstance(measured.ms, dict) and all(map(_is_time, measured.ms.values()))
        if not isinstance(measured.rule, str) or not times:
            raise ValueError(
                f"it is damaged: {problem.key} was measured as {tuple(measured)!r:.200}, expected milliseconds of 0 or "
                "more for each candidate"
            )
    return found


def _loaded(content: bytes) -> dict[str, Any]:
    try:
        loaded = json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(loaded, dict) or not {"format", "environment", "choices"} <= loaded.keys():
        raise ValueError("it is no file of kernel choices")
    if (type(loaded["format"]), loaded["format"]) != (int, FORMAT):
        raise ValueError(f"it is of format {loaded['format']!r:.60}, this version reads {FORMAT}")
    if not isinstance(loaded["environment"], str):
        raise ValueError(f"it is damaged: its environment is {loaded['environment']!r:.60}, expected a text")
    return loaded


def _is_time(ms: object) -> bool:
    return type(ms) in (int, float) and 0 <= ms <= MOST_MS  # type: ignore[operator]  # which NaN is not, either


def _is_choice(choice: object, place: Place) -> bool:
    if place.device_type == "cpu":
        return choice in CPU_CHOICES
    if not isinstance(choice, dict):
        return choice == "aten"
    sizes = [choice.get(name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT", "num_warps", "num_stages")]
    return all(type(size) is int and 0 < size <= 1024 for size in sizes)


def chosen(operator: str, args: tuple[Any, ...]) -> Choice | None:
    """For a launch: what was chosen for an operator's arguments; None for the rule, and for other operators."""
    if operator not in CONVOLUTIONS:
        return None
    device = args[0].device
    choices = _tables.get(("cuda", device.index))  # type: ignore[call-overload]  # a Place in half the time
    if choices is None:
        choices = table(place_of(device))
    measured = choices.get(problem_of(operator, args))
    return None if measured is None else measured.choice


def problem_of(operator: str, args: tuple[Any, ...]) -> Problem:
    """The problem that an operator's arguments pose."""
    return Problem.of(operator, args[0].dtype, ConvShape.of(operator, args))


if WHY_ABSENT is None:
    install_files()
