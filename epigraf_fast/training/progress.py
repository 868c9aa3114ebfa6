"""What the terminal shows while something takes its time."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO, TypeVar

from . import cores

QUIET = 2.0  # seconds that something may take before it is shown
INTERVAL, LOG_INTERVAL = 1.0, 60.0  # seconds between two signs of life: on a terminal, in a file

Item = TypeVar("Item")


class Sparing:
    """A stream whose writes may fail, as those of a log file on a full disk.

    tqdm keeps its lock for ever where one does, and the next bar waits for it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


@contextlib.contextmanager
def waiting(
    what: str, total: int | None = None, unit: str = "it", *, shown: bool = True
) -> Iterator[Callable[[], None]]:
    """Shows what a block does where that takes more than two seconds: for how long already, and how far it is.

    A thread of its own draws, so that also one slow call is seen to go on.

    Args:
        total: How often the block will call what it is given; None if it is one call that nobody can look into.
    """
    count, ended = 0, threading.Event()
    if not shown:  # by one of many processes
        yield lambda: None
        return

    def advance() -> None:
        nonlocal count
        count += 1

    def show() -> None:
        from tqdm import tqdm

        if ended.wait(QUIET):
            return
        interval = INTERVAL if sys.stderr.isatty() else LOG_INTERVAL
        form = "{desc} [{elapsed}]" if total is None else None
        look = {"desc": what, "total": total, "unit": unit, "bar_format": form, "leave": False, "delay": 1e-9}
        with tqdm(**look, file=Sparing(sys.stderr)) as bar:
            bar.start_t -= QUIET
            while True:
                bar.n = count
                bar.refresh()
                if ended.wait(interval):
                    break

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield advance
    finally:
        ended.set()
        thread.join()


def progress(items: Iterable[Item], total: int, what: str, unit: str = "batch") -> Iterator[Item]:
    """The items, with a bar where they take more than two seconds."""
    with waiting(what, total, unit) as advance:
        for item in items:
            yield item
            advance()
            cores.adapt()


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints a line, if that can be written."""
    with contextlib.suppress(OSError):
        print(text, file=stream or sys.stdout, flush=True)
