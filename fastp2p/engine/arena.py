"""The arena: one network's weights, Adam's moments and compute weights, each one flat buffer; parameters are views."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastp2p.engine.plan import Plan
from fastp2p.errors import InputError

operators = torch.ops.fastp2p
ALIGNMENT = 64  # elements: whole cache lines, and more than 16-byte accesses ask for

Reduce = Callable[[Tensor], object]  # changes a flat buffer of gradients in place, such as an all-reduce
Unscale = Callable[[Tensor], Tensor]  # flat gradients -> () what to multiply them by, 0 to skip the step


class Arena:
    """Flat buffers that a network's parameters and its optimizer's state become views of.

    Convolution weights come first, in channels_last, each (O, KH, KW, C) in memory; then the biases and the norms'
    parameters. state_dict, checkpoints and torch.optim.Adam go on working on the views. Whoever changes the parameters
    from outside calls `refresh`.

        param                 masters, float32 (float64 for float64)
        exp_avg, exp_avg_sq   Adam's moments, likewise
        low                   the convolution weights in the dtype of computing, where that is a lower one
        grad                  gradients, where they are wanted whole: one bucket for an all-reduce, or to be checked for
                              infinities before they may count; else every weight is updated from where its gradient is
                              made, and there is no such buffer

    Args:
        net: its parameters are moved into the arena.
        optimizer: torch.optim.Adam without weight decay over exactly net's parameters; its state is moved as well.
        plan: net's. Its layers' dead taps must have no moments.
        dtype: of computing.
        bucket: gather the gradients; the plan must leave out no taps then.
    """

    def __init__(self, net: nn.Module, optimizer: torch.optim.Adam, plan: Plan, dtype: torch.dtype, *, bucket: bool):
        weights = [layer.weight for layer in plan.layers]
        self.small = [p for p in net.parameters() if all(p is not weight for weight in weights)]
        self.parameters = weights + self.small
        group = _only_group(optimizer, self.parameters)
        (self.beta1, self.beta2), self.eps = group["betas"], group["eps"]
        wide, device = torch.promote_types(dtype, torch.float32), weights[0].device

        self.starts, total = _starts(self.parameters)  # in the flat buffers, elements
        self.n_weights = self.starts[len(weights)] if self.small else total
        self.param, self.exp_avg, self.exp_avg_sq = (torch.zeros(total, dtype=wide, device=device) for _ in range(3))
        self.grad = torch.zeros(total, dtype=wide, device=device) if bucket else None
        self.grads = [] if self.grad is None else self._views(self.grad)
        self.steps = torch.zeros(len(self.parameters), device=device)  # torch.optim.Adam has one for each
        self._adopt(optimizer)

        self.lr, self._lr = torch.zeros((), dtype=wide, device=device), 0.0
        self.betas = torch.tensor([self.beta1, self.beta2], dtype=torch.float64, device=device)
        self.powers = self.betas.clone()
        self.zeros = {id(p): torch.zeros_like(p) for p in self.small}  # gradients of biases that a norm takes away

        # What the operators take of each layer: its live taps of weight and moments, and the weight to compute with
        self.masters: list[tuple[Tensor, ...]] = []
        self.low = torch.zeros(self.n_weights, dtype=dtype, device=device) if dtype != wide else None
        self.lows: list[Tensor] = []
        for layer, weight, start in zip(plan.layers, weights, self.starts, strict=False):
            state = optimizer.state[weight]
            live = [layer.taps.of(t) for t in (weight.detach(), state["exp_avg"], state["exp_avg_sq"])]
            self.masters.append(tuple(live))
            if self.low is not None:
                self.lows.append(_view(self.low, start, live[0]))
        self.refresh()

    def _adopt(self, optimizer: torch.optim.Adam) -> None:
        """Move the parameters and the optimizer's state into the flat buffers."""
        values, *moments = (self._views(flat) for flat in (self.param, self.exp_avg, self.exp_avg_sq))
        for number, (parameter, value, *views) in enumerate(zip(self.parameters, values, *moments, strict=True)):
            value.copy_(parameter.detach())
            parameter.data, parameter.grad = value, None
            state = optimizer.state[parameter]
            exp_avg, exp_avg_sq = views
            if state:
                exp_avg.copy_(state["exp_avg"])
                exp_avg_sq.copy_(state["exp_avg_sq"])
                self.steps[number] = float(state["step"])
            optimizer.state[parameter] = {"step": self.steps[number], "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    def _views(self, flat: Tensor) -> list[Tensor]:
        return [_view(flat, start, parameter) for start, parameter in zip(self.starts, self.parameters, strict=True)]

    def refresh(self) -> None:
        """Round the compute weights anew, after the parameters were changed from outside."""
        for low, (master, _, _) in zip(self.lows, self.masters, strict=False):  # lows may be none
            low.copy_(master)

    def weight(self, number: int) -> Tensor:
        """A layer's weight as the operators read it: live taps, dtype of computing, dense channels_last."""
        if self.low is not None:
            return self.lows[number]
        return self.masters[number][0].contiguous(memory_format=torch.channels_last)

    def begin(self) -> None:
        """Set the bias corrections of the step that begins."""
        torch.pow(self.betas, self.steps[0] + 1, out=self.powers)

    def update_weight(
        self, number: int, outer: Tensor, outer2: Tensor | None, inner: Tensor, stride: int, padding: int
    ) -> None:
        """One layer's weight gradient, and unless gradients are gathered its Adam step."""
        param, exp_avg, exp_avg_sq = self.masters[number]
        if self.grad is not None:
            size = param.shape[2:]
            self.grads[number].copy_(operators.wgrad(outer, outer2, inner, *size, stride, padding, self.grad.dtype))
            return
        low = self.lows[number] if self.lows else None
        operators.wgrad_adam(
            *(outer, outer2, inner, param, exp_avg, exp_avg_sq, self.lr, self.powers),
            *(self.beta1, self.beta2, self.eps, stride, padding, low),
        )

    def set_lr(self, lr: float) -> None:
        """Learning rate of the steps that follow."""
        if lr != self._lr:
            self._lr = lr
            self.lr.fill_(lr)

    def finish(
        self, gradients: Mapping[int, Tensor], reduce: Reduce | None = None, unscale: Unscale | None = None
    ) -> None:
        """The Adam step of what is left: biases and norms, or where gradients are gathered everything.

        Args:
            gradients: of biases and norms' parameters, by id(parameter); those that are missing are 0.
            reduce, unscale: called with the flat gradients, where they are gathered.
        """
        small = [gradients.get(id(p), self.zeros[id(p)]) for p in self.small]
        factor = None
        if self.grad is not None:
            if small:
                torch.cat(small, out=self.grad[self.n_weights :])
            if reduce is not None:
                reduce(self.grad)
            factor = None if unscale is None else unscale(self.grad)
            self._adam(slice(self.n_weights), self.grad[: self.n_weights], self.low, factor)
            self._adam(slice(self.n_weights, None), self.grad[self.n_weights :], None, factor)
        elif small:
            self._adam(slice(self.n_weights, None), torch.cat(small), None, None)
        self.steps.add_(1 if factor is None else factor.sign())
        torch.autograd.graph.increment_version(self.parameters)

    def _adam(self, part: slice, grad: Tensor, low: Tensor | None, unscale: Tensor | None) -> None:
        if not grad.numel():
            return
        operators.adam(
            *(self.param[part], grad, self.exp_avg[part], self.exp_avg_sq[part], self.lr, self.powers),
            *(self.beta1, self.beta2, self.eps, low, *([] if unscale is None else [unscale])),
        )


def _starts(parameters: list[nn.Parameter]) -> tuple[list[int], int]:
    """Where each parameter begins, convolution weights at whole multiples of ALIGNMENT; and the end."""
    starts, end = [], 0
    for parameter in parameters:
        starts.append(end)
        end += parameter.numel() + (-parameter.numel() % ALIGNMENT if parameter.ndim == 4 else 0)
    return starts, end


def _view(flat: Tensor, start: int, like: Tensor) -> Tensor:
    """The part of a flat buffer that begins at `start` as a tensor of like's shape; images of weights channels_last."""
    part = flat[start : start + like.numel()]
    if like.ndim != 4:
        return part.view(like.shape)
    o, c, kh, kw = like.shape
    return part.view(o, kh, kw, c).permute(0, 3, 1, 2)


def _only_group(optimizer: torch.optim.Adam, parameters: list[nn.Parameter]) -> dict[str, Any]:
    """The optimizer's settings. Raises InputError unless it is Adam as the recipe has it, over these parameters."""
    groups = optimizer.param_groups
    same = len(groups) == 1 and {id(p) for p in groups[0]["params"]} == {id(p) for p in parameters}
    if not same:
        raise InputError("engine: the optimizer must have the network's parameters in one group")
    for option in ("weight_decay", "amsgrad", "maximize"):
        if groups[0][option]:
            raise InputError(f"engine: got Adam with {option}={groups[0][option]}, expected it off")
    return groups[0]
