"""Ends a process that waits for others which have stopped, though their connections are still there."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

import torch

from .profile import DATA, listening

VARIABLE = "EPIGRAF_FAST_HANG_SECONDS"
LIMIT = 600.0  # seconds of waiting within a step, by default
HUNG = 3  # exit code
TICKS = 4  # looks within the limit


class Watchdog:
    """A thread that ends the process, by one line and exit code `HUNG`, once it waits too long for the others.

    In the block of `over` it counts the time that is spent in blocks of `waiting`; on a GPU, where an exchange is
    launched and the host waits later, also that in phases of a step. Time in which the whole process was stopped does
    not count.

    Args:
        rank: Of this process.
        limit: Seconds; 0: it never ends anything.
        end: Ends the process.
    """

    def __init__(self, rank: int, limit: float = LIMIT, end: Callable[[int], object] = os._exit) -> None:
        self.rank, self.limit, self.end = rank, limit, end
        self.depth, self.waited, self.excused = 0, 0.0, False
        self.phases: list[str] = []
        self.where: Callable[[], str] | None = None  # None: nothing is watched

    @contextlib.contextmanager
    def over(self, where: Callable[[], str], device: torch.device) -> Iterator[None]:
        """Watches in this block.

        Args:
            where: Says which step it is.
        """
        if not self.limit:
            yield
            return
        self.where, ended = where, threading.Event()
        thread = threading.Thread(target=self._look, args=(ended,), daemon=True)
        thread.start()

        @contextlib.contextmanager
        def phase(name: str) -> Iterator[None]:
            self.phases.append(name)
            try:
                on_gpu = device.type == "cuda" and name not in (DATA, "iteration")
                with self.waiting() if on_gpu else contextlib.nullcontext():
                    yield
            finally:
                self.phases.pop()

        try:
            with listening(phase):
                yield
        finally:
            self.where = None
            ended.set()
            thread.join()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A block in which this process waits for others, or for its GPU."""
        if not self.depth:
            self.waited = 0.0
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if not self.depth:
                self.excused = False

    def excuse(self) -> None:
        """Lets the next wait take its time: another process is about to do what takes long, as rank 0's pictures."""
        self.excused = True

    def _look(self, ended: threading.Event) -> None:
        tick, then = min(1.0, self.limit / TICKS), time.monotonic()
        while not ended.wait(tick):
            now = time.monotonic()
            passed, then = min(now - then, 2 * tick), now  # more only if this process was stopped itself
            if self.depth and not self.excused:
                self.waited += passed
                if self.waited > self.limit:
                    self._end()
                    return

    def _end(self) -> None:
        phase = f"phase {self.phases[-1]} of " if self.phases else ""
        line = (
            f"\n[rank {self.rank}] stopped: waited {self.limit:g} s in {phase}{self.where()}: another process or the "
            f"network hangs (exit code {HUNG}; {VARIABLE} sets the limit); go on with --resume auto\n"
        )
        with contextlib.suppress(OSError):
            os.write(2, line.encode())  # print would wait for whatever holds the stream
        self.end(HUNG)
