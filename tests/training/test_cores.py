"""Threads as there are cores that other programs leave free."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from checks import HANG
from epigraf_fast.training import cores

linux = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not tell what its cores do")


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in cores.CHOICES:
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield
    cores._watched = None
    torch.set_num_threads(threads)


def watched(count: int, monkeypatch: pytest.MonkeyPatch) -> cores.Cores:
    """As on a machine of so many cores, where nothing has happened yet."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(count)))
    monkeypatch.setattr(cores, "_busy", lambda cores: 0.0)
    monkeypatch.setattr(cores, "_own", lambda: 0.0)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    return cores.Cores(count)


@linux
def test_every_core_that_others_take_is_a_thread_less(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(8, monkeypatch)
    for others, threads in ((0.0, 8), (0.3, 8), (2.0, 6), (2.4, 6), (7.6, 1), (12.0, 1)):
        seen.threads = 8
        assert seen.choose(others) == threads, others


@linux
def test_a_close_call_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that is half a core would else have a run change its threads at every look."""
    seen = watched(2, monkeypatch)
    seen.threads = 1
    assert [seen.choose(others) for others in (1.0, 0.5, 0.3, 0.2, 0.0)] == [1, 1, 1, 2, 2]
    seen.threads = 2
    assert [seen.choose(others) for others in (0.0, 0.3, 0.45, 0.6)] == [2, 2, 2, 1]


@linux
def test_own_work_is_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(4, monkeypatch)
    monkeypatch.setattr(time, "monotonic", lambda: cores.INTERVAL / 2)
    assert seen.look() is None
    monkeypatch.setattr(time, "monotonic", lambda: 10.0)
    monkeypatch.setattr(cores, "_busy", lambda _: 40.0)  # all four cores
    monkeypatch.setattr(cores, "_own", lambda: 20.0)  # half of that
    assert seen.look() == 2
    monkeypatch.setattr(time, "monotonic", lambda: 20.0)
    monkeypatch.setattr(cores, "_busy", lambda _: 60.0)
    monkeypatch.setattr(cores, "_own", lambda: 40.0)
    assert seen.look() == 4


@linux
def test_torch_takes_them_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    cores.watch()
    assert cores.adapt() is None  # too early
    monkeypatch.setattr(cores._watched, "look", lambda: setattr(cores._watched, "threads", 1) or 1)
    assert cores.adapt() == "computing with 1 of 2 threads: as many as other programs leave cores"
    assert torch.get_num_threads() == 1
    assert cores.adapt() is None


@pytest.mark.parametrize("name", cores.CHOICES)
def test_who_chooses_threads_is_not_overruled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    monkeypatch.setenv(name, "2")
    cores.watch()
    assert cores._watched is None


def test_a_run_of_the_same_bits_keeps_its_threads() -> None:
    torch.set_num_threads(2)
    cores.watch(fixed=True)
    assert cores._watched is None
    assert cores.adapt() is None


def test_without_proc_nothing_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    monkeypatch.setattr(cores, "STAT", tmp_path / "none")
    cores.watch()
    assert cores._watched is None


@linux
def test_another_program_is_seen() -> None:
    """For real: what another process computes is other's; once it has been waited for, it was a child's."""
    seen = cores._busy(os.sched_getaffinity(0)) - cores._own()
    program = "import time\nwhile time.process_time() < 1.0: pass\nprint(flush=True)\ninput()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as process:
        process.stdout.readline()
        assert cores._busy(os.sched_getaffinity(0)) - cores._own() - seen > 0.9
        before = cores._own()
        process.communicate("\n", timeout=HANG)
    assert cores._own() - before > 0.9
