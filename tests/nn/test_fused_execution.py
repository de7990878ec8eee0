"""Fused models under torch.compile, gradient checkpointing and several processes."""

import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.comparing import fuse_it, fused_copy, grads, images, small, total, train_in_parallel
from helpers.plain_models import DCGANDiscriminator, ResidualGenerator, SegmentationUNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DOUBLE = torch.float64


@pytest.mark.parametrize("make", [lambda: small(dropout=0.0), ResidualGenerator, SegmentationUNet, DCGANDiscriminator])
def test_compiled(make: Callable[[], nn.Module]):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make().double()
    fused, _ = fused_copy(model)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    x = images() if isinstance(model, nn.Sequential) else torch.randn(2, 3, 16, 16, dtype=DOUBLE)
    for _ in range(2):
        for m in (model, compiled):
            m.zero_grad()
            total(m(x)).backward()
        torch.testing.assert_close(grads(fused), grads(model))
        torch.testing.assert_close(dict(fused.named_buffers()), dict(model.named_buffers()))
        for m in (model, fused):
            torch.optim.SGD(m.parameters(), lr=0.01).step()
    for m in (model, compiled):
        m.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        for m in (model, fused):
            for p in m.parameters():
                p.mul_(0.9)
        torch.testing.assert_close(compiled(x), model(x))  # not folded into the graph for good


def test_compiled_with_graph_breaks():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = small()

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
                torch._dynamo.graph_break()
            return x

    torch._dynamo.reset()
    model = Broken()
    fused, report = fused_copy(model)
    assert len(report.fused) == 3
    torch.testing.assert_close(torch.compile(fused, backend="aot_eager")(images()), model(images()))


def test_compiled_one_by_one():
    torch._dynamo.reset()
    model = small()
    fused, _ = fused_copy(model)
    fused[0].compile(backend="aot_eager")
    torch.testing.assert_close(fused(images()), model(images()))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # the mark, in strict mode
def test_exported(strict: bool):
    torch._dynamo.reset()
    fused, _ = fused_copy(small())
    x = images()
    exported = torch.export.export(fused, (x,), strict=strict)
    torch.testing.assert_close(exported.module()(x), fused(x))
    torch.testing.assert_close(fused[:1](x), small()[:1](x))  # the export has left no trace


def test_compiled_dropout_is_dropped():
    torch._dynamo.reset()
    fused = fuse_it(nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64), nn.Dropout(0.5)))
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 16, 16)
    outputs = [compiled(x), compiled(x)]
    assert (outputs[0] == 0).double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert not torch.equal(*outputs)


def test_shapes_come_from_the_meta_device():
    fused, _ = fused_copy(small(dtype=torch.float32))
    x = images(dtype=torch.float32)
    expected = fused(x).shape
    fused, x = fused.to("meta"), x.to("meta")
    for mode in (True, False):
        assert fused.train(mode)(x).shape == expected


def test_checkpointing_recomputes_the_same():
    """Running statistics move twice, as PyTorch's own do; dropout repeats its mask."""
    model = small()
    fused, _ = fused_copy(model)
    for m in (model, fused):
        x = images().requires_grad_()
        total(checkpoint(m, x, use_reentrant=False)).backward()
    torch.testing.assert_close(grads(fused), grads(model))
    torch.testing.assert_close(dict(fused.named_buffers()), dict(model.named_buffers()))
    assert fused[1].num_batches_tracked == 2

    gradients = []
    for run in (lambda m, x: m(x), lambda m, x: checkpoint(m, x, use_reentrant=False)):
        m = fuse_it(small(dropout=0.5))
        torch.manual_seed(0)
        total(run(m, images().requires_grad_())).backward()
        gradients.append(grads(m))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_distributed_data_parallel(tmp_path: Path):
    """Two processes: gradients are averaged over both, and are those of the unfused model.

    On the CPU wherever the other tests run: gloo averages there, and two processes need no two GPUs.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = torch.multiprocessing.start_processes(
        train_in_parallel, (port, str(tmp_path)), nprocs=2, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + 100
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the two processes do not end")
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for plain, fused in results:
        torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(results[0][1][0], results[1][1][0], rtol=0, atol=0)
    with torch.device("cpu"):
        alone = fuse_it(small())
        total(alone(images(4)[:2])).backward()
    assert not torch.allclose(alone[0].weight.grad, results[0][1][0]["0.weight"])
