"""fastp2p profile: a timeline that names what the step calls, and tables that add up to it."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.measuring import NETWORKS, PARTS, quick, tiny  # noqa: F401 (the ceilings are small)
from helpers.nets import small_nets
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

from fastp2p.cli import main
from fastp2p.commands import profile as profile_module
from fastp2p.commands.measure import STEP, Profiled
from fastp2p.commands.profile import Profile, profile_step
from fastp2p.count.cost import count_step


@pytest.fixture
def profiled(tmp_path: Path) -> Profile:
    return profile_step(tiny(), trace=tmp_path / "trace.json.gz", steps=2)


def test_the_trace_has_parts_and_operators(profiled: Profile):
    assert profiled.trace.stat().st_size < 2**20
    with gzip.open(profiled.trace) as stream:
        events = json.load(stream)["traceEvents"]
    names = [event.get("name") for event in events]
    for part in PARTS:
        assert names.count(part) == 2
    for operator in (
        "augment",
        "conv",
        "conv_transpose",
        "conv_wgrad_adam",
        "batch_norm_act",
        "norm_dx",
        "patch_loss",
        "adam",
    ):
        assert f"fastp2p::{operator}" in names
    assert names.count("fastp2p::patch_loss") == 2 * 3


def test_shares_add_up(profiled: Profile):
    everything = sum(operator.ms for operator in profiled.operators) + profiled.rest.ms
    assert everything == pytest.approx(profiled.ms)
    assert 0 < sum(part.ms for part in profiled.parts) <= profiled.ms
    assert [part.name for part in profiled.parts] == list(PARTS)
    for operator in (*profiled.operators, profiled.rest):
        # ATen's own times in whole nanoseconds; what a call itself took is among them
        assert sum(share.ms for share in operator.insides) == pytest.approx(operator.ms, rel=1e-6)
    assert [operator.ms for operator in profiled.operators] == sorted((o.ms for o in profiled.operators), reverse=True)
    assert sum(o.cost.flop for o in profiled.operators if o.cost) == sum(p.cost.flop for p in profiled.parts if p.cost)


def test_tables(profiled: Profile):
    text = profiled.table()
    assert max(map(len, text.splitlines())) <= 140
    for name in (
        *PARTS,
        "outside of the parts",
        "conv_wgrad_adam",
        "the rest",
        "GFLOP",
        "% of limit",
        "TFLOP/s",
        "GB/s",
    ):
        assert name in text
    assert f"timeline of 2 steps: {profiled.trace}; open it at https://ui.perfetto.dev" in text
    read = json.loads(json.dumps(profiled.as_dict()))
    assert read["ms_per_step"] == profiled.ms
    assert read["idle_ms_per_step"] is None
    assert read["operators"][0]["insides"]


def test_as_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    options = ["profile", *NETWORKS, "--steps", "1", "--json"]
    assert main(options) == 0
    assert json.loads(capsys.readouterr().out)["trace"] == "fastp2p-trace.json.gz"
    before = Path("fastp2p-trace.json.gz").read_bytes()

    monkeypatch.setattr(profile_module, "Workload", lambda config: pytest.fail("it is found before anything runs"))
    assert main(options) == 1
    assert "fastp2p-trace.json.gz exists; choose another --trace, or add --overwrite" in capsys.readouterr().err
    assert Path("fastp2p-trace.json.gz").read_bytes() == before


def test_overwrite(tmp_path: Path):
    trace = tmp_path / "trace.json"
    trace.write_text("old")
    assert profile_step(tiny(), trace=trace, steps=1, overwrite=True).trace == trace
    assert json.loads(trace.read_text())["traceEvents"]


def event(name: str, start: float, end: float, *below: FunctionEvent, kernels: Any = (), on: str = "CPU") -> Any:
    """As torch.profiler tells of a GPU."""
    made = FunctionEvent(
        id=0, name=name, thread=0, start_us=start, end_us=end, device_type=getattr(DeviceType, on), use_device="cuda"
    )
    for child in below:
        made.append_cpu_child(child)
    for kernel, us in kernels:
        made.append_kernel(kernel, 0, us)
    return made


def test_times_on_a_gpu_are_those_of_kernels():
    """A range's shadow on the GPU is no kernel, and what overlaps is idle for nobody."""
    costs = count_step(small_nets().fused((16, 16), torch.float64), 1)
    costs = [cost for cost in costs if cost.call.operator in ("augment", "conv")][:2]  # the parts of these are ranges
    launches = event("cudaLaunchKernel", 3, 4)
    calls = [
        event("fastp2p::augment", 1, 2, kernels=[("cut", 10.0)]),
        event(
            "fastp2p::conv", 3, 9, launches, event("aten::mm", 5, 6, kernels=[("gemm", 20.0)]), kernels=[("act", 5.0)]
        ),
    ]
    parts = [
        event("augment", 0, 2, calls[0], kernels=[("augment", 10.0)]),
        event("netG forward", 2, 12, event("aten::cat", 2, 3, kernels=[("copy", 3.0)]), calls[1]),
    ]
    step = event(STEP, 0, 20, *parts)
    on_gpu = [("cut", 100, 110), ("augment", 100, 110), ("copy", 112, 115), ("gemm", 115, 135), ("act", 130, 135)]
    shadows = [event(name, start, end, on="CUDA") for name, start, end in [*on_gpu, (STEP, 100, 135)]]
    found = SimpleNamespace(events=lambda: [step, *parts, *calls, *shadows], activities={ProfilerActivity.CUDA})
    profiled: Any = Profiled(found, costs)  # type: ignore[arg-type]
    assert profiled.ms_of_calls() == [0.010, 0.025]
    assert profiled.ms(step) == pytest.approx(0.038)
    assert profiled.ms_of_the_rest() == pytest.approx(0.003)
    assert profiled.idle_ms() == pytest.approx(0.002)
    (mm, act), (copy,) = (sorted(profiled.kernels_of(e)) for e in (calls[1], parts[1].cpu_children[0]))
    assert (mm, act, copy) == (("act", 5.0), ("gemm", 20.0), ("copy", 3.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trace", "nowhere/trace.json"], "trace: got nowhere/trace.json, but there is no folder nowhere"),
        (["--trace", "trace.txt"], "trace: got trace.txt, expected a name that ends in .json or .json.gz"),
        (["--steps", "0"], "steps: got 0"),
    ],
)
def test_wrong_input(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    assert main(["profile", *NETWORKS, *options]) == 1
    assert message in capsys.readouterr().err
