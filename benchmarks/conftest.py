"""Options of the benchmarks, the providers' processes, and the tables after pytest-benchmark's own."""

import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.epochs import write_builtin_pairs
from harness.machine import name_of
from harness.providers import EAGER, HALF_SIDE, LAYERS, OTHERS, PAPER, TINY, providers
from harness.results import Row, head, new_path, save, tables
from harness.team import Team
from plot import plot

from fastp2p.count.ceilings import copy_bytes_per_sec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LEFT_OUT = pytest.StashKey[dict[str, str]]()
HEAD = pytest.StashKey[Row]()  # what a results file begins with
KEPT = pytest.StashKey[Path]()  # the file that they are kept in


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastp2p")
    group.addoption("--quick", action="store_true", help="fewer rounds and cases: three minutes on two CPU cores")
    group.addoption("--rehearse", action="store_true", help="tiny networks, to see that all runs: times mean nothing")
    group.addoption("--out", type=Path, metavar="DIR", help="keep results there, in a file that grows with each "
                    "benchmark, JSON, and a plot at the end; or the file itself, NAME.json")  # fmt: skip
    group.addoption("--data", type=Path, metavar="DIR", help="pairs for epochs, A|B side by side in DIR/train; without "
                    "it the built-in set's")  # fmt: skip
    group.addoption("--direction", default="AtoB", choices=["AtoB", "BtoA"], help="of --data")
    group.addoption("--without", action="append", default=[], metavar="PROVIDER", help="leave one out, by its name in "
                    "the table; may be repeated")  # fmt: skip
    group.addoption("--upstream", type=Path, metavar="DIR", help="checkout of pytorch-CycleGAN-and-pix2pix to compare")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = {}
    if (out := config.getoption("out")) is not None:  # better now than in an hour
        folder = out.parent if out.suffix == ".json" else out
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise pytest.UsageError(f"--out: cannot write to {folder}: {error}; choose another folder") from error
    others = [*(p.name for p in OTHERS if p is not EAGER), LAYERS]
    if unknown := set(config.getoption("without")) - set(others):
        raise pytest.UsageError(f"--without: got {', '.join(unknown)}; expected some of {', '.join(others)}")


@pytest.fixture(scope="session")
def quick(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("quick"))


@pytest.fixture(scope="session")
def rehearse(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("rehearse"))


@pytest.fixture(scope="session")
def copy_gb_per_sec() -> float:
    """What this machine's memory copies, read and written bytes counted."""
    return copy_bytes_per_sec(DEVICE) / 1e9


@pytest.fixture(scope="session")
def team(pytestconfig: pytest.Config, quick: bool, rehearse: bool) -> Iterator[Team]:
    """Every provider that makes sense on this machine, in processes of their own."""
    who, left_out = providers(DEVICE, quick=quick)
    unwanted = pytestconfig.getoption("without")
    who = [p for p in who if p.name not in unwanted]
    left_out |= dict.fromkeys(unwanted, "by --without")
    pytestconfig.stash[LEFT_OUT] = left_out
    scale = TINY if rehearse else HALF_SIDE if quick and DEVICE.type == "cpu" else PAPER
    team = Team(who, DEVICE, scale, left_out, quick=quick)
    yield team
    team.close()


@pytest.fixture(scope="session")
def data(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """--data, or pairs of the built-in set written side by side at 256 px, as the usual data sets come."""
    given: Path | None = pytestconfig.getoption("data")
    if given is None:
        folder = tmp_path_factory.mktemp("builtin-emoji", numbered=False)
        write_builtin_pairs(folder / "train")
        return folder
    if not (given / "train").is_dir():
        pytest.fail(f"--data: got {given}, which has no folder train; expected DIR/train with A|B side by side")
    return given.resolve()


def _content(config: pytest.Config, *, complete: bool) -> Row | None:
    """The results so far, for the file; None while there are none."""
    session = getattr(config, "_benchmarksession", None)
    rows = [row for b in session.benchmarks for row in b.extra_info.get("rows", [])] if session else []
    if not rows:
        return None
    if HEAD not in config.stash:
        config.stash[HEAD] = head(gpu=DEVICE.type == "cuda", rehearsal=config.getoption("rehearse"))
    return config.stash[HEAD] | {"complete": complete, "left_out": config.stash[LEFT_OUT], "rows": rows}


def _keep(config: pytest.Config, content: Row) -> Path:
    """Write the results so far to the run's file, which is new or the one that --out names."""
    if KEPT not in config.stash:
        out = config.getoption("out")
        config.stash[KEPT] = out if out.suffix == ".json" else new_path(content, out)
    save(content, config.stash[KEPT])
    return config.stash[KEPT]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """After each benchmark: what is measured is kept, whatever becomes of the next one or of the workers' end."""
    try:
        return (yield)
    finally:
        content = _content(item.config, complete=False)
        if content is not None and item.config.getoption("out") is not None:
            _keep(item.config, content)


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    content = _content(config, complete=exitstatus == 0)
    if content is None:
        return
    write = terminalreporter.write_line
    terminalreporter.section(f"{name_of(content)}, torch {content['versions']['torch']}")
    for line in tables(content):
        write(line)
    if config.getoption("out") is None:
        return
    path = _keep(config, content)
    write(f"kept: {path}")
    if config.getoption("out") == path:  # who names the file wants that one alone
        return
    try:
        if (picture := plot(content, path.with_suffix(".png"))) is not None:
            write(f"plot: {picture}")
    except ModuleNotFoundError as error:
        write(f"no plot: {error}; where it is installed, python benchmarks/plot.py {path}")
