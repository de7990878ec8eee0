import itertools
import sys

import pytest
import torch
from helpers.gemm_shapes import CONFIG_SHAPES, SHAPES, configurations, conv_shape, convolution_on_the_cpu, random
from helpers.on_device import with_threads

from fastp2p.conv_shape import ConvShape
from fastp2p.errors import InputError
from fastp2p.ops import adam, conv_wgrad, conv_wgrad_adam, conv_wgrad_adam_ref, served_by
from fastp2p.ops.library import INTERPRETED

DEEP = [SHAPES[i] for i in (0, 2, 3, 4, 6, 8)]  # few pixels, as the operator is for; 1x1 and 3x3 kernels too


MOVED = ("param", "exp_avg", "exp_avg_sq")


class State:
    """A weight with Adam's moments as after some steps, and what its gradient is made of."""

    def __init__(self, shape: ConvShape, dtype: torch.dtype, low_precision: torch.dtype | None = torch.bfloat16):
        size = shape.weight
        self.outer = random(shape.images, shape.outer, *shape.small, dtype=dtype)
        self.inner = random(shape.images, shape.inner, *shape.large, dtype=dtype)
        self.param, self.exp_avg = (
            random(*size),
            random(*size, scale=0.3).flip(0).contiguous(memory_format=torch.channels_last),
        )
        self.exp_avg_sq = random(*size, scale=0.5).square()
        self.low_precision = None if low_precision is None else torch.empty_like(self.param, dtype=low_precision)
        self.window = {"stride": shape.stride, "padding": shape.padding}
        self.scalars = {"lr": torch.tensor(2e-3), "powers": torch.tensor([0.5**3, 0.999**3], dtype=torch.float64)}

    def apart(self) -> None:
        """conv_wgrad in float32, then adam."""
        kernel_size = tuple(self.param.shape[2:])
        grad = conv_wgrad(self.outer, self.inner, kernel_size=kernel_size, **self.window)
        flat = [tensor.permute(0, 2, 3, 1).reshape(-1) for tensor in (self.param, grad, self.exp_avg, self.exp_avg_sq)]
        adam(*flat, **self.scalars)
        if self.low_precision is not None:
            self.low_precision.copy_(self.param)

    def sliced(self, kernel: int, first: int) -> list[torch.Tensor]:
        """Move the weight and its moments into the taps from `first` on of larger ones, which hold 9 elsewhere."""
        wholes = []
        for name in MOVED:
            values = getattr(self, name)
            wholes.append(torch.full((*values.shape[:2], kernel, kernel), 9.0).to(memory_format=torch.channels_last))
            taps = slice(first, first + values.shape[2])
            setattr(self, name, wholes[-1][:, :, taps, taps].copy_(values))
        return wholes

    def fused(self, **options: object) -> None:
        buffers = (self.param, self.exp_avg, self.exp_avg_sq)
        conv_wgrad_adam(
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
def test_is_wgrad_then_adam(shape: ConvShape, dtype: torch.dtype, low_precision: torch.dtype | None):
    fused, apart = (State(shape, dtype, low_precision) for _ in range(2))
    fused.fused()
    apart.apart()
    assert not torch.equal(fused.param, State(shape, dtype).param)
    assert_same_step(fused, apart)


def test_two_outer_tensors():
    shape = SHAPES[1]
    fused, apart = (State(shape, torch.float32) for _ in range(2))
    parts = fused.outer.split([20, shape.outer - 20], 1)
    fused.outer = parts[0]
    fused.fused(outer2=parts[1])
    apart.apart()
    assert_same_step(fused, apart)


@pytest.mark.parametrize("shape", DEEP, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("more", "first"), [(0, 0), (1, 0), (1, 1), (2, 1)])
def test_slice_of_the_taps(shape: ConvShape, dtype: torch.dtype, more: int, first: int):
    """The bits of the same weight by itself, and nothing around it."""
    alone, part = (State(shape, dtype) for _ in range(2))
    wholes = part.sliced(shape.kernel[0] + more, first)
    alone.fused()
    part.fused()
    assert torch.equal(alone.low_precision, part.low_precision)
    for name, whole in zip(MOVED, wholes, strict=True):
        assert torch.equal(getattr(alone, name), getattr(part, name))
        getattr(part, name).fill_(9)
        assert (whole == 9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "o", "c"), [(1, 64, 128), (3, 19, 6), (16, 33, 64)])
