"""As many threads as there are cores that other programs leave free.

Threads that compute an operation together wait for the last of them, and wait by spinning. Where another program has
one of their cores, each operation takes as long as that program's turn: two runs side by side then reach a third of
what one reaches alone. With one thread for every core that is free nobody waits.

    watch()      # once, when a run begins
    adapt()      # often, between operations: looks at most every `INTERVAL` seconds
"""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import torch

INTERVAL = 2.0  # seconds between two looks
# Threads are taken back only where so much of a core is free for each: a load that is half a core changes nothing.
NEARLY = 0.75
STAT, PROCESSES = Path("/proc/stat"), Path("/proc")
CHOICES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

_watched: Cores | None = None


class Cores:
    """The cores that this process may use, and what others take of them.

    Args:
        threads: The most that this process takes.
    """

    def __init__(self, threads: int) -> None:
        self.most = self.threads = threads
        self.cores = os.sched_getaffinity(0)
        self.then, self.busy, self.own = time.monotonic(), _busy(self.cores), _own()

    def choose(self, others: float) -> int:
        """Threads to take where others keep so many cores busy; the number of now where it is a close call."""
        free = len(self.cores) - others
        wanted = min(self.most, max(1, round(free)))
        if wanted > self.threads and free < wanted - 1 + NEARLY:
            wanted -= 1
        return wanted

    def look(self) -> int | None:
        """`choose` by what others did since the last look; None where that is too short ago."""
        now = time.monotonic()
        if now - self.then < INTERVAL:
            return None
        busy, own = _busy(self.cores), _own()
        others = max(0.0, (busy - self.busy) - (own - self.own)) / (now - self.then)
        self.then, self.busy, self.own = now, busy, own
        self.threads = self.choose(others)
        return self.threads


def watch(*, fixed: bool = False) -> None:
    """Begins, where the system tells what others do (Linux) and nobody has chosen threads by a variable of OpenMP.

    Args:
        fixed: The number of threads stays, as of a run that shall have the same bits whatever else goes on.
    """
    global _watched
    threads = torch.get_num_threads()
    chosen = fixed or any(name in os.environ for name in CHOICES)
    try:
        _watched = None if chosen or threads == 1 else Cores(threads)
    except (OSError, AttributeError, ValueError):
        _watched = None


def adapt() -> str | None:
    """Takes threads away, or takes them back, in the thread that calls: that which computes.

    Returns:
        What has changed, for people.
    """
    if _watched is None:
        return None
    before = _watched.threads
    threads = _watched.look()
    if threads is None or threads == before:
        return None
    torch.set_num_threads(threads)
    return f"computing with {threads} of {_watched.most} threads: as many as other programs leave cores"


def _busy(cores: set[int]) -> float:
    """Seconds that cores have computed since the machine was started."""
    ticks = 0
    for line in STAT.read_text().splitlines():
        name, *numbers = line.split()
        if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in cores:
            user, nice, system, _idle, _waiting, interrupts, soft = map(int, numbers[:7])
            ticks += user + nice + system + interrupts + soft
    return ticks / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    """Those of this process and of its loader processes."""
    times = os.times()
    seconds = times.user + times.system + times.children_user + times.children_system
    for process in multiprocessing.active_children():
        try:
            numbers = (PROCESSES / str(process.pid) / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended in between
            continue
        seconds += (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")
    return seconds
