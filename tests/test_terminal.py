"""Streams that fail nobody."""

import io
import sys

import pytest

from fastp2p.terminal import Lasting, lasting_streams, progress, say


@pytest.mark.parametrize(
    ("encoding", "written"),
    [("utf-8", "caf\udce9 日 é".encode(errors="surrogateescape")), ("ascii", b"caf\xe9 \\u65e5 \\xe9")],
)
def test_names_keep_their_bytes_and_other_letters_are_escaped(
    monkeypatch: pytest.MonkeyPatch, encoding: str, written: bytes
):
    """A command with a name that is no UTF-8 can be pasted, and a narrow encoding ends nothing."""
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding=encoding))
    with lasting_streams():
        print("caf\udce9 日 é")
    assert content.getvalue() == written + b"\n"


def test_a_narrow_stream_of_the_program_s_own(monkeypatch: pytest.MonkeyPatch):
    """train() called from a program: its stdout stays as it is set."""
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding="ascii", errors="strict"))
    for _ in range(2):
        say("日 caf\udce9")
    sys.stdout.flush()
    assert content.getvalue() == 2 * b"\\u65e5 caf\\udce9\n"


def test_a_line_in_the_middle_of_another_ends_nothing():
    """As a signal's handler may print one; Python refuses it."""

    class Busy(io.StringIO):
        def write(self, text: str) -> int:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    stream = Lasting(Busy())
    stream.write("text")
    assert stream.lost is None


def test_a_stream_that_fails_is_left_and_remembered():
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    stream = Lasting(Full())
    assert stream.write("text") == 4
    assert "No space left" in str(stream.lost)


def test_without_streams(monkeypatch: pytest.MonkeyPatch):
    """As under pythonw, or a service."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    say("a line")
    with progress(total=1) as bar:
        bar.update()


def test_a_closed_stream(monkeypatch: pytest.MonkeyPatch):
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    say("a line")


def test_lines_stand_above_the_bar(monkeypatch: pytest.MonkeyPatch):
    """tqdm clears its bar first, where both go to the same terminal."""
    terminal = io.StringIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, terminal)
    with progress(total=2, bar_format="BAR") as bar:
        bar.refresh()
        say("a line")
    before, _, after = terminal.getvalue().partition("a line\n")
    assert before.endswith("\r   \r")
    assert "BAR" in after
