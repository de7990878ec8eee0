"""make gpu-first where there is no GPU: its stages rehearsed and killed, and what it makes of their ends."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

import gpu_first
import gpu_tests
from gpu_first import Run, Stage
from harness import machine

from fastp2p.environment import slug

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, str(ROOT / "benchmarks" / "gpu_first.py")]
WRITES = "import json, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(json.dumps(dict(rows=[1])));"
HANGS = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def run_in(folder: Path, seconds: float = 600.0) -> Run:
    """A run without stages yet, that must end within so many seconds."""
    out, work = folder / "out", folder / "work"
    out.mkdir()
    (work / "artifacts").mkdir(parents=True)
    run = Run(out, work, time.monotonic() + seconds, True, "builtin:emoji", dict(os.environ))
    run.content = {"rehearsal": True, "stages": {}}
    return run


def stage(name: str, code: str, limit_s: float = 60.0, file: str = "") -> Stage:
    """Runs Python code, which finds the file it may write in sys.argv[1]."""
    return Stage(name, limit_s, ("-c", code, "{file}"), file)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_it_begins_where_fastp2p_is_not_installed():
    """The GPU machine gets it from the cache, which the script unpacks."""
    code = "import sys; sys.modules['fastp2p'] = None; import gpu_first, gpu_cache; gpu_first.main"
    folder = Path(gpu_first.__file__).parent
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


def test_a_stage_that_fails_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One crashes after it has written, one hangs and ignores SIGTERM; what all have written is there."""
    monkeypatch.setattr(gpu_first, "GRACE_S", 0.5)
    run = run_in(tmp_path)
    run.run(stage("first", WRITES))
    run.run(stage("crashes", WRITES + "import os; os.abort()", file="crashes.json"))
    run.run(stage("hangs", WRITES + HANGS, limit_s=5.0))
    run.run(stage("fails", "print('why'); sys.exit(3)"))
    run.run(stage("last", WRITES, file="last.json"))
    stages = read(run.out / "first.json")["stages"]
    assert {name: told["status"] for name, told in stages.items()} == {
        "first": "done", "crashes": "ended with status -6", "hangs": "stopped at its limit",
        "fails": "ended with status 1", "last": "done",
    }  # fmt: skip
    assert stages["first"]["results"] == stages["hangs"]["results"] == {"rows": [1]}
    assert read(run.out / "crashes.json") == read(run.out / "last.json") == {"rows": [1]}
    assert "NameError" in stages["fails"]["output"]
    assert {path.name for path in run.out.iterdir()} == {"first.json", "crashes.json", "last.json", "artifacts.zip"}


def test_what_a_killed_stage_has_begun_ends_with_it(tmp_path: Path):
    child = "import os, subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    run = run_in(tmp_path)
    run.run(stage("parent", child + "open(sys.argv[1], 'w').write(str(p.pid)); os.abort()"))
    pid = run.content["stages"]["parent"]["results"]
    # The child is nobody's any more; it may still be a zombie of the init process
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_an_interrupted_stage_is_told_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, begun = run_in(tmp_path), []

    def interrupt(self: Run, process: "subprocess.Popen[bytes]", *_: object) -> bool:
        begun.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.run(stage("hangs", HANGS))
    assert begun[0].returncode == -signal.SIGKILL
    told = run.content["stages"]["hangs"]
    assert (told["status"], "pid" in told) == ("interrupted", False)


def test_artifacts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What does not fit is named; the small ones, a stage's output among them, come first."""
    monkeypatch.setattr(gpu_first, "ARTIFACTS_BYTES", 10_000)
    run = run_in(tmp_path)
    (run.work / "artifacts" / "a-timeline").write_bytes(os.urandom(9_990))
    run.run(stage("writes", "print('what it says')"))
    with zipfile.ZipFile(run.out / "artifacts.zip") as archive:
        assert archive.namelist() == ["writes.log"]
        assert archive.read("writes.log") == b"what it says\n"
    assert read(run.out / "first.json")["artifacts_left_out"] == {"a-timeline": 9_990}


