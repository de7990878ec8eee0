"""The arena: what one Adam trains, its moments and the compute weights, each one flat buffer; parameters are views."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastp2p.engine.counts import Counts
from fastp2p.engine.plan import Layer, Plan
from fastp2p.engine.record import about
from fastp2p.engine.supported import REFERENCE
from fastp2p.engine.watch import Watch
from fastp2p.errors import InputError

T = TypeVar("T")

operators = torch.ops.fastp2p
ALIGNMENT = 64  # elements: whole cache lines, and more than 16-byte accesses ask for

Reduce = Callable[[Tensor], object]  # changes a flat buffer of gradients in place, such as an all-reduce
Unscale = Callable[[Tensor], Tensor]  # flat gradients -> () what to multiply them by, 0 to skip the step


class LayerWeight(NamedTuple):
    """A convolution's weight as the operators take it: its live taps, detached views of the flat buffers."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    compute: Tensor | None  # in the dtype of computing, dense; None where that is param's own


class Arena:
    """Flat buffers that parameters and their optimizer's state become views of: of one network, or of several.

    Convolution weights come first, in channels_last, each (O, KH, KW, C) in memory; then the biases and the norms'
    parameters. state_dict, checkpoints and torch.optim.Adam go on working on the views.

        param                 weights, biases and norms' parameters: float32 (float64 for float64)
        exp_avg, exp_avg_sq   Adam's moments, likewise
        compute               the convolution weights in the dtype of computing, where that is a lower one
        grad                  gradients, where they are wanted whole: as sums of several passes, as one bucket for an
                              all-reduce, or to be checked for infinities before they may count; else every weight is
                              updated from where its gradient is made, and there is no such buffer

    A step calls `begin`, has `FusedNetwork.backward` bring gradients, and calls `finish`.

    Args:
        nets: their parameters are moved into the arena.
        optimizer: torch.optim.Adam without weight decay over exactly their parameters; its state is moved as well.
        plans: the nets'. What taps they leave out must have no moments; where gradients are whole they must leave out
            none.
        dtype: of computing.
        accumulates: a network may bring gradients several times in a step.
        reduce, unscale: called with all gradients, (M,) of param's dtype, before they are used.

    Raises:
        InputError: on parameters of another dtype or on several devices, or an optimizer that is no such Adam.
    """

    def __init__(
        self,
        nets: Sequence[nn.Module],
        optimizer: torch.optim.Adam,
        plans: Sequence[Plan],
        dtype: torch.dtype,
        *,
        accumulates: bool = False,
        reduce: Reduce | None = None,
        unscale: Unscale | None = None,
    ):
        layers = [layer for plan in plans for layer in plan.layers]
        weights = [layer.weight for layer in layers]
        everything = [p for net in nets for p in net.parameters()]
        self.biases_and_norms = [p for p in everything if all(p is not weight for weight in weights)]
        self.parameters = weights + self.biases_and_norms
        wide = torch.promote_types(dtype, torch.float32)
        device = _check_parameters(self.parameters, wide)
        group = _only_group(optimizer, self.parameters, wide)
        (self.beta1, self.beta2), self.eps = group["betas"], group["eps"]
        self.options = {name: group[name] for name in _OPTIONS}
        self.nets, self.accumulates, self.reduce, self.unscale = nets, accumulates, reduce, unscale

        # The flat buffers
        self.starts, size = _starts(self.parameters)
        self.weights_end = self.starts[len(weights)] if self.biases_and_norms else size
        self.param, self.exp_avg, self.exp_avg_sq = (torch.zeros(size, dtype=wide, device=device) for _ in range(3))
        gathers = accumulates or reduce is not None or unscale is not None
        self.grad = torch.zeros(size, dtype=wide, device=device) if gathers else None
        self.grads = {} if self.grad is None else self._by_id(self._views(self.grad))
        self.brought: set[int] = set()  # whose gradients have come in this step, by id
        self.compute = torch.zeros(self.weights_end, dtype=dtype, device=device) if dtype != wide else None

        # What they take over, and each layer's part of them
        self.steps = torch.zeros(len(self.parameters), device=device)  # torch.optim.Adam has one for each
        self._adopt(optimizer)
        self.weights = self._by_id(
            [self._layer_weight(optimizer, *item) for item in zip(layers, self.starts, strict=False)]
        )
        cancelled = [layer.conv.bias for layer in layers if not layer.trains_bias]
        self.no_gradient = {id(bias): torch.zeros_like(bias) for bias in cancelled if bias is not None}

        # Numbers of the step
        self.lr, self.lr_on_host = torch.zeros((), dtype=wide, device=device), 0.0
        self.betas = torch.tensor([self.beta1, self.beta2], dtype=torch.float64, device=device)
        self._take_counts(optimizer, Counts([self.steps], [self.betas]), 0)
        self.counts_itself = True
        self.round_compute_weights()
        self.watch = Watch(nets, optimizer, self.parameters)

    def _by_id(self, values: list[T]) -> dict[int, T]:
        """What belongs to the first parameters, in their order, by id(parameter)."""
        return {id(parameter): value for parameter, value in zip(self.parameters, values, strict=False)}

    def _adopt(self, optimizer: torch.optim.Adam) -> None:
        """Move the parameters and the optimizer's state into the flat buffers."""
        steps = {float(optimizer.state[p]["step"]) if optimizer.state[p] else 0.0 for p in self.parameters}
        if len(steps) > 1:
            raise InputError(f"engine: got Adam states of {len(steps)} different step counts, expected one for all")
        self.steps.fill_(steps.pop())
        views = (self._views(flat) for flat in (self.param, self.exp_avg, self.exp_avg_sq))
        for parameter, step, value, exp_avg, exp_avg_sq in zip(self.parameters, self.steps, *views, strict=True):
            value.copy_(parameter.detach())
            parameter.data, parameter.grad = value, None
            state = optimizer.state[parameter]
            if state:
                exp_avg.copy_(state["exp_avg"])
                exp_avg_sq.copy_(state["exp_avg_sq"])
            optimizer.state[parameter] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    def _layer_weight(self, optimizer: torch.optim.Adam, layer: Layer, start: int) -> LayerWeight:
        state = optimizer.state[layer.weight]
        tensors = (layer.weight.detach(), state["exp_avg"], state["exp_avg_sq"])
        param, exp_avg, exp_avg_sq = (layer.taps.select(t) for t in tensors)
        compute = None if self.compute is None else _view(self.compute, start, param)
        return LayerWeight(param, exp_avg, exp_avg_sq, compute)

    def share_counts(self, counts: Counts, number: int) -> None:
        """Leave it to whoever shares these counts to advance them, once before this arena's `begin` in each step.

        Args:
            counts: made of this arena's steps and betas, and of others'.
            number: which of them are this arena's.
        """
        self.watch.check()  # another arena may have taken a parameter since
        optimizer = self.watch.optimizer
        self._take_counts(optimizer, counts, number)
        self.counts_itself = False
        self.watch = Watch(self.nets, optimizer, self.parameters)

    def _take_counts(self, optimizer: torch.optim.Adam, counts: Counts, number: int) -> None:
        self.counts, self.number = counts, number
        self.steps, self.powers = counts.steps[number], counts.powers[number]
        for parameter, step in zip(self.parameters, self.steps, strict=True):
            optimizer.state[parameter]["step"] = step

    def _views(self, flat: Tensor) -> list[Tensor]:
        return [_view(flat, start, parameter) for start, parameter in zip(self.starts, self.parameters, strict=True)]

    def round_compute_weights(self) -> None:
        """Make the compute weights anew from the parameters."""
        for weight in self.weights.values():
            if weight.compute is not None:
                weight.compute.copy_(weight.param)

    def prepare(self) -> None:
        """Before a step: take over the optimizer's learning rate, and parameters that were changed in between, by
        load_state_dict or the reference's steps. An edit of `.data`, which autograd does not count, is not seen.

        Raises:
            InputError: when parameters or moments are no longer views of these buffers.
        """
        self.watch.check()
        group = self.watch.group()
        for name, before in self.options.items():
            if group[name] != before:
                raise InputError(
                    f"engine: the optimizer's {name} went from {before} to {group[name]}; make a new FusedStep"
                )
        if not _is_number(group["lr"], self.param.dtype):
            raise InputError(f"engine: the optimizer's lr became {group['lr']!r}; expected a number")
        lr = float(group["lr"])
        if lr != self.lr_on_host:
            self.lr_on_host = lr
            self.lr.fill_(lr)
        if self.watch.has_changed():
            self.round_compute_weights()

    def conclude(self) -> None:
        """After a step: tell autograd, and who caches by versions, that the parameters have changed."""
        torch.autograd.graph.increment_version(self.parameters)
        self.watch.note()

    @property
    def gathers(self) -> bool:
        """Whether gradients are kept whole until the step's end."""
        return self.grad is not None

    @property
    def n_bytes(self) -> int:
        """Bytes of the flat buffers."""
        buffers = (self.param, self.exp_avg, self.exp_avg_sq, self.grad, self.compute)
        return sum(buffer.nbytes for buffer in buffers if buffer is not None)

    def weight(self, layer: Layer) -> Tensor:
        """A layer's weight as the operators read it: live taps, dtype of computing, dense channels_last."""
        param, _, _, compute = self.weights[id(layer.weight)]
        return param.contiguous(memory_format=torch.channels_last) if compute is None else compute

    def begin(self) -> None:
        """Begin an Adam step, before its first gradient comes."""
        if not self.gathers:
            self._count()
        self.brought.clear()
        self.rest: dict[int, Tensor] = {}

    def _count(self) -> None:
        """Before the first update of a step: its number, and the powers that Adam takes of it."""
        if self.counts_itself:
            self.counts.advance(self)
        self.counts.wait()

    def take_weight_gradient(
        self, owner: object, layer: Layer, outer: Tensor, outer2: Tensor | None, inner: Tensor
    ) -> None:
        """Make a layer's weight gradient, and unless gradients are gathered its Adam step, in one operator.

        Args:
            owner: the layer's network, for a record.
            outer, outer2, inner: as `conv_wgrad` takes them.
        """
        param, exp_avg, exp_avg_sq, compute = self.weights[id(layer.weight)]
        stride, padding = layer.stride, layer.taps.padding
        if self.grad is not None:
            size = param.shape[2:]
            about(owner, layer.name, "weight gradient", len(outer))
            gradient = operators.conv_wgrad(outer, outer2, inner, *size, stride, padding, self.grad.dtype)
            self._gather({id(layer.weight): gradient})
            return
        about(owner, layer.name, "weight gradient and Adam", len(outer))
        operators.conv_wgrad_adam(
            *(outer, outer2, inner, param, exp_avg, exp_avg_sq, self.lr, self.powers),
            *(self.beta1, self.beta2, self.eps, stride, padding, compute),
        )

    def take_gradients(self, gradients: Mapping[int, Tensor]) -> None:
        """Take the gradients of biases and norms' parameters, by id(parameter); but for biases that a norm takes away.

        Of an arena that gathers nothing they are all that come in a step.
        """
        if self.grad is None:
            self.rest |= gradients
            return
        self._gather(gradients)

    def _gather(self, gradients: Mapping[int, Tensor]) -> None:
        """Write gradients by id(parameter) into the flat buffer, or add them to what came before in this step."""
        again, new = ([name for name in gradients if (name in self.brought) == brought] for brought in (True, False))
        assert not again or self.accumulates
        for names, act in ((new, torch._foreach_copy_), (again, torch._foreach_add_)):
            if names:
                act([self.grads[name] for name in names], [gradients[name] for name in names])
        self.brought.update(new)

    def finish(self) -> None:
        """End an Adam step: that of biases and norms' parameters, or where gradients are gathered of everything."""
        weights, rest = slice(self.weights_end), slice(self.weights_end, None)
        if self.grad is None:
            known = {**self.no_gradient, **self.rest}
            if self.biases_and_norms:
                self._adam(rest, torch.cat([known[id(p)] for p in self.biases_and_norms]))
            self.counts.keep(self.number)
            return
        late = [p for p in self.parameters if id(p) not in self.brought and id(p) not in self.no_gradient]
        if late:
            paths = [path for net in self.nets for path, p in net.named_parameters() if p is late[0]]
            raise InputError(
                f"engine: {len(late)} parameters have no gradient in this step, the first of them {paths[0]}; expected "
                f"one for each{REFERENCE}"
            )
        self._count()  # not before: a step that is refused does not count
        if self.reduce is not None:
            self.reduce(self.grad)
        unscale = None if self.unscale is None else self.unscale(self.grad)
        if self.weights_end:
            self._adam(weights, self.grad[weights], self.compute, unscale)
        if self.biases_and_norms:
            self._adam(rest, self.grad[rest], None, unscale)
        if unscale is not None:
            self.steps.add_(unscale.sign() - 1)  # a step that is skipped does not count
        self.counts.keep(self.number)

    def _adam(self, part: slice, grad: Tensor, compute: Tensor | None = None, unscale: Tensor | None = None) -> None:
        about(self, None, "Adam of the rest" if part.start else "Adam")
        operators.adam(
            *(self.param[part], grad, self.exp_avg[part], self.exp_avg_sq[part], self.lr, self.powers),
            *(self.beta1, self.beta2, self.eps, compute, unscale),
        )


