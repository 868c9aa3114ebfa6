"""Named ranges on a profiler's timeline."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import Any

import torch


class annotate(contextlib.ContextDecorator):
    """A range, or of a function it decorates one a call, that profilers show under this name.

    NVTX by the package nvtx, on any machine and at no cost while nothing is attached, or without it by torch on a GPU;
    and torch's profiler while it records.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._entered: list[tuple[AbstractContextManager[Any], ...]] = []  # calls of what it decorates may be nested

    def __enter__(self) -> annotate:
        ranges: tuple[AbstractContextManager[Any], ...] = ()
        nvtx = _nvtx()
        if nvtx is not None:
            ranges = (nvtx.annotate(self.name, domain="epigraf_fast"),)
        elif torch.cuda.is_initialized():
            ranges = (torch.cuda.nvtx.range(self.name),)
        if torch.autograd.profiler._is_profiler_enabled:
            ranges = (*ranges, torch.profiler.record_function(self.name))
        for range_ in ranges:
            range_.__enter__()
        self._entered.append(ranges)
        return self

    def __exit__(self, *error: Any) -> None:
        for range_ in reversed(self._entered.pop()):
            range_.__exit__(*error)


@functools.cache
def _nvtx() -> Any:
    try:
        import nvtx
    except ImportError:
        return None
    return nvtx
