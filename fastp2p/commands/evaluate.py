"""Score a trained generator on paired images."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastp2p.config import Device, Direction
from fastp2p.data import PairFormat, eval_batches, load_split
from fastp2p.data.images import bad_file_lines
from fastp2p.data.sources.folders import passed_over
from fastp2p.device import choose_device
from fastp2p.models.checkpoint import load_image_generator
from fastp2p.models.generate import NormStats
from fastp2p.models.metrics import evaluate_generator


def evaluate(
    model: Path,
    data: str,
    split: str = "val",
    *,
    direction: Direction | None = None,
    norm_stats: NormStats | None = None,
    dropout: bool = False,
    skip_bad: bool = False,
    seed: int = 0,
    device: Device = "auto",
) -> dict[str, Any]:
    """L1, PSNR and SSIM (`fastp2p.models.metrics.score`) over a split, each image resized to the model's crop_size.

    Args:
        model: a netG.safetensors.
        data, split: where the pairs are, as in training.
        direction: None takes the model's own.
        norm_stats: what batch norm normalises with, see `fastp2p.models.generate.generate`; None is the model's own.
        dropout: keep dropout on.
        skip_bad: score the rest when there are bad files.
        seed: of the dropout.
        device: "auto", "cpu" or "cuda".

    Returns:
        {"model", "data", "split", "direction", "size", "images", "skipped", "passed_over", "notes", "warnings",
        "norm_stats", "dropout", "metrics": {name: {"mean", "std"}}, "per_image": {pair: {name: value}}}; std is over
        the images.

    Raises:
        InputError: when the model or the pairs cannot be read.
    """
    chosen = choose_device(device)
    netG, spec = load_image_generator(model)
    netG.to(chosen)
    direction, norm_stats = direction or spec.direction, norm_stats or spec.norm_stats
    format = PairFormat(direction, spec.crop_size, spec.input_nc, spec.output_nc)
    dataset = load_split(data, split, format, skip_bad=skip_bad)
    torch.manual_seed(seed)
    values = evaluate_generator(netG, eval_batches(dataset, device=chosen), norm_stats=norm_stats, dropout=dropout)

    names = [pair.name for pair in dataset.pairs if pair.name not in dataset.skipped]  # some while they were scored
    return {
        "model": str(model),
        "data": data,
        "split": split,
        "direction": direction,
        "size": spec.crop_size,
        "images": len(names),
        "skipped": dataset.skipped,
        "passed_over": dataset.ignored,
        "notes": dict(dataset.notes),
        "warnings": dataset.warnings,
        "norm_stats": norm_stats,
        "dropout": dropout,
        "metrics": {k: {"mean": float(np.mean(v)), "std": _std(v)} for k, v in values.items()},
        "per_image": {name: {k: v[i] for k, v in values.items()} for i, name in enumerate(names)},
    }


def _std(values: list[float]) -> float:
    return float(np.std(values)) if np.isfinite(values).all() else math.nan  # an identical image's PSNR is infinite


def to_json(result: dict[str, Any]) -> str:
    """The result as JSON, which knows no infinity and no NaN: they become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(leaf) for name, leaf in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(result), indent=2, allow_nan=False)


def format_table(result: dict[str, Any]) -> str:
    """The result as a table for the terminal."""
    lines = [f"{result['images']} images of {result['data']} {result['split']}, {result['size']}x{result['size']} px"]
    lines += [f"skipped {line.strip()}" for line in bad_file_lines(result["skipped"])]
    lines += [passed_over(result["passed_over"])] if result["passed_over"] else []
    lines += [f"{count} pairs {note}" for note, count in result["notes"].items()]
    lines += [f"warning: {text}" for text in result["warnings"]]
    lines += ["", f"{'':6} {'mean':>9} {'std':>9}"]
    better = {
        "L1": "in [-1, 1], lower is better",
        "PSNR": "dB, higher is better",
        "SSIM": "at most 1, higher is better",
    }
    for name, value in result["metrics"].items():
        lines.append(f"{name:6} {value['mean']:9.4f} {value['std']:9.4f}  {better[name]}")
    return "\n".join(lines)
