"""fastp2p roofline: floors beside what was measured, every call with its own."""

import json
import os
from dataclasses import replace

import pytest
import torch
from helpers.measuring import NETWORKS, PARTS, quick, tiny  # noqa: F401 (the ceilings are small)

from fastp2p.cli import main
from fastp2p.commands.measure import Machine, Spread
from fastp2p.commands.roofline import Roofline, count_roofline, measure_roofline
from fastp2p.count import ceilings as ceilings_module
from fastp2p.count.ceilings import H200, Ceilings, measure_ceilings
from fastp2p.errors import InputError


@pytest.fixture
def measured() -> Roofline:
    return measure_roofline(tiny(), steps=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_ceilings(dtype: torch.dtype):
    found = measure_ceilings(torch.device("cpu"), dtype)
    assert found.flop_per_sec > 1e6
    assert found.bytes_per_sec > 1e6
    assert found.name.endswith(f"{torch.get_num_threads()} threads")
    with pytest.raises(InputError, match="ceilings: got device meta"):
        measure_ceilings(torch.device("meta"), dtype)


def test_ceilings_are_the_least_time(monkeypatch: pytest.MonkeyPatch):
    seconds = iter([0.5, 0.25, 1.0, 2.0] * 2)
    monkeypatch.setattr(ceilings_module, "_seconds", lambda run, device: next(seconds))
    found = measure_ceilings(torch.device("cpu"), torch.float32)  # until 1.5 s are over
    assert (found.flop_per_sec, found.bytes_per_sec) == (2 * 128**3 / 0.25, 2 * 2**20 / 0.25)
    assert Ceilings("a", 1.0, 4.0).or_higher(Ceilings("a", 2.0, 3.0)) == Ceilings("a", 2.0, 4.0)


def test_every_call_is_measured(measured: Roofline):
    ran = measured.measured
    assert ran is not None
    assert len(ran.calls) == len(measured.costs)
    assert all(ms > 0 for ms in [*ran.calls, ran.rest])
    assert ran.step.n == 2
    assert ran.step.quartiles_ms[0] <= ran.step.median_ms <= ran.step.quartiles_ms[1]


def test_table(measured: Roofline):
    text = measured.table()
    lines = text.splitlines()
    (networks,) = (line for line in lines if line.startswith("unet_8, "))
    assert networks.startswith("unet_8, ngf 4; netD pixel, ndf 4; norm batch; 32 px, batch size 2, ")
    assert networks.endswith("convolutions tuned (fastp2p tune)") or "no kernels to choose from" in networks
    rows = {line[:40].split("  ")[0]: line for line in lines if line and not line.startswith(" ")}
    assert set(PARTS) < set(rows)
    assert rows["sum, each call for itself"].split()[5] == str(len(measured.costs))
    assert "the rest: copies, Python" in rows
    assert len(text.split("the 10 calls that lose most")[1].splitlines()) == 11

    by_call = measured.table(layers=True)
    for cost in measured.costs:
        assert cost.call.name in by_call
    assert "netD c1 forward, 4 images" in by_call


def test_a_table_fits_150_columns(measured: Roofline):
    """Also where a tiny call takes a millisecond, thousands of times its floor."""
    ran = measured.measured
    assert ran is not None
    slow = replace(ran, calls=[1.0] * len(ran.calls), rest=1.0, step=Spread(234.5, (211.1, 313.1), 2))
    table = replace(measured, measured=slow).table()
    assert "measure again" in table
    assert max(map(len, table.splitlines())) <= 150


def test_times_that_do_not_fit_are_doubted(measured: Roofline):
    ran = measured.measured
    assert ran is not None
    assert "measure again" in replace(measured, measured=replace(ran, rest=1e4 * ran.step.median_ms)).table()
    fitting = replace(ran, rest=0.0, step=Spread(sum(ran.calls), (0.0, 0.0), 2))
    assert "measure again" not in replace(measured, measured=fitting).table()


def test_json(measured: Roofline):
    read = json.loads(json.dumps(measured.as_dict()))
    assert read["networks"]["batch_size"] == 2
    assert read["machine"]["versions"]["torch"]
    assert len(read["calls"]) == len(measured.costs)
    convolution = next(call for call in read["calls"] if call["operator"] == "conv")
    assert (convolution["net"], convolution["layer"], convolution["direction"]) == ("netG", "e1", "forward")
    assert convolution["floor_ms"] > 0
    assert convolution["measured_ms"] > 0
    assert read["floor"]["overlapped_ms"] < read["floor"]["in_turn_ms"]
    assert read["measured"]["n"] == 2
    assert read["convolutions"]["tuned"] == 0


def test_limits_of_another_machine_without_running(capsys: pytest.CaptureFixture[str]):
    assert main(["roofline", "--limits", "790", "4300", "--batch-size", "64", "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert read["floor"]["overlapped_ms"] == pytest.approx(7.03, abs=0.005)
    assert read["networks"]["precision"] == "bf16"
    assert (read["machine"], read["convolutions"]) == (None, None)
    assert read["ceilings"]["bytes_per_sec"] == H200.bytes_per_sec
    assert "measured_ms" not in read["calls"][0]

    text = count_roofline(tiny(precision="fp32"), tflop_per_sec=1, gb_per_sec=10).table()
    assert "limits, as given: 1 TFLOP/s, 10 GB/s; nothing was run" in text
    assert "fp32" in text
    assert "measured ms" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limits", "0", "4300"], "limits: got 0 TFLOP/s and 4300 GB/s, expected two numbers above 0"),
        (["--limits", "790", "nan"], "limits: got 790 TFLOP/s and nan GB/s"),
        (["--steps", "0"], "steps: got 0, expected 1 or more"),
        (["--netG", "resnet"], "netG: got 'resnet', expected unet_S"),
        (["--crop-size", "4"], "crop_size: got 4"),
    ],
)
def test_wrong_input(capsys: pytest.CaptureFixture[str], options: list[str], message: str):
    assert main(["roofline", *NETWORKS, *options]) == 1
    assert message in capsys.readouterr().err


def test_a_busy_machine_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (99.5, 0.0, 0.0))
    machine = Machine.here(torch.device("cpu"))
    assert machine.too_busy
    assert machine.lines()[1] == "warning: others keep 99.5 cores busy; times are too long, and the ceilings too low"
    monkeypatch.setattr(os, "getloadavg", lambda: (0.25, 0.0, 0.0))
    (line,) = Machine.here(torch.device("cpu")).lines()
    assert line.endswith("; load average 0.25")


def test_spread():
    assert Spread.of([0.001, 0.002, 0.003]) == Spread(2.0, (1.5, 2.5), 3)
    assert Spread.of([0.004]) == Spread(4.0, (4.0, 4.0), 1)
