"""torch.ops.fastp2p, and the single rule by which a kernel is chosen.

Every operator has a readable PyTorch reference, registered as the dispatcher's default (CompositeExplicitAutograd), so
it runs on every device. A faster kernel is registered on top of it for one device: the extension's, fastp2p._C, by
being imported, and Triton's for the operators that the extension leaves. PyTorch's dispatcher does the rest: no model
code asks which kernel there is.
"""

import contextlib
import functools
import importlib
import importlib.util
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastp2p.errors import InputError
from fastp2p.ops.extension import INTERPRETED
from fastp2p.ops.kernel_choices import Choice, chosen
from fastp2p.ops.operands import Named, Operand, Traffic, Work

OLDEST_GPU = (8, 0)  # compute capability; Triton gave up sm_75
LIBRARY = torch.library.Library("fastp2p", "DEF")

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
_references: dict[str, Callable[..., Any]] = {}
_works: dict[str, Work] = {}
_triton_serves: set[tuple[str, str]] = set()  # (operator, device type)


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    work: Work,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Define the operator fastp2p::name.

    Args:
        name: the operator's name, also that of its files.
        schema: its arguments and returns in PyTorch's schema language, such as "(Tensor x) -> Tensor".
        reference: plain PyTorch; serves every device that has no kernel of its own.
        fake: shapes and dtypes alone, for torch.compile and meta tensors.
        work: which arguments are maps, weights or Adam's, and how its FLOPs are counted.
        backward, setup_context: the gradient, as torch.library.register_autograd takes it. Without one, an operator
            that returns tensors raises when a gradient is asked of it; one that changes arguments, too, when it is
            called with tensors that require one.
    """
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastp2p::{name}", fake, lib=LIBRARY)
    _count_versions(name)
    no_gradient = f"{name}: has no gradient; give it tensors that are detached, or torch.no_grad()"
    if backward is None and not schema.endswith("()"):
        if "!" in schema:
            _refuse_gradients(name, no_gradient)
        else:

            def backward(ctx: Any, *grads: Tensor) -> None:
                raise InputError(no_gradient)

    if backward is not None:
        torch.library.register_autograd(f"fastp2p::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    _references[name], _works[name] = reference, work


def cost_of(name: str, args: Named, results: tuple[Operand, ...]) -> tuple[int, Traffic]:
    """The FLOPs and the bytes of an operator's call. What is done for each element is not counted among the FLOPs."""
    work, schema = _works[name], getattr(torch.ops.fastp2p, name).default._schema
    changed = frozenset(arg.name for arg in schema.arguments if arg.alias_info and arg.alias_info.is_write)
    flop = 0 if work.flop is None else work.flop(args, results)
    return flop, work.traffic(args, results, changed)