def test_no_stage_begins_that_cannot_end_in_time(tmp_path: Path):
    run = run_in(tmp_path, seconds=gpu_first.RESERVE_S + gpu_first.GRACE_S)
    run.run(stage("late", WRITES))
    assert run.content["stages"]["late"]["status"] == "not begun: out of time"
    assert all(s.limit_s > 1 for s in gpu_first.STAGES)


def test_the_most_important_comes_first_and_files_are_few():
    names = [s.name for s in gpu_first.STAGES]
    assert names[:4] == ["head", "warm", "parity", "times"]
    files = {s.file for s in gpu_first.STAGES if s.file} | {"first.json", gpu_first.ARTIFACTS}
    assert len(files) <= 8
    assert sum(bool(s.file) for s in gpu_first.STAGES) == len(files) - 2


@pytest.mark.parametrize(("green", "claims"), [(True, True), (False, False), (None, False)])
def test_no_speed_up_without_parity(green: bool | None, claims: bool, tmp_path: Path):
    """None: the parity stage did not end."""
    row = {"suite": "step", "what": "a step", "batch": 1, "peak_mem_mib": None, "first_s": 1.0, "img_per_sec": 1.0}
    row |= {"case": "step, batch 1", "first_quartile": 9.0, "third_quartile": 11.0, "strangers_cores": None}
    rows = [row | {"provider": "eager float32", "ms": 30.0, "ours": False}]
    rows.append(row | {"provider": "fastp2p bf16", "ms": 10.0, "ours": True, "wrong": None})
    content = {"rows": rows, "left_out": {}, "rehearsal": False, "cpu_cores": 16}
    (tmp_path / "times.json").write_text(json.dumps(content))
    told = {"status": "done" if green else "ended with status 1", "seconds": 1.0, "results": {"green": bool(green)}}
    if green is None:
        told = {"status": "stopped at its limit", "seconds": 1.0}
    text = "\n".join(gpu_first.report({"rehearsal": False, "stages": {"parity": told}}, tmp_path))
    assert ("3.00x" in text) is claims
    assert ("WRONG" in text) is not claims


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path):
    done = subprocess.run([*SCRIPT, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu-first: no CUDA ")
    assert done.stderr.endswith("; --rehearse runs every stage on a CPU\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_cache_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_first.gpu_cache, "FOLDER", tmp_path / "none")
    with pytest.raises(gpu_first.gpu_cache.Stale, match="make gpu-cache"):
        gpu_first._environment(tmp_path, rehearse=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "everything"], "invalid choice: 'everything'"),
        (["--limit", "tests=soon"], "got 'tests=soon', expected the name of a stage, =, and seconds"),
        (["--minutes", "0"], "got '0', expected a number of minutes above 0"),
        (["--minutes", "nan"], "got 'nan', expected a number of minutes above 0"),
        (["--data", "nowhere"], "--data: got nowhere, which is not there; expected a folder or .zip of pairs"),
        (["--out", "a-file"], "--out: cannot write to a-file"),
    ],
)
def test_bad_arguments_are_told(options: list[str], message: str, tmp_path: Path):
    (tmp_path / "a-file").touch()
    command = [*SCRIPT, "--out", "out", "--rehearse", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.rglob("*")} == {"a-file"}


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
    assert slug(state["name"]) == "nvidia-h200"


def unit(folder: Path, file: str, shard: int, cases: dict[str, str], ended: str = "") -> gpu_tests.Unit:
    """A run of a test file that wrote this JUnit report."""
    outcomes = {"passed": "", "failed": '<failure message="off by 2">bounds</failure>', "skipped": "<skipped/>"}
    tests = "".join(f'<testcase name="{name}">{outcomes[outcome]}</testcase>' for name, outcome in cases.items())
    xml = folder / f"{Path(file).stem}-{shard}.xml"
    xml.write_text(f"<testsuites><testsuite>{tests}</testsuite></testsuites>")
    return gpu_tests.Unit(ROOT / "tests" / file, f"{shard}/2", [], xml, folder / "log", ended=ended)


