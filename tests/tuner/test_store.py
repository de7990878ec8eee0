"""Which kernels a run takes: measured once, written into its folder, and taken from there when it is resumed."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.runs import assert_same_state, config, resume

from fastp2p.cli import main
from fastp2p.commands import tune
from fastp2p.commands.info import info
from fastp2p.errors import InputError
from fastp2p.models.checkpoint import load_checkpoint
from fastp2p.ops import kernel_choices
from fastp2p.ops.extension import WHY_ABSENT
from fastp2p.ops.kernel_choices import Problem, Table
from fastp2p.train.loop import train
from fastp2p.train.run_folder import read_config
from fastp2p.tuner import store

# TINY's, as far as tune has them
NETWORKS = ["--netG", "unet_8", "--ngf", "4", "--netD", "pixel", "--ndf", "4", "--crop-size", "32", "--batch-size", "2"]
pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.skipif(
        WHY_ABSENT is not None or torch.cuda.is_available(),
        reason="written for a CPU on which C++ serves",
    ),
]


def place() -> kernel_choices.Place:
    return kernel_choices.place_of(torch.device("cpu"))


def flipped(choices: Table) -> Table:
    other = {"gemm": "direct", "direct": "gemm"}
    return {problem: measured._replace(choice=other[measured.choice]) for problem, measured in choices.items()}


def of_run(folder: Path) -> Table:
    return kernel_choices.from_json((folder / "kernels.json").read_bytes(), place())


def test_a_run_measures_what_is_missing_and_writes_what_it_takes(aligned: Path, tmp_path: Path):
    said: list[str] = []
    folder = train(config(aligned, tmp_path / "run", "--max-steps", "1"), say=said.append)
    (line,) = (line for line in said if line.startswith("kernels: ") and "warning" not in line)
    n, kept = len(of_run(folder)), kernel_choices.read_cache(place())
    assert n > 15
    assert line.startswith(f"kernels: {n} convolutions measured in ")
    assert line.endswith(str(kernel_choices.cache_path(place())))
    assert of_run(folder) == kept == kernel_choices.table(place())

    said.clear()
    again = train(config(aligned, tmp_path / "again", "--max-steps", "1"), say=said.append)
    assert not any(line.startswith("kernels: ") for line in said)
    assert of_run(again) == kept
    assert_same_state(folder, again)

    for problem in list(kept)[:2]:
        del kept[problem]
    kernel_choices.cache_path(place()).write_bytes(kernel_choices.to_json(flipped(kept), place()))
    said.clear()
    other = train(config(aligned, tmp_path / "other", "--max-steps", "1"), say=said.append)
    assert any(line.startswith("kernels: 2 convolutions measured in ") for line in said)
    assert flipped(kept).items() <= of_run(other).items()


def test_a_resumed_run_takes_its_own_kernels_whatever_the_file_says_by_then(aligned: Path, tmp_path: Path):
    """And they matter: with the others the weights differ."""
    options = ("--dropout", "paper", "--precision", "fp32", "--ngf", "16", "--max-steps")
    unbroken = train(config(aligned, tmp_path / "unbroken", *options, "5"))
    broken = train(config(aligned, tmp_path / "broken", *options, "2"))
    choices = of_run(broken)
    kernel_choices.cache_path(place()).write_bytes(kernel_choices.to_json(flipped(choices), place()))
    kernel_choices.forget()
    before = (broken / "kernels.json").read_bytes()
    resume(broken, max_steps=5)
    assert_same_state(unbroken, broken)
    assert (broken / "kernels.json").read_bytes() == before

    with_others = train(config(aligned, tmp_path / "others", *options, "5"))
    assert of_run(with_others) == flipped(choices)
    with pytest.raises(AssertionError, match="differs"):
        assert_same_state(unbroken, with_others)


def test_another_machine_s_kernels_are_chosen_anew_and_damaged_ones_told(aligned: Path, tmp_path: Path):
    folder = train(config(aligned, tmp_path / "run", "--max-steps", "1"))
    path = folder / "kernels.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"environment": "another-machine"}))
    said: list[str] = []
    train(dataclasses.replace(read_config(folder), max_steps=2), resume=True, say=said.append)
    assert any("chosen anew" in line and "is of another-machine" in line for line in said)
    assert of_run(folder) == kernel_choices.read_cache(place())
    path.write_text(json.dumps(content | {"format": True}))
    with pytest.raises(
        InputError, match=r"kernels\.json: cannot be read: it is of format True, .*; delete it to choose"
    ):
        resume(folder, max_steps=3)
    path.write_text("{")
    with pytest.raises(InputError, match=r"kernels\.json: cannot be read: .*; delete it to choose kernels anew"):
        resume(folder, max_steps=3)
    path.unlink()
    resume(folder, max_steps=3)
    assert load_checkpoint(folder / "checkpoint.pt")["step"] == 3
    assert of_run(folder)


def test_kernels_aten(aligned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "tune", lambda *args, **options: pytest.fail("nothing is to be measured"))
    folder = train(config(aligned, tmp_path / "run", "--kernels", "aten", "--max-steps", "1"))
    assert {measured.choice for measured in of_run(folder).values()} == {"direct"}
    assert kernel_choices.read_cache(place()) == {}
    with pytest.raises(InputError, match=r"kernels: got auto, but .* was trained with aten"):
        resume(folder, kernels="auto")


def test_kernels_that_do_not_run_here(aligned: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"kernels: got triton on a CPU, .*use --kernels auto, or a GPU"):
        train(config(aligned, tmp_path / "run", "--kernels", "triton"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="kernels: got aten with engine reference"):
        config(aligned, tmp_path / "run", "--kernels", "aten", "--engine", "reference")


def test_another_run_s_kernels_give_its_bits(aligned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Named by its folder or its file, whatever this machine would choose by now."""
    first = train(config(aligned, tmp_path / "first"))
    chosen = of_run(first)
    monkeypatch.setenv("FASTP2P_CACHE", str(tmp_path / "other cache"))
    kernel_choices.forget()
    kernel_choices.add_to_cache(place(), flipped(chosen))
    for number, source in enumerate((first, first / "kernels.json")):
        said: list[str] = []
        again = train(config(aligned, tmp_path / f"{number}", "--kernels", str(source)), say=said.append)
        assert of_run(again) == chosen
        assert f"kernels: {len(chosen)} of {len(chosen)} convolutions as in {source}, the others by rule" in said
        assert_same_state(first, again)
    (first / "kernels.json").unlink()
    resume(again, n_epochs=4)  # has its own by now


