"""TensorBoard's file of events, written at once.

The writer that comes with torch has a thread, in which a full disk is a traceback, and for which everything else may
wait for ever.
"""

from __future__ import annotations

import io
import itertools
import os
import socket
import time
from pathlib import Path

import numpy as np

from .files import append

KEPT = 2**24  # bytes of events that wait for room on the disk; beyond it they are left out

_numbers = itertools.count()


class Board:
    """Scalars and pictures for TensorBoard.

    Args:
        folder: Where a new file of events begins.
        first: Image count; what older files hold from there on is not shown any more.
    """

    def __init__(self, folder: Path, first: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self.path = folder / name
        self.pending = b""
        self._add(first, file_version="brain.Event:2")
        self._add(first, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, name: str, value: float, cur_nimg: int) -> None:
        from torch.utils.tensorboard.summary import scalar

        self._add(cur_nimg, summary=scalar(name, value))

    def image(self, name: str, picture: np.ndarray, cur_nimg: int) -> None:
        """A uint8 picture [H, W, 3]."""
        from torch.utils.tensorboard.summary import image

        self._add(cur_nimg, summary=image(name, picture, dataformats="HWC"))

    def flush(self) -> None:
        """Writes what was added since the last time that it could be written. Raises OSError."""
        if not self.pending:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append(self.path, self.pending)
        except OSError:
            if len(self.pending) > KEPT:
                self.pending = b""
            raise
        self.pending = b""

    def _add(self, cur_nimg: int, **content: object) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        buffer = io.BytesIO()
        RecordWriter(buffer).write(Event(wall_time=time.time(), step=cur_nimg, **content).SerializeToString())
        self.pending += buffer.getvalue()
