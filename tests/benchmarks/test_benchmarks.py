"""The benchmarks' own machinery: who takes turns, what is refused, and what the tables say."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bench_rows import content, row

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

from harness import contest, machine, results, team
from harness.providers import EAGER, LAYERS, OTHERS, TINY, our_provider, providers
from harness.worker import ProviderWorker

from fastp2p.device import best_precision

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


class Pedantic:
    """What is used of pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, call: Any, *, setup: Any, rounds: int) -> None:
        for _ in range(rounds):
            setup()
            call()


class Clock:
    """A contestant of whom it is known how long it takes."""

    session = None

    def __init__(self, name: str, ms: list[float], turns: list[str]):
        self.name, self.ms, self.turns = name, iter(ms), turns

    def sample(self, calls: int) -> float:
        self.turns.append(f"{self.name} x{calls}")
        return next(self.ms)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_imports_is_there(path: Path):
    """Most of them run on a GPU alone, or for minutes."""
    name = ".".join(path.relative_to(ROOT / "benchmarks").with_suffix("").parts).removeprefix("ops.")
    if path.stem in ("gpu_stages", "gpu_programs", "graph_latency", "recorded_tests"):
        pytest.importorskip("triton", reason="needs triton")
    if path.stem != "conftest":  # pytest has imported the tests' own under that name
        importlib.import_module(name)


def test_all_take_turns_and_ours_comes_last():
    turns: list[str] = []
    contestants = [Clock(name, [1.0, 2.0, 9.0], turns) for name in ("a", "b", "ours")]
    samples = contest.take_turns(Pedantic(), contestants, "ours", rounds=3, calls={"a": 1, "b": 2, "ours": 5})
    assert turns == ["a x1", "b x2", "ours x5", "b x2", "a x1", "ours x5", "a x1", "b x2", "ours x5"]
    first, *_ = samples.rows(case="c")
    assert (first["provider"], first["ms"], first["first_quartile"], first["third_quartile"]) == ("a", 2.0, 1.5, 5.5)
    assert (first["n"], first["case"]) == (3, "c")


def test_what_is_off_is_told():
    expected = {"losses": [1.0, 2.0, 3.0, 4.0], "output": [1.0, 0.0, 2.0, 2.0, 0.0]}
    bounds = {"losses": 0.02, "output": 0.1}
    assert team.difference(expected, expected, bounds) == ""
    # A single loss counts for itself, however small it is beside the others
    off = team.difference(expected | {"losses": [1.1, 2.0, 3.0, 4.0]}, expected, bounds)
    assert off == "losses off by 0.1, at most 0.02 is right"
    assert "output off by 1" in team.difference(expected | {"output": [0.0] * 5}, expected, bounds)
    assert "off by nan" in team.difference(expected | {"output": [float("nan")] * 5}, expected, bounds)
    with pytest.raises(AssertionError, match="nothing was compared"):
        team.difference(expected, expected, {"gradient of netG": 0.1})


class FakeWorker:
    """Answers at once; those in `wrong` have another gradient, those in `broken` fail."""

    wrong: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    session = None

    def __init__(self, name: str, *command: str, env: dict[str, str]):
        self.name = name

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        if self.name in self.broken:
            raise team.WorkerError("out of memory")
        gradient = [9.0] * 5 if self.name in self.wrong else [1.0] * 5
        check = {"losses": [1.0] * 4, "gradient of netG": gradient, "first_s": 2.0}
        return check if do == "check" else {"first_s": 0.5, "settled_ms": 1.0, "peak_mem_mib": 1.0}

    def sample(self, calls: int) -> float:
        return 1.0 if "fastp2p" in self.name else 3.0

    def dismiss(self) -> None:
        ends.append("may end")

    def close(self, *, within_s: float) -> None:
        ends.append("ended")


ends: list[str] = []  # what fake workers were told, in its order


def fake_team(monkeypatch: pytest.MonkeyPatch, **faults: tuple[str, ...]) -> team.Team:
    monkeypatch.setattr(team, "Worker", type("Worker", (FakeWorker,), faults))
    members = [EAGER, OTHERS[1], our_provider(best_precision(CPU), CPU)]
    return team.Team(members, CPU, TINY, {}, quick=True)


