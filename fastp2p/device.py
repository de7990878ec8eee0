"""Where to compute."""

import os
from pathlib import Path

import torch

from fastp2p.config import Device
from fastp2p.errors import InputError


def choose_device(name: Device) -> torch.device:
    """The torch.device of a --device option; auto is a CUDA GPU if PyTorch finds one, else the CPU.

    Raises:
        InputError: when it is cuda and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        reason = "this PyTorch is a CPU build" if torch.version.cuda is None else "PyTorch finds no usable GPU"
        raise InputError(f"device: got cuda, but {reason}; use --device cpu, or see fastp2p info")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def describe_device(device: torch.device) -> str:
    """The GPU's name or the CPU's thread count, and the precision of the reference path there."""
    if device.type == "cuda":
        tf32 = ", convolutions in TF32" if torch.backends.cudnn.allow_tf32 else ""
        return f"{torch.cuda.get_device_name(device)}, float32{tf32}"
    return f"CPU, {torch.get_num_threads()} threads, float32"


def memory_bytes(device: torch.device) -> int:
    """Memory of the GPU, or of this machine or container, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of the container; "max" for none
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(physical, int(text)) if text.isdigit() else physical
