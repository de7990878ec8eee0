"""Which Triton programs a training step takes, told without a launch: so that they are compiled before it, in parallel.

The step runs on meta tensors, which have shapes and no values; the operators' launchers run as they are.
"""

import copy
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastp2p.engine.calls import CONVOLUTIONS
from fastp2p.engine.operations import Noise, Operation
from fastp2p.engine.step import FusedStep
from fastp2p.ops import _library
from fastp2p.ops._choices import Choice

META = torch.device("meta")
Serves = Callable[[str], bool]  # whether Triton serves an operator


def on_meta(step: FusedStep) -> FusedStep:
    """The same step without values."""
    netG, netD = (_net_on_meta(net) for net in step.nets)
    optimizers = []
    for net, of in ((netG, step.netG), (netD, step.netD)):
        betas = (of.arena.beta1, of.arena.beta2)
        optimizers.append(torch.optim.Adam(net.parameters(), betas=betas, eps=of.arena.eps))
    twin = FusedStep(
        *(netG, netD, *optimizers),
        size=step.size,
        dtype=step.dtype,
        lambda_L1=step.lambda_L1,
        reduce=None if step.reduce is None else lambda gradients: None,
        skip_dead_taps=step.skip_dead_taps,
    )
    twin.objective = step.objective
    return twin


def _net_on_meta(net: nn.Module) -> Any:
    """A copy whose parameters and buffers were never copied."""
    known: dict[int, Any] = {}
    for parameter in net.parameters():
        known[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=META))
    for buffer in net.buffers():
        known[id(buffer)] = torch.empty_like(buffer, device=META)
    return copy.deepcopy(net, known)


def launch_step(step: FusedStep, images: int, *, serves: Serves, candidates: bool = False) -> None:
    """Launch everything that a step of so many images launches, for `fastp2p.kernels.ahead.recording` to note.

    Args:
        step: of `on_meta`.
        images: of a batch.
        serves: the other operators launch nothing.
        candidates: launch each convolution by every kernel that the tuner may choose for it, and not by rule.
    """
    with torch._C._AutoDispatchBelowAutograd(), _Launches(serves, candidates):
        real_A, real_B = (
            torch.empty(images, channels, *step.size, device=META).contiguous(memory_format=torch.channels_last)
            for channels in step.channels
        )
        step._step(real_A, real_B)


def launch_augment(step: FusedStep, images: int, pair_sizes: Sequence[tuple[int, int]], *, serves: Serves) -> None:
    """Launch what cuts a batch out of pairs of these (height, width), as a graph does."""
    with torch._C._AutoDispatchBelowAutograd(), _Launches(serves, False):
        for height, width in pair_sizes:
            pairs = torch.empty(images, height, width, sum(step.channels), dtype=torch.uint8, device=META)
            index, offset = (torch.empty(images, *shape, dtype=torch.int64, device=META) for shape in ((), (2,)))
            flip = torch.empty(images, dtype=torch.bool, device=META)
            torch.ops.fastp2p.augment(pairs, index, offset, flip, step.size[0], step.channels[0])


def launch_tuner(operations: Sequence[Operation]) -> None:
    """Launch everything that the tuner times of these operations, on operands as it makes them."""
    noise = Noise(META)
    for operation in operations:
        args, name = operation.operands(noise), operation.problem.operator
        for choice in candidates_of(name, args):
            _library.launch(name, choice, args)


def candidates_of(operator: str, args: tuple[Any, ...]) -> list[Choice]:
    """What is worth timing on a GPU for a convolution's arguments, the rule's choice first."""
    candidates = importlib.import_module("fastp2p.kernels.candidates")
    return [*candidates.candidates(candidates.product_of(operator, args)), "aten"]


class _Launches(TorchDispatchMode):
    """Sends operators to Triton's launchers, whatever their device."""

    def __init__(self, serves: Serves, candidates: bool):
        super().__init__()
        self.serves, self.candidates = serves, candidates

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor | Any:
        namespace, _, name = func.name().partition("::")
        if namespace != "fastp2p" or not self.serves(name):
            return func(*args, **(kwargs or {}))
        if not (self.candidates and name in CONVOLUTIONS):
            return _library.launch(name, None, args)
        results = [_library.launch(name, choice, args) for choice in candidates_of(name, args)]
        return results[0]