def test_taps_that_meet_padding_alone_need_no_step(dtype: torch.dtype, n: int, o: int, c: int):
    """From 2x2 pixels to one, only the middle of a 4x4 kernel meets a pixel; the rest never moves from zero moments.

    Two steps. C++ gives the same bits; Triton sums in blocks of another shape.
    """
    whole, part = (State(conv_shape(n, c, 2, 2, o, 4, 2, 1), dtype) for _ in range(2))
    assert whole.outer.shape == (n, o, 1, 1)
    for state in (whole, part):
        state.exp_avg.zero_()
        state.exp_avg_sq.zero_()
    before, middle = whole.param.clone(), (..., slice(1, 3), slice(1, 3))
    views = [part.param, part.exp_avg, part.exp_avg_sq]
    low_precision = torch.empty_like(part.param[middle].contiguous(memory_format=torch.channels_last)).to(
        torch.bfloat16
    )
    for _ in range(2):
        whole.fused()
        slices = [view[middle] for view in views]
        conv_wgrad_adam(
            part.outer, part.inner, *slices, **part.scalars, stride=2, padding=0, low_precision=low_precision
        )
    rest = torch.ones_like(before, dtype=torch.bool)
    rest[middle] = False
    assert torch.equal(whole.param[rest], before[rest])
    assert torch.equal(part.param[rest], before[rest])
    assert not torch.equal(part.param[middle], before[middle])
    whole.low_precision = whole.low_precision[middle]
    part.low_precision = low_precision
    if served_by("conv_wgrad_adam", whole.param.device.type) == "C++":
        for name in (*MOVED, "low_precision"):
            assert torch.equal(getattr(whole, name), getattr(part, name))
    for name in MOVED:
        setattr(whole, name, getattr(whole, name)[middle])
        setattr(part, name, getattr(part, name)[middle])
    assert_same_step(part, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", ["gemm", "direct"])
def test_gradient_in_chunks(algorithm: str, dtype: torch.dtype):
    """Pieces have some 1 MB, the last one less: three or more here, and again so with each number of threads."""
    with convolution_on_the_cpu(algorithm):
        apart = State(conv_shape(1, 64, 4, 6, 1300, 4, 2, 1), dtype)
        apart.apart()
        for parts in ([1300], [700, 600]):
            for fused in with_threads(lambda parts=parts: run_fused(parts, dtype)):
                assert_same_step(fused, apart)


def run_fused(parts: list[int], dtype: torch.dtype) -> State:
    state = State(conv_shape(1, 64, 4, 6, sum(parts), 4, 2, 1), dtype)
    state.outer, *rest = state.outer.split(parts, 1)
    state.fused(outer2=rest[0] if rest else None)
    return state


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", DEEP, ids=str)
def test_float64(shape: ConvShape, lr_dtype: torch.dtype):
    """For proofs: the operator takes it, the function for users does not. Float32 on the way would show as 1e-7."""
    states = []
    for step in (torch.ops.fastp2p.conv_wgrad_adam, conv_wgrad_adam_ref):
        state = State(shape, torch.float64, None)
        for name in MOVED:
            setattr(state, name, getattr(state, name).double())
        scalars = (state.scalars["lr"].to(lr_dtype), state.scalars["powers"], 0.5, 0.999, 1e-8, *state.window.values())
        step(state.outer, None, state.inner, *(getattr(state, name) for name in MOVED), *scalars)
        states.append(state)
    for name in MOVED:
        ours, expected = (getattr(state, name) for state in states)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


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
    torch.library.opcheck(torch.ops.fastp2p.conv_wgrad_adam.default, args)
    state.sliced(6, 1)
    args = (*args[:3], *(getattr(state, name) for name in MOVED), *args[6:])
    torch.library.opcheck(torch.ops.fastp2p.conv_wgrad_adam.default, args)


@pytest.mark.kernels
@pytest.mark.parametrize("low_precision", [None, torch.bfloat16])
def test_sums_over_many_pixels_are_split(low_precision: torch.dtype | None):
    from fastp2p.kernels import conv_wgrad_adam as kernel

    shape = conv_shape(2, 6, 48, 48, 20, 4, 2, 1)
    fused, apart = (State(shape, torch.bfloat16, low_precision) for _ in range(2))
    m, n, k = shape.outer, shape.columns, shape.pixels
    assert kernel.choose_config(m, n, k, fused.param, fused.inner)["SPLIT"] > 1
    fused.fused()
    apart.apart()
    assert_same_step(fused, apart)


@pytest.mark.kernels
@pytest.mark.parametrize("split", [17, 25])
def test_many_splits_are_added_in_shares(split: int, monkeypatch: pytest.MonkeyPatch):
    """The last share has one split of its eight."""
    from fastp2p.kernels import conv_wgrad_adam as kernel

    shape = conv_shape(1, 3, 32, 48, 20, 4, 2, 1)
    fused, apart = (State(shape, torch.float32, None) for _ in range(2))
    tile = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 2, "num_stages": 1, "SPLIT": split}
    steps = kernel.merge_steps(tile | {"SHARE": kernel.share_of(split), "ROWS": kernel.adam_rows(tile)})
    made = set()

    def noted(*ends: int) -> range:
        if sys._getframe(1).f_code.co_name == "sum_splits":
            made.add(len(range(*ends)))
        return range(*ends)

    if INTERPRETED:  # the compiler knows Python's range alone
        monkeypatch.setattr(kernel, "range", noted, raising=False)
    buffers = (fused.param, fused.exp_avg, fused.exp_avg_sq, *fused.scalars.values(), 0.5, 0.999, 1e-8)
    outer, outer2 = fused.outer.split([3, 17], 1)
    kernel.conv_wgrad_adam(outer, outer2, fused.inner, *buffers, shape.stride, shape.padding, config=tile)
    apart.apart()
    assert_same_step(fused, apart)
    assert steps == 2 + 1  # one share's, then the shares'
    assert not INTERPRETED or sorted(made) == [1, 2]


