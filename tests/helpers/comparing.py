"""Whether a fused model does what the model did, and a small model to ask it of."""

import copy
import os
from typing import Any

import torch
from helpers.on_device import generator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastp2p.nn import FuseReport, fuse

DOUBLE = torch.float64


class OperatorCalls(TorchDispatchMode):
    """The names of the operators that are called, and of fastp2p's among them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.all_names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.all_names.append(name)
        if func.namespace == "fastp2p":
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def total(output: Tensor | list[Tensor]) -> Tensor:
    """A scalar in which every element of the output has a weight of its own."""
    outputs = [output] if isinstance(output, Tensor) else output
    return sum((y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in outputs)


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same_training(model: nn.Module, fused: nn.Module, x: Tensor, steps: int = 2, **close: float) -> None:
    """Outputs, gradients by name, the input's gradient and buffers agree over a few steps of SGD, then in eval mode.

    In float64 up to 1e-9 unless told otherwise: the same sums in another order.
    """
    close = close or {"rtol": 1e-9, "atol": 1e-9}
    models = (model, fused)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in models]
    for _ in range(steps):
        inputs = [x.clone().requires_grad_() for _ in models]
        outputs = [m(i) for m, i in zip(models, inputs, strict=True)]
        torch.testing.assert_close(outputs[1], outputs[0], **close)
        for m, output, optimizer in zip(models, outputs, optimizers, strict=True):
            optimizer.zero_grad()
            total(output).backward()
            assert len(grads(m)) > 0
        torch.testing.assert_close(grads(fused), grads(model), **close)
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **close)
        torch.testing.assert_close(dict(fused.named_buffers()), dict(model.named_buffers()), **close)
        for optimizer in optimizers:
            optimizer.step()
    assert_same_eval(model, fused, x, **close)


def assert_same_eval(model: nn.Module, fused: nn.Module, x: Tensor, **close: float) -> None:
    """Outputs agree in eval mode without gradients (twice: folded, then kept) and with them, gradients too."""
    close = close or {"rtol": 1e-9, "atol": 1e-9}
    models = (model.eval(), fused.eval())
    with torch.no_grad():
        expected = model(x.clone())
        for _ in range(2):
            torch.testing.assert_close(fused(x.clone()), expected, **close)
    for m in models:
        m.zero_grad()
        total(m(x.clone())).backward()
    torch.testing.assert_close(grads(fused), grads(model), **close)
    for m in models:
        m.train()


def fused_copy(model: nn.Module) -> tuple[nn.Module, FuseReport]:
    """A copy of the model, fused, and the report; names of parameters and buffers have stayed."""
    fused = copy.deepcopy(model)
    before = dict(fused.named_parameters())
    keys = list(fused.state_dict())
    report = fuse(fused)
    assert list(fused.state_dict()) == keys
    after = dict(fused.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    return fused, report


def fuse_it(model: nn.Module) -> nn.Module:
    assert fuse(model).fused
    return model


def small(dtype: torch.dtype = DOUBLE, dropout: float = 0.0) -> nn.Sequential:
    """Both convolutions, batch and instance norm, with statistics that are not 0 and 1."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 4, 2, 1),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.3),
        nn.Dropout(dropout),
        nn.ConvTranspose2d(4, 5, 3, 2, 1, output_padding=1),
        nn.BatchNorm2d(5, eps=0.1, momentum=0.3),
        nn.ReLU(),
        nn.Conv2d(5, 2, 3),
        nn.InstanceNorm2d(2, affine=True),
        nn.Tanh(),
    )
    for norm in (model[1], model[5]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        norm.running_mean.uniform_(-0.5, 0.5)
        norm.running_var.uniform_(0.5, 1.5)
    return model.to(dtype)


def images(n: int = 2, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(n, 3, 8, 8, dtype=dtype, generator=generator(1))


def train_in_parallel(rank: int, port: int, folder: str) -> None:
    """One of two processes: gradients and buffers of the model and of the fused model to folder/rank.pt."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    both = []
    for m in (small(), fuse_it(small())):
        parallel = nn.parallel.DistributedDataParallel(m)
        total(parallel(images(4)[2 * rank : 2 * rank + 2])).backward()
        both.append((grads(m), dict(m.named_buffers())))
    torch.save(both, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    # DistributedDataParallel keeps gloo's threads alive past destroy_process_group. One that frees a tensor while the
    # interpreter ends aborts the process: see the comments in pytorch/pytorch#190489. So the interpreter does not end.
    os._exit(0)
