"""The engine computes Adam as it is given, or refuses it by name: there is no third outcome."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.nets import batches, outcome, small_nets
from torch import nn

from fastp2p.errors import InputError

SIZE = (32, 32)


@pytest.mark.parametrize("kind", ["RAdam", "NAdam", "Adamax", "AdamW", "SGD", "RMSprop", "Adagrad", "Adadelta", "ASGD"])
def test_another_optimizer_is_refused(kind: str):
    assert outcome(lambda _: None, lambda parameters: getattr(torch.optim, kind)(parameters, 2e-3)) == "refused"


def first_of(optimizer: Any) -> nn.Parameter:
    parameter = optimizer.param_groups[0]["params"][0]
    assert isinstance(parameter, nn.Parameter)
    return parameter


def scheduled(optimizer: torch.optim.Adam) -> None:
    torch.optim.lr_scheduler.StepLR(optimizer, 10)


def own_step(optimizer: Any) -> None:
    step = optimizer.step
    optimizer.step = lambda: [step(), step()]


ADAMS: dict[str, tuple[dict[str, Any], Callable[[torch.optim.Adam], object]]] = {
    **{f"{name}={value}": ({name: value}, lambda _: None) for name, value in [
        ("lr", torch.tensor(2e-3)), ("lr", torch.tensor(2e-3, dtype=torch.float64)), ("lr", 1), ("lr", 0.0),
        ("betas", (0.0, 0.0)), ("betas", (torch.tensor(0.5), torch.tensor(0.999))), ("eps", 0.0), ("eps", 1e-3),
        ("weight_decay", 0.1), ("weight_decay", 0.0), ("decoupled_weight_decay", True), ("amsgrad", True),
        ("maximize", True), ("foreach", True), ("foreach", False), ("fused", True),
    ]},
    "a pre-hook": ({}, lambda o: o.register_step_pre_hook(lambda o, *rest: first_of(o).grad.mul_(2))),
    "a post-hook": ({}, lambda o: o.register_step_post_hook(lambda o, *rest: first_of(o).data.mul_(2))),
    "its own step": ({}, own_step),
    "a schedule": ({}, scheduled),
    "a negative lr": ({}, lambda o: o.param_groups[0].update(lr=-1e-3)),
    "two groups": ({}, lambda o: o.add_param_group({"params": [o.param_groups[0]["params"].pop()], "lr": 1e-4})),
    "a parameter twice": ({}, lambda o: o.param_groups[0]["params"].append(first_of(o))),
    "a parameter less": ({}, lambda o: o.param_groups[0]["params"].pop()),
    "a parameter more": ({}, lambda o: o.param_groups[0]["params"].append(nn.Parameter(torch.ones(1)))),
}  # fmt: skip
SERVED_ADAMS = {"lr=0.002", "lr=1", "lr=0.0", "betas=(0.0, 0.0)", "eps=0.001", "weight_decay=0.0", "a schedule"}


@pytest.mark.parametrize("name", ADAMS)
def test_an_adam_is_computed_or_refused(name: str):
    options, change = ADAMS[name]

    def make(parameters: Any) -> torch.optim.Adam:
        optimizer = torch.optim.Adam(parameters, **{"lr": 2e-3, "betas": (0.5, 0.999)} | options)
        change(optimizer)
        return optimizer

    assert outcome(lambda _: None, make) == "equal" or name not in SERVED_ADAMS


LATER: dict[str, Callable[[Any], object]] = {
    "own step": own_step,
    "a hook": lambda o: o.register_step_post_hook(lambda *rest: None),
    "lr as a tensor": lambda o: o.param_groups[0].update(lr=torch.tensor(1e-3)),
    "a group": lambda o: o.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
    "a parameter less": lambda o: o.param_groups[0]["params"].pop(),
    "no state": lambda o: o.state.clear(),
    "a step of 0": lambda o: o.state[first_of(o)].update(step=torch.zeros(())),
    "another moment": lambda o: o.state[first_of(o)].update(exp_avg_sq=torch.zeros(9)),
}


@pytest.mark.parametrize("name", LATER)
def test_a_change_after_the_first_step_is_refused(name: str):
    trained = small_nets()
    step = trained.fused(SIZE, torch.float64)
    ((A, B),) = batches(1, SIZE, torch.float64, steps=1)
    step(A, B)
    LATER[name](trained.optimizers[0])
    with pytest.raises(InputError, match="engine"):
        step(A, B)


OPTIONS = {"betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1, "amsgrad": True, "maximize": True}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_changed_later_is_refused(option: str):
    trained = small_nets()
    step = trained.fused(SIZE, torch.float64)
    ((A, B),) = batches(1, SIZE, torch.float64, steps=1)
    step(A, B)
    trained.optimizers[1].param_groups[0][option] = OPTIONS[option]
    with pytest.raises(InputError, match=f"the optimizer's {option} went from"):
        step(A, B)
