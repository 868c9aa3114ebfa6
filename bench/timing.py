"""Measuring: device time by CUDA events on a GPU, with the L2 cache cold or warm; ratios alone on a CPU."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

WARM_UP = 3  # calls that are not counted
FLUSH_BYTES = 2**28  # written between two cold runs: more than any L2
RUN_SECONDS = 5e-3  # of a run on a CPU, at least
SLEEP_CYCLES = 2_000_000  # the GPU waits so long before a warm run, while the CPU queues its launches


@dataclass(frozen=True)
class Spread:
    """Median and 20th and 80th percentile of so many measurements."""

    median: float
    p20: float
    p80: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        return cls(statistics.median(values), fifths[0], fifths[-1], len(values))

    def to_dict(self) -> dict[str, Any]:
        return {"median": self.median, "p20": self.p20, "p80": self.p80, "count": self.count}


def gpu_times(function: Callable[[], Any], *, cold: bool, budget: float = 0.3, most: int = 100) -> list[float]:
    """Device milliseconds of single calls.

    Args:
        cold: Whether the L2 cache is overwritten before each.
        budget: Seconds to spend, about.
        most: Calls at most; five at least.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda") if cold else None
    for _ in range(WARM_UP):
        function()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    function()
    torch.cuda.synchronize()
    count = min(most, max(5, int(budget / (time.perf_counter() - begun))))
    events = []
    for _ in range(count):
        if flush is None:
            torch.cuda._sleep(SLEEP_CYCLES)
        else:
            flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def cpu_ratios(functions: dict[str, Callable[[], Any]], *, budget: float = 1.0, most: int = 31) -> dict[str, Spread]:
    """How many times as long as the last function each of the others takes; all run in turn, round after round.

    A ratio is of two neighbouring runs, so that what else the machine does falls on both alike. A run is one call,
    or of short functions as many calls as take 5 ms.

    Args:
        functions: Name -> what to run; the last is the one compared with.
        budget: Seconds to spend, about.
        most: Rounds at most; three at least.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    shortest = math.inf
    for function in functions.values():
        function()
        start = time.perf_counter()
        function()
        shortest = min(shortest, time.perf_counter() - start)
    calls = max(1, int(RUN_SECONDS / shortest))
    begun, rounds = time.perf_counter(), 0
    while rounds < 3 or (rounds < most and time.perf_counter() - begun < budget):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls):
                function()
            times[name].append(time.perf_counter() - start)
        rounds += 1
    *others, last = functions
    pairs = {name: [a / b for a, b in zip(times[name], times[last], strict=True)] for name in others}
    return {name: Spread.of(values) for name, values in pairs.items()}


def peak_bytes(function: Callable[[], Any]) -> int:
    """GPU memory that a call takes beyond what is there before it, its results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(function: Callable[[], Any], inputs: list[torch.Tensor]) -> int:
    """What a forward call keeps for its backward, inputs left out."""
    known = {x.untyped_storage()._cdata for x in inputs}
    kept: dict[int, int] = {}
    alive = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
            alive.append(x)  # an address that is free may be taken again
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return sum(kept.values())
