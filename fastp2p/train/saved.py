"""What a checkpoint must hold before a run takes it over: nothing that training does not write."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastp2p.errors import InputError
from fastp2p.models.checkpoint import check_fit

MAX_STEPS = 2**53  # beyond, a float counts no more
ADAM = ("lr", "betas", "eps", "weight_decay", "amsgrad", "params")  # options; versions of PyTorch differ in the others


def check_saved(saved: dict[str, Any], own: dict[str, Any], nets: Mapping[str, nn.Module], path: Path) -> None:
    """Compare a checkpoint with what the new run's own would be.

    Args:
        saved: of the checkpoint.
        own: of the new run, `TrainState.as_dict`.
        nets: "G" and "D".
        path: for the error.

    Raises:
        InputError: on missing entries, other types, shapes and dtypes, and numbers that no run comes to.
    """
    missing = own.keys() - saved.keys()
    if missing:
        raise InputError(f"{path}: is damaged: it lacks {', '.join(sorted(missing))}")
    for player, net in nets.items():
        weights = saved[f"net{player}"]
        if isinstance(weights, dict) and all(isinstance(value, Tensor) for value in weights.values()):
            check_fit(net, {name: tuple(value.shape) for name, value in weights.items()}, path)
    wrong = next(_wrong(saved, _expected(saved, own, nets)), None)
    if wrong is not None:
        raise InputError(f"{path}: is damaged, or was changed after it was written: {wrong}; take another copy")


def _expected(saved: dict[str, Any], own: dict[str, Any], nets: Mapping[str, nn.Module]) -> dict[str, Any]:
    """`own` with an entry for all that only a run in progress has."""
    expected = dict(own)
    rng = saved["rng"]
    if isinstance(rng, dict) and isinstance(rng.get("cuda"), Tensor):  # a GPU's run may go on elsewhere
        expected["rng"] = own["rng"] | {"cuda": torch.empty(rng["cuda"].numel(), dtype=torch.uint8)}
    for player, net in nets.items():
        adam = own[f"optimizer_{player}"]
        groups = [{option: group[option] for option in ADAM} for group in adam["param_groups"]]
        states = [{"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for p in net.parameters()]
        found = saved[f"optimizer_{player}"]
        at_start = type(saved["step"]) is int and saved["step"] == 0
        begun = not at_start or not isinstance(found, dict) or found.get("state") != {}
        expected[f"optimizer_{player}"] = {"state": dict(enumerate(states)) if begun else {}, "param_groups": groups}
    return expected


def _wrong(saved: dict[str, Any], expected: dict[str, Any]) -> Iterator[str]:
    """What is wrong, in words."""
    for name, value in expected.items():
        yield from _differences(name, value, saved[name])
    step = saved["step"]
    if not 0 <= saved["loss_steps"] <= step < MAX_STEPS:
        yield f"step is {step}, loss_steps {saved['loss_steps']}"
    if not saved["best_val_L1"] >= 0:
        yield f"best_val_L1 is {saved['best_val_L1']}"
    for name in ("netG", "netD"):
        for weight, value in saved[name].items():
            if not value.isfinite().all():
                yield f"{name}/{weight} holds NaN or infinity"
            if weight.endswith("running_var") and value.min() < 0:
                yield f"{name}/{weight} holds {float(value.min()):.3g}, expected variances of 0 or more"
    for name in ("optimizer_G", "optimizer_D"):
        for number in expected[name]["state"]:
            state = saved[name]["state"][number]
            if not 0 <= float(state["step"]) <= step:
                yield f"{name}/state/{number}/step is {float(state['step'])} at step {step}"
            if not all(bool(state[moment].isfinite().all()) for moment in ("exp_avg", "exp_avg_sq")):
                yield f"{name}/state/{number} holds NaN or infinity"
            if state["exp_avg_sq"].min() < 0:
                yield f"{name}/state/{number}/exp_avg_sq holds a negative mean of squares"


def _differences(name: str, own: Any, saved: Any) -> Iterator[str]:
    """Where a saved value has another type, lacks keys, or as a tensor has another shape or dtype."""
    if isinstance(own, Tensor):
        if not isinstance(saved, Tensor) or (saved.shape, saved.dtype) != (own.shape, own.dtype):
            got = f"{tuple(saved.shape)} {saved.dtype}" if isinstance(saved, Tensor) else f"{saved!r:.60}"
            yield f"{name} is {got}, expected {tuple(own.shape)} {own.dtype}"
    elif isinstance(own, dict | list | tuple):
        kind = dict if isinstance(own, dict) else type(own)
        if not isinstance(saved, kind):
            yield f"{name} is {saved!r:.60}, expected {kind.__name__}"
            return
        mine, theirs = (dict(value if isinstance(value, dict) else enumerate(value)) for value in (own, saved))
        for key, value in mine.items():
            if key in theirs:
                yield from _differences(f"{name}/{key}", value, theirs[key])
            else:
                yield f"{name}/{key} is missing"
    elif type(own) is not type(saved):
        yield f"{name} is {saved!r:.60}, expected {type(own).__name__}"
