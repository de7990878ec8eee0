"""What terminals and pipes do to a command: they fill, go away, know few letters, or ask it to stop."""

import codecs
import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn, TextIO

from tqdm import tqdm
from tqdm.utils import ObjectWrapper

Say = Callable[[str], None]


class Lasting(ObjectWrapper):
    """A stream that outlasts its reader: it drops what it can no longer write, and `lost` tells why.

    Args:
        stream: text stream to write to; None, as in sys.stdout of a process without one, loses everything.
    """

    def __init__(self, stream: TextIO | None):
        super().__init__(open(os.devnull, "w") if stream is None else stream)  # noqa: SIM115 (open as long as we)
        self.wrapper_setattr("lost", None)

    def __eq__(self, other: object) -> bool:
        """tqdm clears its bar before a line of the same terminal, and compares streams to find it."""
        return bool(self._wrapped == getattr(other, "_wrapped", other))

    __hash__ = None  # type: ignore[assignment]

    def write(self, text: str) -> int:
        encoding = getattr(self._wrapped, "encoding", None) or "utf-8"
        if getattr(self._wrapped, "errors", "strict") == "strict":
            text = text.encode(encoding, "backslashreplace").decode(encoding)
        self._attempt(lambda: self._wrapped.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._wrapped.flush)

    def _attempt(self, act: Callable[[], object]) -> None:
        try:
            act()
        except RuntimeError:  # the line of a signal's handler came in the middle of another one
            pass
        except (OSError, ValueError) as error:  # ValueError: the program itself closed it
            self.wrapper_setattr("lost", error)
            with contextlib.suppress(OSError, ValueError):  # what is still buffered would fail again at exit
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._wrapped.fileno())
                os.close(null)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """What to write for letters that the encoding lacks: a file name's own bytes, or an escape."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


_ESCAPES = "fastp2p.escapes"
codecs.register_error(_ESCAPES, _escape)


@contextlib.contextmanager
def lasting_streams() -> Iterator[Lasting]:
    """Within the `with` block, sys.stdout and sys.stderr fail nobody; the block gets the first.

    Lines go out one by one, names of files byte by byte, and other letters that the encoding lacks as escapes.
    """
    null = os.open(os.devnull, os.O_RDWR)
    while null < 3:  # closed at the start: else the next file that is opened becomes stdout
        null = os.open(os.devnull, os.O_RDWR)
    os.close(null)
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ESCAPES, line_buffering=True)
    sys.stdout, sys.stderr = lasting = Lasting(before[0]), Lasting(before[1])
    try:
        yield lasting[0]
    finally:
        for stream in lasting:
            stream.flush()
        sys.stdout, sys.stderr = before


def say(line: str) -> None:
    """Print a line above the progress bar."""
    tqdm.write(line, file=Lasting(sys.stdout))


def warn(line: str) -> None:
    """Print a warning on stderr, apart from results."""
    tqdm.write(f"warning: {line}", file=Lasting(sys.stderr))


def progress(**options: Any) -> "tqdm[NoReturn]":
    """A progress bar on stderr, with tqdm's options."""
    return tqdm(file=Lasting(sys.stderr), **options)


@contextlib.contextmanager
def stop_signals(say: Say) -> Iterator[list[int]]:
    """A list that fills when Ctrl-C, SIGTERM, or SIGHUP (a terminal that closes) arrives, so that a step is finished
    first; a second Ctrl-C or SIGTERM interrupts.

    Python delivers signals to the main thread alone: in another one the list stays empty.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and number != signal.SIGHUP:  # shells send that one twice
            raise KeyboardInterrupt
        if not received:
            say("stopping: this step is finished and saved; once more stops at once, without saving")
        received.append(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        ignored = [number for number in wanted if signal.getsignal(number) == signal.SIG_IGN]  # by nohup
        before = {number: signal.signal(number, note) for number in wanted if number not in ignored}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
