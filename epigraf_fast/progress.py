"""What the terminal shows while something takes its time. Large modules are imported when they are needed."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, TextIO

PATIENCE = {True: 1.0, False: 10.0}  # seconds until a wait is shown, on a terminal and in a file
LONGEST_PAUSE = 60.0  # seconds between two lines in a file


class Sparing:
    """A stream whose writes may fail, as those of a log file on a full disk.

    tqdm keeps its lock for ever where one does, and the next bar waits for it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __eq__(self, other: object) -> bool:  # by which tqdm knows the bars that a line must not be written behind
        return isinstance(other, Sparing) and other._stream is self._stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


class Progress:
    """Shows what a long piece of work is and how far it has got: a line that moves on a terminal, a few in a file.

    Nothing is shown of what takes less than a second (ten in a file). A thread writes, so that work in a single call
    is shown too. One inside of another is shown behind it.

    Args:
        items: To go through, `for item in Progress(items, "objects")`.
        what: The name of the work or of its items.
        total: Their number, where it is counted by `update`, or where they have no length; None: nothing to count.
    """

    _open: ClassVar[list[Progress]] = []

    def __init__(self, items: Iterable[Any] | None = None, what: str = "", total: int | None = None) -> None:
        self.items, self.what, self.done = items, what, 0
        self.total = len(items) if hasattr(items, "__len__") else total
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        self.began = time.monotonic()
        Progress._open.append(self)
        if len(Progress._open) == 1:
            self.thread = threading.Thread(target=self._show, name="progress", daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self in Progress._open:
            Progress._open.remove(self)
        self.ended.set()
        if self.thread is not None:
            self.thread.join()

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self.items:
                yield item
                self.update()

    def update(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count

    @staticmethod
    def end_all() -> None:
        """Ends those that an exception has left open."""
        for progress in list(Progress._open):
            progress.__exit__()

    @staticmethod
    def say(text: str) -> None:
        """A line on stderr, of which a bar that is being shown leaves nothing behind."""
        print(f"\r\033[K{text}" if Progress._open and sys.stderr.isatty() else text, file=sys.stderr)

    def line(self, width: int | None = None) -> str:
        """What is shown; with a bar where a width is given."""
        seconds = time.monotonic() - self.began
        if self.total is None:
            return f"{self.what} ... {seconds:.0f} s"
        from tqdm import tqdm

        bar = "{percentage:3.0f}%|{bar}| " if width else ""
        layout = f"{{desc}}: {bar}{{n_fmt}}/{{total_fmt}} [{{elapsed}}<{{remaining}}]"
        return tqdm.format_meter(
            self.done, self.total, seconds, ncols=width, prefix=self.what, ascii=" #", bar_format=layout
        )

    def _show(self) -> None:
        stream, terminal = Sparing(sys.stderr), sys.stderr.isatty()
        pause = PATIENCE[terminal]
        with contextlib.suppress(OSError, ValueError), contextlib.ExitStack() as shown:  # a stream that is closed
            bar = None
            while not self.ended.wait(pause):
                from tqdm import tqdm

                now = time.monotonic()
                running = [
                    part for part in list(Progress._open) if part is self or now - part.began > PATIENCE[terminal]
                ]
                if not running:
                    continue
                width = (os.get_terminal_size(stream.fileno()).columns or 80) - 1 if terminal else None
                line = ", ".join(part.line(width if len(running) == 1 else None) for part in running)
                if terminal:
                    if bar is None:
                        bar = shown.enter_context(tqdm(bar_format="{desc}", leave=False, file=stream))
                    bar.set_description_str(line[:width])
                    pause = 0.2
                else:
                    tqdm.write(line, file=stream)
                    pause = min(1.5 * pause, LONGEST_PAUSE)


def waiting(what: str, *, shown: bool = True) -> contextlib.AbstractContextManager[Any]:
    """`with waiting("reading the checkpoint"):` for work that is one piece; `shown` by one of many processes."""
    return Progress(what=what) if shown else contextlib.nullcontext()
