import itertools

import pytest
import torch
from torch import Tensor

from fastp2p.errors import InputError
from fastp2p.ops import stack_pairs, stack_pairs_ref
from fastp2p.ops.library import INTERPRETED

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def images(n: int = 2, A: int = 3, B: int = 3, height: int = 5, width: int = 7, *dtypes: torch.dtype) -> list[Tensor]:
    """real_A, fake_B, real_B, channels_last, of these dtypes; all float32 by default."""
    torch.manual_seed(n + A)
    shapes = zip((A, B, B), dtypes or (torch.float32,) * 3, strict=True)
    return [torch.randn(n, c, height, width, dtype=d).to(memory_format=torch.channels_last) for c, d in shapes]


def test_by_hand():
    real_A, fake_B, real_B = images(n=2)
    pairs = stack_pairs(real_A, fake_B, real_B)
    assert pairs.shape == (4, 6, 5, 7)
    assert pairs.is_contiguous(memory_format=torch.channels_last)
    for i in range(2):
        assert torch.equal(pairs[i, :3], real_A[i])
        assert torch.equal(pairs[i, 3:], fake_B[i])
        assert torch.equal(pairs[2 + i, :3], real_A[i])
        assert torch.equal(pairs[2 + i, 3:], real_B[i])


@pytest.mark.parametrize(("A", "B"), [(3, 3), (1, 3), (3, 1), (1, 1), (12, 5)])
@pytest.mark.parametrize(("n", "height", "width"), [(1, 1, 1), (1, 16, 16), (3, 17, 15), (2, 1, 300)])
def test_equals_the_reference(A: int, B: int, n: int, height: int, width: int):
    given = images(n, A, B, height, width)
    assert torch.equal(stack_pairs(*given), stack_pairs_ref(*given))


@pytest.mark.parametrize("dtypes", [*itertools.product(DTYPES, repeat=3)])
def test_every_mixture_of_dtypes(dtypes: tuple[torch.dtype, ...]):
    """Rounded once to real_A's dtype; Triton's interpreter truncates where it rounds from float32 to bfloat16."""
    given = images(1, 3, 2, 6, 6, *dtypes)
    pairs, expected = stack_pairs(*given), stack_pairs_ref(*given)
    assert pairs.dtype == dtypes[0]
    error = torch.finfo(torch.bfloat16).eps if INTERPRETED and dtypes[0] == torch.bfloat16 else 0.0
    torch.testing.assert_close(pairs, expected, rtol=error, atol=0)


def test_slices_and_other_layouts():
    """Channels of a larger tensor are read where they lie; NCHW, every second column and one image as all are not."""
    real_A, fake_B, real_B = images(2, 3, 3, 6, 8)
    expected = stack_pairs_ref(real_A, fake_B, real_B)
    wide = torch.zeros(2, 9, 6, 16).to(memory_format=torch.channels_last)
    wide[:, 2:5, :, ::2] = real_A
    sliced = torch.cat([fake_B, real_B], 1).to(memory_format=torch.channels_last)
    assert torch.equal(stack_pairs(wide[:, 2:5, :, ::2], sliced[:, :3], sliced[:, 3:]), expected)
    assert torch.equal(stack_pairs(real_A.contiguous(), fake_B.contiguous(), real_B), expected)
    one = fake_B[:1].expand(2, 3, 6, 8)
    assert torch.equal(stack_pairs(real_A, one, real_B)[1, 3:], fake_B[0])


@pytest.mark.parametrize(
    ("place", "value", "text"),
    [
        (0, torch.zeros(2, 3, 5), r"got \(2, 3, 5\) float32 .*; expected real_A"),
        (0, torch.zeros(2, 3, 5, 7, dtype=torch.int64), "int64"),
        (1, torch.zeros(1, 3, 5, 7), r"\(1, 3, 5, 7\)"),
        (1, torch.zeros(2, 2, 5, 7), r"\(2, 2, 5, 7\)"),
        (2, torch.zeros(2, 3, 7, 5), r"\(2, 3, 7, 5\)"),
    ],
)
def test_bad_input(place: int, value: Tensor, text: str):
    given = images()
    given[place] = value
    with pytest.raises(InputError, match=f"stack_pairs: .*{text}"):
        stack_pairs(*given)


def test_nothing_is_refused():
    with pytest.raises(InputError, match="not empty"):
        stack_pairs(*(x[:0] for x in images()))


def test_opcheck():
    torch.library.opcheck(torch.ops.fastp2p.stack_pairs.default, tuple(images()))
    mixed = images(1, 1, 3, 4, 4, torch.bfloat16, torch.bfloat16, torch.float32)
    torch.library.opcheck(torch.ops.fastp2p.stack_pairs.default, tuple(mixed))


@pytest.mark.kernels
def test_every_configuration():
    from fastp2p.kernels import stack_pairs as kernel

    given = images(2, 3, 3, 19, 16)
    for config in kernel.CONFIGS:
        assert torch.equal(kernel.stack_pairs(*given, config=config), stack_pairs_ref(*given)), config
