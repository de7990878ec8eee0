"""What only a GPU shows: CUDA graphs, streams, offsets over 2^31 and inductor around the operators."""

import fcntl
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import on_device
from helpers.on_device import generator, one_process_at_a_time
from torch import Tensor

from fastp2p import ops

operators = torch.ops.fastp2p
Outputs = tuple[Tensor, ...]
BYTES = 1 << 30


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x = torch.randn(shape, generator=generator(seed)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def adam_state(seed: int, *shape: int) -> list[Tensor]:
    """param, exp_avg, exp_avg_sq, lr, powers."""
    param, exp_avg, exp_avg_sq = (normal(seed + i, *shape, dtype=torch.float32) for i in range(3))
    powers = torch.tensor([0.5, 0.999], dtype=torch.float64)
    return [param, exp_avg, exp_avg_sq.square(), torch.tensor(1e-3 * (1 + seed)), powers ** (1 + seed)]


def norm_inputs(seed: int) -> list[Tensor]:
    """x, mean, var, weight, bias, rng."""
    affine = (normal(seed + i, 24, dtype=torch.float32) for i in (1, 2))
    x = normal(seed, 4, 24, 9, 7)
    return [x, *ops.norm_stats_ref(x, 2), *affine, torch.tensor([5, seed])]


def image_batch(seed: int) -> list[Tensor]:
    pairs = torch.randint(0, 256, (4, 20, 22, 6), dtype=torch.uint8, generator=generator(seed))
    index = torch.randint(0, 4, (3,), generator=generator(seed))
    return [pairs, index, torch.randint(0, 5, (3, 2), generator=generator(seed)), index % 2 == 0]


def adam_in_order(param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, lr: Tensor, powers: Tensor, grad: Tensor) -> None:
    operators.adam(param, grad, exp_avg, exp_avg_sq, lr, powers, 0.5, 0.999, 1e-8)


def norm_act_backward(dy: Tensor, dy2: Tensor, *inputs: Tensor) -> Outputs:
    return operators.norm_act_backward(dy, dy2, *inputs, 1e-5, 2, 0.2, 1, 0.5, 3, False)


# Each operator's tensors by seed, and a call that takes them. What a call changes in place is a result as well.
CALLS: dict[str, tuple[Callable[[int], list[Tensor]], Callable[..., Any]]] = {
    "adam": (lambda s: [*adam_state(s, 5000), normal(s, 5000, dtype=torch.float32)], adam_in_order),
    "augment": (image_batch, lambda *t: operators.augment(*t, 16, 3, torch.bfloat16)),
    "batch_norm_act": (
        lambda s: [*norm_inputs(s), *torch.rand(2, 24, generator=generator(s))],
        lambda *t: operators.batch_norm_act(*t, 0.1, 1e-5, 2, 0.2, 1, 0.5, 3),
    ),
    "conv": (
        lambda s: [normal(s, 1, 32, 10, 6), normal(s + 1, 24, 32, 4, 4)],
        lambda x, w: operators.conv(x, w, None, None, 2, 1, 2, 0.2, 1),
    ),
    "norm_act": (norm_inputs, lambda *t: operators.norm_act(*t, 1e-5, 2, 0.2, 1, 0.5, 3, False)),
    "norm_act_backward": (
        lambda s: [normal(s + 5, 4, 24, 9, 7), normal(s + 6, 4, 24, 9, 7), *norm_inputs(s)],
        norm_act_backward,
    ),
    "norm_dx": (
        lambda s: [
            normal(s + 5, 4, 24, 9, 7),
            *norm_inputs(s)[:4],
            *(normal(s + i, 2, 24, dtype=torch.float32) for i in (7, 8)),
        ],
        lambda *t: operators.norm_dx(*t, 1e-5),
    ),
    "norm_stats": (lambda s: [normal(s, 4, 65, 19, 11)], lambda x: operators.norm_stats(x, 2)),
    "patch_loss": (lambda s: [normal(s, 2, 3, 40, 40)], lambda x: operators.patch_loss(x, None, 0, 1.0, 1.0, False)),
    "running_stats": (
        lambda s: [
            normal(s + i, *shape, dtype=torch.float32) for i, shape in enumerate([(65,), (65,), (2, 65), (2, 65)])
        ],
        lambda *t: operators.running_stats(*t, 7, 0.1),
    ),
    "advance": (
        lambda s: [
            *(torch.full((200,), 9.0 + s), torch.ones(2, 2, dtype=torch.float64), torch.full((2, 2), 0.9).double()),
            *(torch.tensor([0, 150]), torch.arange(300) + s, torch.arange(600).view(2, 300)),
        ],
        lambda *t: operators.advance(*t, 3),
    ),
    "stack_pairs": (
        lambda s: [normal(s, 2, 3, 9, 8), normal(s + 1, 2, 3, 9, 8), normal(s + 2, 2, 3, 9, 8, dtype=torch.float32)],
        lambda *t: (operators.stack_pairs(*t),),
    ),
    "conv_transpose": (
        lambda s: [normal(s, 1, 16, 3, 4), normal(s + 1, 1, 16, 3, 4), normal(s + 2, 32, 24, 4, 4)],
        lambda x, x2, w: operators.conv_transpose(x, x2, w, None, None, 2, 1, 6, 8, 1, 0.2, 1),
    ),
    "conv_wgrad": (
        lambda s: [normal(s, 1, 24, 5, 3), normal(s + 1, 1, 32, 10, 6)],
        lambda outer, inner: (operators.conv_wgrad(outer, None, inner, 4, 4, 2, 1, torch.float32),),
    ),
    "conv_wgrad_adam": (
        lambda s: [normal(s, 1, 8, 2, 3), normal(s + 1, 1, 16, 4, 6), *adam_state(s, 8, 16, 4, 4)],
        lambda outer, inner, *state: operators.conv_wgrad_adam(outer, None, inner, *state, 0.5, 0.999, 1e-8, 2, 1),
    ),
}


def results(call: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    return [*(call(*tensors) or ()), *tensors]


def eager(name: str, seed: int) -> list[Tensor]:
    make, call = CALLS[name]
    return results(call, make(seed))


def assert_same_bits(ours: list[Tensor], expected: list[Tensor]) -> None:
    """NaN equals nothing, so an element that nobody wrote shows: memory is poisoned with it, and no input has any."""
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=False)


def fill(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def test_every_operator_is_here():
    """And its call writes all of its results, and the same bits twice, whatever the device."""
    assert sorted(CALLS) == ops.operators()
    for name in CALLS:
        assert_same_bits(eager(name, 1), eager(name, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_a_replayed_graph_gives_the_bits_of_the_eager_call(name: str):
    """Captured on one set of values, replayed on another: nothing of the first is baked in."""
    make, call = CALLS[name]
    expected = {seed: eager(name, seed) for seed in (1, 2)}
    tensors = make(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(call, tensors)
    for seed in (2, 1):
        fill(tensors, make(seed))
        graph.replay()
        assert_same_bits(captured, expected[seed])


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_it_runs_on_the_current_stream(name: str):
    """Its tensors get their values there, late: whoever reads them on another stream reads the old ones."""
    make, call = CALLS[name]
    expected, tensors, values = eager(name, 1), make(2), make(1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles, some 50 ms
        fill(tensors, values)
        ours = results(call, tensors)
    stream.synchronize()
    assert_same_bits(ours, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adam", "conv", "norm_act"])
def test_inductor(name: str):
    """One graph without a break; the update in place survives functionalisation."""
    make, call = CALLS[name]
    compiled = torch.compile(call, fullgraph=True)
    assert_same_bits(results(compiled, make(1)), eager(name, 1))


@pytest.fixture
def need_memory(_device: None) -> Iterator[Callable[[int], None]]:
    """Skip where a GPU has not so many GB to spare. One test at a time, of all processes that share it, may ask.

    The largest takes 34 GB; beside the contexts of 16 processes an H100 has room for one such, not for all four.
    """

    def need(gigabytes: int) -> None:
        free, _ = torch.cuda.mem_get_info()
        if free < gigabytes * BYTES:
            pytest.skip(f"needs {gigabytes} GB of free GPU memory")

    with one_process_at_a_time():
        torch.cuda.empty_cache()
        yield need
        torch.cuda.empty_cache()  # for the next process


def test_each_large_test_has_the_memory_to_itself():
    """Whoever is inside keeps the others out, and each of these tests is inside."""
    large = {name: test for name, test in globals().items() if "beyond_2_to_the_31" in name}
    assert len(large) == 4
    assert all("need_memory" in inspect.signature(test).parameters for test in large.values())
    folder = os.open(Path(on_device.__file__).parent, os.O_RDONLY)
    try:
        with one_process_at_a_time(), pytest.raises(BlockingIOError):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(folder, fcntl.LOCK_EX)
    finally:
        os.close(folder)


@pytest.mark.gpu
def test_patch_loss_beyond_2_to_the_31(need_memory: Callable[[int], None]):
    """The gradient of the last elements is that of a batch of them alone, but for the size of the mean."""
    need_memory(12)
    x = torch.randn(2**31 + 2**20, dtype=torch.bfloat16)
    loss, dx, _ = operators.patch_loss(x, None, 1, 0.5, float(x.numel()), False)
    last = 2**20 + 4096
    alone, dx_alone, _ = operators.patch_loss(x[-last:].clone(), None, 1, 0.5, float(last), False)
    assert torch.equal(dx[-last:], dx_alone)
    assert torch.equal(dx[:4096], operators.patch_loss(x[:4096].clone(), None, 1, 0.5, 4096.0, False)[1])
    assert (loss / x.numel()).item() == pytest.approx((alone / last).item(), rel=0.01)  # both are 1.25 of all normal x


@pytest.mark.gpu
def test_down_beyond_2_to_the_31(need_memory: Callable[[int], None]):
    """The lower half of the last image, where element 2^31 lies, against PyTorch's convolution of that half."""
    need_memory(16)
    x = torch.randn(3, 2400, 2400, 128, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    weight = normal(1, 16, 128, 4, 4) / 64
    out, *_ = operators.conv(x, weight, None, None, 2, 1, 0, 0.2, 0)
    assert x[:-1].numel() < 2**31 < x.numel()
    expected = torch.nn.functional.conv2d(x[2:, :, 1200:].float(), weight.float(), None, 2, 1)
    bound = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(out[2:, :, 602:].float(), expected[:, :, 2:], rtol=bound, atol=1e-5)


@pytest.mark.gpu
def test_adam_beyond_2_to_the_31(need_memory: Callable[[int], None]):
    """The last elements, one of them by itself after the fours, as in buffers of them alone."""
    need_memory(40)
    m, last = 2**31 + 2**20 + 1, 2**20 + 4097
    whole = [torch.randn(m), torch.randn(m), torch.randn(m), torch.rand(m)]  # param, grad, exp_avg, exp_avg_sq
    alone = [tensor[-last:].clone() for tensor in whole]
    settings = (torch.tensor(1e-3), torch.tensor([0.5, 0.999], dtype=torch.float64), 0.5, 0.999, 1e-8)
    for tensors in (whole, alone):
        operators.adam(*tensors, *settings)
    assert_same_bits([tensor[-last:] for tensor in whole], alone)


@pytest.mark.gpu
def test_augment_beyond_2_to_the_31(need_memory: Callable[[int], None]):
    """Resident pairs of more bytes than that: the last of them."""
    need_memory(6)
    pairs = torch.randint(0, 256, (4400, 286, 286, 6), dtype=torch.uint8)
    assert pairs[:-1].numel() > 2**31
    index, offset = torch.tensor([len(pairs) - 1, 0]), torch.tensor([[30, 30], [0, 7]])
    ours, expected = (
        augment(pairs, index, offset, index > 0, 256, 3, torch.bfloat16)
        for augment in (operators.augment, ops.augment_ref)
    )
    assert_same_bits(list(ours), list(expected))
