"""A run folder has one run at a time; who only reads it is not concerned, and no lock outlives its process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from checks import HANG
from command_lines import assert_one_error_line, flags
from epigraf_fast.config import Config
from epigraf_fast.errors import UserError
from epigraf_fast.tools import train
from epigraf_fast.training import files, lock
from epigraf_fast.training.checkpoint import find_checkpoint, list_checkpoints
from epigraf_fast.training.distributed import World
from epigraf_fast.training.files import append, require_writable
from epigraf_fast.training.lock import locked
from epigraf_fast.training.log import read_stats

TinyConfig = Callable[..., Config]


@contextlib.contextmanager
def another_process(run_dir: Path) -> Iterator[int]:
    """In this block a process, whose number is given, holds the folder; locks do not hinder their own process."""
    ready, over = (multiprocessing.get_context("fork").Event() for _ in range(2))

    def hold() -> None:
        with locked(run_dir, World()):
            ready.set()
            over.wait(60)

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    try:
        assert ready.wait(60)
        yield process.pid
    finally:
        over.set()
        process.join(60)


def test_a_second_run_is_refused(tiny_config: TinyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before it reads or writes anything; and it takes nothing away from the first."""
    config = tiny_config(kimg=0.008)
    run_dir = tmp_path / "run"
    with another_process(run_dir) as pid:
        (run_dir / "checkpoints").mkdir()
        writing = run_dir / "checkpoints" / f"checkpoint-000000008.pt.{socket.gethostname()}-{pid}.tmp"
        writing.write_bytes(b"half of it")
        before = sorted(run_dir.rglob("*"))
        for resume in ([], ["--resume", "auto"]):
            assert train.main([*flags(config), *resume]) == 2
            captured = capsys.readouterr()
            assert_one_error_line(
                captured.err,
                f"{run_dir} is in use by another run (process {pid} on {socket.gethostname()}, since 20",
                "stop that one or wait for its end, or choose another --run-dir",
            )
            assert [line.partition(" ")[0] for line in captured.out.splitlines()] == ["precision"]
        assert sorted(run_dir.rglob("*")) == before
        assert find_checkpoint("auto", run_dir) is None
        assert read_stats(run_dir / "stats.jsonl") == []
    assert not (run_dir / ".lock").exists()
    assert train.main([*flags(config), "--resume", "auto"]) == 0
    assert not writing.exists()
    assert list_checkpoints(run_dir)


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    """kill -9 leaves the file, which hinders nobody, also where the process has children that live on."""
    run_dir = tmp_path / "run"
    (ready, announce), (over, end) = os.pipe(), os.pipe()

    def hold() -> None:
        os.close(end)
        with locked(run_dir, World()):
            if os.fork():
                signal.pause()
            os.write(announce, b"x")
            os.read(over, 1)  # until the test closes the other end
            os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    assert os.read(ready, 1) == b"x"
    with pytest.raises(UserError, match=f"process {process.pid}"), locked(run_dir, World()):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()  # with a limit it would wait for the child, too
    assert (run_dir / ".lock").exists()
    with locked(run_dir, World()):
        pass
    for file in (end, over, ready, announce):
        os.close(file)


def test_only_what_runs_left_behind_is_removed(tmp_path: Path) -> None:
    left = [
        tmp_path / "checkpoints" / "checkpoint-000000016.pt.host.domain-77.tmp",
        tmp_path / "checkpoints" / "checkpoint-000000016.tmp",  # of the first release
        tmp_path / "samples" / "reals.png.host-77.tmp",
        tmp_path / "stats.jsonl.host-77.tmp",
    ]
    own = [tmp_path / "notes.tmp", tmp_path / "checkpoints" / "mine.pt", tmp_path / "samples" / "x-1.tmp"]
    for path in (*left, *own):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with locked(tmp_path, World()):
        assert [path.exists() for path in left] == [False] * 4
    assert all(path.exists() for path in own)