def dead_taps_move(plan: Plan, optimizer: torch.optim.Adam) -> bool:
    """Whether Adam still moves taps that the plan leaves out: it was trained at another size before."""
    for layer in plan.layers:
        state = optimizer.state.get(layer.weight, {})
        for name in ("exp_avg", "exp_avg_sq") if state and not layer.taps.are_all(layer.weight) else ():
            moment = state[name].clone()
            layer.taps.select(moment).zero_()
            if moment.any():
                return True
    return False


def _check_parameters(parameters: list[nn.Parameter], dtype: torch.dtype) -> torch.device:
    """Their device. Raises InputError unless they are of this dtype, on one device, and all to be trained."""
    fixed = sum(not p.requires_grad for p in parameters)
    if fixed:
        raise InputError(f"engine: got {fixed} parameters with requires_grad False, expected none{REFERENCE}")
    found = {str(p.dtype).removeprefix("torch.") for p in parameters}
    if found != {str(dtype).removeprefix("torch.")}:
        raise InputError(
            f"engine: got parameters in {', '.join(sorted(found))}, expected {str(dtype).removeprefix('torch.')}: "
            "float64 to compute in float64, else float32; convert the networks with .to() first"
        )
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        raise InputError(f"engine: got parameters on {', '.join(sorted(map(str, devices)))}; expected one device")
    return devices.pop()


