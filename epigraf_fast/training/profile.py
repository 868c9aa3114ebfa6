"""Named ranges of a training step for profilers and measurements, and a trace of a few iterations."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from ..atomic import replacing
from ..ops import ranges as op_ranges
from .progress import say

TRACE_SKIPS = 5  # iterations before the trace: compilations, and the first regularization
TRACE_ITERATIONS = 3

DATA = "data"  # the range in which a batch is waited for

_listeners: list[Callable[[str], AbstractContextManager[Any]]] = []


@contextlib.contextmanager
def annotate(name: str) -> Iterator[None]:
    """`ops.ranges.annotate`, which listeners enter, too."""
    with contextlib.ExitStack() as ranges:
        for listener in _listeners:
            ranges.enter_context(listener(name))
        ranges.enter_context(op_ranges.annotate(name))
        yield


@contextlib.contextmanager
def listening(listener: Callable[[str], AbstractContextManager[Any]]) -> Iterator[None]:
    """In this block every range enters `listener(name)` too."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextlib.contextmanager
def traced(path: Path | None) -> Iterator[None]:
    """Writes a trace of a few training iterations of this block, for Perfetto or chrome://tracing.

    Args:
        path: Of the trace, a .json; None records nothing.
    """
    if path is None:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=TRACE_SKIPS - 1, warmup=1, active=TRACE_ITERATIONS, repeat=1)

    def write(profiler: torch.profiler.profile) -> None:
        try:
            with replacing(path) as temporary:
                half = temporary.with_name(f"{temporary.name}.tmp")  # torch's, which it leaves where it fails, silently
                try:
                    profiler.export_chrome_trace(str(temporary))
                finally:
                    half.unlink(missing_ok=True)
        except OSError as error:
            say(f"warning: {path} cannot be written ({error.strerror}); training goes on", sys.stderr)

    @contextlib.contextmanager
    def count(name: str) -> Iterator[None]:
        yield
        if name == "iteration":
            profiler.step()

    profiler = torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=write)
    with profiler, listening(count):
        yield
