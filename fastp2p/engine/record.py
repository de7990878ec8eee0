"""A step's calls, recorded: its twin runs on the meta device, where nothing is computed, and each operator is noted.

Whoever counts, tunes or estimates a step reads such a record, so a fact about the step is written once: as the code
that runs.
"""

import copy
import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastp2p.data import Crops
from fastp2p.engine.ranges import AUGMENT, part
from fastp2p.engine.step import Step
from fastp2p.ops.operands import Operand

META = torch.device("meta")
NAMESPACE = "fastp2p"


@dataclass(frozen=True)
class Call:
    """One call of an operator."""

    part: str  # the step's; "" outside of its parts
    direction: str  # forward, data gradient, ...: what the call is for; where nobody told, the operator's name
    operator: str
    images: int  # 0 where the call is for no images, such as Adam's
    net: str | None  # its name among the step's networks
    layer: str | None
    args: dict[str, Any]  # by their names in the schema, each tensor as an Operand
    results: tuple[Operand, ...]

    @property
    def name(self) -> str:
        """The network, the layer and the direction, as far as there are, such as: e4 data gradient."""
        return " ".join(filter(None, (self.net, self.layer, self.direction)))


class Subject(NamedTuple):
    """Whose call comes next."""

    owner: object | None = None  # the network, or the arena where that calls for all of its networks
    layer: str | None = None
    direction: str | None = None
    images: int = 0


class _Current(threading.local):
    recorder: "Recorder | None" = None


_current = _Current()


def about(owner: object, layer: str | None, direction: str, images: int = 0) -> None:
    """Tell a recording which network or arena calls the next operator, and what for. Without one it does nothing."""
    if _current.recorder is not None:
        _current.recorder.subject = Subject(owner, layer, direction, images)


class Rehearsal:
    """A step's twin on the meta device: it calls what the step calls, computes nothing and changes nothing.

    Args:
        step: on any device; is left as it is.
    """

    def __init__(self, step: Step):
        self.step = step.on_meta()

    def crops(self, images: int, height: int, width: int) -> Crops:
        """A batch yet to be cut out of as many pairs of this size."""
        channels = {name: shape[0] for name, shape in self.step.shapes.items()}
        side = self.step.shapes["A"][1]
        pairs = torch.empty(images, height, width, sum(channels.values()), dtype=torch.uint8, device=META)
        index, offset = (torch.empty(images, *shape, dtype=torch.int64, device=META) for shape in ((), (2,)))
        flip = torch.empty(images, dtype=torch.bool, device=META)
        return Crops(pairs, index, offset, flip, side, channels["A"])

    def batch(self, images: int) -> dict[str, Tensor]:
        """Images as crops are cut."""
        dtypes = self.step.image_dtypes
        empty = functools.partial(torch.empty, device=META, memory_format=torch.channels_last)
        return {
            name: empty((images, *shape), dtype=dtypes.get(name, torch.float32))
            for name, shape in self.step.shapes.items()
        }


class Recorder(TorchDispatchMode):
    """Notes the calls of our operators, and the most memory that is held at once of what is made meanwhile.

    Args:
        names: each network's name, and each arena's, by its id.
    """

    def __init__(self, names: Mapping[int, str]):
        super().__init__()
        self.names, self.calls, self.part, self.subject = names, list[Call](), "", Subject()
        self.held: dict[int, int] = {}  # bytes of each storage that was made and still lives, by its address
        self.n_bytes = self.most_bytes = 0

    def __enter__(self) -> "Recorder":
        _current.recorder = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _current.recorder = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, _, operator = func.name().partition("::")
        if operator.startswith("_record_function_enter"):
            self.part = args[0]
        elif operator.startswith("_record_function_exit"):
            self.part = ""
        else:
            self._hold(result, (args, kwargs))
        if namespace == NAMESPACE:
            self._note(operator, func._schema.arguments, args, result)
        return result

    def _note(self, operator: str, schema: Any, args: tuple[Any, ...], result: Any) -> None:
        given = [*args, *(argument.default_value for argument in schema[len(args) :])]
        named = {argument.name: value for argument, value in zip(schema, given, strict=True)}
        results = () if result is None else (result,) if isinstance(result, Tensor) else result
        owner, layer, direction, images = self.subject
        call = Call(
            part=self.part,
            direction=direction or operator,
            operator=operator,
            images=images,
            net=self.names.get(id(owner)),
            layer=layer,
            args=tree_map_only(Tensor, Operand.of, named),
            results=tuple(map(Operand.of, results)),
        )
        self.calls.append(call)
        self.subject = Subject()

    def _hold(self, result: Any, given: Any) -> None:
        """Count the memory of what is new in a result, until it is given back."""
        tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if tensors:
            known = {t.untyped_storage()._cdata for t in tree_leaves(given) if isinstance(t, Tensor)}
            self.hold(t for t in tensors if t.untyped_storage()._cdata not in known)

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count the memory of tensors from now on, until it is given back."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.held:
                self.held[key] = storage.nbytes()
                self.n_bytes += storage.nbytes()
                weakref.finalize(storage, self._give_back, key)
        self.most_bytes = max(self.most_bytes, self.n_bytes)

    def _give_back(self, key: int) -> None:
        self.n_bytes -= self.held.pop(key)


Watch = Callable[[Recorder], AbstractContextManager[object]]


def record(step: Step, images: int) -> list[Call]:
    """The calls of a step of so many images in their order; the augmentation, which cuts squares, comes before them.

    The step is neither run nor changed; its twin runs. Copies between the operators are no operators, so they are not
    in the record.
    """
    return rehearse(step, images).calls


def peak_bytes(step: Step, images: int) -> int:
    """The most bytes held at once of what a step of so many images makes: activations, gradients, copies.

    The networks' and the optimizers' own memory is not counted, nor is scratch space that an operator takes inside. On
    a GPU the gradients that weight gradients read live longer, since those run beside the main chain.
    """
    return rehearse(step, images).most_bytes


def rehearse(step: Step, images: int, watch: Watch | None = None) -> Recorder:
    """Run a step's twin, and return the record of it.

    Args:
        watch: given the recorder, a context around all that the twin calls.
    """
    rehearsal = Rehearsal(step)
    twin, (_, height, width) = rehearsal.step, step.shapes["A"]
    crops = rehearsal.crops(images, height, width)
    names = {id(owner): name for name, owner in (*twin.networks.items(), *twin.arenas.items())}
    with Recorder(names) as recorder, nullcontext() if watch is None else watch(recorder):
        if height == width:
            with part(AUGMENT):
                batch = crops.cut(META, twin.image_dtypes)
        else:
            batch = rehearsal.batch(images)
        twin.launch(batch)
    return recorder


def net_on_meta(net: nn.Module) -> Any:
    """Copy a network without its values: parameters and buffers of the copy are on the meta device."""
    known: dict[int, Any] = {}
    for parameter in net.parameters():
        known[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=META))
    for buffer in net.buffers():
        known[id(buffer)] = torch.empty_like(buffer, device=META)
    return copy.deepcopy(net, known)
