"""fuse(model): find chains of convolution, normalisation, activation and dropout in any model, and fuse them."""

import itertools
import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import fx, nn

from fastp2p.errors import InputError
from fastp2p.nn.block import Convolution
from fastp2p.nn.fused import Chain, is_fused, join, name_of, part, plain_class
from fastp2p.nn.scope import Scope, scope_of, unwatch
from fastp2p.nn.settings import has_hooks, refusal
from fastp2p.nn.tracing import LAYERS, STAGES, Region, trace

_IN_PLACE_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


class Fused(NamedTuple):
    """One chain that became one block."""

    modules: tuple[str, ...]  # paths in the model, the convolution's first
    kind: str  # "Conv2d + BatchNorm2d + ReLU"
    note: str  # why it ends where it ends, when more might have been expected


class Left(NamedTuple):
    """A convolution that stays as it is, or a module whose forward could not be followed."""

    module: str  # path in the model, "" for the model itself
    kind: str  # its class
    reason: str


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did: print it for a table."""

    fused: tuple[Fused, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        rows = [(", ".join(_shorten(chain.modules)), chain.kind, chain.note) for chain in self.fused]
        rest = [(row.module or "(the model)", row.kind, row.reason) for row in self.left]
        widths = [max((len(row[i]) for row in rows + rest), default=0) for i in (0, 1)]

        def table(title: str, rows: list[tuple[str, str, str]]) -> list[str]:
            lines = [f"  {row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}".rstrip() for row in rows]
            return [f"{title}: {len(rows) or 'none'}", *lines]

        return "\n".join(table("fused", rows) + table("left as they are", rest))


def fuse(model: nn.Module, *, channels_last: bool = True) -> FuseReport:
    """Let each convolution of a model do the normalisation, activation and dropout that follow it, in place.

    `fuse` follows the model's forward with torch.fx and finds chains: Conv2d or ConvTranspose2d -> BatchNorm2d or
    InstanceNorm2d -> ReLU, LeakyReLU or Tanh -> Dropout. A chain has a norm, an activation, or both. Its convolution
    then computes the whole chain (see `fastp2p.nn.ConvNormAct`), and the other modules pass on what they get. Outputs,
    gradients and running statistics are as before, up to rounding; dropout draws another mask.

    All modules stay the objects they were, with their parameters, buffers, names, modes and settings: optimizers go on,
    state_dicts load both ways, train(), eval(), requires_grad_(), .to(), deepcopy, pickle, AveragedModel,
    DistributedDataParallel, torch.compile, torch.export and torch.jit.trace work. Calling it again does nothing;
    `unfuse` takes it back.

    What changes afterwards is followed, or refused with an InputError that names the module:

    - Weights and settings are read at every call, edits through `.data` included. No fused operator serves groups,
      dilation, padding_mode, momentum None, a hook on a member, or a parametrization. Then each module of the chain
      does its own part, as if never fused; so it does for an empty batch, and while torch.jit.trace looks.
    - So it does wherever the forward in which `fuse` saw the chain is not running: in a slice of a Sequential, in
      `Sequential(*list(net.children())[:-1])`, in model.forward(x) called without model(x).
    - Where that forward takes another path than in training or eval mode today, the call raises InputError; also where
      a module of the chain was replaced or removed. Call `unfuse`, then `fuse`.

    What does not work on a fused model:

    - torch.jit.script, torch.fx.symbolic_trace, ONNX export, torch.func.grad and jvp, forward-mode derivatives and
      nn.DataParallel: they raise; call `unfuse` first.
    - A second derivative, as of a gradient penalty: it raises.
    - view() on results, which are channels_last as after model.to(memory_format=torch.channels_last): PyTorch asks for
      reshape().
    - view(-1) on weights, as in LBFGS, parameters_to_vector and prune.l1_unstructured: PyTorch raises, since fused
      convolutions hold them in channels_last. fuse(model, channels_last=False) leaves them as they are.
    - Edits in place of a LeakyReLU's result that the forward does not show, before its backward: PyTorch raises.

    Fuse last, but before DistributedDataParallel: after convert_sync_batchnorm, spectral_norm and all else that
    replaces modules.

    Args:
        model: any module, in training or eval mode.
        channels_last: also lay out the weights of fused convolutions as the kernels want them, by setting their
            `.data`; False leaves them, and kernels copy them at every call.

    Returns:
        The report; print it.

    Raises:
        InputError: on what is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"fuse: got a {type(model).__name__}, expected an nn.Module")
    traced = trace(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    names = Counter(map(id, modules.values()))
    fused: dict[nn.Module, Fused] = {}
    chains: dict[nn.Module, Chain] = {}
    reasons: dict[nn.Module, str] = {}
    for region in traced.regions:
        for path, calls in region.calls.items():
            conv = modules[path]
            if isinstance(conv, Convolution) and not is_fused(conv):
                note = _refusal(conv, names) or _convolution_call_refusal(calls) or _box_around(path, region)
                paths, note = ([path], note) if note else _follow(path, region, modules, names)
                if any(STAGES[type(modules[p])] < 3 for p in paths[1:]):
                    chains[conv] = _chain(paths, region, modules)
                    fused[conv] = Fused(tuple(paths), " + ".join(name_of(modules[p]) for p in paths), note)
                else:
                    reasons[conv] = note or "nothing to fuse follows it"
    left = [Left(path, name_of(modules[path]), reason) for path, reason in traced.untraced.items()]
    left += _left_convolutions(model, fused, reasons)
    for conv, chain in chains.items():
        join(conv, chain, channels_last=channels_last)
    in_order = [fused[module] for module in model.modules() if module in fused]
    return FuseReport(tuple(in_order), tuple(left))


def unfuse(model: nn.Module) -> None:
    """Take `fuse` back, in place: for torch.jit.script, ONNX export, or to change the model and fuse it anew.

    The modules are again of the classes they were, with the same parameters, buffers and names. Weights that `fuse`
    laid out as channels_last are contiguous again, so results are those of a model that never was fused, bit for bit.
    A model that is not fused stays as it is.

    Raises:
        InputError: on what is no nn.Module, or where a fused module has another class since, as by a parametrization;
            the model is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"unfuse: got a {type(model).__name__}, expected an nn.Module")
    fused = {path: module for path, module in model.named_modules() if is_fused(module)}
    for path, module in fused.items():
        if plain_class(module) is None:
            raise InputError(
                f"unfuse: {path} has become a {type(module).__name__} since; remove that first, as by "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
    for module in fused.values():
        part(module)
    for module in model.modules():
        unwatch(module)


def _follow(start: str, region: Region, modules: dict[str, nn.Module], names: Counter[int]) -> tuple[list[str], str]:
    """The chain that begins at a convolution, as paths, and why it ends where it does when that is worth a word."""
    paths, stage = [start], 0
    while True:
        path, note = _only_reader(paths[-1], region)
        if path is None:
            break
        module = modules[path]
        if type(module) in STAGES and STAGES[type(module)] <= stage:
            break
        if type(module) in STAGES or _is_alike(module):
            note = _call_count_refusal(paths[-1], path, region) or _refusal(module, names) or _box_around(path, region)
            note = note or _mismatch(modules[start], module) or _crossing(start, path, region, modules)
            note = note and f"{path} ({name_of(module)}) {note}"
        if note or type(module) not in STAGES:
            break
        paths, stage = [*paths, path], STAGES[type(module)]
    chain = [type(modules[path]) for path in paths]
    if nn.LeakyReLU in chain and _written_to(region.calls[paths[-1]]):
        # Its gradient is told from the result here, where PyTorch tells it from the input.
        end = chain.index(nn.LeakyReLU)
        return paths[:end], f"{paths[end]} (LeakyReLU) has a result that is changed in place afterwards"
    return paths, note


def _only_reader(path: str, region: Region) -> tuple[str | None, str]:
    """The one module that reads each result of a module and nothing else, or None and why there is none."""
    targets = set()
    for node in region.calls[path]:
        users = list(node.users)
        if len(users) > 1:
            return None, f"its result is read at {len(users)} places"
        if not users or users[0].op != "call_module" or users[0].args != (node,):
            return None, ""
        targets.add(region.full_path(users[0]))
    if len(targets) > 1:
        return None, f"its result goes to {' or '.join(sorted(targets))}"
    return targets.pop(), ""


def _is_alike(module: nn.Module) -> bool:
    """A normalisation, activation or dropout of another kind than the fused ones."""
    own = type(module).__module__.removeprefix("torch.nn.modules.")
    others = ("activation", "batchnorm", "instancenorm", "normalization", "dropout")
    return isinstance(module, tuple(STAGES)) or own in others


def _call_count_refusal(path: str, reader: str, region: Region) -> str:
    n_calls = len(region.calls[reader])
    return "" if n_calls == len(region.calls[path]) else f"is called at {-(-n_calls // region.n_graphs)} places"


def _box_around(path: str, region: Region) -> str:
    """Why a module within another that could not be followed is left: that one may call it in other ways."""
    boxes = [box for box in region.boxes if path.startswith(f"{box}.")]
    return f"is part of {boxes[0]}, which cannot be followed" if boxes else ""


def _refusal(module: nn.Module, names: Counter[int]) -> str:
    """Why a module cannot be fused, whatever is around it; "" if it can."""
    reason = refusal(module)
    if not reason and type(module) not in (*STAGES, nn.Conv2d, nn.ConvTranspose2d):
        return "is of a class that is not fused"
    return reason or (f"is registered under {names[id(module)]} names" if names[id(module)] > 1 else "")


def _convolution_call_refusal(calls: Iterable[fx.Node]) -> str:
    if any(len(call.args) != 1 or call.kwargs for call in calls):
        return "is called with more than its input, such as an output_size"
    return ""


def _mismatch(conv: nn.Module, module: nn.Module) -> str:
    if isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d) and module.num_features != conv.out_channels:
        return f"is for {module.num_features} channels, not {conv.out_channels}"
    return ""


def _crossing(start: str, path: str, region: Region, modules: dict[str, nn.Module]) -> str:
    """Why a chain cannot reach from one place to the other."""
    modes = {node.meta["modes"] for p in (start, path) for node in region.calls[p]}
    if len(modes) > 1:
        return "runs in another grad or autocast mode"
    for ancestor in _ancestors(start) ^ _ancestors(path):
        if has_hooks(modules[ancestor]):
            return f"is on the other side of {ancestor}, which has hooks"
    return ""


def _written_to(calls: Iterable[fx.Node]) -> bool:
    """Whether a reader of these results changes them in place."""
    return any(_writes(user) for node in calls for user in node.users)


def _writes(node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(node.meta.get("inplace"))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    by_name = name.endswith("_") and not name.endswith("__")  # relu_
    return by_name or bool(node.kwargs.get("inplace")) or node.target in _IN_PLACE_OPERATORS


def _left_convolutions(model: nn.Module, fused: dict[nn.Module, Fused], reasons: dict[nn.Module, str]) -> list[Left]:
    left, seen = [], {part for module in model.modules() if isinstance(module, LAYERS) for part in module.modules()}
    for path, module in model.named_modules():
        if isinstance(module, Convolution) and module not in fused and module not in seen:
            default = "is fused already" if is_fused(module) else "is not called by a forward that could be followed"
            left.append(Left(path, name_of(module), reasons.get(module, default)))
    return left


def _chain(paths: list[str], region: Region, modules: dict[str, nn.Module]) -> Chain:
    """The chain of these modules, the convolution's path first, and the scope in which it may run as one."""
    stacks = region.callers(paths)
    levels = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*stacks, strict=False))
    shared = [level[0] for level in levels]
    around = modules[shared[-1]]
    between = {path: modules[path] for stack in stacks for path in stack[len(shared) :]}
    names = tuple(f"{path} ({name_of(modules[path])})" for path in paths)
    chain = Chain(names, scope_of(around) or Scope().watch(around), tuple(between.values()))
    for module in (modules[path] for path in paths[1:]):
        setattr(chain, ("norm", "activation", "dropout")[STAGES[type(module)] - 1], module)
    return chain


def _ancestors(path: str) -> set[str]:
    parts = path.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


def _shorten(paths: tuple[str, ...]) -> list[str]:
    """Paths after the first without what they share with it: down.0, .1, .2."""
    parent = paths[0].rpartition(".")[0]
    return [paths[0], *(p.removeprefix(parent) if parent and p.startswith(f"{parent}.") else p for p in paths[1:])]
