"""The prediction beside what GPUs have taken."""

import statistics

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("folder", ["nvidia-h200-2026-11-27", "nvidia-h100-2026-11-26"])
def test_products_take_about_what_is_predicted(folder: str, monkeypatch: pytest.MonkeyPatch):
    """At batch size 1: the median within a tenth, and half of all within a quarter, of what the GPU has taken."""
    import predicted

    monkeypatch.setattr(predicted, "BATCH_SIZES", (1,))
    quotients = [sample.quotient for sample in predicted.samples([folder])]
    assert len(quotients) > 50
    first, median, third = statistics.quantiles(quotients, n=4)
    assert 0.9 < median < 1.1
    assert 0.75 < first < third < 1.25
