"""Nodes of a job on this machine: torchrun's agents, forked from the test as their workers are from them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.launcher import api

# What an agent waits for others at most, in seconds; its own defaults are made for machines, not for tests.
WAITS = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=4,is_host={host}"


class Node:
    """An agent with one worker, in a process group of their own, which dies as a machine does: all at once.

    Args:
        folder: Gets what they print.
        port: Of the rendezvous.
        nodes: As torchrun's --nnodes.
        worker: Runs in every worker, which finds the others by the variables of torchrun; returns its exit code.
        host: Whether this agent keeps the rendezvous.
    """

    def __init__(self, folder: Path, port: str, nodes: str, worker: Callable[[], int], *, host: bool) -> None:
        folder.mkdir()
        self.folder = folder
        line = ["--nnodes", nodes, "--nproc_per_node", "1", "--max-restarts", "9", "--rdzv-id", "job"]
        line += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--local-addr", "localhost"]
        line += ["--rdzv-conf", WAITS.format(host=host), "--log-dir", str(folder / "logs")]

        def work() -> None:
            if code := worker():
                sys.exit(code)

        def agent() -> None:
            os.setpgid(0, 0)
            for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
                os.environ.pop(name, None)
            os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # as docs/cluster.md says, and why
            for number, name in ((1, "output"), (2, "errors")):
                os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
            # Every change of the rendezvous looks up its caller, slowly in a stack as deep as a test's: others
            # change it meanwhile, and it is never made.
            dynamic_rendezvous.get_method_name = lambda *args, **kwargs: ""
            config, *_ = run.config_from_args(run.parse_args([*line, "worker"]))
            config.start_method = "fork"
            code = 1
            try:
                api.elastic_launch(config, work)()
                code = 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

        self.process = multiprocessing.get_context("fork").Process(target=agent)
        self.process.start()

    def read(self) -> str:
        paths = [self.folder / name for name in ("output", "errors")]
        return "".join(path.read_text() for path in paths if path.is_file())

    def kill(self) -> None:
        """The whole machine goes, without a word."""
        if self.process.is_alive():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
