"""Where to compute."""

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
    """The GPU's name, or the CPU's thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
