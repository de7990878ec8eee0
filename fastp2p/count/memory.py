"""What a training step will take, counted before it is run."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fastp2p.engine import kept_elements, plan_network
from fastp2p.models.pix2pix.networks import UnetGenerator
from fastp2p.nn.init import count_parameters

STATE_BUFFERS = 4  # weight, gradient and Adam's two moments


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one step."""

    state: int  # weights, gradients where they are kept, Adam's moments
    activations: int  # what is kept for the backward passes at the step's peak: D's two passes and G's one

    @property
    def total(self) -> int:
        return self.state + self.activations


def estimate_fused_step_memory(
    netG: UnetGenerator, netD: nn.Module, *, batch_size: int, crop_size: int, dtype: torch.dtype
) -> MemoryEstimate:
    """Count the bytes of a step of the fused engine from its plans.

    A lower bound: activation gradients, of which a few live at a time, and scratch space come on top.

    Args:
        netG, netD: the networks, on any device.
        batch_size, crop_size: the shape of real_A.
        dtype: of computing.
    """
    wide = torch.promote_types(dtype, torch.float32).itemsize
    buffers = 4 if dtype == torch.float16 else 3  # weight, Adam's moments; in float16 gradients, to look for infinities
    low = 0 if dtype.itemsize == wide else dtype.itemsize
    state = (buffers * wide + low) * (count_parameters(netG) + count_parameters(netD))
    padded = -(-crop_size // 2**netG.levels) * 2**netG.levels
    plan_G, plan_D = plan_network(netG, (padded, padded)), plan_network(netD, (crop_size, crop_size))
    pairs = 2 * batch_size * plan_D.in_channels * crop_size**2
    elements = kept_elements(plan_G, batch_size) + kept_elements(plan_D, 2 * batch_size) + pairs
    return MemoryEstimate(state, elements * dtype.itemsize)


def estimate_step_memory(
    netG: nn.Module, netD: nn.Module, *, batch_size: int, input_nc: int, crop_size: int
) -> MemoryEstimate:
    """Count a reference step's bytes by running the nets' shapes alone; nothing is allocated.

    A lower bound: the convolution library's scratch space, on a GPU the temporaries of multi-tensor Adam, and PyTorch
    itself come on top. (unet_256 at batch 1 on two Zen 5 cores, torch 2.13.0, one run: 965 MiB counted, and the process
    grew by 1,278 from the 224 that it had after its imports.)

    Args:
        netG, netD: the networks, on any device.
        batch_size, input_nc, crop_size: the shape of real_A.
    """
    dtype = next(netD.parameters()).dtype
    state = STATE_BUFFERS * dtype.itemsize * (count_parameters(netG) + count_parameters(netD))
    real_A = torch.empty(batch_size, input_nc, crop_size, crop_size, dtype=dtype, device="meta")
    saved: dict[int, Tensor] = {}  # by storage, since one tensor may serve several gradients

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    parameters: list[Tensor] = []
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        fake_B = _on_meta(netG, real_A, parameters)
        for _ in ("fake", "real"):
            _on_meta(netD, torch.cat([real_A, fake_B], dim=1), parameters)
    weights = {parameter.untyped_storage()._cdata for parameter in parameters}
    activations = sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in weights)
    return MemoryEstimate(state, activations)


def _on_meta(net: nn.Module, x: Tensor, parameters: list[Tensor]) -> Tensor:
    """The net's forward pass on the meta device, without touching the net itself."""
    tensors = {name: torch.empty_like(tensor, device="meta") for name, tensor in net.state_dict(keep_vars=True).items()}
    parameters += [tensors[name].requires_grad_() for name, _ in net.named_parameters()]
    y = torch.func.functional_call(net, tensors, (x,))
    assert isinstance(y, Tensor)
    return y
