"""make gpu-check where there is no GPU: rehearsed end to end, and piece by piece what a rehearsal does not reach."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

import gemm_jobs
import gpu_check
import gpu_machine
import gpu_parity
import gpu_rows
import jobs
import machine
import timing
from fastp2p.kernels import gemm
from fastp2p.kernels.layer_shapes import LAYERS

from fastp2p import ops

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py")]
OPERATORS = [name for name in ops.operators() if not name.endswith("_backward")]


def results(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


@pytest.mark.slow
def test_a_rehearsal_measures_every_operator(tmp_path: Path):
    kept = sorted((ROOT / "benchmarks").rglob("*.json"))
    command = [*SCRIPT, "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted((ROOT / "benchmarks").rglob("*.json")) == kept
    content = results(tmp_path)
    assert content["rehearsal"] is True
    assert content["complete"] is True
    assert content["errors"] == []
    assert content["parity"]["green"] is True
    assert content["parity"]["total"]["passed"] >= 5
    assert content["versions"]["torch"] == torch.__version__
    assert content["ceilings"]["bf16_tflops"] > 0
    rows = {(row["case"], row["provider"]): row for row in content["rows"]}
    assert {row["operator"] for row in rows.values()} == {*OPERATORS, gpu_check.STEP}
    for (case, provider), row in rows.items():
        assert 0 < row["first_quartile"] <= row["ms"] <= row["third_quartile"]
        assert row["n"] >= 3
        assert row["speedup_over_eager"] == pytest.approx(rows[case, jobs.EAGER]["ms"] / row["ms"], abs=1e-3)
        by_triton = provider == jobs.OURS and row["operator"] != gpu_check.STEP
        assert row.get("served_by") == ("Triton, interpreted" if by_triton else None)
        if provider == jobs.BEST:
            assert row["config"] in [tried["config"] for tried in row["tried"]]
    assert content["parity"]["operators"]["adam"] == ""
    assert "written:" in done.stdout


@pytest.mark.slow
def test_interrupted_it_keeps_what_it_has(tmp_path: Path):
    command = [*SCRIPT, "--rehearse", "--only", "benchmarks", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.rstrip().endswith(" ms"):
                process.send_signal(signal.SIGTERM)
                break
        assert "not complete" in process.stdout.read()
    assert process.returncode == gpu_check.INTERRUPTED
    content = results(tmp_path)
    assert content["complete"] is False
    assert len(content["rows"]) >= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run(SCRIPT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "make gpu-rehearse runs the same path on a CPU" in done.stderr


def test_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(gpu_machine, "WHEELS", tmp_path / ".gpu-wheels")
    find_spec = gpu_machine.importlib.util.find_spec
    for missing in ("numpy", "pytest"):
        monkeypatch.setattr(
            gpu_machine.importlib.util, "find_spec", lambda name, m=missing: None if name == m else find_spec(name)
        )
        with pytest.raises(gpu_machine.Unfit, match="lacks numpy" if missing == "numpy" else "run make gpu-wheels"):
            gpu_machine.check_given(rehearse=True) if missing == "numpy" else gpu_machine.prepare(needs_pytest=True)


def test_another_checkout_is_not_measured_for_this_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(gpu_machine, "ROOT", tmp_path)
    with pytest.raises(gpu_machine.Unfit, match=f"pip install -e {tmp_path}"):
        gpu_machine.prepare(needs_pytest=True)


def test_the_commit_of_a_copy_without_a_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.delenv("FASTP2P_COMMIT", raising=False)
    assert machine.commit() == {"commit": None, "dirty": None}
    monkeypatch.setenv("FASTP2P_COMMIT", "abc123-dirty")
    assert machine.commit() == {"commit": "abc123", "dirty": True}
    (tmp_path / ".git").mkdir()  # a repository, if a broken one, speaks for itself
    assert machine.commit() == {"commit": None, "dirty": None}


def test_clocks_are_those_of_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.smi_state() is None
    fake = tmp_path / "nvidia-smi"
    fake.write_text(
        "#!/bin/sh\necho 'NVIDIA H200, 580.1, P0, 1980, 3201, 1980, 3201, 34, 120 W, 700 W, 0 %, 4, 143771'\n"
    )
    fake.chmod(0o755)
    state = machine.smi_state()
    assert state["clocks.sm"] == "1980"
    assert state["memory.total"] == "143771"
    assert machine.slug(state["name"]) == "nvidia-h200"


def unit(folder: Path, file: str, shard: int, cases: dict[str, str], ended: str = "") -> gpu_parity.Unit:
    """A run of a test file that wrote this JUnit report."""
    outcomes = {"passed": "", "failed": '<failure message="off by 2">bounds</failure>', "skipped": "<skipped/>"}
    tests = "".join(f'<testcase name="{name}">{outcomes[outcome]}</testcase>' for name, outcome in cases.items())
    xml = folder / f"{Path(file).stem}-{shard}.xml"
    xml.write_text(f"<testsuites><testsuite>{tests}</testsuite></testsuites>")
    return gpu_parity.Unit(ROOT / "tests" / file, f"{shard}/2", [], xml, folder / "log", ended=ended)


def test_only_green_operators_are_timed(tmp_path: Path):
    units = [
        unit(tmp_path, "ops/test_adam.py", 1, {"test_a": "passed"}),
        unit(tmp_path, "ops/test_adam.py", 2, {"test_b": "passed", "test_c": "skipped"}),
        unit(tmp_path, "ops/test_wgrad_adam.py", 1, {"test_a": "failed", "test_b": "passed"}),
        unit(tmp_path, "ops/test_wgrad.py", 1, {"test_a": "passed"}),
        unit(tmp_path, "ops/test_norm_act_dropout.py", 1, {"test_a": "passed"}, ended="stopped before its end"),
        unit(tmp_path, "ops/test_up.py", 1, {"test_a": "passed"}),
        unit(tmp_path, "ops/test_down.py", 1, {"test_a": "skipped"}),
        unit(tmp_path, "ops/test_on_gpu.py", 1, {"test_graph[up]": "failed", "test_graph[wgrad]": "passed"}),
        unit(tmp_path, "nn/test_layers.py", 1, {"test_a": "failed"}),
    ]
    summary = gpu_parity.summarise(units, OPERATORS)
    assert summary["green"] is False
    assert summary["total"] == {"passed": 7, "failed": 3, "skipped": 2, "unfinished": 1}
    assert summary["files"]["tests/ops/test_adam.py"] == {"passed": 2, "failed": 0, "skipped": 1}
    assert summary["failures"][0]["test"] == "test_wgrad_adam.py::test_a"
    assert "off by 2" in summary["failures"][0]["text"]
    why = summary["operators"]
    assert [name for name in OPERATORS if not why[name]] == ["adam", "wgrad"]
    assert why["wgrad_adam"] == why["up"] == "1 tests failed"
    assert why["norm_act"] == "1 runs of tests did not finish"
    assert why["down"] == why["augment"] == "none of its tests ran"


def test_the_suite_is_all_of_its_files(tmp_path: Path):
    units = gpu_parity.list_units("cuda", False, tmp_path)
    files = {path for folder in ("ops", "nn", "engine") for path in (ROOT / "tests" / folder).glob("test_*.py")}
    assert {unit.file for unit in units} == files
    assert len({unit.xml for unit in units}) == len(units)
    assert {gpu_parity.operator_of(path.stem, "", OPERATORS) for path in files} - {None} == set(OPERATORS)


def test_the_jobs_are_every_layer_and_operator():
    device = torch.device("cpu")
    everything = {*OPERATORS, gpu_check.STEP}
    listed = gpu_rows.list_jobs(device, False, everything)
    assert {job.operator for job in listed} == everything
    assert len({job.name for job in listed}) == len(listed)
    products = [job for job in listed if job.provider == jobs.BEST]
    assert len(products) == len(LAYERS) * len(gemm_jobs.BATCHES) * 3
    assert all(job.configs and job.flop for job in products)
    assert all(0 < job.input_bytes < job.n_bytes for job in listed)
    assert {job.operator for job in gpu_rows.list_jobs(device, False, {"adam"})} == {"adam"}


@pytest.mark.parametrize("direction", ["forward", "data gradient", "weight gradient"])
def test_products_are_those_of_the_launchers(direction: str, monkeypatch: pytest.MonkeyPatch):
    """What the search takes for the GEMM's sizes is what the launcher chooses its own configuration by."""

    class Asked(Exception):
        pass

    def ask(m: int, n: int, k: int, like: torch.Tensor, *, whole: bool, products: int = 1) -> None:
        raise Asked(m, n, k, whole, products)

    monkeypatch.setattr(gemm, "choose_config", ask)
    for layer in LAYERS:
        with torch.device("meta"):
            call = gemm_jobs._ours(layer, direction, gemm_jobs._operands(layer, 3, torch.bfloat16))
            with pytest.raises(Asked) as asked:
                call(None)
        product = gemm_jobs._product(layer, 3, direction)
        assert asked.value.args == (product.m, product.n, product.k, product.whole, product.products), layer.name


