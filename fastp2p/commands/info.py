"""What is installed, on which device, and which kernel serves each operator there."""

import os
import platform

import torch

from fastp2p import ops
from fastp2p.device import best_precision, choose_device, describe_device
from fastp2p.environment import installed_version
from fastp2p.ops import kernel_choices
from fastp2p.ops.extension import describe_extension

PACKAGES = ("torch", "triton", "numpy", "pillow", "safetensors", "torchmetrics", "tensorboard", "matplotlib")


def info() -> str:
    """A report to read, and to paste into an issue."""
    device = choose_device("auto")
    lines = [
        f"fastp2p      {version_of('fastp2p')}",
        f"python       {platform.python_version()} on {platform.platform()}",
        *(f"{name:<13}{version_of(name)}" for name in PACKAGES),
        "",
        f"device       {device.type}: {describe_device(device)}",
        f"cores        {os.cpu_count()}, CPU capability {torch.backends.cpu.get_cpu_capability()}",
        f"C++ kernels  {describe_extension()}",
        f"CUDA         {torch.version.cuda or 'not in this PyTorch'}",
        f"engine       fused, by default in {best_precision(device)}",
        f"kernels      {_describe_choices(device)}",
        "",
        f"{'operator':<19}served on {device.type} by",
        *(f"{name:<19}{ops.served_by(name, device.type)}" for name in ops.operators()),
    ]
    return "\n".join(lines)


def _describe_choices(device: torch.device) -> str:
    place = kernel_choices.place_of(device)
    path = kernel_choices.cache_path(place)
    if path is None:
        return "none kept: this user has no home folder; set FASTP2P_CACHE to a folder"
    return f"{len(kernel_choices.read_cache(place))} convolutions measured on this device, in {path}"


def version_of(package: str) -> str:
    """The version of an installed package, for a report; of PyTorch with the build, such as 2.11.0+cu130."""
    if package == "torch":
        return torch.__version__  # PyPI's metadata leave the build out
    return installed_version(package) or "not installed"
