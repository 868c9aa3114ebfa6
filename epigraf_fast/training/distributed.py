"""Several processes that train together: torchrun's environment, averaged gradients, agreement on when to stop."""

from __future__ import annotations

import contextlib
import datetime
import io
import math
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import Config, micro_batch_for, micro_of
from ..errors import Stopped, UserError
from ..progress import waiting
from .watchdog import LIMIT, VARIABLE, Watchdog

# While rank 0 draws pictures or measures FID, the others wait. A dead process is noticed by torchrun, not by this.
TIMEOUT = datetime.timedelta(hours=4)
JOIN = datetime.timedelta(minutes=10)  # that a process waits at the beginning for the others to come

BUCKET = 2**22  # numbers, 16 MiB, of gradients that travel together

FAULT = 1000  # what a process says that has no batch, where others say the number of the signal that stops them, or 0

Content = TypeVar("Content")


class World:
    """The processes of a job; without torchrun, one alone, for which everything here does nothing.

    A process that is gone makes every exchange raise UserError in the others.

    Args:
        rank, size: Of this process.
        local_rank: On its machine, the number of its GPU.
        local_size: Processes on its machine.
        hang: Seconds after which a step that waits for the others ends the process; 0: never.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1, hang: float = LIMIT
    ) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self.watch = Watchdog(rank, hang if size > 1 else 0)
        self.control: dist.ProcessGroup | None = None  # for words between the CPUs, which must not wait for a GPU
        self.data: dist.ProcessGroup | None = None  # for gradients

    @classmethod
    def from_environment(cls) -> World:
        """What torchrun says.

        Raises:
            UserError: It says something else.
        """

        def number(name: str, default: int, least: int, below: float = math.inf) -> int:
            text = os.environ.get(name) or str(default)
            if not (text.isdecimal() and least <= int(text) < below):
                limit = f"at least {least}" if below == math.inf else f"in [{least}, {below})"
                starts = "" if name == VARIABLE else "start the processes by torchrun, or "
                raise UserError(f"{name} must be an integer {limit}, got {text!r}: {starts}unset {name}")
            return int(text)

        size = number("WORLD_SIZE", 1, 1)
        rank, local_rank = number("RANK", 0, 0, size), number("LOCAL_RANK", 0, 0)
        local_size = number("LOCAL_WORLD_SIZE", 1, 1)
        if size > 1:
            if not os.environ.get("MASTER_ADDR"):
                raise UserError(
                    f"WORLD_SIZE is {size}, but MASTER_ADDR is not set, where the processes would meet: start them by "
                    "torchrun, or unset WORLD_SIZE to train with one process"
                )
            number("MASTER_PORT", 0, 1, 65536)
        return cls(rank, size, local_rank, local_size, number(VARIABLE, round(LIMIT), 0))

    def join(self) -> None:
        """Waits for the other processes.

        Raises:
            UserError: They do not come.
        """
        if self.size == 1 or self.control is not None:
            return
        address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        try:
            with waiting(f"rank {self.rank}: waiting for the other {self.size - 1} at {address}"):
                dist.init_process_group("gloo", timeout=JOIN, rank=self.rank, world_size=self.size)
                self.control = dist.new_group(backend="gloo", timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"the {self.size} processes do not meet at {address} ({_reason(error)}): start as many with the same "
                "MASTER_ADDR and MASTER_PORT, which must be free, and see what the others say"
            ) from None

    def connect(self, device: torch.device) -> None:
        """Joins the processes, and prepares for gradients: NCCL between GPUs, gloo between CPUs."""
        self.join()
        if self.size > 1:
            self.data = dist.new_group(backend="nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
            self.control = self.data = None

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block that all processes enter: what fails in it on one ends it on all, where others say whose fault it is.

        Raises:
            UserError: It failed elsewhere.
        """
        if self.size == 1:
            yield
            return
        fault: BaseException | None = None
        try:
            yield
        except BaseException as error:  # an interruption, too, must not leave the others waiting
            if isinstance(error, SystemExit) and not error.code:  # the help was asked for
                raise
            fault = error
        try:
            words = self.exchange(None if fault is None else _reason(fault))
        finally:
            if fault is not None:
                raise fault
        for rank, word in enumerate(words):
            if word is not None:
                raise UserError(f"rank {rank} has stopped: {word}")

    def exchange(self, value: Content) -> list[Content]:
        """The plain values of all processes, in order."""
        if self.size == 1:
            return [value]
        self.join()
        values: list[Any] = [None] * self.size
        with self.noticing():
            dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, content: dict[str, Any]) -> dict[str, Any]:
        """Tensors and plain values of rank 0, for all, on the CPU. The others' `content` is not looked at."""
        if self.size == 1:
            return content
        buffer = io.BytesIO()
        if self.rank == 0:
            torch.save(content, buffer)
        sent = [buffer.getvalue()]
        with self.noticing():
            dist.broadcast_object_list(sent, src=0, group=self.control)
        return torch.load(io.BytesIO(sent[0]), map_location="cpu", weights_only=True)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors of one dtype by their means over the processes, in one all-reduce."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with self.noticing():
            dist.all_reduce(flat, group=self.data)
        flat /= self.size
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view(tensor.shape))

    @contextlib.contextmanager
    def averaged_gradients(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Around the last backward pass: the gradients become their means over the processes.

        They travel in buckets, in an order that all processes share: backwards through the parameters, as they become
        ready, each bucket as soon as it and those before it are complete. A gradient that is missing here counts as
        zero; one that is missing everywhere stays None.
        """
        if self.size == 1:
            yield
            return
        buckets = _Buckets(parameters, self)
        try:
            yield
        finally:
            buckets.detach()
        somewhere = self.agree(*(p.grad is not None for p in parameters))
        buckets.finish(self.size, {id(p) for p, anywhere in zip(parameters, somewhere, strict=True) if anywhere})

    def agree(self, *words: int) -> list[int]:
        """The largest number that a process has to say, of each."""
        if self.size == 1:
            return list(words)
        largest = torch.tensor(words)
        with self.noticing():
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return largest.tolist()

    @contextlib.contextmanager
    def noticing(self) -> Iterator[None]:
        """Around an exchange, which raises some RuntimeError when another process is gone."""
        try:
            with self.watch.waiting():
                yield
        except RuntimeError as error:
            raise UserError(
                f"another process is gone ({_reason(error)}): its own message says why; go on with --resume auto"
            ) from None

    def reseed(self, seed: int, cur_nimg: int) -> None:
        """Gives every process random numbers of its own, after the networks were built from the same ones."""
        if self.size > 1:
            # torch's CPU generator keeps 32 bits of a seed.
            torch.manual_seed(((seed * 1_000_003 + cur_nimg) * 1_000_003 + self.rank + 1) % 2**32)


def _reason(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, KeyboardInterrupt):
        return f"stopped by signal {signal.SIGINT:d}"
    lines = str(error).strip().splitlines()
    if isinstance(error, UserError | Stopped) and lines:
        return lines[0]
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def buckets_of(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """The parameters whose gradients travel together, in the order that they do."""
    buckets: list[list[Tensor]] = []
    size = BUCKET
    for p in reversed(parameters):
        if size >= BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append(p)
        size += p.numel()
    return buckets


class _Buckets:
    """Gradients on their way: sent by hooks during a backward pass, brought home by `finish`."""

    def __init__(self, parameters: Sequence[Tensor], world: World) -> None:
        self.world = world
        self.buckets = buckets_of(parameters)
        self.missing = [len(bucket) for bucket in self.buckets]
        self.sent: list[tuple[Tensor, dist.Work]] = []
        self.hooks = [
            p.register_post_accumulate_grad_hook(lambda _, number=number: self._arrived(number))
            for number, bucket in enumerate(self.buckets)
            for p in bucket
        ]

    def _arrived(self, number: int) -> None:
        self.missing[number] -= 1
        while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
            self._send()

    def _send(self) -> None:
        bucket = self.buckets[len(self.sent)]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
        with self.world.noticing():
            self.sent.append((flat, dist.all_reduce(flat, group=self.world.data, async_op=True)))

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def finish(self, processes: int, wanted: set[int]) -> None:
        """Sends the rest, waits, and writes the means into the gradients of the parameters of these ids."""
        while len(self.sent) < len(self.buckets):
            self._send()
        for bucket, (flat, work) in zip(self.buckets, self.sent, strict=True):
            with self.world.noticing():
                work.wait()
            flat /= processes
            for p, mean in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                if id(p) in wanted:
                    p.grad = mean.view(p.shape)


def check_world(config: Config, world: World) -> None:
    """Raises UserError unless the batch can be shared by the processes."""
    size, group = world.size, config.discriminator.minibatch_std_group

    def fits(images: int, micro: int) -> bool:
        return images % micro == 0 and micro % min(group, micro) == 0

    def shared(batch: int) -> bool:
        """Whether one process could train on so many images, and these processes, too."""
        shares = [batch, batch // size]
        return batch % size == 0 and all(fits(share, micro_of(config, share)) for share in shares)

    if config.batch % size:
        known = 1 if config.micro_batch == "auto" else config.micro_batch or 1
        whole = size * math.lcm(known, group)  # in most settings multiples of this can be shared
        batch = next((batch for batch in range(config.batch, config.batch + whole + 1) if shared(batch)), None)
        advice = f"--batch {batch}" if batch else f"--batch {-(-config.batch // whole) * whole} --micro-batch {group}"
        raise UserError(f"batch must be a multiple of the {size} processes, got {config.batch}: set {advice}")
    if not shared(config.batch):
        share = config.batch // size
        micro = micro_of(config, share)
        raise UserError(
            f"the share of a process, batch / {size} = {share}, must be a multiple of micro_batch = {micro}, and "
            f"that of discriminator.minibatch_std_group = {group}: set --micro-batch "
            f"{micro_batch_for(share, micro, group)}"
        )