def test_a_folder_that_nothing_was_written_to_goes(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b", World()):
        assert (tmp_path / "a" / "b" / ".lock").exists()
    assert not (tmp_path / "a").exists()
    with locked(tmp_path / "a" / "b", World()):
        (tmp_path / "a" / "b" / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A warning, and the run goes on; temporary files may then be those of a run that lives."""
    (tmp_path / "stats.jsonl.host-77.tmp").touch()

    def lockf(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with locked(tmp_path, World()):
        pass
    assert f"warning: {tmp_path} has no locks ({os.strerror(number)})" in capsys.readouterr().err
    assert (tmp_path / "stats.jsonl.host-77.tmp").exists()


def test_a_lock_without_a_name(tmp_path: Path) -> None:
    """As on a full disk, or in the moment before its process has written."""
    with another_process(tmp_path):
        (tmp_path / ".lock").write_text("")
        with pytest.raises(UserError, match=r"in use by another run \(another process\)"), locked(tmp_path, World()):
            pass


def test_a_lock_that_is_removed_while_it_is_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that was opened is no longer the folder's: the one that is there now has to be locked."""
    original, calls = fcntl.lockf, []

    def lockf(file: Any, *args: Any) -> None:
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        original(file, *args)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with locked(tmp_path, World()):
        assert len(calls) == 2
        assert os.path.samestat(os.fstat(calls[1].fileno()), (tmp_path / ".lock").stat())


def test_processes_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three, two share a folder that is not rank 0's; each of the other jobs is refused."""
    shared = tmp_path / "shared"
    shared.mkdir()
    file = lock._take(shared, "job")

    def other(job: str, results: Any) -> None:
        try:
            results.put(lock._take(shared, job) is None)
        except UserError:
            results.put("refused")

    results = multiprocessing.get_context("fork").Queue()
    for job, expected in (("job", True), ("another", "refused")):
        process = multiprocessing.get_context("fork").Process(target=other, args=(job, results))
        process.start()
        assert results.get(timeout=HANG) == expected
        process.join(60)
    file.close()


# Folders that cannot be written


def occupied(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file"


def below_a_file(tmp_path: Path) -> Path:
    return occupied(tmp_path) / "runs" / "run"


def no_folder_can_be_made(tmp_path: Path) -> Path:
    return Path("/proc/runs/run")


def too_long(tmp_path: Path) -> Path:
    return tmp_path / ("x" * 300)


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("place", [occupied, below_a_file, too_long])
def test_run_folders_that_cannot_be_written(
    place: Callable[[Path], Path],
    dry: bool,
    tiny_config: TinyConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before the data are read."""
    run_dir = place(tmp_path)
    line = [*flags(tiny_config(run_dir=str(run_dir))), "--data", "no/such/data", *(["--dry-run"] if dry else [])]
    before = sorted(tmp_path.rglob("*"))
    assert train.main(line) == 2
    assert_one_error_line(capsys.readouterr().err, f"{run_dir} cannot be written (", "choose another --run-dir")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", [occupied, below_a_file, too_long, no_folder_can_be_made])
def test_no_lock_where_nothing_can_be_written(place: Callable[[Path], Path], tmp_path: Path) -> None:
    run_dir = place(tmp_path)
    with pytest.raises(UserError, match=r"cannot be written \(.*: choose another --run-dir"), locked(run_dir, World()):
        pass


@pytest.mark.parametrize("name", ["checkpoints", "samples", "tensorboard"])
def test_occupied_folders_of_a_run(
    name: str, tiny_config: TinyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found before the first step, not at the first checkpoint."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).touch()
    assert train.main(flags(tiny_config())) == 2
    assert_one_error_line(
        capsys.readouterr().err, f"{tmp_path / 'run' / name} cannot be written (it, or a folder above"
    )
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_file()] == [name]


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(UserError, match=f"a/b cannot be written .no permission to write in {tmp_path}"):
        require_writable(tmp_path / "a" / "b", dry=True)


# Lines that are added


def test_append_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    append(path, b"first\n")
    original = open

    class Filling:
        """A file of which only four more bytes can be written."""

        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 4

        def __enter__(self) -> Filling:
            return self

        def __exit__(self, *args: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, content: memoryview) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            written, self.room = self.file.write(content[: self.room]), 0
            return written

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", lambda *args, **options: Filling(original(*args, **options)), raising=False)
        with pytest.raises(OSError, match="No space left"):
            append(path, b"second\n")
    assert path.read_bytes() == b"first\n"
    append(path, b"second\n")
    assert path.read_bytes() == b"first\nsecond\n"