def test_a_wrong_result_claims_nothing(monkeypatch: pytest.MonkeyPatch):
    """Ours is timed all the same, compared with nobody, and the benchmark fails; another one is not timed."""
    benchmark = Pedantic()
    ours = fake_team(monkeypatch).ours.name
    with pytest.raises(pytest.fail.Exception, match="wrong, so its time claims nothing: gradient of netG off by 8"):
        fake_team(monkeypatch, wrong=(ours,)).compare(benchmark, "step", 1)
    rows = benchmark.extra_info["rows"]
    assert {row["provider"] for row in rows if row["wrong"]} == {ours}
    assert {row["provider"] for row in rows} == {EAGER.name, OTHERS[1].name, ours}
    text = "\n".join(results.tables(content(*rows)))
    assert f"{ours} is WRONG, so its time claims nothing: gradient of netG off by 8" in text
    assert re.search(r"\d\.\d\dx", text) is None

    benchmark = Pedantic()
    other = OTHERS[1].name
    mine = fake_team(monkeypatch, wrong=(other,))
    mine.compare(benchmark, "step", 1)
    assert {row["provider"] for row in benchmark.extra_info["rows"]} == {EAGER.name, ours}
    assert "gradient of netG off" in mine.left_out[other]


def test_who_fails_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch):
    benchmark, other = Pedantic(), OTHERS[1].name
    mine = fake_team(monkeypatch, broken=(other,))
    mine.compare(benchmark, "step", 4)
    rows = {row["provider"]: row for row in benchmark.extra_info["rows"]}
    assert set(rows) == {EAGER.name, mine.ours.name}
    assert mine.left_out[other] == "out of memory"
    assert rows[EAGER.name]["img_per_sec"] == pytest.approx(4e3 / 3)
    assert rows[EAGER.name]["first_s"] == 2.0  # the check's, which came first
    assert rows[mine.ours.name]["settings"] == mine.ours.settings
    with pytest.raises(pytest.fail.Exception, match=r"fastp2p .* fails, so nothing is timed: out of memory"):
        fake_team(monkeypatch, broken=(mine.ours.name,)).compare(benchmark, "step", 4)


def test_layers_are_compared_too():
    """The fused step comes first among ours: it is what a verdict speaks of."""
    who, left_out = providers(CPU, quick=True)
    best, layers = (p for p in who if p.ours)
    assert (best.engine, layers.engine, layers.name) == ("fused", "layers", LAYERS)
    assert LAYERS not in left_out
    expected = ProviderWorker(EAGER, CPU, TINY).check("step", 2)
    for precision in dict.fromkeys((layers.precision, "fp32")):
        provider = our_provider(precision, CPU, engine="layers")
        got = ProviderWorker(provider, CPU, TINY).check("step", 2)
        assert team.difference(got, expected, team.bounds_of(provider, "step", CPU)) == ""


def test_a_worker_answers_fails_and_is_ended():
    worker = team.Worker(EAGER.name, "worker", EAGER.name, "--scale", "tiny")
    try:
        check = worker.ask("check", what="step", batch=2)
        assert len(check["losses"]) == 4
        assert all(check[f"gradient of {net}"] for net in ("netG", "netD"))
        prepared = worker.ask("prepare", what="step", batch=2)
        assert prepared["peak_mem_mib"] is None or 0 < prepared["peak_mem_mib"] < 1000
        assert worker.sample(2) > 0
        with pytest.raises(team.WorkerError, match="AttributeError") as failed:
            worker.ask("prepare", what="nothing")
        assert "Traceback" in failed.value.__notes__[0]
        with pytest.raises(team.WorkerError, match="did not answer within 0 s"):
            worker.ask("sample", within_s=0.0, calls=10**12)  # hours, even of the nothing that is prepared now
        with pytest.raises(team.WorkerError, match="ended with status -9"):
            worker.ask("release")
    finally:
        worker.close()


def test_the_workers_end_together(monkeypatch: pytest.MonkeyPatch):
    """None waits for the end of another one's process, which takes seconds after use of a GPU."""
    mine = fake_team(monkeypatch)
    ends.clear()
    mine.close()
    assert ends == ["may end"] * len(mine.workers) + ["ended"] * len(mine.workers)


MEASURES = """
import json, pathlib, pytest

@pytest.fixture(scope="session")
def kept(pytestconfig):
    yield pytestconfig.getoption("out")
    content = json.loads(pytestconfig.getoption("out").read_text())
    assert [row["provider"] for row in content["rows"]] == ["one", "two"]
    assert content["complete"] is False

@pytest.mark.parametrize("provider", ["one", "two"])
def test_measures(benchmark, kept, provider):
    benchmark.pedantic(lambda: None)
    benchmark.extra_info["rows"] = [ROW | {"provider": provider, "ours": True}]
    assert provider == "one"  # a wrong result is kept, too
"""


