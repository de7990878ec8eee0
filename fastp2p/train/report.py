"""What a run prints before its first step: its networks, its device, its memory."""

import torch

from fastp2p.config import ResolvedConfig
from fastp2p.device import describe_device, memory_bytes
from fastp2p.ops.extension import WHY_ABSENT
from fastp2p.terminal import Say
from fastp2p.train.state import TrainState


def describe(config: ResolvedConfig, state: TrainState, pairs: int, say: Say) -> None:
    """Print the networks' sizes, the device, and the memory that a step will take, before it takes it."""
    for line in state.model.describe(config, state.nets):
        say(line)
    batch_size = min(config.batch_size, pairs)
    if batch_size < config.batch_size:
        say(f"warning: --batch-size {config.batch_size}, but there are only {pairs} pairs, so batches are of {pairs}")
    need, mib = state.model.memory(config, state.nets, batch_size), 2**20
    say(
        f"{describe_device(state.device)}; engine {config.engine}, {describe_precision(config, state.device)}; "
        f"a step of batch {batch_size} holds {need.total / mib:,.0f} MiB: {need.state / mib:,.0f} for the "
        f"networks and Adam, {need.activations / mib:,.0f} for activations; scratch space comes on top"
    )
    if state.device.type == "cpu" and WHY_ABSENT is not None:
        say(f"no C++ kernels, so plain PyTorch serves the operators, more slowly: {WHY_ABSENT}")
    if need.total > (there := memory_bytes(state.device)):
        say(f"warning: there are only {there / mib:,.0f} MiB; lower --batch-size, --crop-size or --ngf")


def describe_precision(config: ResolvedConfig, device: torch.device) -> str:
    """The number format in which a step of config.engine computes."""
    if config.precision in ("bf16", "fp16"):
        return f"{config.precision} on fp32 weights"
    tf32 = config.engine == "reference" and device.type == "cuda" and torch.backends.cudnn.allow_tf32
    return config.precision + (", convolutions in TF32" if tf32 and config.precision == "fp32" else "")
