"""The launches of a training step on a GPU, counted without one: what each does, and which of them wait for which."""

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastp2p.engine.branch import Branch, told_to
from fastp2p.engine.record import NAMESPACE, Recorder, rehearse
from fastp2p.engine.step import Step
from fastp2p.errors import InputError
from fastp2p.ops import library

MAIN = "main"  # the chain that the step begins and ends on
# ATen's operators that launch nothing; views, as their schemas tell them, launch nothing either
ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias"}
OVERWRITE = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}  # change an argument without reading it


@dataclass(frozen=True)
class Launch:
    """One launch: a node of the step's CUDA graph."""

    part: str  # the step's
    name: str  # network, layer and direction, such as: netG e4 data gradient; "" between the operators
    operator: str  # ours that launches it; "" between the operators
    kernel: str  # file and name of a Triton kernel, or ATen's operator
    programs: int | None  # None for ATen's, as the next two
    iterations: int | None  # those of a program's loop, one after the other
    merges: int | None  # those of the last program to arrive, for what the others left
    n_bytes: int  # each tensor that it is given once, those that it updates twice
    flop: int  # the FLOPs of the operator's matrix product, at the launch that does it
    chain: str  # main, or the branch beside it
    depth: int  # launches that come one after the other up to this one, itself included
    after: tuple[int, ...]  # the numbers, from 0, of those that it waits for; what these wait for is not repeated
    config: dict[str, Any]  # tile, split, warps and stages of a Triton kernel
    gathers: bool  # it loads an operand of its product element by element
    sums: bool  # after its product come sums over pixels: statistics, or a norm's


@dataclass(frozen=True)
class LaunchCount:
    """The nodes of several launches."""

    nodes: int
    main: int  # those on the main chain
    beside: int  # those on branches
    longest: int  # the nodes of the longest dependent chain

    @classmethod
    def of(cls, launches: Sequence[Launch]) -> "LaunchCount":
        """The counts of a whole step."""
        main = sum(launch.chain == MAIN for launch in launches)
        longest = max((launch.depth for launch in launches), default=0)
        return cls(len(launches), main, len(launches) - main, longest)


