"""What a run says, and shows, while something takes its time."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

from ..progress import Progress
from . import cores

Item = TypeVar("Item")


def progress(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """The items, shown where they take long, for as many cores as are free."""
    for item in Progress(items, what, total):
        yield item
        cores.adapt()


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints a line, if that can be written."""
    with contextlib.suppress(OSError):
        print(text, file=stream or sys.stdout, flush=True)