def test_rows_are_kept_before_the_workers_end(tmp_path: Path):
    """They used to be written after it, and a run stopped in between lost the last benchmark's."""
    (tmp_path / "test_measures.py").write_text(MEASURES.replace("ROW", repr(row("", 1.0))))
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", "test_measures.py"]
    # In a worker of xdist pytest-benchmark would measure nothing
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["PYTHONPATH"] = str(ROOT / "benchmarks")
    done = subprocess.run([*command, "--out", str(out)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "1 failed, 1 passed" in done.stdout
    assert "error" not in done.stdout
    assert len(json.loads(out.read_text())["rows"]) == 2


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="Linux alone tells")
def test_strangers_are_noticed():
    """Another process's work counts, unless its session is named as ours."""
    busy = "import time\nend = time.time() + 3\nwhile time.time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", busy], start_new_session=True) as process:
        strangers, friends = machine.Strangers(set()), machine.Strangers({process.pid})
        for watch in (strangers, friends):
            watch.begin()
        time.sleep(1)
        for watch in (strangers, friends):
            watch.end()
        process.kill()
    theirs, ours = strangers.cores(), friends.cores()
    assert theirs is not None
    assert ours is not None
    # The process had some of a second, other tests the rest; as ours it no longer counts
    assert theirs - ours > 0.5 / (os.cpu_count() or 1)


UPSTREAM = {
    "options/base_options.py": "",
    "options/train_options.py": """
import argparse, sys
class TrainOptions:
    def parse(self):
        parser = argparse.ArgumentParser()
        for name in ("dataroot", "direction", "model", "name", "checkpoints_dir", "netG", "netD"):
            parser.add_argument("--" + name)
        for name in ("batch_size", "crop_size", "load_size", "ngf", "ndf", "n_layers_D"):
            parser.add_argument("--" + name, type=int)
        parser.add_argument("--no_dropout", action="store_true")
        print("prints what it likes")
        return parser.parse_args()
""",
    "models/__init__.py": """
import torch
from fastp2p.models.gan_losses import GANLoss
from fastp2p.models.pix2pix.networks import PatchDiscriminator, UnetGenerator
from fastp2p.models.pix2pix.reference import train_step
def create_model(opt):
    return Model(opt)
class Model:
    def __init__(self, opt):
        levels = int(opt.netG.removeprefix("unet_")).bit_length() - 1
        dropout = "none" if opt.no_dropout else "upstream"
        self.netG = UnetGenerator(levels=levels, ngf=opt.ngf, dropout=dropout)
        self.netD = PatchDiscriminator(ndf=opt.ndf, n_layers=opt.n_layers_D)
        nets = (self.netG, self.netD)
        self.optimizer_G, self.optimizer_D = (torch.optim.Adam(n.parameters(), 2e-4, (0.5, 0.999)) for n in nets)
    def setup(self, opt):
        pass
    def set_input(self, data):
        self.real = data["A"], data["B"]
    def optimize_parameters(self):
        self.losses = train_step(self.netG, self.netD, self.optimizer_G, self.optimizer_D, *self.real,
                                 gan_loss=GANLoss(), lambda_L1=100.0)
    def get_current_losses(self):
        names = ("G_GAN", "G_L1", "D_real", "D_fake")
        return dict(zip(names, map(float, self.losses)))
""",
    "data/__init__.py": """
import torch
def create_dataset(opt):
    shape = (opt.batch_size, 3, opt.crop_size, opt.crop_size)
    return [{"A": torch.rand(shape), "B": torch.rand(shape)} for _ in range(3)]
""",
}


def test_upstream_s_worker_takes_its_checkout(tmp_path: Path):
    """On a stand-in with the official repository's interface, made of our own networks."""
    for name, text in UPSTREAM.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    upstream = team.Worker("upstream", "upstream_worker", str(tmp_path), "--scale", "tiny")
    ours = team.Worker(EAGER.name, "worker", EAGER.name, "--scale", "tiny")
    try:
        weights = str(tmp_path / "weights.pt")
        expected = upstream.ask("check", batch=2, data="somewhere", weights=weights)
        assert team.difference(ours.ask("check", what="step", batch=2, weights=weights), expected, team.FLOAT32) == ""
        prepared = upstream.ask("prepare", what="epoch", batch=2, data="somewhere", direction="BtoA")
        assert prepared["settled_ms"] > 0
        assert upstream.sample(4) > 0
    finally:
        upstream.close()
        ours.close()


@pytest.mark.slow
def test_a_rehearsal_runs_every_suite(tmp_path: Path):
    command = [sys.executable, "-m", "pytest", "benchmarks", "--quick", "--rehearse", "--out", str(tmp_path), "-q"]
    done = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a rehearsal: its times mean nothing" in done.stdout
    (path,) = tmp_path.glob("*.json")
    kept = json.loads(path.read_text())
    assert kept["rehearsal"] is True
    suites = {row["suite"] for row in kept["rows"]}
    assert {"step", "epoch", "inference", "operators"} <= suites
    assert all(row["peak_mem_mib"] is not None for row in kept["rows"])
    assert path.with_suffix(".png").stat().st_size > 10_000
