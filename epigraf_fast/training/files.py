"""Files of a run: what is added to them, and whether they can be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from ..atomic import temporary_of
from ..errors import UserError


def append(path: Path, content: bytes) -> None:
    """Adds bytes to the end of a file: all of them, or, where the disk is full, none."""
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except BaseException:
            file.truncate(end)
            raise


def require_writable(folder: Path, *, dry: bool = False) -> None:
    """Raises UserError unless files can be made in a folder, which is made if it is not there.

    Args:
        dry: Look only, at the folder or the nearest one above it.
    """
    try:
        if dry:
            there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            if not there.is_dir():
                raise NotADirectoryError
            if not os.access(there, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, f"no permission to write in {there}")
            return
        folder.mkdir(parents=True, exist_ok=True)
        probe = temporary_of(folder / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise cannot_write(folder, error) from None


def cannot_write(folder: Path, error: OSError) -> UserError:
    """What to say of a run's folder that cannot be written."""
    occupied = isinstance(error, FileExistsError | NotADirectoryError)
    reason = "it, or a folder above it, is a file" if occupied else error.strerror or error
    return UserError(f"{folder} cannot be written ({reason}): choose another --run-dir, or make it writable")
