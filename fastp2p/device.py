"""Where to compute."""

import os
from pathlib import Path

import torch

from fastp2p.config import Device, Precision, ResolvedConfig, RunConfig
from fastp2p.errors import InputError

DTYPES: dict[Precision, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


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


def best_precision(device: torch.device) -> Precision:
    """What --precision auto stands for: bf16 on GPUs of capability 8.0 or more and on CPUs with AVX512_BF16 or AMX,
    fp16 on GPUs of 7.0 or more, else fp32."""
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return "bf16" if major >= 8 else "fp16" if major >= 7 else "fp32"
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if has_bf16 else "fp32"


def prepare(config: RunConfig) -> tuple[torch.device, ResolvedConfig]:
    """Choose a run's device and decide its configuration there, and make cuDNN give the same bits each time.

    Returns:
        The device, and the configuration with every None and auto replaced.

    Raises:
        InputError: when the configuration asks for cuda and there is none.
    """
    device = choose_device(config.device)
    torch.backends.cudnn.deterministic = True  # or a resumed run would not repeat the unbroken one's bits on a GPU
    return device, config.resolve(device.type, best_precision(device))


def describe_device(device: torch.device) -> str:
    """The GPU's name, or the CPU's thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def memory_bytes(device: torch.device) -> int:
    """Memory of the GPU, or of this machine or container, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # the container's; "max" for none
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(physical, int(text)) if text.isdigit() else physical