def test_another_run_s_kernels_that_cannot_be_taken(aligned: Path, tmp_path: Path, other_kernels: Path):
    """Each is refused before a folder is made."""
    damaged, elsewhere = tmp_path / "damaged.json", tmp_path / "elsewhere.json"
    damaged.write_text("{")
    elsewhere.write_text(other_kernels.read_text().replace("torch", "torch0."))
    for source, why in {
        "atten": "expected auto, aten, triton, or a run folder with a kernels.json .*: there is no such file",
        str(tmp_path): "expected auto, aten, triton, or a run folder with a kernels.json .*: there is no such file",
        str(damaged): "damaged.json, expected auto",
        str(elsewhere): "it is for .*torch0",
        str(other_kernels): "knows none of this run's convolutions",
    }.items():
        with pytest.raises(InputError, match=f"kernels: .*{why}"):
            train(config(aligned, tmp_path / "run", "--kernels", source))
        assert not (tmp_path / "run").exists()


@pytest.fixture
def other_kernels(aligned: Path, tmp_path: Path) -> Path:
    """The choices of a run with other networks."""
    other = config(aligned, tmp_path / "other", "--max-steps", "1", "--ngf", "8", "--ndf", "6", "--batch-size", "3")
    return train(other) / "kernels.json"


def test_where_there_is_nothing_to_choose_from(aligned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "why_not", lambda device, dtype: "the convolutions are served by: reference (PyTorch)")
    monkeypatch.setattr(tune, "why_not", lambda device, dtype: "plain PyTorch serves")
    said: list[str] = []
    folder = train(config(aligned, tmp_path / "run", "--max-steps", "1"), say=said.append)
    assert "kernels: nothing to choose from, the convolutions are served by: reference (PyTorch)" in said
    assert of_run(folder) == {}
    assert main(["tune", *NETWORKS, "--device", "cpu"]) == 1


def test_a_busy_machine_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store.os, "getloadavg", lambda: (99.5, 0.0, 0.0))
    monkeypatch.setattr(store, "tune", lambda *args, **options: {})
    operation: Any = SimpleNamespace(problem=Problem("conv", torch.float32, 1, 1, 0, 1, 4, 4, 2))
    said: list[str] = []
    compiled: list[Any] = []
    assert store.tuned([operation], place(), said.append, compile_first=compiled.append) == {}
    assert compiled == [[operation]]
    assert said[0].startswith("kernels: warning: others keep 99.5 cores busy; fastp2p tune --again, with the same net")


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    options: list[Any] = ["tune", *NETWORKS, "--device", "cpu", "--precision", "fp32"]
    assert f"kernels      0 convolutions measured on this device, in {kernel_choices.cache_path(place())}" in info()
    assert main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    n = len(kernel_choices.read_cache(place()))
    assert any(line.startswith(f"kernels: {n} convolutions measured in ") for line in lines)
    rows = [line for line in lines if line.startswith(("netG ", "netD "))]
    assert len(rows) == n
    assert all("gemm " in row and "direct " in row for row in rows)
    assert lines[-1].startswith("each once: ")
    assert f"kernels      {n} convolutions measured" in info()

    monkeypatch.setattr(store, "tune", lambda missing, *args, **options: {"measured": len(missing)})
    assert main(options) == 0
    assert "measured in" not in capsys.readouterr().out
    monkeypatch.setattr(store, "tuned", lambda *args, again, **options: {} if again else pytest.fail("--again"))
    assert main([*options, "--again"]) == 0
    assert capsys.readouterr().out.count("by rule\n") == n


def test_a_choice_whose_time_is_not_kept_has_none_in_the_table(tmp_path: Path):
    """A file that lacks it ended in a KeyError."""
    problem = Problem.parse("conv float32 24px 36+0-40 4x4s2")
    wanted: Any = [SimpleNamespace(name="netG conv", problem=problem)]
    table = tune.format_table(wanted, {problem: kernel_choices.Measured("gemm", "direct", {"direct": 1.0})})
    assert table.splitlines()[-1].startswith("each once: nan ms as chosen, 1.00 by rule")
