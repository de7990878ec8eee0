import pytest
import torch

from fastp2p import ops
from fastp2p.errors import InputError
from fastp2p.ops import library
from fastp2p.ops.extension import WHY_ABSENT
from fastp2p.ops.library import INTERPRETED


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels serve the CPU alone")
@pytest.mark.parametrize(("capability", "server"), [((9, 0), "Triton"), ((7, 5), "reference (PyTorch): an old GPU")])
def test_who_serves_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], server: str):
    pytest.importorskip("triton")
    library._triton_supports.cache_clear()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    if server == "Triton":
        assert ops.served_by("conv", "cuda") == server
    else:
        with pytest.warns(UserWarning, match="compute capability 8.0; GPU 0 has 7.5, so plain PyTorch serves"):
            assert ops.served_by("conv", "cuda") == server
        assert ops.served_by("conv_transpose", "cuda") == server  # said once
    library._triton_supports.cache_clear()


def test_who_serves_the_cpu():
    expected = "Triton, interpreted" if INTERPRETED else "C++" if WHY_ABSENT is None else "reference (PyTorch)"
    assert {ops.served_by(name, "cpu") for name in ops.operators()} == {expected}


def test_autocast_casts_what_it_should():
    x, wide, integers = torch.zeros(1), torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    assert library.autocast(x, wide, integers) == (x, wide, integers)
    with torch.autocast(x.device.type, torch.bfloat16):
        cast, *others = library.autocast(x, wide, integers, None)
    assert cast.dtype == torch.bfloat16
    assert others[0] is wide
    assert others[1] is integers
    assert others[2] is None


def test_compiling_asks_nothing_that_the_oldest_pytorch_cannot_trace(monkeypatch: pytest.MonkeyPatch):
    """Whether there is autocast for a type of device, PyTorch 2.11's compiler cannot find out."""
    monkeypatch.setattr(torch.amp, "is_autocast_available", torch.compiler.disable(torch.amp.is_autocast_available))
    compiled = torch.compile(library.autocast, backend="eager", fullgraph=True)
    x = torch.zeros(1)
    assert compiled(x)[0].dtype == torch.float32
    with torch.autocast(x.device.type, torch.bfloat16):
        assert compiled(x)[0].dtype == torch.bfloat16
    assert compiled(x.to("meta"))[0].dtype == torch.float32


def test_a_gradient_that_there_is_not_raises():
    x = torch.zeros(1, 2, 3, 3, requires_grad=True)
    dweight = torch.ops.fastp2p.conv_wgrad(x, None, x.detach(), 1, 1, 1, 0, torch.float32)
    with pytest.raises(InputError, match="conv_wgrad: has no gradient; give it tensors that are detached"):
        dweight.sum().backward()
