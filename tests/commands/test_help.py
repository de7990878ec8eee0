"""The help: each command's options in titled groups, each option told in two lines at 80 columns."""

import dataclasses
import io
import re
from typing import get_args

import pytest

from fastp2p import cli
from fastp2p.commands.options import GROUPS, texts
from fastp2p.config import RunConfig
from fastp2p.models.pix2pix.options import Pix2PixConfig

COMMANDS = [kind.__name__.lower() for kind in get_args(cli.AnyCommand)]
STEP = ["options", "pix2pix options", "data options", "device and precision options"]
TITLES = {
    "train": [*STEP[:3], "schedule options", STEP[3], "output options"],
    "tune": STEP,
    "roofline": STEP,
    "launches": STEP,
    "profile": STEP,
    "translate": ["positional arguments", "options"],
    "evaluate": ["positional arguments", "options"],
    "convert": ["positional arguments", "options"],
    "info": ["options"],
}


@pytest.fixture
def help_of(monkeypatch: pytest.MonkeyPatch):
    """What a command's --help prints on a terminal of so many columns."""

    def read(command: str, columns: int = 80) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        printed = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding="utf-8"))
            assert cli.main([command, "--help"]) == 0
            return printed.getvalue().decode()

    return read


def titles(text: str) -> list[str]:
    return re.findall(r"╭─ (.+?) ─+╮", text)


def lines_of_options(text: str) -> dict[str, int]:
    """How many lines of text each option or argument has; a line with its name alone counts none."""
    counts: dict[str, int] = {}
    rows = [row[2:-1].rstrip() for row in text.splitlines() if row.startswith("│")]
    name = ""
    for row in rows:
        if re.match(r"--?[\w]|PATH|\[\[PATH", row):
            name = row.split()[0] + str(len(counts)) if row.startswith("PATH") else row.split()[0].rstrip(",")
            counts[name] = int(re.search(r"\S {2,}\S", row) is not None)
        elif row.startswith(" ") and name:
            counts[name] += 1
        else:
            name = ""  # a group's own description
    return counts


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_takes_two_lines_at_80_columns(help_of, command: str):
    text = help_of(command)
    assert all(len(line) <= 80 for line in text.splitlines()[3:])
    counts = lines_of_options(text)
    assert counts["-h"] == 1
    long = {name: count for name, count in counts.items() if not 1 <= count <= 2}
    assert not long, long


@pytest.mark.parametrize("command", COMMANDS)
def test_options_stand_in_groups(help_of, command: str):
    assert titles(help_of(command)) == TITLES[command]


def test_lines_are_counted():
    """The measure itself: a name with its text, a name alone, and a text of three lines."""
    text = (
        "│ --a INT   One.   │\n│ --b {x,y,z,w,v}  │\n│           One    │\n│           two    │\n│           three. │"
    )
    assert lines_of_options(text) == {"--a": 1, "--b": 3}


@pytest.mark.parametrize("columns", [80, 120])
def test_train_shows_every_option_with_its_source(help_of, columns: int):
    text = " ".join(help_of("train", columns).replace("│", " ").split())
    told = texts(Pix2PixConfig)
    for field in dataclasses.fields(Pix2PixConfig):
        assert f"--{field.name.replace('_', '-')} " in text.replace(",", " "), field.name
        assert re.search(r" \[(paper|upstream|ours)[^\]]*\]$", told[field.name]), field.name
        assert told[field.name] in text, field.name
    for source in ("[paper N] is", "[upstream] is", "[ours] is"):
        assert source in text
    for unit in ("px", "minutes", "Steps", "Epochs"):
        assert unit in text


def test_each_shared_option_has_its_group():
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(field.name for field in dataclasses.fields(RunConfig))
