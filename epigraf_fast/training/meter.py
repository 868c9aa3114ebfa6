"""Where the time of a run goes, and how full its GPU is: means between two lines of the log."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .profile import DATA, listening

PHASES = (DATA, "G", "path length", "D", "R1", "average")  # ranges of `profile.annotate` that are timed
SAMPLING = 1.0  # seconds between two looks at how busy the GPU is
GIB = 2**30


class CudaGauge:
    """What a GPU tells of itself: CUDA events on its current stream, its allocator, the driver's count of busy moments.

    A mark is a point in its work: what was launched before comes before it. Only `seconds` waits, for the later mark.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        properties = torch.cuda.get_device_properties(device)
        self.total = properties.total_memory
        self.driver = busy_counter(str(getattr(properties, "uuid", "")))

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))  # of another GPU than torch's current one, perhaps
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def idle(self) -> float | None:
        """The share of the last moments in which no kernel ran; None: not known."""
        busy = self.driver()
        return None if busy is None else 1 - busy

    def memory(self) -> tuple[int, int]:
        """Bytes that this process held at most since the last call, and those of the device."""
        most = torch.cuda.max_memory_reserved(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return most, self.total


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))  # percent


def busy_counter(uuid: str, load: Callable[[str], Any] = ctypes.CDLL) -> Callable[[], float | None]:
    """A function that says in which share of the last moments some kernel ran on a GPU, as the driver counts it.

    Args:
        uuid: Of the GPU, as torch has it.
        load: Opens a shared library. NVML comes with the driver; where it is missing or refuses, the function says
            None.
    """
    handle = ctypes.c_void_p()
    try:
        nvml = load("libnvidia-ml.so.1")
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle)):
            return lambda: None
    except (OSError, AttributeError):
        return lambda: None

    def busy() -> float | None:
        found = _Utilization()
        return None if nvml.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(found)) else found.gpu / 100

    return busy


class Meter:
    """Times the phases of an iteration, in the block of this context manager.

    On a GPU by its own clock, so that nothing waits for it; waiting for data, and everything on a CPU, by the host's.

    Args:
        gauge: Of a GPU; None: there is none, and nothing is said of one.
        gpus: That train together.
    """

    def __init__(self, gauge: CudaGauge | None = None, gpus: int = 1) -> None:
        self.gauge, self.gpus = gauge, gpus
        self.totals: dict[str, float] = {}  # seconds since the last `read`
        self.marks: deque[tuple[str, Any, Any]] = deque()  # of phases that the GPU may not have come to yet
        self.idle: list[float] = []
        self.looked = -SAMPLING
        self.ways = contextlib.ExitStack()

    def __enter__(self) -> Meter:
        self.ways.enter_context(listening(self._range))
        return self

    def __exit__(self, *exception: object) -> None:
        self.ways.close()

    @contextlib.contextmanager
    def _range(self, name: str) -> Iterator[None]:
        if name not in PHASES:
            yield
        elif self.gauge is None or name == DATA:
            begun = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - begun)
        else:
            start = self.gauge.mark()
            yield
            self.marks.append((name, start, self.gauge.mark()))
            while self.marks and self.gauge.passed(self.marks[0][2]):
                self._take()
            if time.perf_counter() - self.looked >= SAMPLING:
                self.looked, idle = time.perf_counter(), self.gauge.idle()
                self.idle += [] if idle is None else [idle]

    def _add(self, name: str, seconds: float) -> None:
        self.totals[name] = self.totals.get(name, 0.0) + seconds

    def _take(self) -> None:
        name, start, end = self.marks.popleft()
        self._add(name, self.gauge.seconds(start, end))

    def read(self, images: int, kimg: float, seconds: float) -> dict[str, float]:
        """Statistics since the last call.

        Args:
            images: Trained on since then, by all processes.
            kimg: Length of the run.
            seconds: Of training since then.

        Returns:
            time/G and so on: seconds of a phase for 1000 images, as sec_per_kimg. Of a GPU also gpu/idle, the share of
            time without a kernel; gpu/memory_gib, what this process held at most, and gpu/memory_share of its memory;
            gpu/days, how many the whole run takes at this speed, over all GPUs. What is not known is not there.
        """
        while self.marks:
            self._take()
        found: dict[str, float] = {}
        if images:
            for name in PHASES:
                if name in self.totals:
                    found[f"time/{name.replace(' ', '_')}"] = self.totals[name] / images * 1000
        if self.gauge is not None:
            most, total = self.gauge.memory()
            found |= {"gpu/memory_gib": most / GIB, "gpu/memory_share": most / total}
            if self.idle:
                found["gpu/idle"] = sum(self.idle) / len(self.idle)
            if images:
                found["gpu/days"] = seconds / images * 1000 * kimg * self.gpus / 86400
        self.totals, self.idle = {}, []
        return found


def summary(found: dict[str, float]) -> str:
    """One line on what `Meter.read` gave: shares of the time, and the GPU."""
    times = {name.removeprefix("time/"): value for name, value in found.items() if name.startswith("time/")}
    whole = sum(times.values())
    words = [f"{name.replace('_', ' ')} {value / whole:.0%}" for name, value in times.items()] if whole else []
    if "gpu/memory_gib" in found:
        words.append(f"{found['gpu/memory_gib']:.1f} GiB, {found['gpu/memory_share']:.0%} of the GPU's memory")
    if "gpu/idle" in found:
        words.append(f"the GPU is idle {found['gpu/idle']:.0%} of the time")
    if "gpu/days" in found:
        words.append(f"the whole run takes {found['gpu/days']:.3g} GPU-days at this speed")
    return "; ".join([", ".join(words[: len(times)]), *words[len(times) :]] if times else words)
