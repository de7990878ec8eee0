"""Which module reads which module's result: the calls of a model's forward, seen with torch.fx."""

import contextlib
import inspect
import operator
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fastp2p.nn.layers import ConvNormAct, PatchGANLoss, UpConvNormAct
from fastp2p.nn.scope import modes

LAYERS = (ConvNormAct, UpConvNormAct, PatchGANLoss)
STAGES: dict[type[nn.Module], int] = {  # what may follow a convolution, in this order
    nn.BatchNorm2d: 1,
    nn.InstanceNorm2d: 1,
    nn.ReLU: 2,
    nn.LeakyReLU: 2,
    nn.Tanh: 2,
    nn.Dropout: 3,
}
LEAVES = (*LAYERS, nn.Conv2d, nn.ConvTranspose2d, *STAGES)  # calls of these, or of what derives from them, stay calls


@dataclass
class Region:
    """A module whose forward was followed from end to end, with all calls that it leads to."""

    path: str  # the module's place in the model
    calls: dict[str, list[fx.Node]]  # path in the model -> the calls of that module, in all graphs together
    n_graphs: int
    boxes: frozenset[str]  # paths in the model of modules that are called here, but were not looked into

    def callers(self, paths: Iterable[str]) -> list[tuple[str, ...]]:
        """For each call of these modules, the modules whose forwards are running then, from the outermost on."""
        return [node.meta["stack"] for path in paths for node in self.calls[path]]

    def full_path(self, node: fx.Node) -> str:
        """Where in the model the module is that a node calls."""
        return _join(self.path, str(node.target))


@dataclass
class Traced:
    """What came of tracing a model: regions, and for those modules that could not be followed, why."""

    regions: list[Region] = field(default_factory=list)
    untraced: dict[str, str] = field(default_factory=dict)  # path -> reason


def trace(model: nn.Module) -> Traced:
    """Follow the model's forward; where that cannot be done, its children's, each on its own.

    A forward is followed in training and in eval mode, and, where it has defaults, with and without them: a chain
    counts only if it is there in all of them. A module that cannot be followed is a closed box to its parent.
    """
    traced = Traced()
    _trace_at(model, "", {}, traced)
    return traced


def _trace_at(module: nn.Module, path: str, callers: dict[str, set[str]], traced: Traced) -> None:
    """Trace one module, and what it leads to but could not be followed, into `traced`."""
    if isinstance(module, LAYERS) or not any(module.children()):
        return
    boxes: frozenset[str] = frozenset()
    error: str | None = None
    if _has_forward(module):
        if _called_piecewise(path, callers):
            error = "its parts are called one by one by a forward that cannot be followed"
        elif "forward" in module.__dict__:
            error = "its forward was replaced"
        else:
            region, callers, error = _trace_whole(module, path)
            if region is not None:
                traced.regions.append(region)
                boxes = region.boxes
        if error is not None:
            traced.untraced[path] = error
    if error is not None or not _has_forward(module):
        boxes = frozenset(_join(path, name) for name, _ in module.named_children())
    for box in sorted(boxes):
        _trace_at(module.get_submodule(box.removeprefix(path).lstrip(".")), box, callers, traced)


def _trace_whole(module: nn.Module, path: str) -> tuple[Region | None, dict[str, set[str]], str | None]:
    """One module's forward in all its ways: (region, or None, who calls whom, why there is no region)."""
    boxes: set[str] = set()
    while True:
        callers: dict[str, set[str]] = defaultdict(set)
        tracers = [_Tracer(path, boxes, callers, training) for training in (True, False)]
        try:
            graphs = [tracer.follow(module, way) for tracer in tracers for way in _ways(module)]
        except Exception as error:  # users' code may raise anything on stand-ins; the report tells what
            failed_at = next((tracer.failed_at for tracer in tracers if tracer.failed_at), None)
            if failed_at is None or failed_at in boxes:
                return None, callers, f"cannot be followed: {type(error).__name__}: {_first_line(error)}"
            boxes.add(failed_at)  # once more, with this one closed
            continue
        region = Region(path, defaultdict(list), len(graphs), frozenset(boxes))
        for node in (node for graph in graphs for node in graph.nodes if node.op == "call_module"):
            region.calls[region.full_path(node)].append(node)
        return region, callers, None


class _Proxy(fx.Proxy):
    """torch.fx takes y += x for y = y + x; here what is done in place stays visible."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _Tracer(fx.Tracer):
    """Notes who called what, in which mode, and where it went wrong."""

    proxy_buffer_attributes = True  # a forward that writes to a buffer must not do so now

    def __init__(self, path: str, boxes: set[str], callers: dict[str, set[str]], training: bool):
        super().__init__()
        self.path, self.boxes, self.callers, self.training = path, boxes, callers, training
        self.stack = [path]
        self.failed_at: str | None = None

    def follow(self, module: nn.Module, concrete_args: dict[str, Any] | None) -> fx.Graph:
        with undisturbed(module, self.training):
            return self.trace(module, concrete_args)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        closed = isinstance(m, LEAVES) or _join(self.path, module_qualified_name) in self.boxes
        return closed or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = _join(self.path, self.path_of_module(m))
        self.callers[path].add(self.stack[-1])
        self.stack.append(path)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:  # _trace_whole gets it, and asks where it arose
            self.failed_at = self.failed_at or path
            raise
        finally:
            self.stack.pop()
        if isinstance(result, fx.Proxy) and result.node.op == "call_module":
            result.node.meta.setdefault("modes", modes())
            result.node.meta.setdefault("stack", tuple(self.stack))
            result.node.meta.setdefault("inplace", getattr(m, "inplace", False))
        return result


def _ways(module: nn.Module) -> list[dict[str, Any] | None]:
    """The ways to call a forward: all arguments unknown, and those with a default left out."""
    parameters = inspect.signature(module.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return [None, defaults] if defaults else [None]


@contextlib.contextmanager
def undisturbed(module: nn.Module, training: bool) -> Iterator[None]:
    """In training or eval mode for a while; afterwards all attributes and random generators are as before."""
    submodules = list(module.modules())
    attributes = [dict(m.__dict__) for m in submodules]
    containers = [v for values in attributes for v in values.values() if type(v) in (list, dict, set)]
    copies = [v.copy() for v in containers]
    python_state = random.getstate()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            for m in submodules:
                m.__dict__["training"] = training
            yield
    finally:
        random.setstate(python_state)
        for container, copy in zip(containers, copies, strict=True):
            container.clear()
            container.extend(copy) if isinstance(container, list) else container.update(copy)
        for m, values in zip(submodules, attributes, strict=True):
            m.__dict__.clear()
            m.__dict__.update(values)


def _called_piecewise(path: str, callers: dict[str, set[str]]) -> bool:
    """Whether something outside of a module calls the modules within it."""
    below = [who for callee, who in callers.items() if callee.startswith(f"{path}.") and path]
    return any(caller != path and not caller.startswith(f"{path}.") for who in below for caller in who)


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
