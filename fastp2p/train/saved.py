"""What a checkpoint must hold before a run takes it over: nothing that training does not write."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastp2p.errors import InputError
from fastp2p.models.checkpoint import check_fit

MAX_STEPS = 2**53  # beyond, a float counts no more
ADAM = ("lr", "betas", "eps", "weight_decay", "amsgrad", "params")  # options; versions of PyTorch differ in the others


def of_earlier_versions(saved: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with the names of this version: once there was pix2pix alone, and its best score was of L1."""
    if "best_val_L1" not in saved or "model" in saved:
        return saved
    renamed = {"best_score" if name == "best_val_L1" else name: value for name, value in saved.items()}
    return {"model": "pix2pix", "options": options, **renamed}


def check_saved(
    saved: dict[str, Any],
    own: dict[str, Any],
    nets: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Adam],
    path: Path,
) -> None:
    """Compare a checkpoint with what the new run's own would be.

    Args:
        saved: of the checkpoint.
        own: of the new run, `TrainState.as_dict`.
        nets, optimizers: of the new run, by their names in a checkpoint.
        path: for the error.

    Raises:
        InputError: on another model's checkpoint, missing entries, other types, shapes and dtypes, and numbers that no
            run comes to.
    """
    if saved.get("model") != own["model"]:
        raise InputError(f"{path}: is a checkpoint of {saved.get('model')!r:.60}, expected one of {own['model']}")
    missing = own.keys() - saved.keys()
    if missing:
        raise InputError(f"{path}: is damaged: it lacks {', '.join(sorted(missing))}")
    for name, net in nets.items():
        weights = saved[name]
        if isinstance(weights, dict) and all(isinstance(value, Tensor) for value in weights.values()):
            check_fit(net, {name: tuple(value.shape) for name, value in weights.items()}, path)
    wrong = next(_wrong(saved, _expected(saved, own, optimizers), nets, optimizers), None)
    if wrong is not None:
        raise InputError(f"{path}: is damaged, or was changed after it was written: {wrong}; take another copy")


def _expected(saved: dict[str, Any], own: dict[str, Any], optimizers: Mapping[str, torch.optim.Adam]) -> dict[str, Any]:
    """`own` with an entry for all that only a run in progress has."""
    expected = own | {"options": {}}  # another version may have more of them, or fewer
    rng = saved["rng"]
    if isinstance(rng, dict) and isinstance(rng.get("cuda"), Tensor):  # a GPU's run may go on elsewhere
        expected["rng"] = own["rng"] | {"cuda": torch.empty(rng["cuda"].numel(), dtype=torch.uint8)}
    for name, optimizer in optimizers.items():
        groups = [{option: group[option] for option in ADAM} for group in own[name]["param_groups"]]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        states = [{"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for p in parameters]
        found = saved[name]
        at_start = type(saved["step"]) is int and saved["step"] == 0
        begun = not at_start or not isinstance(found, dict) or found.get("state") != {}
        expected[name] = {"state": dict(enumerate(states)) if begun else {}, "param_groups": groups}
    return expected


def _wrong(
    saved: dict[str, Any], expected: dict[str, Any], nets: Iterable[str], optimizers: Iterable[str]
) -> Iterator[str]:
    """What is wrong, in words."""
    for name, value in expected.items():
        yield from _differences(name, value, saved[name])
    step = saved["step"]
    if not 0 <= saved["loss_steps"] <= step < MAX_STEPS:
        yield f"step is {step}, loss_steps {saved['loss_steps']}"
    if not saved["best_score"] >= 0:
        yield f"best_score is {saved['best_score']}"
    for name in nets:
        for weight, value in saved[name].items():
            if not value.isfinite().all():
                yield f"{name}/{weight} holds NaN or infinity"
            if weight.endswith("running_var") and value.min() < 0:
                yield f"{name}/{weight} holds {float(value.min()):.3g}, expected variances of 0 or more"
    for name in optimizers:
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
