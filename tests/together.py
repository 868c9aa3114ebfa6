"""Processes of one run, forked from the test: what it has imported they need not import again."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch._dynamo  # noqa: F401  optimizers import it at their first step, which takes seconds: here once for all

from checks import HANG
from epigraf_fast.config import Config
from epigraf_fast.tools import train
from epigraf_fast.training.start import checksum

Fault = Callable[[], None]


class Ended(NamedTuple):
    """How one process of a run ended."""

    code: int
    output: str
    errors: str
    state: str  # checksum of networks and optimizers at its end


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def fork(count: int, main: Callable[[int], int | None]) -> list[int]:
    """Runs `main(rank)` in every one of `count` processes, which find each other by the variables of torchrun.

    Returns:
        Their exit codes: what `main` returned (None: 0) or exited with; 1 for an exception, whose traceback is printed.
    """
    place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}

    def process(rank: int) -> None:
        os.environ.update(place, RANK=str(rank))
        code = 1
        try:
            code = main(rank) or 0
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    workers = [multiprocessing.get_context("fork").Process(target=process, args=(rank,)) for rank in range(count)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join(HANG / 2)
        assert all(worker.exitcode is not None for worker in workers), "a process is left waiting"
    finally:
        for worker in workers:
            worker.kill()
    return [worker.exitcode for worker in workers]


def train_together(folder: Path, *lines: list[str], faults: dict[int, Fault] | None = None) -> list[Ended]:
    """`train.py` with each of these command lines, as the processes of one run.

    Args:
        folder: Of theirs alone; gets what they print and their final state.
        faults: By rank, what is done before.
    """
    folder.mkdir()

    def main(rank: int) -> int:
        for name, number in (("output", 1), ("errors", 2)):
            os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        original = train.loop

        def loop(config: Config, dataset: Any, trainer: Any, *rest: Any) -> int:
            code = original(config, dataset, trainer, *rest)
            state = trainer.state_dict()
            names = ("generator", "discriminator", "average", "g_optimizer", "d_optimizer", "cur_nimg", "augment_p")
            (folder / f"state{rank}").write_text(checksum([state[name] for name in names]))
            return code

        train.loop = loop
        (faults or {}).get(rank, lambda: None)()
        return train.main(lines[rank])

    def read(name: str, rank: int) -> str:
        path = folder / f"{name}{rank}"
        return path.read_text() if path.is_file() else ""

    return [
        Ended(code, *(read(name, rank) for name in ("output", "errors", "state")))
        for rank, code in enumerate(fork(len(lines), main))
    ]
