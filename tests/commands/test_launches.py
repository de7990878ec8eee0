"""fastp2p launches: the list, the sums, the totals; and what it refuses."""

import importlib.util
import json

import pytest

from fastp2p.cli import main
from fastp2p.commands.launches import count_step_launches
from fastp2p.models.pix2pix.options import Pix2PixConfig

pytest.importorskip("triton")
SMALL = ["--netG", "unet_32", "--ngf", "8", "--ndf", "8", "--crop-size", "32"]


def small(**options: object) -> Pix2PixConfig:
    return Pix2PixConfig(netG="unet_32", ngf=8, ndf=8, crop_size=32, **options)  # type: ignore[arg-type]


def test_json(capsys: pytest.CaptureFixture[str]):
    assert main(["launches", *SMALL, "--batch-size", "2", "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert read["networks"]["batch_size"] == 2
    assert read["networks"]["precision"] == "bf16"
    assert read["target"] == {"name": "H100", "capability": 90, "processors": 132, "shared_bytes": 232448}
    totals, launches = read["totals"], read["launches"]
    assert totals["nodes"] == len(launches) == totals["main"] + totals["beside"]
    assert totals["main"] == sum(launch["chain"] == "main" for launch in launches)
    assert totals["longest"] == max(launch["depth"] for launch in launches)
    convolution = next(launch for launch in launches if launch["operator"] == "conv")
    assert (convolution["part"], convolution["name"]) == ("netG forward", "netG e1 forward")
    assert convolution["kernel"] == "conv._conv_kernel"
    assert convolution["flop"] > 0
    assert convolution["iterations"] > 0
    assert {"BLOCK_M", "SPLIT", "num_warps"} <= set(convolution["config"])


def test_table():
    result = count_step_launches(small())
    text = result.table()
    lines = text.splitlines()
    assert lines[0].startswith("unet_32, ngf 8; ")
    assert lines[1].startswith("on an H100: 132 processors, compute capability 9.0, 227 KiB")
    assert "by the rule" in lines[2]
    for number, launch in enumerate(result.launches, 1):
        (line,) = (line for line in lines if line.startswith("  ") and line.split()[0] == str(number))
        assert launch.kernel in line
        assert launch.name in line
        assert line.split()[-1] == str(launch.depth)
    count = result.count
    assert f"{count.nodes} nodes: {count.main} on the main chain, {count.beside} beside it" in lines
    assert f"{count.longest} of them are the longest dependent chain" in lines
    assert max(map(len, lines)) <= 150

    sums = result.table(summary=True)
    assert set(sums.splitlines()) < set(lines)
    assert "netG e1 forward" not in sums
    for line in (line for line in sums.splitlines() if line.startswith("sum ")):
        assert line.split()[1:4] == [str(n) for n in (count.nodes, count.main, count.beside)]


def test_predicted_times_stand_beside_the_counts(capsys: pytest.CaptureFixture[str]):
    result = count_step_launches(small(), predict=True)
    lines, counted = result.table().splitlines(), count_step_launches(small()).table().splitlines()
    (heads,) = (line for line in lines if line.startswith("launches, in order"))
    assert heads.endswith("predicted us, H100  predicted us, H200  bound by")
    for number, one in enumerate(result.predicted["H100"].launches, 1):
        (line,) = (line for line in lines if line.startswith("  ") and line.split()[0] == str(number))
        assert line.split()[-3] == f"{1e6 * one.total:.1f}"
        assert line.split()[-1] == one.bound_by
    for gpu, step in result.predicted.items():
        (line,) = (line for line in lines if f"a step on an {gpu}" in line)
        assert line == f"predicted, not measured: {1e3 * step.total:.2f} ms a step on an {gpu}, bound by its path:"
    assert not any("predicted" in line for line in counted)

    assert main(["launches", *SMALL, "--predict", "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert set(read["predicted"]) == {"H100", "H200"}
    for step in read["predicted"].values():
        assert len(step["launches"]) == len(read["launches"])
        assert 0 < step["path"] <= step["total"] <= sum(launch["seconds"] for launch in step["launches"])
        assert sum(step["path_by_term"].values()) == pytest.approx(step["path"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "batch_size: got 0, expected 1 or more"),
        (["--engine", "layers"], "engine: got layers, whose launches autograd makes; expected fused"),
        (["--engine", "reference"], "engine: got reference, whose launches autograd makes; expected fused"),
        (["--precision", "fp64"], "launches: got a step in float64"),
        (["--precision", "fp32", "--predict"], "predict: got precision fp32, expected one of bf16, fp16"),
    ],
)
def test_wrong_input(capsys: pytest.CaptureFixture[str], options: list[str], message: str):
    assert main(["launches", *SMALL, *options]) == 1
    assert message in capsys.readouterr().err


def test_an_unknown_option(capsys: pytest.CaptureFixture[str]):
    assert main(["launches", "--layers"]) == 2
    assert "--layers" in capsys.readouterr().err


def test_without_triton(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *at: None if name == "triton" else find(name, *at))
    assert main(["launches", *SMALL]) == 1
    assert "launches: Triton is not installed" in capsys.readouterr().err