def _starts(parameters: list[nn.Parameter]) -> tuple[list[int], int]:
    """Where each parameter begins, in elements, the one after a convolution weight aligned; and the end."""
    starts, end = [], 0
    for parameter in parameters:
        starts.append(end)
        end += parameter.numel() + (-parameter.numel() % ALIGNMENT if parameter.ndim == 4 else 0)
    return starts, end


def _view(flat: Tensor, start: int, like: Tensor) -> Tensor:
    """The part of a flat buffer that begins at `start` as a tensor of like's shape, a weight's channels_last."""
    part = flat[start : start + like.numel()]
    if like.ndim != 4:
        return part.view(like.shape)
    o, c, kh, kw = like.shape
    return part.view(o, kh, kw, c).permute(0, 3, 1, 2)


_OPTIONS = ("betas", "eps", "weight_decay", "amsgrad", "maximize")  # that the buffers were made for


def _only_group(optimizer: torch.optim.Adam, parameters: list[nn.Parameter], wide: torch.dtype) -> dict[str, Any]:
    """The optimizer's settings. Raises InputError unless it is Adam as the recipe has it, over these parameters."""
    groups = optimizer.param_groups
    if len(groups) != 1 or sorted(map(id, groups[0]["params"])) != sorted(map(id, parameters)):
        raise InputError(
            f"engine: the optimizer must have exactly its networks' parameters, each once, in one group{REFERENCE}"
        )
    group = groups[0]
    for option in ("weight_decay", "amsgrad", "maximize"):
        if group.get(option):
            raise InputError(f"engine: got Adam with {option}={group[option]}, expected it off{REFERENCE}")
    numbers = {"lr": _is_number(group["lr"], wide)} | {
        name: all(isinstance(value, float | int) for value in values)
        for name, values in (("betas", group["betas"]), ("eps", [group["eps"]]))
    }
    for option, is_number in numbers.items():
        if not is_number:
            raise InputError(f"engine: got Adam with {option}={group[option]}, expected plain numbers{REFERENCE}")
    if not group["eps"] > 0:  # what has no gradient would become NaN, and the engine leaves it out
        raise InputError(f"engine: got Adam with eps={group['eps']}, expected more than 0{REFERENCE}")
    return group


def _is_number(lr: object, wide: torch.dtype) -> bool:
    """Whether a learning rate is read as Adam reads it: a tensor of a lower dtype rounds what is computed with it."""
    if isinstance(lr, Tensor):
        return lr.numel() == 1 and torch.promote_types(lr.dtype, wide) == lr.dtype
    return isinstance(lr, float | int)
