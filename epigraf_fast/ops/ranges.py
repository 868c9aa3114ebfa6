"""Named ranges on a profiler's timeline."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch


class annotate:
    """A range, or of a function it decorates one a call, that profilers show under this name.

    NVTX by the package nvtx, on any machine and at no cost while nothing is attached, or without it by torch on a GPU;
    and torch's profiler while it records.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.ranges: tuple[AbstractContextManager[Any], ...] = ()

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def annotated(*args: Any, **kwargs: Any) -> Any:
            with annotate(self.name):  # one of its own: calls may be nested, or those of several threads
                return function(*args, **kwargs)

        return annotated

    def __enter__(self) -> None:
        nvtx = _nvtx()
        if nvtx is not None:
            self.ranges = (nvtx.annotate(self.name, domain="epigraf_fast"),)
        elif torch.cuda.is_initialized():
            self.ranges = (torch.cuda.nvtx.range(self.name),)
        if torch.autograd.profiler._is_profiler_enabled:
            self.ranges = (*self.ranges, torch.profiler.record_function(self.name))
        for range_ in self.ranges:
            range_.__enter__()

    def __exit__(self, *error: Any) -> None:
        for range_ in reversed(self.ranges):
            range_.__exit__(*error)


@functools.cache
def _nvtx() -> Any:
    try:
        import nvtx
    except ImportError:
        return None
    return nvtx