def _refuse_gradients(name: str, text: str) -> None:
    """Raise where autograd would differentiate the operator; it takes none in place of its own for such a schema."""
    operator = getattr(torch.ops.fastp2p, name).default

    def refuse(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            raise InputError(text)
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    LIBRARY.impl(name, refuse, "Autograd", with_keyset=True)


def _count_versions(name: str) -> None:
    """Tell autograd of what the operator changes in place, as PyTorch's own operators do."""
    operator = getattr(torch.ops.fastp2p, name).default
    changed = [i for i, arg in enumerate(operator._schema.arguments) if arg.alias_info and arg.alias_info.is_write]
    if not changed:
        return

    def count(keyset: Any, *args: Any) -> Any:
        tensors = [args[i] for i in changed if i < len(args) and args[i] is not None]
        torch.autograd.graph.increment_version(tensors)
        with torch._C._AutoDispatchBelowAutograd():  # what the kernel calls is not to be differentiated either
            return operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    LIBRARY.impl(name, count, "ADInplaceOrView", with_keyset=True)


def serve_by_triton(name: str) -> None:
    """Let fastp2p.kernels.NAME.NAME serve CUDA tensors; under TRITON_INTERPRET=1, CPU tensors instead.

    Not where the extension serves them already.

    A backward operator's launcher lies beside its forward's: X_backward in fastp2p.kernels.X.

    Triton itself is imported at the first call. Where it is not installed the reference stays in charge; so it does for
    float64, which is there for proofs (the kernels compute in float32), and on GPUs older than Triton supports.
    """
    device_type = "cpu" if INTERPRETED else "cuda"
    if importlib.util.find_spec("triton") is None or _has_own_kernel(name, device_type):
        return

    def serve(*args: Any) -> Any:
        device = args[0].device
        if args[0].dtype == torch.float64 or (device.type == "cuda" and not _triton_supports(device.index)):
            return _references[name](*args)
        with contextlib.nullcontext() if INTERPRETED else torch.cuda.device(device):
            return launch(name, chosen(name, args), args)

    LIBRARY.impl(name, serve, _DISPATCH_KEYS[device_type])
    _triton_serves.add((name, device_type))


def launch(name: str, choice: Choice | None, args: tuple[Any, ...]) -> Any:
    """Call an operator's launcher: ours with a configuration, or by rule, or ATen's convolution for "aten"."""
    kernel = getattr(_kernels("aten" if choice == "aten" else file_of(name)), name)
    return kernel(*args, config=choice) if isinstance(choice, dict) else kernel(*args)


@functools.cache
def _kernels(file: str) -> Any:
    """A file of kernels; from the first one on, what programs are kept by is settled."""
    importlib.import_module("fastp2p.kernels.compile_check").fix_keys()
    return importlib.import_module(f"fastp2p.kernels.{file}")


@functools.cache
def _triton_supports(device_index: int) -> bool:
    """Whether Triton compiles for this GPU; where not, that is said once."""
    capability = torch.cuda.get_device_capability(device_index)
    if capability < OLDEST_GPU:
        warnings.warn(
            f"fastp2p's kernels need compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]}; GPU {device_index} has "
            f"{capability[0]}.{capability[1]}, so plain PyTorch serves its operators",
            stacklevel=2,
        )
    return capability >= OLDEST_GPU


def file_of(name: str) -> str:
    """The name of the files in which an operator lives: its own, and for X_backward X's."""
    return name.removesuffix("_backward")


def operators() -> list[str]:
    """The names of all operators."""
    return sorted(_references)


def served_by(name: str, device_type: str) -> str:
    """Which implementation a tensor on this device type ("cpu", "cuda") reaches, as the dispatcher itself knows it."""
    if (name, device_type) in _triton_serves:
        if INTERPRETED:
            return "Triton, interpreted"
        return "Triton" if _triton_supports(torch.cuda.current_device()) else "reference (PyTorch): an old GPU"
    if _has_own_kernel(name, device_type):
        return "C++" if device_type == "cpu" else "CUDA C++"
    return "reference (PyTorch)"


def _has_own_kernel(name: str, device_type: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"fastp2p::{name}", _DISPATCH_KEYS[device_type]))


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For a backward that autograd cannot differentiate: asking for its derivative raises.

    PyTorch's once_differentiable does so only where the incoming gradient itself requires one. That of a sum does not,
    and a gradient penalty on it would silently count as a constant. It also leaves no way from the results to what they
    were computed from, so that torch.autograd.grad, which follows the ways to its inputs alone, would miss the error.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
        if not torch.is_grad_enabled():  # nobody can ask
            return backward(ctx, *grads)
        once = _Unpacked(ctx)
        with torch.no_grad():
            outputs = backward(once, *grads)
        sources = [t for t in (*grads, *once.saved_tensors) if t is not None and t.requires_grad]
        results = [None if output is None else output.detach().requires_grad_() for output in outputs]
        n = len(results) + len(sources)
        refuse: Any = torch._C._functions.DelayedError(b"fastp2p: there is no second derivative", n)
        return refuse(*results, *sources)[: len(results)]

    return wrapper


class _Unpacked:
    """An autograd context whose saved tensors are unpacked once, as gradient checkpointing demands."""

    def __init__(self, ctx: Any):
        self.ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype, where it is on for x's device and they are floating and not float64."""
    dtype = autocast_dtype(x.device.type)
    if dtype is None:
        return x, *others
    return tuple(t.to(dtype) if t is not None and _autocasts(t) else t for t in (x, *others))


class _OnMeta(threading.local):
    dtype: torch.dtype | None = None


_on_meta = _OnMeta()


@contextlib.contextmanager
def autocast_to(dtype: torch.dtype | None, device_type: str) -> Iterator[None]:
    """Autocast to a dtype, or for None none at all. The meta device has no autocast: there it is ours."""
    if device_type != "meta":
        with torch.autocast(device_type, dtype, enabled=dtype is not None):
            yield
        return
    before, _on_meta.dtype = _on_meta.dtype, dtype
    try:
        with _LowerOnMeta():
            yield
    finally:
        _on_meta.dtype = before


class _LowerOnMeta(TorchFunctionMode):
    """What autocast lowers of PyTorch's own functions, as far as networks of images call them."""

    functions = (F.conv2d, F.conv_transpose2d, F.linear, torch.matmul)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self.functions and _on_meta.dtype is not None:
            args = tuple(x.to(_on_meta.dtype) if isinstance(x, Tensor) and _autocasts(x) else x for x in args)
        return function(*args, **(kwargs or {}))


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """autocast's dtype, where it is on for this type of device; None elsewhere, and where there is no autocast."""
    if device_type == "meta":
        return _on_meta.dtype
    # PyTorch 2.11 compiles no question after availability; each device that it compiles for has it
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    return torch.get_autocast_dtype(device_type) if available and torch.is_autocast_enabled(device_type) else None


def _autocasts(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64


def check_devices(operator: str, *tensors: Tensor | None) -> None:
    """Raise InputError unless all are on one device."""
    devices = {str(tensor.device) for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise InputError(f"{operator}: got tensors on {', '.join(sorted(devices))}; expected one device")


def describe(tensor: Tensor) -> str:
    """A tensor for an error message: shape, dtype, strides."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} of strides {tensor.stride()}"
