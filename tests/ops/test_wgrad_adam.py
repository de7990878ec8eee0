import pytest
import torch
from gemm_shapes import CONFIG_SHAPES, SHAPES, Shape, configurations, random

from fastp2p.errors import InputError
from fastp2p.ops import adam, wgrad, wgrad_adam
from fastp2p.ops._library import INTERPRETED

DEEP = [SHAPES[i] for i in (0, 2, 3, 4, 6, 8)]  # few pixels, as the operator is for; 1x1 and 3x3 kernels too


class State:
    """A weight with Adam's moments as after some steps, and what its gradient is made of."""

    def __init__(self, shape: Shape, dtype: torch.dtype, low_precision: torch.dtype | None = torch.bfloat16):
        size = (shape.o, shape.c, shape.k, shape.k)
        self.outer = random(shape.n, shape.o, *shape.out, dtype=dtype)
        self.inner = random(shape.n, shape.c, shape.h, shape.w, dtype=dtype)
        self.param, self.exp_avg = (
            random(*size),
            random(*size, scale=0.3).flip(0).contiguous(memory_format=torch.channels_last),
        )
        self.exp_avg_sq = random(*size, scale=0.5).square()
        self.low_precision = None if low_precision is None else torch.empty_like(self.param, dtype=low_precision)
        self.window = {"stride": shape.stride, "padding": shape.padding}
        self.scalars = {"lr": torch.tensor(2e-3), "powers": torch.tensor([0.5**3, 0.999**3], dtype=torch.float64)}

    def apart(self) -> None:
        """wgrad in float32, then adam."""
        kernel_size = tuple(self.param.shape[2:])
        grad = wgrad(self.outer, self.inner, kernel_size=kernel_size, **self.window)
        flat = [tensor.permute(0, 2, 3, 1).reshape(-1) for tensor in (self.param, grad, self.exp_avg, self.exp_avg_sq)]
        adam(*flat, **self.scalars)
        if self.low_precision is not None:
            self.low_precision.copy_(self.param)

    def fused(self, **options: object) -> None:
        buffers = (self.param, self.exp_avg, self.exp_avg_sq)
        wgrad_adam(
            self.outer, self.inner, *buffers, **self.scalars, **self.window, low_precision=self.low_precision, **options
        )


def assert_same_step(ours: State, theirs: State) -> None:
    """The gradients differ by the order of float32 sums, some 1e-6 of their size, and the moments with them.

    A step of Adam moves a weight by about lr = 2e-3, of which a relative 1e-5 and the roundings of the weight are left.
    """
    for name in ("exp_avg", "exp_avg_sq"):
        scale = getattr(theirs, name).abs().max().item()
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-5 * scale)
    torch.testing.assert_close(ours.param, theirs.param, rtol=1.2e-7, atol=5e-7)
    if ours.low_precision is not None:  # the interpreter truncates
        torch.testing.assert_close(ours.low_precision.float(), ours.param, rtol=2**-7 if INTERPRETED else 2**-8, atol=0)


@pytest.mark.parametrize("shape", DEEP, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low_precision", [None, torch.bfloat16])
def test_is_wgrad_then_adam(shape: Shape, dtype: torch.dtype, low_precision: torch.dtype | None):
    fused, apart = (State(shape, dtype, low_precision) for _ in range(2))
    fused.fused()
    apart.apart()
    assert not torch.equal(fused.param, State(shape, dtype).param)
    assert_same_step(fused, apart)


def test_two_outer_tensors():
    shape = SHAPES[1]
    fused, apart = (State(shape, torch.float32) for _ in range(2))
    parts = fused.outer.split([20, shape.o - 20], 1)
    fused.outer = parts[0]
    fused.fused(outer2=parts[1])
    apart.apart()
    assert_same_step(fused, apart)


def test_twice_the_same_bits():
    first, second = (State(SHAPES[2], torch.bfloat16) for _ in range(2))
    first.fused()
    second.fused()
    assert torch.equal(first.param, second.param)
    assert torch.equal(first.low_precision, second.low_precision)


@pytest.mark.parametrize("name", ["outer", "inner", "param"])
def test_inputs_that_require_a_gradient(name: str):
    """In grad mode too the step is no part of the graph."""
    state, same = (State(SHAPES[0], torch.float32) for _ in range(2))
    getattr(state, name).requires_grad_()
    state.fused()
    same.fused()
    assert state.param.grad_fn is None
    assert torch.equal(state.param, same.param)


def test_autograd_sees_the_change():
    state = State(SHAPES[0], torch.float32)
    version = state.param._version
    state.fused()
    assert state.param._version > version


def test_opcheck():
    state = State(SHAPES[0], torch.float32)
    buffers = (state.param, state.exp_avg, state.exp_avg_sq, *state.scalars.values())
    args = (state.outer, None, state.inner, *buffers, 0.5, 0.999, 1e-8, 2, 1, state.low_precision)
    torch.library.opcheck(torch.ops.fastp2p.wgrad_adam.default, args)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [CONFIG_SHAPES[1], Shape(1, 64, 3, 2, 20, 2, 1, 0)], ids=str)
def test_every_configuration(shape: Shape, dtype: torch.dtype):
    from fastp2p.kernels import wgrad_adam as kernel

    apart = State(shape, dtype)
    apart.apart()
    for config in configurations(dtype):
        state = State(shape, dtype)
        buffers = (state.param, state.exp_avg, state.exp_avg_sq, *state.scalars.values())
        args = (
            state.outer,
            None,
            state.inner,
            *buffers,
            0.5,
            0.999,
            1e-8,
            shape.stride,
            shape.padding,
            state.low_precision,
        )
        kernel.wgrad_adam(*args, config=config)
        assert_same_step(state, apart)


def test_bad_input_is_told_and_changes_nothing():
    state = State(SHAPES[0], torch.float32)
    before = state.param.clone()
    for name, wrong in (
        ("param", state.param.contiguous()[:, :, :, :3]),
        ("exp_avg", state.exp_avg.half()),
        ("exp_avg_sq", state.exp_avg_sq.contiguous()),
        ("low_precision", state.low_precision.float()),
    ):
        broken = State(SHAPES[0], torch.float32)
        setattr(broken, name, wrong)
        with pytest.raises(InputError, match="wgrad_adam: got"):
            broken.fused()
        if name != "param":
            assert torch.equal(broken.param, before)
    state.scalars["lr"] = torch.tensor([2e-3])
    with pytest.raises(InputError, match=r"got lr \(1,\)"):
        state.fused()
