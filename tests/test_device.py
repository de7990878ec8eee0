"""Where a run computes, and with what bits."""

import pytest
import torch

from fastp2p.config import ResolvedConfig, RunConfig
from fastp2p.device import best_precision, prepare
from fastp2p.errors import InputError

CPU = torch.device("cpu")


def test_prepare_decides_the_device_the_configuration_and_the_bits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    device, config = prepare(RunConfig(device="cpu"))
    assert device == CPU
    assert isinstance(config, ResolvedConfig)
    assert (config.crop_size, config.precision) == (256, best_precision(CPU))
    assert torch.backends.cudnn.deterministic


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_prepare_refuses_a_device_that_is_not_there():
    with pytest.raises(InputError, match="device: got cuda, but"):
        prepare(RunConfig(device="cuda"))


def test_wrong_input_is_a_value_error():
    with pytest.raises(ValueError, match="batch_size: got 0"):
        RunConfig(batch_size=0)
