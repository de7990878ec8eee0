import pytest
import torch
from torch import Tensor

from fastp2p.errors import InputError
from fastp2p.ops import advance, advance_ref

F64 = torch.float64


def numbers(steps: tuple[int, ...] = (0, 41), parameters: int = 5, counters: int = 4) -> list[Tensor]:
    """Steps, powers, betas, firsts, counters, increments: of one Adam after so many steps, and of further ones."""
    a = len(steps)
    counts = torch.tensor(steps, dtype=torch.float32).repeat_interleave(parameters)
    betas = torch.tensor([[0.5, 0.999], [0.9, 0.99]], dtype=F64)[torch.arange(a) % 2]
    increments = torch.stack([torch.arange(counters), torch.arange(counters) % 2])
    return [counts, torch.full((a, 2), torch.nan, dtype=F64), betas, parameters * torch.arange(a),
            100 * torch.arange(counters), increments]  # fmt: skip


def test_counts_by_hand():
    ours = numbers()
    advance(*ours, images=3)
    steps, powers, _, _, counters, _ = ours
    assert steps.tolist() == [1.0] * 5 + [42.0] * 5
    torch.testing.assert_close(powers, torch.tensor([[0.5, 0.999], [0.9**42, 0.99**42]], dtype=F64), rtol=1e-14, atol=0)
    assert counters.tolist() == [0, 100 + 1 + 3, 200 + 2, 300 + 3 + 3]


@pytest.mark.parametrize("t", [0, 1, 2, 1023, 1024, 99_999, 2**24 - 2])
def test_powers_of_many_steps(t: int):
    """Squares double a relative error: 1 - beta^t, which Adam reads, is off by t beta^t roundings, 368 at the most."""
    ours, expected = numbers((t,)), numbers((t,))
    advance(*ours, images=1)
    advance_ref(*expected, 1)
    assert torch.equal(ours[0], expected[0])
    torch.testing.assert_close(1 - ours[1], 1 - expected[1], rtol=0, atol=368 * 2.0**-53)


@pytest.mark.parametrize(("parameters", "counters"), [(1, 0), (127, 2), (128, 129), (300, 7), (3, 500)])
def test_equals_the_reference(parameters: int, counters: int):
    """Adams of different steps; the longer buffers need several programs."""
    given = {"steps": (7, 7, 19), "parameters": parameters, "counters": counters}
    ours, expected = numbers(**given), numbers(**given)
    for images in (1, 16, 5):
        advance(*ours, images=images)
        advance_ref(*expected, images)
    for index in (0, 4):
        assert torch.equal(ours[index], expected[index])
    torch.testing.assert_close(ours[1], expected[1], rtol=22 * 2.0**-52, atol=0)


def test_the_count_alone_makes_the_powers():
    """Ten steps in turn, and the tenth after a checkpoint: the same bits."""
    ours, resumed = numbers((0, 30)), numbers((9, 39))
    for _ in range(10):
        advance(*ours, images=1)
    advance(*resumed, images=1)
    assert torch.equal(ours[1], resumed[1])


def test_views_of_larger_buffers_are_all_that_changes():
    ours = numbers()
    steps, counters = torch.full((20,), 9.0), torch.full((20,), 9)
    before = steps.clone(), counters.clone()
    steps[4:14], counters[4:8] = ours[0], ours[4]
    advance(steps[4:14], *ours[1:4], counters[4:8], ours[5], images=1)
    for buffer, old, end in zip((steps, counters), before, (14, 8), strict=True):
        assert torch.equal(buffer[:4], old[:4])
        assert torch.equal(buffer[end:], old[end:])


@pytest.mark.parametrize(
    ("place", "value", "text"),
    [
        (0, torch.zeros(10, dtype=F64), r"got steps \(10,\) float64 .*, expected contiguous \(10,\) float32"),
        (1, torch.zeros(2, 3, dtype=F64), r"got powers \(2, 3\)"),
        (1, torch.zeros((), dtype=F64), r"got powers \(\)"),
        (2, torch.zeros(1, 2, dtype=F64), r"got betas \(1, 2\) .*, expected contiguous \(2, 2\) float64"),
        (3, torch.zeros(2), r"got firsts \(2,\) float32 .*, expected contiguous \(2,\) int64"),
        (
            4,
            torch.zeros(8, dtype=torch.int64)[::2],
            r"got counters \(4,\) int64 of strides \(2,\), expected contiguous",
        ),
        (5, torch.zeros(2, 3, dtype=torch.int64), r"got increments \(2, 3\) .*, expected contiguous \(2, 4\) int64"),
    ],
)
def test_bad_input(place: int, value: Tensor, text: str):
    given = numbers()
    given[place] = value
    with pytest.raises(InputError, match=f"advance: {text}"):
        advance(*given, images=1)


def test_opcheck():
    torch.library.opcheck(torch.ops.fastp2p.advance.default, (*numbers(), 3))
    torch.library.opcheck(torch.ops.fastp2p.advance.default, (*numbers(counters=0), 0))


@pytest.mark.kernels
def test_every_configuration():
    from fastp2p.kernels import advance as kernel

    for config in kernel.CONFIGS:
        ours, expected = numbers(parameters=150), numbers(parameters=150)
        kernel.advance(*ours, 2, config=config)
        advance_ref(*expected, 2)
        torch.testing.assert_close(ours, expected, rtol=42 * 2.0**-52, atol=0)
