"""Where the time goes: phases by the device's clock, and what a GPU tells of itself, with a GPU that stands in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from epigraf_fast.training import meter as meter_module
from epigraf_fast.training.meter import GIB, Meter, busy_counter, summary
from epigraf_fast.training.profile import annotate


class StandIn:
    """A GPU that does everything `behind` seconds later than it is asked to."""

    def __init__(self, clock: SimpleNamespace) -> None:
        self.clock, self.behind, self.looks, self.most = clock, 1000.0, [0.25, None, 0.75], 6 * GIB

    def mark(self) -> float:
        return self.clock.now

    def passed(self, mark: float) -> bool:
        return self.clock.now >= mark + self.behind

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def idle(self) -> float | None:
        return self.looks.pop(0) if self.looks else None

    def memory(self) -> tuple[int, int]:
        return self.most, 24 * GIB


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(meter_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def train(clock: SimpleNamespace) -> None:
    """An iteration of 8 images in 3 s: 2 s of work, half a second for data, and half that is nobody's."""
    for name, seconds in (("data", 0.5), ("iteration", 0.5), ("G", 1.0), ("path length", 0.25), ("D", 0.75)):
        with annotate(name):
            clock.now += seconds


def test_phases_are_timed_without_waiting_for_the_gpu(clock: SimpleNamespace) -> None:
    gpu = StandIn(clock)
    with Meter(gpu, gpus=2) as meter:
        train(clock)
        assert len(meter.marks) == 3  # what the GPU has not come to
        gpu.behind = 0.0
        train(clock)
        assert not meter.marks
        found = meter.read(16, kimg=1000.0, seconds=6.0)
        expected = {"data": 62.5, "G": 125.0, "path_length": 31.25, "D": 93.75}
        assert {name: value for name, value in found.items() if "time" in name} == {
            f"time/{name}": value for name, value in expected.items()
        }
        assert (found["gpu/idle"], found["gpu/memory_gib"], found["gpu/memory_share"]) == (0.5, 6.0, 0.25)
        assert found["gpu/days"] == pytest.approx(1e6 * 6 / 16 * 2 / 86400)
        assert summary(found) == (
            "data 20%, G 40%, path length 10%, D 30%; 6.0 GiB, 25% of the GPU's memory; "
            "the GPU is idle 50% of the time; the whole run takes 8.68 GPU-days at this speed"
        )
        train(clock)
        found = meter.read(8, kimg=1000.0, seconds=3.0)
        assert found["time/G"] == 125.0
        assert "gpu/idle" not in found  # the driver says no more
    train(clock)
    assert meter.read(0, kimg=1000.0, seconds=0.0).keys() == {"gpu/memory_gib", "gpu/memory_share"}


def test_a_cpu_says_nothing_of_a_gpu(clock: SimpleNamespace) -> None:
    with Meter() as meter:
        train(clock)
    found = meter.read(8, kimg=1.0, seconds=3.0)
    assert found == {"time/data": 62.5, "time/G": 125.0, "time/path_length": 31.25, "time/D": 93.75}
    assert summary(found) == "data 20%, G 40%, path length 10%, D 30%"


def test_the_drivers_count_of_busy_moments() -> None:
    asked: list[Any] = []

    def rates(handle: Any, found: Any) -> int:
        found._obj.gpu = 75
        return len(asked) - 1

    def by_uuid(name: bytes, handle: Any) -> int:
        asked.append(name)
        return 0

    nvml = SimpleNamespace(
        nvmlInit_v2=lambda: 0, nvmlDeviceGetHandleByUUID=by_uuid, nvmlDeviceGetUtilizationRates=rates
    )
    busy = busy_counter("1234", lambda name: nvml)
    assert (busy(), asked) == (0.75, [b"GPU-1234"])
    asked.append(b"")
    assert busy() is None  # it refuses

    def missing(name: str) -> Any:
        raise OSError(name)

    for load in (missing, lambda name: SimpleNamespace(), lambda name: SimpleNamespace(nvmlInit_v2=lambda: 9)):
        assert busy_counter("1234", load)() is None
