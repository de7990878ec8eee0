import numpy as np

from fastp2p.data.jitter import epoch_order, jitter


def test_order_is_a_permutation_and_a_function_of_seed_and_epoch():
    order = epoch_order(3, 7, 1000)
    assert sorted(order) == list(range(1000))
    assert np.array_equal(order, epoch_order(3, 7, 1000))
    assert not np.array_equal(order, epoch_order(3, 8, 1000))
    assert not np.array_equal(order, epoch_order(4, 7, 1000))


def test_values_are_pinned():
    """A run must come out the same on another machine and with another NumPy."""
    assert epoch_order(0, 1, 5).tolist() == [2, 4, 0, 1, 3]
    assert [jitter(0, 1, i, span=30, flip=True) for i in range(3)] == [(10, 2, False), (7, 25, False), (26, 6, False)]


def test_crop_is_uniform_over_0_to_span_and_flip_is_fair():
    draws = [jitter(0, epoch, i, span=30, flip=True) for epoch in range(31) for i in range(300)]
    for column in (0, 1):
        counts = np.bincount([draw[column] for draw in draws], minlength=31)
        assert len(counts) == 31
        assert np.abs(counts - 300).max() < 5 * 300**0.5  # 5 standard deviations
    flips = sum(draw[2] for draw in draws)
    assert abs(flips - len(draws) / 2) < 5 * (len(draws) / 4) ** 0.5
    assert abs(np.corrcoef([d[0] for d in draws], [d[1] for d in draws])[0, 1]) < 5 / len(draws) ** 0.5


def test_order_and_jitter_are_independent():
    """SeedSequence pads with zeros, so that without a word of its own pair 0's crop would follow from its place."""
    place = [int(np.flatnonzero(epoch_order(0, epoch, 50) == 0)[0]) for epoch in range(1, 1001)]
    left = [jitter(0, epoch, 0, span=30, flip=True)[1] for epoch in range(1, 1001)]
    assert abs(np.corrcoef(place, left)[0, 1]) < 5 / 1000**0.5


def test_no_span_and_no_flip():
    assert {jitter(0, 1, i, span=0, flip=False) for i in range(50)} == {(0, 0, False)}