def check_triton() -> None:
    """Raise InputError where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise InputError("launches: Triton is not installed, whose launchers say what is launched; pip install triton")


def h100() -> Any:
    """What an H100 tells launchers of itself, and an H200 as well: a `fastp2p.kernels.ahead.Target`."""
    return importlib.import_module("fastp2p.kernels.ahead").H100


def count_launches(step: Step, images: int, target: Any = None) -> list[Launch]:
    """The launches of a step of so many images in their order, the augmentation's first.

    The step's twin runs on the meta device and each operator's Triton launcher runs in it: launches are noted and not
    done. Tiles are those of the rule, which takes what was never measured. An operator that CUDA C++ serves, `adam` or
    `augment`, has one launch in either language. Copies into the graph's inputs come before the step and do not count.

    Args:
        step: a fused one, on any device, in a dtype of 4 bytes or less; is left as it is.
        images: 1 or more.
        target: a `fastp2p.kernels.ahead.Target`; None: an H100.

    Raises:
        InputError: where Triton is not installed, on another step, dtype or number of images.
    """
    check_triton()
    if images < 1:
        raise InputError(f"launches: got {images} images, expected 1 or more")
    if not step.networks:
        raise InputError("launches: got a step in autograd, expected a fused one, whose launches it can note")
    if step.dtype == torch.float64:
        raise InputError(
            "launches: got a step in float64, which PyTorch computes; expected float32 or a lower precision"
        )
    notes = _Notes()

    @contextmanager
    def watch(recorder: Recorder) -> Iterator[None]:
        notes.recorder = recorder
        noting = importlib.import_module("fastp2p.kernels.launches").noting
        with noting(target or h100(), notes.kernel), told_to(notes), notes:
            yield

    return notes.launches(rehearse(step, images, watch))


class _Notes(TorchDispatchMode):
    """Notes launches: our operators go to Triton's launchers, whose kernels come to `kernel`, and ATen's are its own.

    It also keeps count of what waits for what, as `engine.branch` tells it.
    """

    recorder: Recorder

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[int | None, bool, dict[str, Any]]] = []  # number of the call, multiplies, the rest
        self.call: int | None = None  # the number of the operator's call that is being launched
        self.names: dict[Branch | None, str] = {None: MAIN}
        self.ends: dict[Branch | None, dict[int, None]] = {None: {}}  # the launches that the next one waits for
        self.chains: list[Branch | None] = [None]  # the current one last

    def fork(self, branch: Branch) -> None:
        self.names.setdefault(branch, f"branch {len(self.names)}")
        self.ends[branch] = self.ends.get(branch, {}) | self.ends[self.chains[-1]]
        self.chains.append(branch)

    def back(self) -> None:
        self.chains.pop()

    def join(self, branch: Branch) -> None:
        current = self.chains[-1]
        self.ends[current] = self.ends[current] | self.ends.get(branch, {})

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == NAMESPACE:
            self.call = len(self.recorder.calls)
            with self:
                library.launch(func._schema.name.partition("::")[2], None, args)
            self.call = None
            return func(*args, **kwargs)  # the recorder notes the call
        if func.namespace == "aten":
            with self:  # contiguous, to and their like consist of other operators: those launch, or none does
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if func.namespace == "aten" and _launches(func, args, result):
            self._note(func._schema.name, n_bytes=_aten_bytes(func, args, kwargs, result))
        return result

    def kernel(self, launch: Any) -> None:
        """Note a `KernelLaunch`."""
        self._note(launch.name, multiplies=launch.facts.multiplies, **told_by(launch))

    def _note(self, kernel: str, *, multiplies: bool = False, **told: Any) -> None:
        current, number = self.chains[-1], len(self.noted)
        after = tuple(self.ends[current])
        depth = 1 + max((self.noted[i][2]["depth"] for i in after), default=0)
        self.ends[current] = {number: None}
        nothing: dict[str, Any] = {"programs": None, "iterations": None, "merges": None, "config": {}}
        nothing |= {"gathers": False, "sums": False}
        where = {"part": self.recorder.part, "chain": self.names[current], "depth": depth, "after": after}
        self.noted.append((self.call, multiplies, {"kernel": kernel} | nothing | told | where))

    def launches(self, recorder: Recorder) -> list[Launch]:
        """What was noted, each with what its operator was called for."""
        calls, found, multiplied = recorder.calls, [], set[int]()
        for number, multiplies, told in self.noted:
            call = None if number is None else calls[number]
            flop = 0
            if call is not None and number is not None and multiplies and number not in multiplied:
                multiplied.add(number)
                flop, _ = library.cost_of(call.operator, call.args, call.results)
            name, operator = ("", "") if call is None else (call.name, call.operator)
            found.append(Launch(name=name, operator=operator, flop=flop, **told))
        return found


def told_by(launch: Any) -> dict[str, Any]:
    """What a `KernelLaunch` itself tells for a `Launch`: its programs, iterations, merges, bytes and configuration."""
    facts, args = launch.facts, launch.arguments
    left_alone = {name for name, constant in facts.only_with.items() if not args[constant]}
    tensors = [value for name, value in args.items() if name not in left_alone]
    return {
        "programs": launch.programs,
        "iterations": int(facts.iterations(args)),
        "merges": int(facts.merges(args)),
        "n_bytes": _bytes(tensors) + sum(_bytes([args[name]]) for name in facts.updates if name not in left_alone),
        "config": launch.config,
        "gathers": not args.get("WHOLE_BLOCKS", True),
        "sums": bool(facts.multiplies and args.get("HAS_STATS")),
    }


def _launches(func: Any, args: tuple[Any, ...], result: Any) -> bool:
    """Whether an operator of ATen's launches a kernel, or a copy by the GPU's copy engine."""
    name = func._schema.name.partition("::")[2]
    if func.is_view or name in ALLOCATE:
        return False
    if name == "copy_" and _place(args[0]) == _place(args[1]):  # onto itself, which PyTorch leaves out
        return False
    outputs = [t for t in tree_leaves((result, args)) if isinstance(t, Tensor)]
    return any(tensor.numel() for tensor in outputs)


def _aten_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """What an operator of ATen's reads, each tensor once, and what it writes."""
    overwrites = func._schema.name.partition("::")[2] in OVERWRITE
    read, written = [], [result, kwargs.get("out")]
    for argument, value in zip(func._schema.arguments, args, strict=False):
        changed = argument.alias_info is not None and argument.alias_info.is_write
        written += [value] if changed else []
        read += [] if changed and overwrites else [value]
    read += [value for name, value in kwargs.items() if name != "out"]
    return _bytes(tree_leaves(read)) + _bytes(tree_leaves(written))


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same memory."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _bytes(values: Sequence[Any]) -> int:
    """Those of the distinct tensors among them."""
    tensors = {_place(value): value for value in values if isinstance(value, Tensor)}
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