def test_tests_are_green_when_all_have_ended_well(tmp_path: Path):
    good = [
        unit(tmp_path, "ops/test_adam.py", 1, {"test_a": "passed"}),
        unit(tmp_path, "ops/test_adam.py", 2, {"test_b": "passed", "test_c": "skipped"}),
    ]
    assert gpu_tests.summarise(good)["green"] is True
    failed = unit(tmp_path, "ops/test_up.py", 1, {"test_a": "failed", "test_b": "passed"})
    stopped = unit(tmp_path, "ops/test_down.py", 1, {"test_a": "passed"}, ended="stopped before its end")
    summary = gpu_tests.summarise([*good, failed, stopped])
    assert summary["green"] is False
    assert summary["total"] == {"passed": 4, "failed": 1, "skipped": 1, "unfinished": 1}
    assert summary["files"]["tests/ops/test_adam.py"] == {"passed": 2, "failed": 0, "skipped": 1}
    assert summary["failures"][0]["test"] == "test_up.py::test_a"
    assert "off by 2" in summary["failures"][0]["text"]
    assert gpu_tests.summarise([unit(tmp_path, "ops/test_wgrad.py", 1, {"test_a": "skipped"})])["green"] is False


def test_the_suite_is_all_of_its_files(tmp_path: Path):
    units = gpu_tests.list_units("cuda", False, tmp_path)
    files = {path for folder in ("ops", "nn", "engine") for path in (ROOT / "tests" / folder).glob("test_*.py")}
    files.add(ROOT / "tests" / "tuner" / "test_contest.py")
    assert {unit.file for unit in units} == files
    assert len({unit.xml for unit in units}) == len(units)


@pytest.mark.slow
def test_every_stage_is_rehearsed(tmp_path: Path):
    command = [*SCRIPT, "--rehearse", "--out", str(tmp_path), "--minutes", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    first = read(tmp_path / "first.json")
    assert first["complete"] is True
    stages = first["stages"].values()
    assert first["seconds"] >= sum(told["seconds"] for told in stages) - 0.1 * len(stages)  # each is rounded
    assert {told["status"] for told in first["stages"].values()} == {"done"}
    assert [*first["stages"]] == [s.name for s in gpu_first.STAGES]
    assert first["stages"]["head"]["results"]["versions"]["torch"] == torch.__version__
    assert first["stages"]["parity"]["results"]["green"] is True
    assert first["stages"]["train"]["results"]["img_per_sec"]
    for name in ("times.json", "tuned.json", "operators.json"):
        assert read(tmp_path / name)["complete"] is True
        assert all(0 < row["first_quartile"] <= row["ms"] for row in read(tmp_path / name)["rows"])
    assert read(tmp_path / "tests.json")["green"] is True
    assert "a rehearsal: its times mean nothing" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("doomed", [gpu_first.STAGES[::2], gpu_first.STAGES[1::2]], ids=["even", "odd"])
def test_every_stage_is_killed_in_the_middle(doomed: tuple[Stage, ...], tmp_path: Path):
    """What it has written is whole, and the others, of which each comes after one that is killed, are complete."""
    out, files = tmp_path / "out", {s.name: s.file for s in doomed}
    killed: list[str] = []
    with subprocess.Popen([*SCRIPT, "--rehearse", "--out", str(out)], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            stages = read(out / "first.json")["stages"] if (out / "first.json").exists() else {}
            for name, told in stages.items():
                if told["status"] == "running" and name in files and name not in killed:
                    if not files[name]:
                        time.sleep(0.5)  # PyTorch alone takes longer
                    elif not (out / files[name]).exists():
                        continue
                    killed.append(name)
                    os.killpg(told["pid"], signal.SIGKILL)
            time.sleep(0.1)
    assert process.returncode == 1
    assert killed == [*files]
    status = {name: told["status"] for name, told in read(out / "first.json")["stages"].items()}
    assert status == {s.name: "ended with status -9" if s in doomed else "done" for s in gpu_first.STAGES}
    contents = {path.name: read(path) for path in out.glob("*.json")}
    for name in ("times.json", "tuned.json", "operators.json"):
        assert contents[name]["complete"] is (name not in files.values())
    assert not [*out.glob(".*")]
