"""What a run says of itself before its first step."""

import torch
from torch import nn

from fastp2p.config import ResolvedConfig
from fastp2p.count.memory import MemoryEstimate, estimate_fused_step_memory, estimate_step_memory
from fastp2p.device import DTYPES, describe_device, memory_bytes
from fastp2p.nn.init import count_parameters
from fastp2p.ops.extension import WHY_ABSENT
from fastp2p.terminal import Say
from fastp2p.train.state import TrainState


def describe(config: ResolvedConfig, state: TrainState, pairs: int, say: Say) -> None:
    """Print the networks' sizes, the device, and the memory that a step will take, before it takes it."""
    dropouts = sum(isinstance(module, nn.Dropout) for module in state.netG.modules())
    say(
        f"netG {config.netG}, ngf {config.ngf}: {count_parameters(state.netG):,} parameters, {dropouts} dropouts; "
        f"netD {config.netD}, ndf {config.ndf}: {count_parameters(state.netD):,} parameters; "
        f"loss: {config.gan_mode} + {config.lambda_L1:g} L1"
    )
    batch_size = min(config.batch_size, pairs)
    if batch_size < config.batch_size:
        say(f"warning: --batch-size {config.batch_size}, but there are only {pairs} pairs, so batches are of {pairs}")
    multiple = 2**state.netG.levels
    if config.crop_size % multiple:
        padded = -(-config.crop_size // multiple) * multiple
        say(f"netG pads {config.crop_size} px to {padded}, the next multiple of {multiple}, and works at that size")
    need, mib = step_memory(config, state, batch_size), 2**20
    say(
        f"{describe_device(state.device)}; engine {config.engine}, {describe_precision(config, state.device)}; "
        f"a step of batch {batch_size} holds {need.total / mib:,.0f} MiB: {need.state / mib:,.0f} for the "
        f"networks and Adam, {need.activations / mib:,.0f} for activations; scratch space comes on top"
    )
    if state.device.type == "cpu" and WHY_ABSENT is not None:
        say(f"no C++ kernels, so plain PyTorch serves the operators, more slowly: {WHY_ABSENT}")
    if need.total > (there := memory_bytes(state.device)):
        say(f"warning: there are only {there / mib:,.0f} MiB; lower --batch-size, --crop-size or --ngf")


def step_memory(config: ResolvedConfig, state: TrainState, batch_size: int) -> MemoryEstimate:
    """What a step of config.engine will take."""
    if config.engine == "reference":
        sizes = {"input_nc": config.input_nc, "crop_size": config.crop_size}
        return estimate_step_memory(state.netG, state.netD, batch_size=batch_size, **sizes)
    dtype = DTYPES[config.precision]
    return estimate_fused_step_memory(
        state.netG, state.netD, batch_size=batch_size, crop_size=config.crop_size, dtype=dtype
    )


def describe_precision(config: ResolvedConfig, device: torch.device) -> str:
    """In what a step of config.engine computes."""
    if config.precision in ("bf16", "fp16"):
        return f"{config.precision} on fp32 weights"
    tf32 = config.engine == "reference" and device.type == "cuda" and torch.backends.cudnn.allow_tf32
    return config.precision + (", convolutions in TF32" if tf32 and config.precision == "fp32" else "")