@pytest.mark.kernels
def test_a_large_tile_is_updated_in_pieces():
    from fastp2p.kernels import conv_wgrad_adam as kernel

    tile = {"BLOCK_M": 128, "BLOCK_N": 128, "SPLIT": 1}
    rows = kernel.adam_rows(tile)
    assert rows == 32
    assert kernel.merge_steps(tile | {"SHARE": 1, "ROWS": rows}) == 4
    assert kernel.merge_steps(tile | {"SPLIT": 8, "SHARE": 8, "ROWS": rows}) == 4 * 2


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [CONFIG_SHAPES[1], conv_shape(1, 64, 3, 2, 20, 2, 1, 0)], ids=str)
def test_every_configuration(shape: ConvShape, dtype: torch.dtype):
    from fastp2p.kernels import conv_wgrad_adam as kernel

    apart = State(shape, dtype)
    apart.apart()
    for config, split in itertools.product(configurations(dtype), (1, 3)):
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
        kernel.conv_wgrad_adam(*args, config=config | {"SPLIT": split})
        assert_same_step(state, apart)


def test_bad_input_is_told_and_changes_nothing():
    state = State(SHAPES[0], torch.float32)
    before = state.param.clone()
    for name, wrong in (
        ("param", state.param.contiguous()[:, :, :, :3]),
        ("exp_avg", state.exp_avg.half()),
        ("exp_avg_sq", state.exp_avg_sq.contiguous()),
        ("low_precision", state.low_precision.float()),
        ("exp_avg", torch.zeros(5, 6, 6, 3).permute(0, 3, 1, 2)[:, :, 1:5, 1:5]),  # param is no such slice
        ("low_precision", torch.zeros(5, 6, 6, 3).bfloat16().permute(0, 3, 1, 2)[:, :, 1:5, 1:5]),
        ("param", state.param[:, :, :, :1].expand(-1, -1, -1, 4)),
        ("param", state.param.flip(2).transpose(0, 1).contiguous().transpose(0, 1)),
    ):
        broken = State(SHAPES[0], torch.float32)
        setattr(broken, name, wrong)
        with pytest.raises(InputError, match="conv_wgrad_adam: got"):
            broken.fused()
        if name != "param":
            assert torch.equal(broken.param, before)
    state.scalars["lr"] = torch.tensor([2e-3])
    with pytest.raises(InputError, match=r"got lr \(1,\)"):
        state.fused()