class FakeCUDA:
    """Just enough of torch.cuda for the timing: a clock that each call moves, and graphs that replay what they took."""

    def __init__(self):
        self.now, self.taking, self.calls = 0.0, None, 0

    def work(self, ms: float) -> None:
        self.calls += 1
        if self.taking is None:
            self.now += ms
        else:
            self.taking.append(ms)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = self

        class Event:
            def __init__(self, enable_timing: bool):
                assert enable_timing

            def record(self) -> None:
                self.at = fake.now

            def elapsed_time(self, end: "Event") -> float:
                return end.at - self.at

        class CUDAGraph:
            def replay(self) -> None:
                fake.now += sum(self.taken) + 0.01

        class Capture:
            def __init__(self, graph: CUDAGraph, **_: object):
                self.graph = graph

            def __enter__(self) -> None:
                fake.taking = []

            def __exit__(self, *_: object) -> None:
                self.graph.taken, fake.taking = fake.taking, None

        for name, value in (("Event", Event), ("CUDAGraph", CUDAGraph), ("graph", Capture)):
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)


@pytest.mark.parametrize("capturable", [True, False])
def test_time_is_per_call(capturable: bool, monkeypatch: pytest.MonkeyPatch):
    """Of calls of 20 and 40 µs in turn: 30 µs each, and in a graph its replay's own time spread over all of them."""
    fake, device = FakeCUDA(), torch.device("cuda")
    fake.install(monkeypatch)
    calls = [lambda: fake.work(0.02), lambda: fake.work(0.04)]
    measured = timing.measure(calls, device, capturable=capturable)
    assert measured.calls == 16  # eight rounds of two: half a millisecond between events
    assert measured.ms == pytest.approx(0.03 + (0.01 / 16 if capturable else 0))
    assert measured.first_quartile == pytest.approx(measured.third_quartile)
    assert measured.method == ("graph" if capturable else "stream")
    assert measured.n == 50
    assert timing.input_sets(1 << 30, device) == 1
    assert timing.input_sets(10_000_000, device) * 10_000_000 >= timing.COLD_BYTES
    assert timing.input_sets(timing.COLD_BYTES // timing.MOST_SETS, device) == timing.MOST_SETS
    assert timing.input_sets(4096, device) == 1  # never cold


def test_the_table_has_every_case(capsys: pytest.CaptureFixture[str]):
    row = {"case": "adam", "operator": "adam", "ms": 0.5, "gb_per_s": 3000.0, "tflops": None}
    rows = [row | {"provider": jobs.OURS}, row | {"provider": jobs.EAGER, "ms": 1.25}]
    gpu_check.add_speedups(rows)
    content = {"gpu": "NVIDIA H200", "versions": {"torch": "2.11", "triton": "3.6"}, "parity": None, "ceilings": None}
    content |= {"not_timed": {"up": "1 tests failed"}, "errors": [], "rows": rows, "rehearsal": False}
    gpu_check.print_table(content | {"complete": False, "jobs_left_for_want_of_time": 7})
    printed = capsys.readouterr().out
    assert "up: not timed: 1 tests failed" in printed
    assert "7 measurements left" in printed
    assert printed.splitlines()[-1].split() == ["adam", "1250.0", "500.0", "3000", "GB/s", "2.5"]
