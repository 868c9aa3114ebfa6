"""A file that is written whole or not at all, whoever else writes it."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

# Of `replacing`, with host and process; and what the first release left when it was killed.
TEMPORARY = re.compile(r"(.+\.\S+-\d+|checkpoint-\d{9})\.tmp")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file of this process beside `path`, which takes its place at the end of the block if nothing fails.

    The folder is made if it is not there. Nothing is left of a block that fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def temporary_of(path: Path) -> Path:
    """Beside it, and no other process's: neither of this host nor of another one that shares the disk."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
