"""One run at a time in a run folder."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import socket
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..atomic import TEMPORARY
from ..errors import UserError
from .distributed import World
from .files import cannot_write
from .progress import say

FILE = ".lock"
ATTEMPTS = 10


@contextlib.contextmanager
def locked(run_dir: Path, world: World) -> Iterator[None]:
    """In this block, and while the process lives, `run_dir` is this run's; all of its processes have to enter.

    They may share the folder, which rank 0 makes, or have folders of their own. Programs that only read are not
    affected. Where the file system knows no locks, a warning says so. What killed processes left half-written is
    removed. At the end the lock's file goes, and a folder made here in which nothing was written.

    Raises:
        UserError: The folder cannot be written, or another run is in it.
    """
    job = world.exchange(uuid.uuid4().hex)[0]
    made = [folder for folder in (run_dir, *run_dir.parents) if not os.path.exists(folder)]
    file = None
    try:
        for rank in range(world.size):  # in turn: whoever is too late finds the name of the job in the file
            with world.together():
                if rank == world.rank and (rank == 0 or run_dir.is_dir()):
                    file = _take(run_dir, job)
        yield
    finally:
        with contextlib.suppress(OSError):
            if file is not None:
                (run_dir / FILE).unlink()
                file.close()
            for folder in made:
                folder.rmdir()


def _take(run_dir: Path, job: str) -> IO[str] | None:
    """The open file that holds the lock; None where another process of this job has it."""
    path = run_dir / FILE
    for attempt in range(ATTEMPTS):
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            # It stays open, for a lock of this kind ends when its process closes the file. Forked processes have none.
            file = open(path, "a+")  # noqa: SIM115
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempt < ATTEMPTS - 1:
                continue  # another run that ends has just removed the folder
            raise cannot_write(run_dir, error) from None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = _holder(file)
            file.close()
            if holder.get("job") == job:
                return None
            who = "process {pid} on {host}, since {since}".format(**holder) if holder else "another process"
            raise UserError(
                f"{run_dir} is in use by another run ({who}): stop that one or wait for its end, or choose another "
                "--run-dir"
            ) from None
        except OSError as error:
            say(
                f"warning: {run_dir} has no locks ({error.strerror}): no other run may write there at the same time",
                sys.stderr,
            )
            return file
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # its former holder has removed it meanwhile
    else:
        raise cannot_write(run_dir, OSError("other runs begin and end there all the time"))
    with contextlib.suppress(OSError):  # on a full disk the lock has no name
        file.truncate(0)
        since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        json.dump({"job": job, "pid": os.getpid(), "host": socket.gethostname(), "since": since}, file)
        file.flush()
        os.fsync(file.fileno())
    for folder in (run_dir, run_dir / "checkpoints", run_dir / "samples"):
        for left in folder.glob("*.tmp"):
            if TEMPORARY.fullmatch(left.name):
                with contextlib.suppress(OSError):
                    left.unlink()
    return file


def _holder(file: IO[str]) -> dict[str, object]:
    """Who holds a lock, if that can be read."""
    try:
        file.seek(0)
        holder = json.load(file)
        return holder if {"job", "pid", "host", "since"} <= holder.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}
