"""The whole training step for gpu_check.py: unet_256 and the 70x70 PatchGAN at 256 px, by each provider."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from jobs import COMPILED, EAGER, OURS, Config, Job, Runner
from timing import COLD_BYTES

from fastp2p.engine import FusedStep, plan_network
from fastp2p.losses import GANLoss
from fastp2p.networks import PatchDiscriminator, UnetGenerator, count_parameters, init_weights
from fastp2p.reference import train_step

AMP = "eager, AMP, channels_last, fused Adam"
STEP = "step"  # what these jobs stand under instead of an operator
D_PASSES, D_WEIGHT_GRADIENTS = 3, 2  # fake, real, and once more for G, whose backward needs no weight gradient of D
BYTES_PER_PARAMETER = 26  # that Adam must move where its gradients never reach memory: 12 in, 12 out, 2 in bfloat16


def step_jobs(device: torch.device, rehearse: bool) -> Iterator[Job]:
    """Batch sizes 1, 4, 16 and 64; each provider has networks of its own, in device memory from the first call on."""
    size, levels, width, n_layers = (8, 2, 4, 1) if rehearse else (256, 8, 64, 3)
    netG, netD = UnetGenerator(levels=levels, ngf=width), PatchDiscriminator(ndf=width, n_layers=n_layers)
    plans = [plan_network(net, (size, size)) for net in (netG, netD)]
    n_bytes = BYTES_PER_PARAMETER * (count_parameters(netG) + count_parameters(netD))
    for batch in (1,) if rehearse else (1, 4, 16, 64):
        # Forward, data gradient and weight gradient; the first layer of G has no data gradient to give
        macs_G = 3 * plans[0].macs(batch) - plans[0].layers[0].macs(batch)
        macs_D = (2 * D_PASSES + D_WEIGHT_GRADIENTS) * plans[1].macs(batch) - 2 * plans[1].layers[0].macs(batch)
        for provider, make in _providers(device, size, levels, width, n_layers, batch).items():
            yield Job(
                f"step batch {batch}", STEP, provider, make, n_bytes, COLD_BYTES, flop=2 * (macs_G + macs_D),
                capturable=provider == OURS, facts={"batch": batch, "size": size},
            )  # fmt: skip


def _providers(
    device: torch.device, size: int, levels: int, width: int, n_layers: int, batch: int
) -> dict[str, Callable[[], Runner]]:
    def make(provider: str) -> Runner:
        torch.manual_seed(0)
        nets = [UnetGenerator(levels=levels, ngf=width), PatchDiscriminator(ndf=width, n_layers=n_layers)]
        for net in nets:
            init_weights(net)
            net.to(device)
        real_A, real_B = torch.rand(2, batch, 3, size, size, device=device) * 2 - 1
        adam = {"lr": 2e-4, "betas": (0.5, 0.999)}
        if provider == OURS:
            step = FusedStep(*nets, *(torch.optim.Adam(net.parameters(), **adam) for net in nets),
                             size=(size, size), dtype=torch.bfloat16)  # fmt: skip
            step.prepare()
            return lambda _: step.launch(real_A, real_B)
        if provider != EAGER:
            real_A, real_B = (x.contiguous(memory_format=torch.channels_last) for x in (real_A, real_B))
            nets = [net.to(memory_format=torch.channels_last) for net in nets]
        adam |= {} if provider == EAGER else {"fused": device.type == "cuda"}
        optimizers = [torch.optim.Adam(net.parameters(), **adam) for net in nets]
        if provider == COMPILED:
            torch._inductor.config.force_layout_optimization = True  # whose own rule declines channels_last here
            backend = "inductor" if device.type == "cuda" else "aot_eager"
            nets = [torch.compile(net, backend=backend, dynamic=False) for net in nets]

        def run(_: Config | None) -> object:
            with torch.autocast(device.type, torch.bfloat16, enabled=provider != EAGER):
                return train_step(*nets, *optimizers, real_A, real_B, gan_loss=GANLoss(), lambda_L1=100.0)

        return run

    return {provider: partial(make, provider) for provider in (EAGER, AMP, COMPILED, OURS)}
