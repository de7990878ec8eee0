"""What is made of a benchmark's results: verdicts, comparisons, files, a plot."""

import json
import sys
from pathlib import Path

import pytest
from helpers.bench_rows import content, row

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

import compare
import plot
from harness import results


def test_verdicts():
    rows = [row("eager float32", 30.0), row("torch.compile", 12.0), row("fastp2p bf16", 10.0)]
    text = "\n".join(results.tables(content(*rows, left_out={"graph of eager": "is for cuda"})))
    assert "fastp2p bf16 is ahead of all; of the next, torch.compile, by 1.20x\n" in text
    assert "3.00x" in text
    assert "left out: graph of eager: is for cuda" in text
    assert "TRUST" not in text

    close = "\n".join(results.tables(content(row("torch.compile", 10.2), row("fastp2p bf16", 10.0))))
    assert "by 1.02x, but their quartiles overlap" in close
    behind = "\n".join(results.tables(content(row("torch.compile", 9.0), row("fastp2p bf16", 10.0))))
    assert "fastp2p bf16 is BEHIND torch.compile, 0.90x" in behind
    overlap = "\n".join(results.tables(content(row("torch.compile", 9.9), row("fastp2p bf16", 10.0))))
    assert "BEHIND torch.compile, 0.99x, but their quartiles overlap" in overlap
    rows = [row("torch.compile", 9.0, strangers_cores=0.7), row("fastp2p bf16", 10.0)]
    busy = "\n".join(results.tables(content(*rows)))
    assert "NOT TO BE TRUSTED: other programs kept up to 0.7 cores busy during step, batch 1" in busy


def test_two_results_side_by_side():
    before = content(row("eager float32", 30.0), row("fastp2p bf16", 10.0), row("torch.compile", 12.0))
    after = content(row("eager float32", 31.0), row("fastp2p bf16", 8.0), versions={"torch": "2.14"}, dirty=True)
    lines = compare.compare(before, after)
    assert "  torch: 2.13 before, 2.14 after" in lines
    assert next(line for line in lines if line.startswith("after:")).endswith("commit 0123456789 and changes")
    (eager,) = (line for line in lines if "eager float32" in line)
    (ours,) = (line for line in lines if "fastp2p" in line)
    assert eager.endswith("0.97x")  # within the quartiles
    assert ours.endswith("1.25x  faster")
    assert "before alone: step, batch 1, torch.compile" in lines
    smaller = content(row("fastp2p bf16", 2.0, what="a smaller step"))
    assert "no measurement is in both files" in compare.compare(before, smaller)
    (worse,) = (line for line in compare.compare(after, before) if "fastp2p" in line)
    assert worse.endswith("0.80x  SLOWER")


def test_compare_says_what_it_wants(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "a.json").write_text("[]")
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert compare.main() == 2
    assert "expected results of pytest benchmarks/ --out" in capsys.readouterr().err


def test_results_are_kept_and_plotted(tmp_path: Path):
    kept = content(row("eager float32", 30.0), row("fastp2p bf16", 10.0), row("fastp2p bf16", 9.0, batch=4))
    paths = []
    for _ in range(2):
        paths.append(results.new_path(kept, tmp_path))
        results.save(kept, paths[-1])
    first, second = paths
    assert (first.name, second.name) == ("2-cores-of-a-cpu-2026-11-20.json", "2-cores-of-a-cpu-2026-11-20-2.json")
    assert json.loads(first.read_text()) == kept
    picture = plot.plot(kept, tmp_path / "plot.png")
    assert picture is not None
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert plot.plot(content(), tmp_path / "none.png") is None
