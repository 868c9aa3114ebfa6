"""Named ranges on a profiler's timeline."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def annotate(name: str) -> Iterator[None]:
    """A range, or of a function it decorates one a call, that profilers show under this name.

    NVTX by the package nvtx, on any machine and at no cost while nothing is attached, or without it by torch on a GPU;
    and torch's profiler while it records.
    """
    with contextlib.ExitStack() as ranges:
        nvtx = _nvtx()
        if nvtx is not None:
            ranges.enter_context(nvtx.annotate(name, domain="epigraf_fast"))
        elif torch.cuda.is_initialized():
            ranges.enter_context(torch.cuda.nvtx.range(name))
        if torch.autograd.profiler._is_profiler_enabled:
            ranges.enter_context(torch.profiler.record_function(name))
        yield


@functools.cache
def _nvtx() -> Any:
    try:
        import nvtx
    except ImportError:
        return None
    return nvtx
